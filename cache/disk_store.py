"""A store that outlives the process: the commit protocol, the same for every backend and file layer. See docs/store.md.

Letters: R rows of a shard; C channels, T time steps, H W grid.
"""

import contextlib
import secrets
from collections.abc import Callable
from typing import Any, Literal

from cache.document import SPEC, Plan, StoreDocument, put_twice, read_document
from cache.errors import ShardHeld, StoreError
from cache.files import Files
from cache.format import Cubes, Format
from cache.leases import Leases
from cache.ledger import Ledger
from cache.records import Record, ShardDrop, ShardRecord, checksum, encode_line
from cache.row_table import RowTable, check_segment
from cache.rows import Claim, FileRecord, RowKey, RowRecord, Segment, Shard
from cache.table import TableStore

MakeFormat = Callable[[StoreDocument, Files], Format]


def make_document(files: Files, document: StoreDocument) -> None:
    """Found a store: from here on it exists, and the first opening for writing completes it.

    Raises:
        FileExistsError: there is a store, perhaps of a process that was faster.
    """
    RowTable(document.shard_rows)  # refuses a bad number before anything is written
    # Under the lock, or a second writer could take the half-written copy for the litter of a killed one.
    with files.lock():
        put_twice(files, SPEC, document.to_json(), replace=False)


def matching_record(files: Files, first: ShardRecord, second: ShardRecord) -> ShardRecord:
    """Which of two commits of one shard the files belong to; the same one in any order of reading."""
    first, second = sorted((first, second), key=encode_line)
    if first.files == second.files:
        return first
    found: dict[str, FileRecord | None] = {}
    for name in second.files:
        try:
            data = files.read(name)
            found[name] = FileRecord(len(data), checksum(data))
        except FileNotFoundError:
            found[name] = None
    return second if found == second.files else first


def new_store_id() -> str:
    """A random name for a new store."""
    return secrets.token_hex(8)


class DiskStore(TableStore):
    """Cubes in files. Any number may read while writers write."""

    def __init__(self, files: Files, make_format: MakeFormat, mode: Literal["r", "a"] = "r") -> None:
        """Open a store that exists.

        Args:
            mode: `r` never changes a byte; `a` first clears what killed writers left, then may plan and commit.
        """
        self._files = files
        self._mode = mode
        self._document = read_document(files)
        super().__init__(self._document.spec, self._document.shard_rows)
        self._store_id = self._document.store_id
        self._format = make_format(self._document, files)
        self._plan = Plan(files, self._store_id)
        self._ledger = Ledger(files, self._store_id)
        self._leases = Leases(files, self._ledger)
        self._num_segments_followed = 0
        self._waiting: list[Record] = []
        if mode == "a":
            self._recover()
        self._refresh()

    @property
    def url(self) -> str:
        """Path or address."""
        return self._files.url

    @property
    def origin(self) -> dict[str, Any]:
        """As in `StoreDocument`."""
        return self._document.origin

    def _refresh(self) -> None:
        # Records first: whoever committed a shard had planned it before. They wait until they are taken in, whatever fails between.
        self._waiting += self._ledger.new_records()
        for segment in self._plan.new_segments():
            self._table.add_segment(segment)
        num_taken = 0
        try:
            for record in self._waiting:
                other = self._table.take_in(record)
                if other is not None and isinstance(record, ShardRecord):
                    # Two writers made the shard, by mistake and past its lease: the files belong to one of them.
                    self._table.records[record.shard_index] = matching_record(self._files, other, record)
                num_taken += 1
        finally:
            del self._waiting[:num_taken]

    def _recover(self) -> None:
        with self._files.lock():
            self._refresh()
            if not self._ledger.others_alive():
                self._files.remove_litter()
                self._ledger.cut_torn_lines()
            self._leases.remove_dead()
            self._plan.mend_copies()
            self._write_derived()

    def _add_segment(self, make: Callable[[], Segment]) -> None:
        self._check_writable()
        with self._files.lock():
            self._refresh()
            segment = make()
            if segment.rows or segment.removed:
                check_segment(segment)
                self._plan.add_segment(segment)
                self._refresh()
                self._write_derived()

    def _write_derived(self) -> None:
        """Make the files that follow from the plan (row table, array lengths, index) follow it.

        The plan is the truth, so that a kill between the plan and these files is mended at the next opening.
        """
        for name, data in self._format.derived(self._table):
            if not self._holds(name, data):
                self._files.put(name, data)
        self._num_segments_followed = self._plan.num_segments
        self._format.forget()

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            return self._files.read(name) == data
        except FileNotFoundError:
            return False

    def claim(self, shard: Shard) -> Claim:
        """As in the `FeatureStore` protocol."""
        self._check_writable()
        with self._lock:
            holder = self._leases.take(shard.index)
            if holder is not None:
                return Claim("held", holder)
            # Its last owner may have committed it just before giving it back.
            self._refresh()
            if shard.index in self._table.records:
                self._leases.release(shard.index)
                return Claim("done")
            if self._num_segments_followed != self._plan.num_segments:
                # Another writer planned, and may have been killed before it wrote what readers need to find the rows.
                with self._files.lock():
                    self._refresh()
                    self._write_derived()
            return Claim("ours")

    def release(self, shard: Shard) -> None:
        """As in the `FeatureStore` protocol."""
        with self._lock:
            self._leases.release(shard.index)

    def _write_shard(self, shard: Shard, blocks: dict[str, Cubes]) -> dict[str, FileRecord | None]:
        encoded = self._format.encode(shard.index, blocks)
        # Encoding takes a while. After a stall that was longer than a lease, the shard may be another's by now.
        claim = self.claim(shard)
        if claim.state != "ours":
            raise ShardHeld(
                f"shard {shard.index} of {self.url} was taken over, as this writer was silent for too long; it is "
                + (f"being made by {claim.holder}" if claim.holder else "committed")
            )
        for name, data in encoded.items():
            if data is None:
                self._files.delete(name)
            else:
                self._files.put(name, data)
        return {name: None if data is None else FileRecord(len(data), checksum(data)) for name, data in encoded.items()}

    def _publish(self, record: ShardRecord) -> None:
        self._ledger.append(record)

    def drop(self, shard_index: int, why: str, generation: int | None = None) -> tuple[RowRecord, ...]:
        """Give up a committed shard whose data is damaged; its rows are pending again. Returns what had been committed.

        Args:
            generation: of the commit that is meant; another one stays. None: whichever there is.
        """
        self._check_writable()
        with self._lock:
            self._refresh()
            record = self._table.records.get(shard_index)
            if record is None or generation not in (None, record.generation):
                return ()
            drop = ShardDrop(shard_index, record.generation, self._store_id, why)
            self._ledger.append(drop)
            self._table.take_in(drop)
            for name in record.files:
                self._files.delete(name)
            self._format.forget()
            return record.rows

    def _read_row(self, array: str, place: int) -> Cubes:
        return self._format.read_row(array, place)

    def _check_writable(self) -> None:
        if self._mode == "r":
            raise StoreError(f"{self.url} is open for reading; open it with mode 'a' to plan or commit")

    def layout(self) -> dict[str, Any]:
        """Backend, sizes and arrays, as a JSON object."""
        return {
            "backend": self._document.backend,
            "compression": self._document.compression,
            "bytes": self._files.total_bytes(),
            "weights_digest": self.spec.weights_digest,
            "from_run": self.origin.get("from_run"),
            **self._shared_layout(),
        }

    def row_hashes(self, key: RowKey) -> dict[str, str] | None:
        """Array -> SHA-256 of a row, as committed; None while it is not."""
        with self._lock:
            record = self._table.row_record(key)
            return None if record is None else record.sha256

    def holders(self) -> dict[int, str]:
        """Shard -> who is making it now."""
        return self._leases.held_by_others()

    def close(self) -> None:
        """Let go of leases, ledger and files."""
        with self._lock:
            with contextlib.suppress(OSError, StoreError):
                self._leases.close()
            self._ledger.close()
            self._format.close()
