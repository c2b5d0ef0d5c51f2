"""Leases: one living writer per shard. They keep two writers from doing the same work; the ledger keeps the data right.

`ledger/leases/shard-00000012.json` names the log of the writer that has the shard. Exactly one writer can make the file.
A lease counts as long as its owner is alive (`Files.is_alive`); that of a dead owner is taken over under the store's lock.
"""

import contextlib
import json
import re
import threading
import time
from typing import Any

from cache.cube import canonical_json
from cache.errors import StoreError
from cache.files import Files, owner_of
from cache.ledger import Ledger

FOLDER = "ledger/leases"
SECONDS_BETWEEN_BEATS = 20.0
MOST_TRIES = 100
_LOG = re.compile(r"ledger/[A-Za-z0-9._]+-[0-9]+-[0-9a-f]+\.jsonl")


def lease_name(shard_index: int) -> str:
    """Name of the lease of one shard."""
    return f"{FOLDER}/shard-{shard_index:08d}.json"


class Leases:
    """The leases of one writer, and who holds the others."""

    def __init__(self, files: Files, ledger: Ledger) -> None:
        self._files = files
        self._ledger = ledger
        self._mine: dict[int, str] = {}
        """Shard -> our log that its lease names."""
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None

    def take(self, shard_index: int) -> str | None:
        """Ask for a shard; None when it is ours now, else who has it, in a person's words."""
        log = self._ledger.claim()
        # After a failed write we have another log, and the lease under the old one counts no longer. Where no lock tells who is
        # alive, another writer may have taken over the lease of one that was silent for too long.
        if self._mine.get(shard_index) == log.name and self._names_us(shard_index):
            return None
        self._start_beats()
        lease = canonical_json({"log": log.name, "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        if not self._make(shard_index, lease.encode("ascii")):
            # Under the lock, or two writers could each remove the other's fresh lease for the stale one.
            with self._files.lock():
                for _ in range(MOST_TRIES):
                    if self._make(shard_index, lease.encode("ascii")):
                        break
                    held = self._read(shard_index)
                    if held is not None and self._is_anothers(held):
                        return _in_words(held)
                    # One that was given back meanwhile is not removed: the next one there may be another's already.
                    if held is not None:
                        self._files.delete(lease_name(shard_index))
                else:
                    path = self._files.path_of(lease_name(shard_index))
                    raise StoreError(f"{path} can neither be made nor read; remove it")
        self._mine[shard_index] = log.name
        return None

    def _make(self, shard_index: int, lease: bytes) -> bool:
        """Make the lease; False when there is one."""
        try:
            self._files.put(lease_name(shard_index), lease, replace=False)
        except FileExistsError:
            return False
        return True

    def _names_us(self, shard_index: int) -> bool:
        held = self._read(shard_index)
        return held is not None and held.get("log") == self._ledger.own_name

    def _is_anothers(self, held: dict[str, Any]) -> bool:
        log = held.get("log")
        return log is not None and log != self._ledger.own_name and self._files.is_alive(log)

    def _read(self, shard_index: int) -> dict[str, Any] | None:
        """A lease; None when there is none, empty when it is damaged."""
        try:
            lease = json.loads(self._files.read(lease_name(shard_index)))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        is_lease = isinstance(lease, dict) and {"log", "since"} <= lease.keys()
        # A name that leads elsewhere is none of ours, and is not opened.
        return lease if is_lease and isinstance(lease["log"], str) and _LOG.fullmatch(lease["log"]) else {}

    def release(self, shard_index: int) -> None:
        """Give a shard back, done or not."""
        log_name = self._mine.pop(shard_index, None)
        # Under an older log it may have been taken over; if not, it is removed as that of a dead writer.
        if log_name is not None and log_name == self._ledger.own_name and self._names_us(shard_index):
            self._files.delete(lease_name(shard_index))

    def held_by_others(self) -> dict[int, str]:
        """Shard -> who has it, for every lease of another writer that is alive."""
        found = {}
        for name in self._files.sizes(FOLDER):
            shard_index = _shard_of(name)
            held = None if shard_index is None else self._read(shard_index)
            if shard_index is not None and held is not None and self._is_anothers(held):
                found[shard_index] = _in_words(held)
        return found

    def remove_dead(self) -> None:
        """Remove the leases of writers that are dead. Call it under the store's lock."""
        alive: dict[str, bool] = {}
        for name in self._files.sizes(FOLDER):
            if not name.endswith(".json"):
                continue  # a lease that a living writer is about to make
            shard_index = _shard_of(name)
            held = {} if shard_index is None else self._read(shard_index)
            if held is None:
                continue
            log = str(held.get("log", ""))
            if log not in alive:
                alive[log] = bool(log) and (log == self._ledger.own_name or self._files.is_alive(log))
            if not alive[log]:
                self._files.delete(name)

    def _start_beats(self) -> None:
        if self._beats is None:
            self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)
            self._beats.start()

    def _beat(self) -> None:
        while not self._stop.wait(SECONDS_BETWEEN_BEATS):
            self._ledger.beat()

    def close(self) -> None:
        """Give everything back."""
        self._stop.set()
        for shard_index in sorted(self._mine):
            # What cannot be removed now counts no longer once our log is closed.
            with contextlib.suppress(OSError, StoreError):
                self.release(shard_index)


def _shard_of(name: str) -> int | None:
    digits = name.removeprefix(f"{FOLDER}/shard-").removesuffix(".json")
    return int(digits) if re.fullmatch(r"[0-9]{8,12}", digits) else None


def _in_words(held: dict[str, Any]) -> str:
    return f"{owner_of(held['log'])}, since {held['since']}"
