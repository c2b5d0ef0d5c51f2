"""How far all writers of a store have come, from its ledger: for `mastaf store info --watch`, and for the parent of several processes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from cache.disk_store import DiskStore
from cache.open import open_disk_store, store_kind


@dataclass(frozen=True, slots=True)
class Look:
    """What a store and its writers looked like at one moment."""

    num_rows: int
    """Planned, and not removed since."""
    is_planned: bool
    """Whether any row ever was; a store that is being made has none yet."""
    num_ok: int
    num_degraded: int
    num_rejected: int
    rows_per_second: float | None
    """Since the look before; None at the first."""
    writers: dict[str, list[int]]
    """Each writer that is alive and holds shards -> these shards. On file systems without locks a dead one stays for two minutes."""

    @property
    def num_done(self) -> int:
        """Rows that are committed."""
        return self.num_ok + self.num_degraded + self.num_rejected

    @property
    def is_complete(self) -> bool:
        """Whether every planned row is committed."""
        return self.is_planned and self.num_rows == self.num_done

    def in_words(self) -> str:
        """One line."""
        percent = f" ({100 * self.num_done / self.num_rows:.1f} %)" if self.num_rows else ""
        parts = [
            f"{self.num_done}/{self.num_rows} rows{percent}: {self.num_ok} ok, {self.num_degraded} degraded, {self.num_rejected} rejected"
        ]
        if self.rows_per_second is not None and not self.is_complete:
            left = (self.num_rows - self.num_done) / self.rows_per_second if self.rows_per_second else None
            parts.append(f"{self.rows_per_second:.1f} rows/s" + ("" if left is None else f", {_duration(left)} left"))
        if not self.is_complete:
            parts.append(_writers_in_words(self.writers) if self.writers else "nobody is writing")
        return "; ".join(parts)


class Watcher:
    """Looks at a store again and again; each look reads only what was added to the ledger."""

    def __init__(self, store: DiskStore) -> None:
        self._store = store
        self._before: tuple[float, int] | None = None

    def look(self) -> Look:
        """The store as it is now."""
        counts, now = self._store.counts(), time.monotonic()
        num_rows = sum(counts.values())
        num_done = num_rows - counts["pending"]
        rate = None
        if self._before is not None and now > self._before[0]:
            # Fewer than before after a repair or a replan.
            rate = max(0, num_done - self._before[1]) / (now - self._before[0])
        self._before = (now, num_done)
        return Look(
            num_rows=num_rows,
            is_planned=num_rows > 0 or self._store.layout()["num_shards"] > 0,
            num_ok=counts["ok"],
            num_degraded=counts["degraded"],
            num_rejected=counts["rejected"],
            rows_per_second=rate,
            writers=_by_writer(self._store.holders()),
        )


def watch_store(path: str, interval: float, as_json: bool) -> None:
    """Print how a store fills, every `interval` seconds, until every planned row is committed.

    Args:
        as_json: one JSON object a line, in place of words.
    """
    with open_disk_store(path, store_kind(path, None)) as store:
        watcher = Watcher(store)
        if as_json or not sys.stdout.isatty():
            while not (look := watcher.look()).is_complete:
                click.echo(_line(look, as_json))
                time.sleep(interval)
            click.echo(_line(look, as_json))
            return
        with Live(console=Console(highlight=False), auto_refresh=False) as live:
            while not (look := watcher.look()).is_complete:
                live.update(Text(look.in_words()), refresh=True)
                time.sleep(interval)
            live.update(Text(look.in_words()), refresh=True)


def _line(look: Look, as_json: bool) -> str:
    return json.dumps({**asdict(look), "num_done": look.num_done}) if as_json else look.in_words()


def _by_writer(holders: Mapping[int, str]) -> dict[str, list[int]]:
    writers: dict[str, list[int]] = {}
    for shard_index, holder in sorted(holders.items()):
        # The store says "process 12 on node3, since ...": the time is that of the shard, not of the writer.
        writers.setdefault(holder.split(", since ")[0], []).append(shard_index)
    return writers


def _writers_in_words(writers: Mapping[str, list[int]], most: int = 8) -> str:
    named = [
        f"{writer} (shard{'s' if len(shards) > 1 else ''} {', '.join(map(str, shards))})"
        for writer, shards in writers.items()
    ]
    more = f" and {len(named) - most} more" if len(named) > most else ""
    return f"{len(named)} writing: {', '.join(named[:most])}{more}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
