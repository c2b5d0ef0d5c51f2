"""Attacks on a store while it is written: what all of them share. Loads neither pytest nor torch.

A writer process (`tests/cache/crash_writer.py`) says what it begins and what is committed. An attack ends it in some bad way;
then the store is opened again, held against what the writer had acknowledged, finished, and held against a store that was
written in peace.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from cache.open import FORMATS, is_store, open_files, open_store
from cache.records import ShardRecord, decode_line
from cache.row_table import RowTable
from cache.rows import Segment
from cache.store import FeatureStore, RowKey, RowNotReady, RowRejected, Shard, StoreError
from cache.verify import verify
from contracts.store_examples import (
    VIDEO_IDS,
    commit_example,
    example_outcome,
    example_row,
    example_spec,
    expected_hash,
)

ROOT = Path(__file__).parents[2]
SHARD_ROWS = 4


@dataclass(frozen=True)
class Order:
    """What a writer shall do."""

    path: str
    kind: str
    num_views: int = 2
    """Views of each of the nine videos in the first step of the plan."""
    num_more: int = 10
    """Rows of the second step of the plan."""
    asks_first: bool = True
    """Whether it claims a shard before it works on it; one that does not, commits whatever is pending."""
    stops_in: int | None = None
    """It stops itself (SIGSTOP) in this shard, between the claim and the commit."""
    tries_again: bool = False
    """A commit that failed is tried once more."""
    waits: bool = False
    """It stops itself before it begins, until SIGCONT."""
    left_out: tuple[str, ...] = ()
    """Names of functions, innermost first, from which fsync does nothing."""
    output: str = ""
    errors: str = ""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Order":
        """Read back what `asdict` gave."""
        return cls(**{**value, "left_out": tuple(value["left_out"])})

    @property
    def steps(self) -> tuple[tuple[list[str], list[int]], ...]:
        """Ids and views of each step of the plan."""
        return (VIDEO_IDS, list(range(self.num_views))), ([f"more/{number}" for number in range(self.num_more)], [0])

    def shards(self) -> list[Shard]:
        """All shards of the finished store."""
        table = RowTable(SHARD_ROWS)
        for video_ids, views in self.steps:
            table.add_segment(Segment(rows=tuple(table.unplanned(video_ids, views))))
        return [table.shard(index) for index in range(table.num_shards)]


@dataclass(slots=True)
class Tally:
    """What became of the trials of one attack."""

    trials: int = 0
    acknowledged_rows: int = 0
    """Rows that the writers had reported as committed when they were attacked."""
    lost_rows: int = 0
    """Acknowledged, but not readable."""
    wrong_rows: int = 0
    """Read without an error, but with other values."""
    redone_shards: int = 0
    """Begun before the attack and made once more after it."""
    bad: list[str] = field(default_factory=list)
    """Everything that must not happen, one line each."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Said:
    """What the writers of one trial had said when it ended."""

    begun: frozenset[int] = frozenset()
    done: frozenset[int] = frozenset()
    is_finished: bool = False
    held: tuple[str, ...] = ()
    """Lines of writers that were told who holds a shard."""

    @classmethod
    def of(cls, *outputs: str) -> "Said":
        """From the text of each writer's output."""
        lines = [line.split(" ", 2) for output in outputs for line in output.splitlines()]
        return cls(
            frozenset(int(words[1]) for words in lines if words[0] == "begin"),
            frozenset(int(words[1]) for words in lines if words[0] == "done"),
            ["finished"] in lines,
            tuple(words[2] for words in lines if words[0] == "held"),
        )


class Writer:
    """A writer process."""

    def __init__(self, nursery: "Nursery", pid: int, order: Order) -> None:
        self.pid = pid
        self.order = order
        self._nursery = nursery
        self._status: int | None = None

    def send(self, signal_number: int) -> None:
        """A signal, to a process that was not waited for yet."""
        os.kill(self.pid, signal_number)

    def wait(self) -> int:
        """Exit status, negative for a signal."""
        if self._status is None:
            self._status = self._nursery.ask({"wait": self.pid})
        return self._status

    def wait_until_stopped(self) -> None:
        """Return when SIGSTOP has taken effect."""
        while (state := Path(f"/proc/{self.pid}/stat").read_text().rsplit(") ", 1)[1][0]) != "T":
            if state == "Z":
                raise RuntimeError(f"the writer ended instead of stopping: {self.errors}")
            time.sleep(0.002)

    def wait_until_said(self, num_lines: int) -> None:
        """Return when it has said so many lines, or has nothing more to say."""
        while self.output.count("\n") < num_lines and not self.output.endswith("finished\n") and not self.errors:
            time.sleep(0.001)

    @property
    def output(self) -> str:
        """What it said."""
        return Path(self.order.output).read_text()

    @property
    def errors(self) -> str:
        """What it wrote to stderr."""
        return Path(self.order.errors).read_text()


class Nursery:
    """Makes writer processes by forking one that has everything imported."""

    def __init__(self, folder: Path) -> None:
        """`folder` takes what the writers say."""
        self._folder = folder
        self._num_writers = 0

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "cache" / "crash_writer.py"), "--nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # One thread, so that the forks are whole.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def ask(self, request: dict[str, Any]) -> int:
        """One line there, one number back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def start(self, order: Order) -> Writer:
        """Fork a writer; it says what it does in files of its own."""
        name = self._folder / f"writer-{self._num_writers:06d}"
        self._num_writers += 1
        order = Order(**{**asdict(order), "output": f"{name}.out", "errors": f"{name}.err"})
        for file in (order.output, order.errors):
            Path(file).write_bytes(b"")
        return Writer(self, self.ask(asdict(order)), order)

    def run(self, order: Order) -> Writer:
        """A writer that was left in peace until its end."""
        writer = self.start(order)
        if writer.wait() != 0:
            raise RuntimeError(f"a writer that nobody disturbed failed: {writer.errors}")
        return writer


def look_and_finish(order: Order, said: Said, tally: Tally, where: str, num_workers: int = 1) -> None:
    """After an attack: read what is there, finish it, compare with a store that was written in peace."""
    shards = order.shards()
    acknowledged = frozenset(range(len(shards))) if said.is_finished else said.done
    tally.trials += 1
    tally.acknowledged_rows += sum(len(shards[index].rows) for index in acknowledged)
    _told(tally, f"{where}, reading", lambda: _look(order, shards, acknowledged, tally, where))
    _told(tally, f"{where}, finishing", lambda: _finish(order, said, tally, where, num_workers))
    _told(tally, f"{where}, checking", lambda: _check_whole(order, shards, tally, where))


def _told(tally: Tally, where: str, act: Callable[[], None]) -> None:
    # Whatever a store raises here is the finding that the attacks look for.
    try:
        act()
    except Exception as error:
        tally.bad.append(f"{where}: {type(error).__name__}: {error}")


def _look(order: Order, shards: Sequence[Shard], acknowledged: frozenset[int], tally: Tally, where: str) -> None:
    if not acknowledged and not is_store(open_files(order.path)):
        return
    try:
        store = open_store(order.path, order.kind)
    except StoreError:
        tally.lost_rows += sum(len(shards[index].rows) for index in acknowledged)
        raise
    with store:
        planned = frozenset(store.rows())
        for shard in shards:
            for key in shard.rows:
                state = _state(store, key, key in planned)
                if state == "wrong":
                    tally.wrong_rows += 1
                    tally.bad.append(f"{where}: {key} has wrong values")
                elif shard.index in acknowledged and state != "right":
                    tally.lost_rows += 1
                    tally.bad.append(f"{where}: {key} was acknowledged and is {state}")
                elif state not in ("right", "not ready"):
                    tally.bad.append(f"{where}: {key} of shard {shard.index}, not acknowledged: {state}")


def _state(store: FeatureStore, key: RowKey, is_planned: bool) -> str:
    is_ready = store.outcome(key.video_id, key.view) is not None
    try:
        for name, array in store.spec.arrays.items():
            if not np.array_equal(store.read([key.video_id], [key.view], name)[0], example_row(key, name, array)):
                return "wrong"
    except RowRejected:
        return "right" if example_outcome(key).status == "rejected" else "wrongly rejected"
    except RowNotReady:
        return "not ready" if not is_ready else "ready, but told not to be"
    except StoreError as error:
        return "not ready" if not is_planned else f"damaged: {error}"
    return "right" if is_ready else "readable, but not ready"


def _finish(order: Order, said: Said, tally: Tally, where: str, num_workers: int) -> None:
    with open_store(order.path, order.kind, example_spec(), "a", SHARD_ROWS) as store:
        redone: set[int] = set()
        for video_ids, views in order.steps:
            store.plan(video_ids, views)
            for shard in store.pending():
                redone |= {shard.index} & said.begun
                commit_example(store, shard)
    tally.redone_shards += len(redone)
    if len(redone) > num_workers:
        tally.bad.append(f"{where}: {len(redone)} shards of {num_workers} workers were redone")


def _check_whole(order: Order, shards: Sequence[Shard], tally: Tally, where: str) -> None:
    """Equal to a store that was written in peace, each shard committed once, no litter, every byte as it should be."""
    keys = [key for shard in shards for key in shard.rows]
    with open_store(order.path, order.kind) as store:
        if store.pending() or sorted(store.rows()) != sorted(keys):
            tally.bad.append(f"{where}: not finished after it was finished")
        if store.content_hash() != expected_hash(store.spec, keys):
            tally.bad.append(f"{where}: another content hash than without the attack")
    path = Path(order.path)
    litter = [file.name for pattern in ("*.partial", "leases/*") for file in path.rglob(pattern)]
    if litter:
        tally.bad.append(f"{where}: left behind: {litter}")
    commits = num_commits(path)
    if order.tries_again:
        # A line whose fsync failed was cut off again, but after a power cut it can be back beside its repetition.
        commits = Counter(set(commits))
    if commits != Counter(range(len(shards))):
        tally.bad.append(f"{where}: commits per shard {dict(commits)}")
    report = verify(open_files(path), FORMATS.__getitem__, num_threads=1)
    tally.bad += [f"{where}: {damage.file}: {damage.what}" for damage in report.damages]


def num_commits(path: Path) -> Counter[int]:
    """Shard -> lines of the ledger that commit it."""
    lines = [line for log in (path / "ledger").glob("*.jsonl") for line in log.read_bytes().splitlines()]
    records = map(decode_line, lines)
    return Counter(record.shard_index for record in records if isinstance(record, ShardRecord))
