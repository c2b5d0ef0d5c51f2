"""What stage 1 did, counted so that every input is accounted for, and how a person is told."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cache.store import FeatureStore, RowOutcome
from pipeline.console import say

_BEST_FIRST = ("ok", "degraded", "rejected")
_OK = RowOutcome("ok")
SHOWN_PROBLEMS = 100
"""Videos that are not ok and are named at the end; the others are counted."""


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
    """Videos that could not be done now, since their shard also holds videos of another manifest, is made by another process, or
    is another share's. The four sum to `num_videos`."""
    num_rows_left: int
    """Rows of the store in shards that were left alone since they hold videos of another manifest."""
    seconds: float
    """Wall clock of this call."""
    clips_per_second: float
    """Clips done now per second."""
    bound_by: str
    """What the main thread spent the most time on: "decoding" (waiting for clips), "backbone" (running it), "writing" (waiting
    for commits), each beyond what ran at the same time; "nothing to do" where all was stored."""
    problems: tuple[tuple[str, RowOutcome], ...] = field(default=())
    """(video_id, outcome) of every video asked for that is degraded or rejected."""
    decoding_seconds: float = 0.0
    backbone_seconds: float = 0.0
    writing_seconds: float = 0.0
    """Of the main thread, as in `bound_by`; they sum to nearly `seconds`."""
    num_restarts: int = 0
    """Decoding processes that died or were too late, and were replaced."""
    num_clips: int = 0
    """Rows committed now, rejected ones included."""
    bytes_written: int = 0
    """Cubes committed now, before compression."""
    num_rows_elsewhere: int = 0
    """Pending rows of the store that are another share's work, or were being made by another process."""
    holders: tuple[tuple[str, int], ...] = ()
    """(process, shards that it was making when it was their turn here)."""


class Clock:
    """Where the main thread's time goes."""

    def __init__(self) -> None:
        # A Counter, so that the clocks of several processes add up.
        self.seconds: Counter[str] = Counter(decoding=0, backbone=0, writing=0)

    @contextmanager
    def counts(self, name: str) -> Iterator[None]:
        """Add the time spent in the block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds.update({name: time.perf_counter() - begin})


@dataclass(frozen=True, slots=True)
class Work:
    """What one call has done."""

    num_clips: int
    num_bytes: int
    num_rows_left: int
    num_rows_elsewhere: int
    num_restarts: int
    holders: Mapping[str, int]
    seconds: float
    clock: Clock


def worst_outcomes(store: FeatureStore, asked: Mapping[str, Sequence[int]]) -> dict[str, RowOutcome | None]:
    """The worst outcome of each video's views; None while one of them is not extracted. One pass, in the store's order."""
    worst: dict[str, RowOutcome | None] = dict.fromkeys(asked, _OK)
    num_found: Counter[str] = Counter()
    for key, outcome in store.outcomes(asked):
        if key.view not in asked[key.video_id]:
            continue
        num_found[key.video_id] += outcome is not None
        known = worst[key.video_id]
        # One object for all that are well: a million outcomes with their sources would take half a gigabyte.
        if outcome is not None and known is not None and _badness(outcome) > _badness(known):
            worst[key.video_id] = outcome
    for video_id, views in asked.items():
        if num_found[video_id] < len(views):
            worst[video_id] = None
    return worst


def _badness(outcome: RowOutcome) -> int:
    return _BEST_FIRST.index(outcome.status)


def make_report(outcomes: Mapping[str, RowOutcome | None], num_skipped: int, work: Work) -> ExtractionReport:
    """Count."""
    clock = work.clock.seconds
    statuses = Counter("pending" if outcome is None else outcome.status for outcome in outcomes.values())
    return ExtractionReport(
        num_videos=len(outcomes),
        num_skipped=num_skipped,
        num_ok=statuses["ok"],
        num_degraded=statuses["degraded"],
        num_rejected=statuses["rejected"],
        num_pending=statuses["pending"],
        num_rows_left=work.num_rows_left,
        seconds=work.seconds,
        clips_per_second=work.num_clips / work.seconds if work.seconds > 0 else 0.0,
        bound_by=max(clock, key=lambda name: clock[name]) if work.num_clips else "nothing to do",
        problems=tuple((name, found) for name, found in outcomes.items() if found is not None and found.status != "ok"),
        decoding_seconds=clock["decoding"],
        backbone_seconds=clock["backbone"],
        writing_seconds=clock["writing"],
        num_restarts=work.num_restarts,
        num_clips=work.num_clips,
        bytes_written=work.num_bytes,
        num_rows_elsewhere=work.num_rows_elsewhere,
        holders=tuple(sorted(work.holders.items())),
    )


def report_json(report: ExtractionReport, with_problems: bool = True) -> dict[str, Any]:
    """A report as a JSON-able dict.

    Args:
        with_problems: also each video that is not ok, under `problems`; a million of them are a large text.
    """
    holders = [{"process": process, "num_shards": count} for process, count in report.holders]
    facts = {**asdict(replace(report, problems=(), holders=())), "holders": holders}
    del facts["problems"]
    if with_problems:
        facts["problems"] = [
            {"video_id": video_id, "status": outcome.status, "reason": outcome.reason, "detail": outcome.detail}
            for video_id, outcome in report.problems
        ]
    return facts


def say_report(report: ExtractionReport, store: str) -> None:
    """The report for a person: what is not ok, what was left alone and why, and one line that sums up."""
    for video_id, outcome in report.problems[:SHOWN_PROBLEMS]:
        say(f"{outcome.status}: {video_id}: {outcome.reason}" + (f" ({outcome.detail})" if outcome.detail else ""))
    if len(report.problems) > SHOWN_PROBLEMS:
        say(f"... and {len(report.problems) - SHOWN_PROBLEMS} more that are not ok: mastaf store failures {store}")
    if report.num_rows_left:
        say(
            f"warning: {report.num_rows_left} planned rows were left alone, since their shards hold videos that are not in this manifest "
            f"({report.num_pending} videos of this one are waiting there). Extract once with the manifest that they were planned by."
        )
    for process, num_shards in report.holders:
        say(f"{num_shards} shards were left to {process}, which is making them")
    if report.num_rows_elsewhere:
        say(
            f"{report.num_rows_elsewhere} rows are for other processes to make. When all have ended, the same command finishes what "
            "they left."
        )
    say(_summary(report, store))


def _summary(report: ExtractionReport, store: str) -> str:
    pending = f", {report.num_pending} pending" if report.num_pending else ""
    restarts = f", {report.num_restarts} decoding processes replaced" if report.num_restarts else ""
    waits = f"waited {report.decoding_seconds:.1f} s for clips and {report.writing_seconds:.1f} s for commits"
    retry = "; --retry-failed does the rejected ones again" if report.num_rejected else ""
    return (
        f"{report.num_videos} videos: {report.num_ok} ok, {report.num_degraded} degraded, {report.num_rejected} rejected{pending}; "
        f"{report.num_skipped} were stored before; {report.num_clips} clips ({report.bytes_written / 1e6:.1f} MB) in "
        f"{report.seconds:.1f} s, {report.clips_per_second:.1f} clips/s, bound by {report.bound_by} ({waits}){restarts}. "
        f"Failures: mastaf store failures {store}{retry}"
    )
