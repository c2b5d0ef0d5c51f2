"""Whether a run's inputs are all there, asked before any work; end to end, whether its videos decode."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

from pipeline.checkpoint import write_file
from pipeline.classify import clip_sampler
from pipeline.console import progress_lines, say, shortened
from pipeline.live_clips import LiveClips, SourceError
from pipeline.training_job import TrainingJob


def check_sources(job: TrainingJob) -> None:
    """Refuse, before any work, what an episode would stumble over.

    Raises:
        SourceError: inputs are missing, or videos cannot be decoded (these are in bad_videos.json).
        Stopped: a signal came while videos were tried.
    """
    config, manifest, source = job.place.config, job.place.manifest, job.place.source
    train_ids = [video.video_id for video in manifest.videos_of("train")]
    source.check(train_ids, range(config.episodes.train_views))
    scored_ids = [video_id for sampler in (job.validation, job.test) if sampler for video_id in sampler.video_ids]
    if config.training.mode == "classify":
        scored_ids += clip_sampler(config, manifest).held_out_ids
    if scored_ids:
        source.check(scored_ids, [0])
    if isinstance(source, LiveClips):
        _try_videos(job, source, train_ids, scored_ids)


def write_bad_videos(job: TrainingJob) -> None:
    """List every video that could not be decoded, and why; the rank that met them may be any, so each writes what it knows."""
    source = job.place.source
    if isinstance(source, LiveClips) and source.failed:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_file(job.folder / "bad_videos.json", (json.dumps(source.failed, indent=2) + "\n").encode())


def _try_videos(job: TrainingJob, source: LiveClips, train_ids: Sequence[str], scored_ids: Sequence[str]) -> None:
    """A file that does not decode should show now, not in the middle of the night."""
    wants_all = job.training.check_videos
    tries_all = job.progress.episode == 0 if wants_all is None else wants_all
    needed = list(dict.fromkeys([*(train_ids if tries_all else ()), *scored_ids]))
    test_ids = [video.video_id for video in job.place.manifest.videos_of("test")] if tries_all else []
    unused = [video_id for video_id in test_ids if video_id not in set(scored_ids)]
    report = progress_lines("try the videos")

    def look(done: int, total: int) -> None:
        job.leave_before_training(done, total)
        if done < total:
            report(done, total)

    with suppress(SourceError):  # here from this rank's share alone
        source.try_all(job.ranks.slice_of([*needed, *unused]), look)
    for failed in job.ranks.gather(source.failed):
        source.failed |= cast(dict[str, str], failed)
    _warn_of_test_videos(source, unused)
    write_bad_videos(job)
    source.refuse_failed(needed)


def _warn_of_test_videos(source: LiveClips, video_ids: Sequence[str]) -> None:
    """Training never reads them, so it need not wait for their repair; nor are they the run's to report."""
    bad = []
    for video_id in video_ids:
        source.degraded.pop(video_id, None)
        reason = source.failed.pop(video_id, None)
        bad += [] if reason is None else [f"{video_id} ({reason})"]
    if bad:
        say(
            f"warning: {len(bad)} videos of the test split cannot be decoded: {shortened(bad)}. Training does not need them, but "
            "`mastaf evaluate` will: repair them meanwhile, or begin with a manifest without them."
        )
