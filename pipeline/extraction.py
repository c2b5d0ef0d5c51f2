"""Stage 1: videos -> clips -> backbone -> cubes -> store, shard by shard.

The composition of every forward batch is fixed by the shard, and zeros stand in for rows that have no clip, so the bytes of a
row depend neither on its neighbours' fate nor on where an earlier run was killed.

V videos or rows; F frames, H W pixels; C channels, T time.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version

import av
import numpy as np
import torch
from torch import nn

from cache.cube import ArraySpec, Spec
from cache.store import FeatureStore, RowOutcome, Shard
from configs.schema import RunConfig
from episodes.datasets import Manifest
from extract.build import weights_digest
from extract.decode import VideoError, VideoSource, ViewClips, read_views
from pipeline.model import cube_shape, describe_backbone, forward_in_full_batches


@dataclass(frozen=True, slots=True)
class ExtractionReport:
    """What stage 1 did in this call."""

    num_videos: int
    """Videos asked for."""
    num_skipped: int
    """Of these, stored before this call."""
    num_ok: int
    num_degraded: int
    num_rejected: int
    """Outcomes of all videos asked for, those stored before included."""
    num_pending: int
    """Videos that could not be done now, since their shard also holds videos of another manifest. The four sum to `num_videos`."""
    num_rows_left: int
    """Rows of the store in shards that were left alone for that reason."""
    seconds: float
    """Wall clock of this call."""
    clips_per_second: float
    """Clips done now per second."""
    bound_by: str
    """What took the most of the main thread's time: "decoding", "backbone" or "writing"; "nothing to do" where all was stored."""
    problems: tuple[tuple[str, RowOutcome], ...] = field(default=())
    """(video_id, outcome) of every video asked for that is degraded or rejected."""


def video_sources(manifest: Manifest) -> dict[str, VideoSource]:
    """The files of a manifest in the words of `extract/`, by video id."""
    return {
        video.video_id: VideoSource(video.video_id, manifest.path_of(video), video.start_seconds, video.end_seconds)
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


def extract_videos(
    store: FeatureStore,
    videos: Sequence[VideoSource],
    backbone: nn.Module,
    config: RunConfig,
    device: torch.device,
    views: Sequence[int] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExtractionReport:
    """Fill a store; what is stored already is skipped.

    A shard is done whole or not at all. One that was planned by another call and holds videos that are not among `videos` is
    left pending and counted: its files are not known here, and rejecting them would lose them.

    Args:
        store: opened for writing with the spec of `build_spec`.
        videos: what to extract, in the order of the rows.
        backbone: in evaluation mode on `device`.
        config: sampling, extraction and store tables are used.
        device: where the backbone runs.
        views: which views; None: 0 .. sampling.num_views - 1.
        on_progress: called with (rows done, rows pending at the start).

    Raises:
        VideoTooShortError: with ``short_policy = "fail"``, the first video that is too short; what was committed stays.
        ChangedInput: a video is stored, but from another file or stretch than now.
    """
    started = time.perf_counter()
    wanted_views = list(range(config.sampling.num_views)) if views is None else list(views)
    ids = [video.video_id for video in videos]
    done_before = {
        video_id for video_id in ids if all(store.outcome(video_id, view) is not None for view in wanted_views)
    }
    by_id = {video.video_id: video for video in videos}
    _refuse_changed_inputs(store, videos, wanted_views)
    store.plan(ids, wanted_views)
    pending = store.pending()
    shards = [shard for shard in pending if all(row.video_id in by_id for row in shard.rows)]
    num_rows_left = sum(len(shard.rows) for shard in pending) - sum(len(shard.rows) for shard in shards)
    total = sum(len(shard.rows) for shard in shards)
    clock = {"decoding": 0.0, "backbone": 0.0, "writing": 0.0}
    num_rows = 0
    backbone.eval()
    with _DecodedAhead(shards, by_id, config) as decoded:
        for shard in shards:
            _extract_shard(store, shard, decoded, backbone, config, device, clock)
            num_rows += len(shard.rows)
            on_progress(num_rows, total)
    seconds = time.perf_counter() - started
    outcomes = {video_id: _worst(store, video_id, wanted_views) for video_id in ids}
    return _report(outcomes, len(done_before), num_rows, num_rows_left, seconds, clock)


def _report(
    outcomes: Mapping[str, RowOutcome | None],
    num_skipped: int,
    num_rows: int,
    num_rows_left: int,
    seconds: float,
    clock: Mapping[str, float],
) -> ExtractionReport:
    statuses = Counter("pending" if outcome is None else outcome.status for outcome in outcomes.values())
    return ExtractionReport(
        num_videos=len(outcomes),
        num_skipped=num_skipped,
        num_ok=statuses["ok"],
        num_degraded=statuses["degraded"],
        num_rejected=statuses["rejected"],
        num_pending=statuses["pending"],
        num_rows_left=num_rows_left,
        seconds=seconds,
        clips_per_second=num_rows / seconds if seconds > 0 else 0.0,
        bound_by=max(clock, key=lambda name: clock[name]) if num_rows else "nothing to do",
        problems=tuple((name, found) for name, found in outcomes.items() if found is not None and found.status != "ok"),
    )


class ChangedInput(ValueError):
    """A stored row was made from another file or another stretch of it than the manifest names now."""


def source_text(video: VideoSource) -> str:
    """What tells whether a row was made from this input: the stretch, and the file's size (moving a file changes nothing)."""
    size = video.path.stat().st_size if video.path.is_file() else None
    return f"bytes={size} start={video.start_seconds} end={video.end_seconds}"


def _refuse_changed_inputs(store: FeatureStore, videos: Sequence[VideoSource], views: Sequence[int]) -> None:
    changed = [
        f"{video.video_id} (stored from {outcome.source}, now {source_text(video)})"
        for video in videos
        for outcome in [store.outcome(video.video_id, views[0])]
        if outcome is not None and outcome.status != "rejected" and outcome.source not in (None, source_text(video))
    ]
    if changed:
        raise ChangedInput(
            f"{len(changed)} stored videos were made from other input: {'; '.join(changed[:3])}. "
            "Give a changed video another id, or extract into another store."
        )


def _worst(store: FeatureStore, video_id: str, views: Sequence[int]) -> RowOutcome | None:
    """The worst outcome of a video's views; None while one of them is not extracted."""
    outcomes = [store.outcome(video_id, view) for view in views]
    found = [outcome for outcome in outcomes if outcome is not None]
    if len(found) < len(outcomes):
        return None
    return max(found, key=lambda outcome: ("ok", "degraded", "rejected").index(outcome.status))


def _extract_shard(
    store: FeatureStore,
    shard: Shard,
    decoded: Iterator[tuple[str, dict[int, np.ndarray] | None, RowOutcome]],
    backbone: nn.Module,
    config: RunConfig,
    device: torch.device,
    clock: dict[str, float],
) -> None:
    sampling, batch_size = config.sampling, config.extraction.forward_batch
    arrays = {
        name: np.full((len(shard.rows), *spec.shape), np.nan, dtype=spec.dtype)
        for name, spec in store.spec.arrays.items()
    }
    outcomes: list[RowOutcome] = []
    current: tuple[str, dict[int, np.ndarray] | None, RowOutcome] | None = None
    shape = (batch_size, sampling.num_frames, sampling.crop_size, sampling.crop_size, 3)
    for start in range(0, len(shard.rows), batch_size):
        rows = shard.rows[start : start + batch_size]
        clips = np.zeros(shape, dtype=np.uint8)
        mark = time.perf_counter()
        for offset, row in enumerate(rows):
            if current is None or current[0] != row.video_id:
                current = next(decoded)
            if current[1] is not None:
                clips[offset] = current[1][row.view]
            outcomes.append(current[2])
        clock["decoding"] += time.perf_counter() - mark
        mark = time.perf_counter()
        with torch.no_grad():
            cubes = forward_in_full_batches(
                backbone, torch.from_numpy(clips).to(device), sampling, batch_size, config.extraction.compute_dtype
            )
        for name, values in cubes.items():
            # An overflow to float16 infinity is found, counted and rejected just below.
            with np.errstate(over="ignore"):
                arrays[name][start : start + len(rows)] = values[: len(rows)].cpu().numpy().astype(arrays[name].dtype)
        clock["backbone"] += time.perf_counter() - mark
    mark = time.perf_counter()
    store.commit(shard, *_without_bad_rows(arrays, outcomes))
    clock["writing"] += time.perf_counter() - mark


def _without_bad_rows(
    arrays: dict[str, np.ndarray], outcomes: list[RowOutcome]
) -> tuple[dict[str, np.ndarray], list[RowOutcome]]:
    """Reject rows with values that are not finite (one would poison every episode that draws it); give rejected rows NaN."""
    checked = list(outcomes)
    for index, outcome in enumerate(outcomes):
        if outcome.status != "rejected":
            bad = [name for name, values in arrays.items() if not np.isfinite(values[index]).all()]
            if bad:
                detail = f"{', '.join(bad)}: not all values are finite as {arrays[bad[0]].dtype}; try store.dtype = 'float32'"
                checked[index] = RowOutcome("rejected", "not_finite", detail, outcome.source)
        if checked[index].status == "rejected":
            for values in arrays.values():
                values[index] = np.nan
    return arrays, checked


class _DecodedAhead:
    """Decode the videos of some shards ahead, in order, on a few threads; a context manager around an iterator.

    Gives (video_id, clips by view or None, outcome). At most four videos per thread wait decoded, so memory is bounded.
    """

    def __init__(self, shards: Iterable[Shard], videos: dict[str, VideoSource], config: RunConfig) -> None:
        self._tasks = iter(_tasks(shards))
        self._videos = videos
        self._sampling = config.sampling
        self._pool = ThreadPoolExecutor(config.extraction.decode_threads, thread_name_prefix="decode")
        self._queue: deque[tuple[str, list[int], Future[ViewClips]]] = deque()
        self._ahead = 4 * config.extraction.decode_threads

    def __enter__(self) -> _DecodedAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> _DecodedAhead:
        return self

    def __next__(self) -> tuple[str, dict[int, np.ndarray] | None, RowOutcome]:
        while len(self._queue) < self._ahead:
            task = next(self._tasks, None)
            if task is None:
                break
            video_id, views = task
            self._queue.append(
                (video_id, views, self._pool.submit(read_views, self._videos[video_id], self._sampling, views))
            )
        if not self._queue:
            raise StopIteration
        video_id, views, future = self._queue.popleft()
        source = source_text(self._videos[video_id])
        try:
            result = future.result()
        except VideoError as error:
            return video_id, None, RowOutcome("rejected", error.reason, error.detail, source)
        clips = dict(zip(views, result.clips, strict=True))
        return video_id, clips, RowOutcome(result.status, result.reason, None, source)


def _tasks(shards: Iterable[Shard]) -> Iterator[tuple[str, list[int]]]:
    """The runs of rows of one video within a shard, in order."""
    for shard in shards:
        task: tuple[str, list[int]] | None = None
        for row in shard.rows:
            if task is not None and task[0] == row.video_id:
                task[1].append(row.view)
                continue
            if task is not None:
                yield task
            task = (row.video_id, [row.view])
        if task is not None:
            yield task


def _major(package: str) -> int:
    return int(version(package).split(".")[0])
