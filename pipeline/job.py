"""An extraction by several processes as one whole: what was asked for, how much of it is done, and the report in the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from cache.disk_store import DiskStore
from cache.open import is_store, open_disk_store, open_files, store_kind
from cache.store import FeatureStore, Shard, StoreError
from pipeline.extraction_report import Clock, ExtractionReport, Work, make_report, worst_outcomes
from pipeline.shares import Share


@dataclass(frozen=True, slots=True)
class Job:
    """What all processes together have to do."""

    store: str
    """Path or address."""
    store_kind: str | None
    video_ids: Sequence[str]
    views: Sequence[int]
    share: Share
    """Of the job in the work of several machines; its `pick` gives the shards of all processes of the job."""

    @property
    def asked(self) -> dict[str, Sequence[int]]:
        """Video id -> the views that are wanted of it."""
        return dict.fromkeys(self.video_ids, self.views)

    def open(self) -> DiskStore | None:
        """The store for reading; None while there is none."""
        if not is_store(open_files(self.store)):
            return None
        return open_disk_store(self.store, store_kind(self.store, self.store_kind))

    def pending(self, store: FeatureStore) -> list[Shard]:
        """Shards of the job that are not committed. One with videos of another manifest is none: its files are not known."""
        names = set(self.video_ids)
        return [
            shard
            for shard in self.share.pick(store.pending())
            if all(
                row.video_id in names
                for row, is_wanted in zip(shard.rows, store.wanted(shard), strict=True)
                if is_wanted
            )
        ]

    def num_rows_pending(self, store: FeatureStore) -> int:
        """Rows of `pending`."""
        return _num_wanted(store, self.pending(store))

    def num_rows_foreign(self, store: FeatureStore) -> int:
        """Rows of the share that are not committed, and wait in shards with videos of another manifest."""
        return _num_wanted(store, self.share.pick(store.pending())) - self.num_rows_pending(store)

    def num_rows_left(self) -> int:
        """Rows of the job that are planned, not committed, and not being made by anyone who is alive."""
        store = self.open()
        if store is None:
            return 0
        with store:
            held = store.holders()
            return _num_wanted(store, [shard for shard in self.pending(store) if shard.index not in held])


def _num_wanted(store: FeatureStore, shards: Sequence[Shard]) -> int:
    return sum(sum(store.wanted(shard)) for shard in shards)


@dataclass(frozen=True, slots=True)
class Start:
    """The store before the job began."""

    num_skipped: int
    """Videos of the job that were stored."""
    num_done: int
    """Rows of the store that were committed."""
    started: float
    """time.monotonic()."""


def note_start(job: Job, retry: bool = False) -> Start:
    """Call it before the first process is started.

    Args:
        retry: rejected videos will be made anew, so they do not count as stored.
    """
    started, store = time.monotonic(), job.open()
    if store is None:
        return Start(0, 0, started)
    with store:
        found = worst_outcomes(store, job.asked).values()
        num_skipped = sum(one is not None and not (retry and one.status == "rejected") for one in found)
        return Start(num_skipped, _num_done(store), started)


def report_job(job: Job, start: Start, reports: Sequence[Mapping[str, Any]]) -> ExtractionReport:
    """Count what the ledger says now, whoever made it.

    Args:
        reports: of the processes that ended well, as JSON objects; only where time went is taken from them.

    Raises:
        StoreError: there is no store.
    """
    store = job.open()
    if store is None:
        raise StoreError(f"the processes ended, but there is no store at {job.store}; run the command again")
    with store:
        outcomes = worst_outcomes(store, job.asked)
        # Processes that died report nothing, and rows that were made anew were done before.
        num_clips = max(_num_done(store) - start.num_done, sum(report["num_clips"] for report in reports))
        row_bytes = sum(prod(array.shape) * int(array.dtype[-2:]) // 8 for array in store.spec.arrays.values())
        num_rows_left, num_rows_elsewhere = job.num_rows_foreign(store), job.num_rows_pending(store)
        holders = Counter(holder.split(", since ")[0] for holder in store.holders().values())

    clock = Clock()
    for report in reports:
        clock.seconds.update({part: report[f"{part}_seconds"] for part in ("decoding", "backbone", "writing")})
    work = Work(
        num_clips=num_clips,
        num_bytes=num_clips * row_bytes,
        num_rows_left=num_rows_left,
        num_rows_elsewhere=num_rows_elsewhere,
        num_restarts=sum(report["num_restarts"] for report in reports),
        holders=holders,
        seconds=time.monotonic() - start.started,
        clock=clock,
    )
    return make_report(outcomes, start.num_skipped, work)


def _num_done(store: DiskStore) -> int:
    counts = store.counts()
    return sum(counts.values()) - counts["pending"]
