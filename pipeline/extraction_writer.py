"""The way of the cubes out of stage 1: a thread that commits whole shards while the next one is being made.

R rows of a shard; C channels, T time steps, H W grid.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cache.format import Cubes
from cache.store import FeatureStore, RowOutcome, Shard
from pipeline.extraction_feed import POLL_SECONDS


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """What a commit takes."""

    shard: Shard
    arrays: dict[str, Cubes]
    """Array name -> (R, C, T, H, W) in its stored dtype; values of rejected rows mean nothing."""
    outcomes: list[RowOutcome]
    """R of them."""


class ShardWriter:
    """Commits shards in the order they come; a context manager. At most one waits, so at most three are in memory.

    On the way out, whatever the reason, it finishes what it was given.
    """

    def __init__(self, store: FeatureStore, on_commit: Callable[[Shard], None]) -> None:
        self._store = store
        self._on_commit = on_commit
        self._waiting: queue.Queue[FinishedShard | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._is_ending = False
        self.error: Exception | None = None
        """Why nothing is written any more."""
        self.num_shards = 0
        self.num_rows = 0
        self.num_bytes = 0
        """Of cubes, before compression."""

    def __enter__(self) -> ShardWriter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish(lambda: None)

    def submit(self, finished: FinishedShard, check: Callable[[], None]) -> None:
        """Have a shard committed; waits while another one waits. What `check` raises ends the wait, and the shard is lost."""
        self._put(finished, check)

    def finish(self, check: Callable[[], None]) -> None:
        """Wait until all is committed. What `check` raises ends the wait."""
        if not self._is_ending:
            self._put(None, check)
            self._is_ending = True
        while self._thread.is_alive():
            check()
            self._thread.join(POLL_SECONDS)
        check()

    def _put(self, item: FinishedShard | None, check: Callable[[], None]) -> None:
        while True:
            check()
            try:
                self._waiting.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return

    def _run(self) -> None:
        while (finished := self._waiting.get()) is not None:
            if self.error is None:
                try:
                    self._commit(finished)
                except Exception as error:
                    self.error = error
            del finished  # with its cubes, before the wait for the next one

    def _commit(self, finished: FinishedShard) -> None:
        self._store.commit(finished.shard, finished.arrays, _with_finite_rows(finished))
        self.num_shards += 1
        self.num_rows += len(finished.outcomes)
        self.num_bytes += sum(values.nbytes for values in finished.arrays.values())
        self._on_commit(finished.shard)


def _with_finite_rows(finished: FinishedShard) -> list[RowOutcome]:
    """The outcomes; rows with values that are not finite are rejected (one would poison every episode that draws it)."""
    checked = list(finished.outcomes)
    for index, outcome in enumerate(finished.outcomes):
        if outcome.status != "rejected":
            bad = [name for name, values in finished.arrays.items() if not np.isfinite(values[index]).all()]
            if bad:
                dtype = finished.arrays[bad[0]].dtype
                detail = f"{', '.join(bad)}: not all values are finite as {dtype}; try store.dtype = 'float32'"
                checked[index] = RowOutcome("rejected", "not_finite", detail, outcome.source)
    return checked
