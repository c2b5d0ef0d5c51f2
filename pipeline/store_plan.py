"""`mastaf store plan`: bytes, files and hours before anything runs.

Bytes and files are computed: the rows that are to be made are laid out as the store would lay them out. Time, the share of
rejected videos and the effect of compression are measured: a sample of the manifest is extracted for real, into a temporary
store beside the one that is planned.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from pipeline.extraction import build_spec, extract_videos


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
    """Of the sample, after its first batch."""
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
    """Plan the extraction of `videos` into ``store.path``, which need not exist."""
    spec = build_spec(config, backbone, device)
    rows = _missing_rows(config, spec, videos)
    step = max(len(videos) // num_sampled, 1)
    sample = list(videos)[::step][:num_sampled]
    path = str(config.store.path)
    kind = store_kind(path, config.store.kind)
    parent = Path(tempfile.gettempdir()) if "://" in path else _existing_folder(Path(path).absolute().parent)
    folder = Path(tempfile.mkdtemp(prefix=".mastaf-plan-", dir=parent))
    try:
        measured = _measure(folder / "sample", kind, spec, sample, config, backbone, device)
        document = StoreDocument(spec, kind, config.store.shard_rows, config.store.compression, "0" * 16)
        form = FORMATS[kind](document, LocalFiles(folder / "sample"))
        sizes = _sizes(form, document, rows, measured, num_workers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return StorePlan(
        num_videos=len(videos),
        num_rows=len(rows),
        num_shards=-(-len(rows) // config.store.shard_rows),
        num_files=sizes.num_files,
        num_bytes=sizes.num_bytes,
        seconds=measured.start_seconds + len(rows) / measured.clips_per_second / num_workers,
        clips_per_second=measured.clips_per_second,
        num_workers=num_workers,
        bound_by=measured.bound_by,
        num_sampled=len(sample),
        num_sampled_rejected=measured.num_rejected,
    )


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
    clips_per_second: float
    start_seconds: float
    bound_by: str
    num_rejected: int
    share_kept: float
    """Rows that are not rejected, of all."""
    ledger_bytes_per_row: float
    cubes: dict[str, np.ndarray]
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
    marks: list[tuple[float, int]] = []
    with open_disk_store(path, kind, spec, "a", config.extraction.forward_batch) as store:
        started = time.perf_counter()
        with progress("measure") as show:

            def on_progress(done: int, total: int) -> None:
                marks.append((time.perf_counter(), done))
                show(done, total)

            report = extract_videos(store, sample, backbone, config, device, on_progress=on_progress)
        good = [
            key
            for key in store.rows()
            if (found := store.outcome(key.video_id, key.view)) and found.status != "rejected"
        ]
        chosen = good[: config.store.shard_rows]
        ids, views = [key.video_id for key in chosen], [key.view for key in chosen]
        cubes = {name: np.asarray(store.read(ids, views, name)) for name in spec.arrays}
        num_rows = len(store.rows())
    ledger_bytes = sum(file.stat().st_size for file in (path / "ledger").glob("*.jsonl"))
    (first_time, first_done), (last_time, last_done) = marks[0], marks[-1]
    # The first batch waits for decoding processes and warms the backbone up.
    is_long_enough = last_done > first_done
    rate = (last_done - first_done) / (last_time - first_time) if is_long_enough else report.clips_per_second
    return _Measured(
        clips_per_second=rate,
        start_seconds=max(first_time - started - first_done / rate, 0.0),
        bound_by=report.bound_by,
        num_rejected=report.num_rejected,
        share_kept=len(good) / num_rows,
        ledger_bytes_per_row=ledger_bytes / num_rows,
        cubes=cubes,
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    num_bytes: int
    num_files: int


def _sizes(
    form: Format, document: StoreDocument, rows: Sequence[RowKey], measured: _Measured, num_workers: int
) -> _Sizes:
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
    return _Sizes(int(data + sum(derived) + documents + ledger), num_files)


def _shard_bytes(form: Format, document: StoreDocument, measured: _Measured, num_rows: int) -> int:
    blocks = {}
    for name, array in document.spec.arrays.items():
        block = np.full((document.shard_rows, *array.shape), np.nan, dtype=array.dtype)
        cubes = measured.cubes[name]
        for row in range(num_rows):
            block[row] = cubes[row % len(cubes)] if len(cubes) else 0
        blocks[name] = block
    return sum(len(data) for data in form.encode(0, blocks).values() if data is not None)


def say_plan(plan: StorePlan, path: str) -> dict[str, Any]:
    """The plan in words; as a JSON-able dict."""
    say(
        f"{path}: {plan.num_rows} rows of {plan.num_videos} videos in {plan.num_shards} shards: "
        f"{plan.num_bytes:,} bytes ({plan.num_bytes / 1e9:.2f} GB) in {plan.num_files} files"
    )
    say(
        f"about {plan.seconds / 3600:.2f} h ({plan.seconds:.0f} s) with {plan.num_workers} processes at "
        f"{plan.clips_per_second:.2f} clips/s each, bound by {plan.bound_by}; measured on {plan.num_sampled} videos"
        + (f", {plan.num_sampled_rejected} of them rejected" if plan.num_sampled_rejected else "")
    )
    return {"store": path, **asdict(plan)}
