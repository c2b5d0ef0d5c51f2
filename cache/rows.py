"""Rows of a store: which are planned, which are done, and how they ended."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from cache.cube import Spec, canonical_json

Status = Literal["ok", "degraded", "rejected"]


class StoreError(Exception):
    """A store cannot do what was asked; the text says why and what to do."""


# The name says what is the case; `except SpecMismatch` reads well without a suffix.
class SpecMismatch(StoreError):
    """The store holds cubes of another spec."""


# The name says what is the case; `except RowNotReady` reads well without a suffix.
class RowNotReady(StoreError):
    """The row is planned but not extracted yet."""


# The name says what is the case; `except RowRejected` reads well without a suffix.
class RowRejected(StoreError):
    """The row's video could not be used; the reason is in the ledger."""


# The name says what is the case; `except RowDamaged` reads well without a suffix.
class RowDamaged(StoreError):
    """The row was committed, but its data is missing or damaged now."""


@dataclass(frozen=True, slots=True, order=True)
class RowKey:
    """Names one row."""

    video_id: str
    view: int

    def __post_init__(self) -> None:
        if not isinstance(self.video_id, str) or not self.video_id:
            raise StoreError(f"video_id {self.video_id!r}: expected a text of at least one character")
        if type(self.view) is not int or self.view < 0:
            raise StoreError(f"view {self.view!r} of video {self.video_id!r}: expected an integer from 0")


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """How the extraction of one row ended."""

    status: Status
    reason: str | None = None
    """Code of the reason; None if and only if the status is ok."""
    detail: str | None = None
    """Free text for a person."""
    source: str | None = None
    """What the row was made from, in the caller's words (file, stretch); kept beside the content, no part of its hash."""

    def __post_init__(self) -> None:
        if self.source is not None and (not isinstance(self.source, str) or not self.source):
            raise StoreError(f"source {self.source!r}: expected a text of at least one character, or None")
        if self.status not in get_args(Status):
            raise StoreError(f"status {self.status!r}: allowed are {', '.join(get_args(Status))}")
        if (self.status == "ok") != (self.reason is None):
            raise StoreError(f"status {self.status} with reason {self.reason!r}: give a reason unless the row is ok")


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows that are written, committed and redone as one."""

    index: int
    rows: tuple[RowKey, ...]
    """At most `shard_rows` of them; the last shard of a plan segment may hold fewer."""


@dataclass(frozen=True, slots=True)
class RowRecord:
    """The ledger's word on one row."""

    key: RowKey
    outcome: RowOutcome
    sha256: dict[str, str] = field(default_factory=dict)
    """Array name -> SHA-256 of the stored little-endian C-order values, hex; empty for a rejected row."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """The ledger's word on one data file."""

    num_bytes: int
    crc32: str
    """zlib.crc32 of the whole file, eight hex digits."""


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """The ledger's word on one shard: its rows are ready from here on."""

    shard_index: int
    rows: tuple[RowRecord, ...]
    files: dict[str, FileRecord | None]
    """Array name -> its data file; None when every row of the shard was rejected, which needs no file."""
    fingerprint: str


class RowTable:
    """Planned rows in order and, for each finished shard, its record. Row i of shard s is row `s * shard_rows + i`."""

    def __init__(self, shard_rows: int) -> None:
        if type(shard_rows) is not int or shard_rows < 1:
            raise StoreError(f"shard_rows {shard_rows!r}: expected a positive integer")
        self.shard_rows = shard_rows
        self.shards: list[Shard] = []
        self.records: dict[int, ShardRecord] = {}
        self._row_index: dict[RowKey, int] = {}
        self._views: dict[str, list[int]] = {}

    @property
    def num_rows(self) -> int:
        """Rows of the arrays, the padding behind each plan segment included."""
        return len(self.shards) * self.shard_rows

    def ids(self) -> list[str]:
        """Planned videos, in the order they were planned."""
        return list(self._views)

    def rows(self) -> list[RowKey]:
        """Planned rows, in order."""
        return list(self._row_index)

    def views(self) -> list[int]:
        """Views that are planned of at least one video."""
        return sorted({view for views in self._views.values() for view in views})

    def pending(self) -> list[Shard]:
        """Shards that are planned and not committed."""
        return [shard for shard in self.shards if shard.index not in self.records]

    def unplanned(self, video_ids: Iterable[str], views: Sequence[int]) -> list[RowKey]:
        """The rows of ids x views that no segment holds yet, video by video."""
        video_ids = list(video_ids)
        if len(set(video_ids)) != len(video_ids):
            twice = Counter(video_ids).most_common(1)[0][0]
            raise StoreError(f"video {twice!r} is planned twice in one call; ids must be unique")
        if len(set(views)) != len(views):
            raise StoreError(f"views {list(views)} name one view twice")
        keys = (RowKey(video_id, int(view)) for video_id in video_ids for view in views)
        return [key for key in keys if key not in self._row_index]

    def add_segment(self, rows: Sequence[RowKey]) -> None:
        """Append rows as new shards; shards that exist stay as they are."""
        for start in range(0, len(rows), self.shard_rows):
            shard = Shard(len(self.shards), tuple(rows[start : start + self.shard_rows]))
            for position, key in enumerate(shard.rows):
                if key in self._row_index:
                    raise StoreError(f"the plan holds view {key.view} of video {key.video_id!r} twice")
                self._row_index[key] = shard.index * self.shard_rows + position
                self._views.setdefault(key.video_id, []).append(key.view)
            self.shards.append(shard)

    def check_record(self, record: ShardRecord) -> None:
        """Raise StoreError unless the record fits the plan."""
        if not 0 <= record.shard_index < len(self.shards):
            raise StoreError(f"shard {record.shard_index} is not planned; the plan has {len(self.shards)} shards")
        if tuple(row.key for row in record.rows) != self.shards[record.shard_index].rows:
            raise StoreError(f"the rows of shard {record.shard_index} are not the rows that were planned for it")

    def row_index(self, key: RowKey) -> int:
        """Place of a planned row in the arrays."""
        index = self._row_index.get(key)
        if index is not None:
            return index
        if key.video_id not in self._views:
            raise StoreError(f"video {key.video_id!r} is not in the store; extract it first")
        planned = ", ".join(str(view) for view in sorted(self._views[key.video_id]))
        raise StoreError(
            f"video {key.video_id!r} has no view {key.view} in the store (views: {planned}); extract with more views"
        )

    def row_record(self, key: RowKey) -> RowRecord | None:
        """The record of a row; None when it is not planned or not extracted yet."""
        index = self._row_index.get(key)
        if index is None:
            return None
        record = self.records.get(index // self.shard_rows)
        return None if record is None else record.rows[index % self.shard_rows]

    def ready_row_index(self, key: RowKey) -> int:
        """Index of a row that can be read; raises RowNotReady, RowRejected or StoreError."""
        index = self.row_index(key)
        record = self.row_record(key)
        if record is None:
            raise RowNotReady(
                f"view {key.view} of video {key.video_id!r} is not extracted yet; run the extraction again to finish"
            )
        if record.outcome.status == "rejected":
            detail = f" ({record.outcome.detail})" if record.outcome.detail else ""
            raise RowRejected(
                f"view {key.view} of video {key.video_id!r} was rejected: {record.outcome.reason}{detail}. "
                "Mend the file and extract into a new store, or exclude the video from the manifest"
            )
        return index


def content_hash(spec: Spec, table: RowTable) -> str:
    """SHA-256 of what a store holds, from the records alone: independent of order, shards, codec and backend.

    Covers the rows that are ok or degraded, sorted; rejected and missing rows have no content.
    """
    lines = []
    for record in table.records.values():
        for row in record.rows:
            for name, digest in row.sha256.items():
                array = spec.arrays[name]
                lines.append((row.key.video_id, name, row.key.view, array.dtype, list(array.shape), digest))
    total = hashlib.sha256()
    for line in sorted(lines):
        total.update(canonical_json(line).encode("ascii") + b"\n")
    return total.hexdigest()
