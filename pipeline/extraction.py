"""Stage 1: videos -> clips -> backbone -> cubes -> store, shard by shard.

Three things go on at the same time: `extraction_feed` claims shards and decodes, this thread runs the backbone
(`extraction_batches`), and `extraction_writer` commits. What waits between them is bounded.

V videos or rows; F frames, H W pixels; C channels, T time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import av
import torch
from torch import nn

from cache.cube import ArraySpec, Spec
from cache.store import FeatureStore, Shard
from configs.schema import RunConfig
from episodes.datasets import Manifest
from extract.build import weights_digest
from extract.decode import VideoSource
from pipeline.extraction_batches import ShardEmbedder
from pipeline.extraction_feed import ShardFeed, is_other_input, source_text
from pipeline.extraction_report import Clock, ExtractionReport, Work, make_report, worst_outcomes
from pipeline.extraction_writer import ShardWriter
from pipeline.interrupts import PromptStop, Stopped
from pipeline.model import cube_shape, describe_backbone, forward_in_full_batches
from pipeline.shares import Share

__all__ = ["ChangedInput", "ExtractionReport", "build_spec", "extract_videos", "plan_videos", "video_sources"]


def video_sources(manifest: Manifest, allow_outside: bool = False) -> dict[str, VideoSource]:
    """The files of a manifest in the words of `extract/`, by video id.

    Args:
        allow_outside: whether links in a folder of pictures may lead out of the manifest's root.
    """
    root = None if allow_outside else manifest.root
    return {
        video.video_id: VideoSource(
            video.video_id, manifest.path_of(video), video.start_seconds, video.end_seconds, root
        )
        for video in manifest.videos
    }


def build_spec(config: RunConfig, backbone: nn.Module, device: torch.device) -> Spec:
    """Everything that decides the numbers of a store filled with this config and backbone.

    The cubes' shapes are found by one forward pass of a black clip.
    """
    sampling = config.sampling
    clip = torch.zeros(
        (1, sampling.num_frames, sampling.crop_size, sampling.crop_size, 3), dtype=torch.uint8, device=device
    )
    with torch.no_grad():
        cubes = forward_in_full_batches(backbone, clip, sampling, 1)
    dtype = config.store.dtype
    return Spec(
        decoder={
            "name": "pyav",
            "av": _major("av"),
            "avcodec": av.library_versions["libavcodec"][0],
            "pillow": _major("pillow"),
        },
        sampling=sampling.model_dump(mode="json", exclude={"num_views"}),
        backbone={"name": config.backbone.name, **describe_backbone(backbone)},
        weights_digest=weights_digest(backbone),
        compute={"dtype": config.extraction.compute_dtype, "forward_batch": config.extraction.forward_batch},
        arrays={
            name: ArraySpec(layer="last", pooling="none", dtype=dtype, quantiser=None, shape=cube_shape(cube))
            for name, cube in cubes.items()
        },
    )


class ChangedInput(ValueError):
    """A stored row was made from another file or another stretch of it than the manifest names now."""


def plan_videos(store: FeatureStore, videos: Sequence[VideoSource], views: Sequence[int], retry: bool = False) -> None:
    """Plan what is not in the store yet; with `retry`, also plan the rejected rows of these videos anew.

    Raises:
        ChangedInput: a video is stored, but from another file or stretch than now. Rejected rows may come from a mended file.
    """
    _refuse_changed_inputs(store, videos, views)
    store.plan([video.video_id for video in videos], views)
    if retry:
        found = store.outcomes({video.video_id for video in videos})
        store.replan(
            [
                row
                for row, outcome in found
                if row.view in views and outcome is not None and outcome.status == "rejected"
            ]
        )


def _refuse_changed_inputs(store: FeatureStore, videos: Sequence[VideoSource], views: Sequence[int]) -> None:
    by_id = {video.video_id: video for video in videos}
    changed = []
    for row, outcome in store.outcomes(by_id):
        if row.view == views[0] and outcome is not None and outcome.status != "rejected" and outcome.source is not None:
            now = source_text(by_id[row.video_id])
            if is_other_input(outcome.source, now):
                changed.append(f"{row.video_id} (stored from {outcome.source}, now {now})")
    if changed:
        raise ChangedInput(
            f"{len(changed)} stored videos were made from other input: {'; '.join(changed[:3])}. "
            "Give a changed video another id, or extract into another store."
        )


def extract_videos(
    store: FeatureStore,
    videos: Sequence[VideoSource],
    backbone: nn.Module,
    config: RunConfig,
    device: torch.device,
    views: Sequence[int] | None = None,
    share: Share | None = None,
    retry: bool = False,
    only_pending: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExtractionReport:
    """Fill a store; what is stored already is skipped.

    A shard is done whole or not at all. One that was planned by another call and holds videos that are not among `videos` is
    left pending and counted: its files are not known here, and rejecting them would lose them. So is one that another process
    is making.

    Args:
        store: opened for writing with the spec of `build_spec`.
        videos: what to extract, in the order of the rows.
        backbone: in evaluation mode on `device`.
        config: sampling and extraction tables are used.
        device: where the backbone runs.
        views: which views; None: 0 .. sampling.num_views - 1.
        share: which shards are this process's work; None: all.
        retry: make the rejected rows of these videos anew.
        only_pending: plan nothing, and finish what was planned of these videos, in all its views.
        on_progress: called with (rows embedded, rows to do) in this thread.

    Raises:
        VideoTooShortError: with ``short_policy = "fail"``, the first video that is too short; what was committed stays.
        ChangedInput: a video is stored, but from another file or stretch than now.
        StoreError: a shard could not be written; those before it stay.
        Stopped: SIGINT, SIGTERM or SIGUSR1 came; what was committed stays. Only in the main thread.
    """
    started = time.perf_counter()
    by_id = {video.video_id: video for video in videos}
    if only_pending:
        asked = _planned_views(store, by_id)
    else:
        wanted_views = list(range(config.sampling.num_views)) if views is None else list(views)
        plan_videos(store, videos, wanted_views, retry)
        asked = dict.fromkeys(by_id, wanted_views)
    pending = store.pending()
    outcomes = worst_outcomes(store, asked)
    num_skipped = sum(outcome is not None for outcome in outcomes.values())
    known = [shard for shard in pending if _is_known(store, shard, by_id)]
    own = share.pick(known) if share is not None else known
    work = _Extraction(store, own, by_id, backbone, config, device, on_progress)
    work.run()
    num_wanted = {shard.index: sum(store.wanted(shard)) for shard in pending}
    known_rows = {shard.index: num_wanted[shard.index] for shard in known}
    unfinished = {shard.index for shard in store.pending()}
    return make_report(
        # A pass over a million rows takes seconds, so it is not made twice for nothing.
        worst_outcomes(store, asked) if pending else outcomes,
        num_skipped,
        Work(
            num_clips=work.writer.num_rows,
            num_bytes=work.writer.num_bytes,
            num_rows_left=sum(num_wanted.values()) - sum(known_rows.values()),
            num_rows_elsewhere=sum(rows for index, rows in known_rows.items() if index in unfinished),
            num_restarts=work.feed.num_restarts,
            holders=work.feed.holders,
            seconds=time.perf_counter() - started,
            clock=work.clock,
        ),
    )


def _planned_views(store: FeatureStore, videos: Mapping[str, VideoSource]) -> dict[str, list[int]]:
    planned: dict[str, list[int]] = {}
    for row in store.rows():
        if row.video_id in videos:
            planned.setdefault(row.video_id, []).append(row.view)
    return planned


def _is_known(store: FeatureStore, shard: Shard, videos: Mapping[str, VideoSource]) -> bool:
    return all(row.video_id in videos for row, wanted in zip(shard.rows, store.wanted(shard), strict=True) if wanted)


class _StopAsked(Exception):
    """Leads out of the work after a signal."""


class _Extraction:
    """The work on some shards."""

    def __init__(
        self,
        store: FeatureStore,
        shards: Sequence[Shard],
        videos: Mapping[str, VideoSource],
        backbone: nn.Module,
        config: RunConfig,
        device: torch.device,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.feed = ShardFeed(store, shards, videos, config.sampling, config.extraction)
        self.writer = ShardWriter(store, on_commit=self.feed.committed)
        self.clock = Clock()
        self._embedder = ShardEmbedder(store.spec, backbone.eval(), config, device)
        self._num_rows = sum(len(shard.rows) for shard in shards)
        self._num_shards = len(shards)
        self._on_progress = on_progress
        self._stop = PromptStop(self._last_words)

    def run(self) -> None:
        """Do it; raises what `extract_videos` raises."""
        if not self._num_shards:
            return
        is_stopped = False
        with self._stop:
            try:
                with self.feed, self.writer:
                    self._pass_all_rows()
            except _StopAsked:
                is_stopped = True
        if is_stopped:
            assert self._stop.signal_number is not None
            raise Stopped(self._stop.signal_number, self._saved())

    def _pass_all_rows(self) -> None:
        num_passed = 0
        while True:
            with self.clock.counts("decoding"):
                rows = self.feed.next_rows(self._check)
            if rows is None:
                break
            for row in rows:
                self._check()
                with self.clock.counts("backbone"):
                    finished = self._embedder.add(row)
                if finished is not None:
                    with self.clock.counts("writing"):
                        self.writer.submit(finished, self._check)
            num_passed += len(rows)
            self._on_progress(num_passed, self._num_rows - self.feed.num_rows_passed_over)
        with self.clock.counts("writing"):
            self.writer.finish(self._check)

    def _check(self) -> None:
        if self._stop.signal_number is not None:
            raise _StopAsked
        if self.writer.error is not None:
            raise self.writer.error

    def _last_words(self) -> str:
        """Called when the work does not end: a lock may never be free again, so that giving back may fail."""
        giving = threading.Thread(target=self.feed.give_back, daemon=True)
        giving.start()
        giving.join(timeout=1.0)
        return self._saved()

    def _saved(self) -> str:
        error = self.writer.error
        failed = f"; the last commit failed: {error}" if error is not None else ""
        return (
            f"{self.writer.num_rows} of {self._num_rows} clips ({self.writer.num_shards} of {self._num_shards} shards) "
            f"were committed; run the same command again to go on{failed}"
        )


def _major(package: str) -> int:
    return int(version(package).split(".")[0])
