"""`mastaf store plan`: bytes, files and hours before anything runs.

Bytes and files are computed: the rows that are to be made are laid out as the store would lay them out. Time, the share of
rejected videos and the effect of compression are measured: a sample of the manifest is extracted for real, into a temporary
store beside the one that is planned.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cache.cube import Spec
from cache.document import StoreDocument, seal, segment_to_json
from cache.files import LocalFiles
from cache.format import Format
from cache.open import FORMATS, is_store, open_disk_store, open_files, store_kind
from cache.row_table import RowTable
from cache.rows import RowKey, Segment
from configs.schema import RunConfig
from extract.decode import VideoSource
from pipeline.console import progress, say
from pipeline.extract_command import extract_config, wanted_videos
from pipeline.extraction import build_spec, extract_videos
from pipeline.reextraction import build_extraction_backbone, make_origin
from pipeline.settings import SetupError
from pipeline.setup import choose_device

# Shorter measurements say more about what else the machine does.
_MIN_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class StorePlan:
    """What filling a store will take."""

    num_videos: int
    num_rows: int
    """Rows to be made; those that the store holds already do not count."""
    num_shards: int
    num_files: int
    """Files of the finished store, without what is there already."""
    num_bytes: int
    seconds: float
    """With `num_workers` processes like the one that was measured."""
    clips_per_second: float
    """Of one process, without what every run takes once."""
    num_workers: int
    bound_by: str
    num_sampled: int
    """Videos that were extracted to measure."""
    num_sampled_rejected: int


def plan_extraction(
    config: RunConfig,
    videos: Sequence[VideoSource],
    backbone: nn.Module,
    device: torch.device,
    num_sampled: int = 64,
    num_workers: int = 1,
) -> StorePlan:
    """Plan the extraction of `videos` into ``store.path``, which need not exist.

    Raises:
        SetupError: too few videos to measure with.
        SpecMismatch: there is a store of another spec.
    """
    spec = build_spec(config, backbone, device)
    rows = _missing_rows(config, spec, videos)
    if not videos:
        raise SetupError("the manifest names no video; there is nothing to plan")
    path = str(config.store.path)
    kind = store_kind(path, config.store.kind)
    # Beside the planned store, so that the same disk is measured.
    parent = Path(tempfile.gettempdir()) if "://" in path else _existing_folder(Path(path).absolute().parent)
    folder = Path(tempfile.mkdtemp(prefix=".mastaf-plan-", dir=parent))
    try:
        samples = [_first_sample(config, videos, num_sampled)]
        measured = [_measure(folder / f"first.{kind}", kind, spec, samples[0], config, backbone, device)]
        if len(samples[0]) < len(videos):
            samples.append(_second_sample(config, videos, samples[0], num_sampled, measured[0].seconds))
            measured.append(_measure(folder / f"second.{kind}", kind, spec, samples[1], config, backbone, device))
        document = StoreDocument(
            spec, kind, config.store.shard_rows, config.store.compression, "0" * 16, make_origin(config, None)
        )
        form = FORMATS[kind](document, LocalFiles(folder))
        num_files, num_bytes = _sizes(form, document, rows, measured[-1], num_workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    speed = _speed([_Point(found.seconds, num_batches(config, found.num_rows)) for found in measured])
    seconds = speed.once + num_batches(config, len(rows)) * speed.seconds_per_batch / num_workers
    return StorePlan(
        num_videos=len(videos),
        num_rows=len(rows),
        num_shards=-(-len(rows) // config.store.shard_rows),
        num_files=num_files,
        num_bytes=num_bytes,
        seconds=seconds,
        clips_per_second=config.extraction.forward_batch / speed.seconds_per_batch,
        num_workers=num_workers,
        bound_by=measured[-1].bound_by,
        num_sampled=sum(map(len, samples)),
        num_sampled_rejected=sum(found.num_rejected for found in measured),
    )


def num_batches(config: RunConfig, num_rows: int) -> int:
    """Forward passes that rows in shards take. Each is full, so that time goes in steps."""
    rows, batch = config.store.shard_rows, config.extraction.forward_batch
    num_full, rest = divmod(num_rows, rows)
    return num_full * -(-rows // batch) + -(-rest // batch)


def _first_sample(config: RunConfig, videos: Sequence[VideoSource], num_sampled: int) -> list[VideoSource]:
    """One batch of evenly spread videos; all of them where there are hardly more than are to be measured."""
    batch = _videos_of_a_batch(config)
    return list(videos) if max(num_sampled, 4 * batch) >= len(videos) else _spread(videos, batch)


def _second_sample(
    config: RunConfig, videos: Sequence[VideoSource], first: list[VideoSource], num_sampled: int, first_seconds: float
) -> list[VideoSource]:
    """Whole batches of evenly spread other videos: three or more, and enough for some seconds of work, but at most half of all."""
    batch = _videos_of_a_batch(config)
    names = {video.video_id for video in first}
    others = [video for video in videos if video.video_id not in names]
    in_time = min(_MIN_SECONDS / first_seconds * len(first), len(videos) / 2)
    num_chosen = max(int(max(in_time, num_sampled - len(first))) // batch, 3) * batch
    return _spread(others, min(num_chosen, len(others)))


def _spread(videos: Sequence[VideoSource], num_chosen: int) -> list[VideoSource]:
    return [videos[index * len(videos) // num_chosen] for index in range(num_chosen)]


def _videos_of_a_batch(config: RunConfig) -> int:
    return -(-config.extraction.forward_batch // config.sampling.num_views)


@dataclass(frozen=True, slots=True)
class _Point:
    seconds: float
    num_batches: int


@dataclass(frozen=True, slots=True)
class _Speed:
    once: float
    """Seconds that every run takes once, such as starting decoding processes."""
    seconds_per_batch: float


def _speed(points: list[_Point]) -> _Speed:
    """From two samples of different size, or one."""
    large = points[-1]
    if len(points) == 2:
        slope = (large.seconds - points[0].seconds) / (large.num_batches - points[0].num_batches)
        once = points[0].seconds - points[0].num_batches * slope
        # Else other work on the machine had more to say than the samples.
        if slope > 0 and once >= 0:
            return _Speed(once, slope)
    return _Speed(0.0, large.seconds / large.num_batches)


def _existing_folder(folder: Path) -> Path:
    return folder if folder.is_dir() else _existing_folder(folder.parent)


def _missing_rows(config: RunConfig, spec: Spec, videos: Sequence[VideoSource]) -> list[RowKey]:
    wanted = [RowKey(video.video_id, view) for video in videos for view in range(config.sampling.num_views)]
    path = str(config.store.path)
    if not is_store(open_files(path)):
        return wanted
    with open_disk_store(path, store_kind(path, config.store.kind), spec) as store:
        return [key for key in wanted if store.outcome(key.video_id, key.view) is None]


@dataclass(frozen=True, slots=True)
class _Measured:
    num_rows: int
    seconds: float
    bound_by: str
    num_rejected: int
    share_kept: float
    """Rows that are not rejected, of all."""
    ledger_bytes_per_row: float
    cubes: dict[str, NDArray[Any]]
    """Array -> (n, C, T, H, W), rows that were extracted."""


def _measure(
    path: Path,
    kind: str,
    spec: Spec,
    sample: list[VideoSource],
    config: RunConfig,
    backbone: nn.Module,
    device: torch.device,
) -> _Measured:
    with open_disk_store(path, kind, spec, "a", config.store.shard_rows, config.store.compression) as store:
        with progress("measure") as on_progress:
            report = extract_videos(store, sample, backbone, config, device, on_progress=on_progress)
        outcomes = {key: store.outcome(key.video_id, key.view) for key in store.rows()}
        kept = [key for key, outcome in outcomes.items() if outcome is not None and outcome.status != "rejected"]
        chosen = kept[: config.store.shard_rows]
        ids, views = [key.video_id for key in chosen], [key.view for key in chosen]
        cubes = {name: store.read(ids, views, name) for name in spec.arrays}
    ledger_bytes = sum(file.stat().st_size for file in (path / "ledger").glob("*.jsonl"))
    return _Measured(
        num_rows=len(outcomes),
        seconds=report.seconds,
        bound_by=report.bound_by,
        num_rejected=report.num_rejected,
        share_kept=len(kept) / len(outcomes),
        ledger_bytes_per_row=ledger_bytes / len(outcomes),
        cubes=cubes,
    )


def _sizes(
    form: Format, document: StoreDocument, rows: Sequence[RowKey], measured: _Measured, num_workers: int
) -> tuple[int, int]:
    """(files, bytes) of the finished store."""
    table = RowTable(document.shard_rows)
    segment = Segment(rows=tuple(rows))
    table.add_segment(segment)
    derived = [len(data) for _, data in form.derived(table)]
    documents = 2 * len(seal(document.to_json())) + 2 * len(seal(segment_to_json(segment, document.store_id)))
    full, one = _shard_bytes(form, document, measured, document.shard_rows), _shard_bytes(form, document, measured, 1)
    per_row = (full - one) / max(document.shard_rows - 1, 1)
    data = table.num_shards * (one - per_row) + len(rows) * measured.share_kept * per_row
    ledger = len(rows) * measured.ledger_bytes_per_row
    # Spec and plan twice each, the lock, and a log for each process.
    num_files = table.num_shards * len(form.file_names(0)) + len(derived) + 4 + 1 + num_workers
    return num_files, int(data + sum(derived) + documents + ledger)


def _shard_bytes(form: Format, document: StoreDocument, measured: _Measured, num_rows: int) -> int:
    blocks = {}
    for name, array in document.spec.arrays.items():
        block = np.full((document.shard_rows, *array.shape), np.nan, dtype=array.dtype)
        cubes = measured.cubes[name]
        for row in range(num_rows):
            block[row] = cubes[row % len(cubes)] if len(cubes) else 0
        blocks[name] = block
    return sum(len(data) for data in form.encode(0, blocks).values() if data is not None)


def plan_store(
    path: str,
    manifest: Path | None,
    backbone: str | None,
    weights: str | None,
    recipe: str | None,
    from_run: Path | None,
    device: str,
    num_sampled: int,
    num_processes: int,
    overrides: tuple[str, ...],
) -> dict[str, Any]:
    """`mastaf store plan`: say what `mastaf extract` with the same options would take; as a JSON-able dict."""
    config = extract_config(manifest, backbone, weights, path, None, recipe, from_run, overrides)
    chosen = choose_device(device)
    built = build_extraction_backbone(config, from_run if weights is None else None).to(chosen)
    plan = plan_extraction(config, wanted_videos(config), built, chosen, num_sampled, num_processes)
    say(
        f"{path}: {plan.num_rows} rows of {plan.num_videos} videos in {plan.num_shards} shards: "
        f"{plan.num_bytes:,} bytes ({plan.num_bytes / 1e9:.2f} GB) in {plan.num_files} files"
    )
    say(
        f"about {plan.seconds / 3600:.2f} h ({plan.seconds:.0f} s) with {plan.num_workers} process(es), each alone on a machine "
        f"or GPU like this one: {plan.clips_per_second:.2f} clips/s, bound by {plan.bound_by}; measured on {plan.num_sampled} videos"
        + (f", {plan.num_sampled_rejected} of them rejected" if plan.num_sampled_rejected else "")
    )
    return {"store": path, **asdict(plan)}
