"""`mastaf extract --workers N`: the same command in N processes on this machine, which help each other through the leases of the store.

The parent makes nothing itself: it starts, watches, stops and counts. Whatever becomes of it or of them, the ledger is right.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache.disk_store import DiskStore
from pipeline.console import say
from pipeline.extraction_report import ExtractionReport
from pipeline.interrupts import SIGNALS, Stopped
from pipeline.job import Job, note_start, report_job
from pipeline.worker_process import Worker

POLL_SECONDS = 0.25
STOP_SECONDS = 15.0
"""Allowed for the others to commit what they have, when one met an error that concerns all."""
ONE_SIGNAL_SECONDS = 1.0
"""Ctrl-C or a scheduler may deliver one wish twice; what comes later is a second one."""


class WorkersFailed(RuntimeError):
    """The processes of `--workers` did not bring the work to its end; the message says what to do."""

    exit_code = 2
    """What the process should exit with."""


class _Signals:
    """Collects the signals for the parent; a context manager."""

    def __init__(self) -> None:
        self.first: int | None = None
        """The signal that came, or None."""
        self.is_urgent = False
        """Whether a second one came well after it."""
        self._first_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.first is None:
            self.first, self._first_at = number, time.monotonic()
            os.write(2, b"stopping the processes; a second signal stops them at once\n")
        elif time.monotonic() - self._first_at > ONE_SIGNAL_SECONDS:
            self.is_urgent = True


@dataclass(slots=True)
class _Crew:
    """The processes of one round; a context manager that leaves none behind."""

    workers: list[Worker]
    warned: set[str]

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.end()

    def start(self, command: Sequence[str], num_more: int, count: int, environment: Mapping[str, str]) -> None:
        for index in range(len(self.workers), len(self.workers) + num_more):
            self.workers.append(Worker(command, index, count, environment))

    def holds_a_shard(self, store: DiskStore) -> bool:
        names = {f"process {worker.process.pid} on" for worker in self.running}
        return any(holder.startswith(name) for holder in store.holders().values() for name in names)

    @property
    def running(self) -> list[Worker]:
        return [worker for worker in self.workers if not worker.has_ended]

    def send(self, number: int) -> None:
        for worker in self.running:
            worker.send(number)

    def newly_ended(self) -> list[Worker]:
        """Processes that have ended since the last call."""
        ended = [worker for worker in self.running if worker.process.poll() is not None]
        for worker in ended:
            worker.end()
            # All processes warn of the same; once is enough.
            for line in worker.lines:
                if line.startswith("warning:") and line not in self.warned:
                    self.warned.add(line)
                    say(line)
        return ended

    def stop(self) -> None:
        """End all, with some time to commit what they have."""
        self.send(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while any(worker.process.poll() is None for worker in self.running) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def run_workers(
    command: Sequence[str],
    num_workers: int,
    job: Job,
    on_progress: Callable[[int, int], None],
    first_only: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> ExtractionReport:
    """Have the command done by several processes, and count what came of it.

    When a process dies, the others take over its shards; when these have ended too and shards are left, as many processes as
    survived begin once more.

    Args:
        command: words of the whole command; each process prints its report as JSON.
        on_progress: called with (rows committed, rows planned), of the whole store.
        first_only: words for the first process alone, which plans rejected videos anew; the others start when it has begun a shard.
            If it dies before that, the first process of the next round is given them again; doing so twice changes nothing.

    Raises:
        Stopped: a signal came, and was passed on.
        WorkersFailed: all died, one met an error that concerns all, or nothing is done any more.
    """
    start = note_start(job, retry=bool(first_only))
    reports: list[dict[str, Any]] = []
    warned: set[str] = set()
    has_planned = not first_only
    with _Signals() as signals:
        while True:
            before = job.num_rows_left()
            with _Crew([], warned) as crew:
                crew.start(command if has_planned else [*command, *first_only], 1, num_workers, environment)
                if not has_planned:
                    has_planned = _watch(crew, job, signals, on_progress, until_begun=True)
                crew.start(command, num_workers - 1, num_workers, environment)
                _watch(crew, job, signals, on_progress)
            has_planned = has_planned or crew.workers[0].report is not None
            survivors = [worker.report for worker in crew.workers if worker.report is not None]
            reports += survivors
            if len(survivors) == num_workers:
                return report_job(job, start, reports)
            left = job.num_rows_left()
            if not survivors:
                raise WorkersFailed(
                    f"all {num_workers} processes died, and {left} planned rows are left. What was committed is kept. Find the cause "
                    "above; if it is memory, use fewer --workers or a smaller extraction.forward_batch; then run the same command "
                    "again."
                )
            if not left and has_planned:
                return report_job(job, start, reports)
            if left == before and has_planned:
                raise WorkersFailed(
                    f"processes died and nothing is committed any more, {left} rows are left. Run the command without --workers."
                )
            num_workers = len(survivors)
            unplanned = "" if has_planned else ", and the rejected videos are not planned anew yet"
            say(f"{left} rows are left of processes that died{unplanned}; {num_workers} begin once more")


def _watch(
    crew: _Crew, job: Job, signals: _Signals, on_progress: Callable[[int, int], None], until_begun: bool = False
) -> bool:
    """Follow the processes to their end, or with `until_begun` until one of them holds a shard; whether one was seen to."""
    store: DiskStore | None = None
    has_begun = False
    is_told, shown = False, (0, 0)
    try:
        while crew.running and not signals.is_urgent:
            if signals.first is not None and not is_told:
                is_told = True
                crew.send(signals.first)
            time.sleep(POLL_SECONDS)
            store = store or job.open()
            if store is not None:
                counts = store.counts()
                now = (sum(counts.values()) - counts["pending"], sum(counts.values()))
                if now != shown:
                    on_progress(*now)
                    shown = now
                has_begun = until_begun and crew.holds_a_shard(store)
                if has_begun:
                    break
            for worker in crew.newly_ended():
                if worker.process.returncode and signals.first is None:
                    _lament(worker, crew)
    finally:
        if store is not None:
            store.close()
    if signals.first is not None:
        raise Stopped(signals.first, f"what was committed is kept in {job.store}; the same command goes on from there")
    return has_begun


def _lament(worker: Worker, crew: _Crew) -> None:
    """Say how a process ended.

    Raises:
        WorkersFailed: by an error that the user has to mend; the others would meet it too.
    """
    if worker.process.returncode == 2:
        crew.stop()
        words = [line.removeprefix("mastaf: ") for line in worker.lines if line.startswith("mastaf: ")]
        raise WorkersFailed(words[-1] if words else f"process {worker.index} {worker.end_in_words}")
    if worker.process.returncode == 1:
        say("\n".join(worker.lines))
    num_others = len(crew.running)
    others = f"; the other {num_others} take over its shards" if num_others else ""
    say(f"process {worker.index} (pid {worker.process.pid}) {worker.end_in_words}{others}")
