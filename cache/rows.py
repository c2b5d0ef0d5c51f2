"""Rows of a store: their names, how they ended, and the ledger's word on them."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from cache.errors import StoreError

MOST_VIEWS = 1 << 31
Status = Literal["ok", "degraded", "rejected"]


@dataclass(frozen=True, slots=True, order=True)
class RowKey:
    """Names one row."""

    video_id: str
    view: int

    def __post_init__(self) -> None:
        if not isinstance(self.video_id, str) or not self.video_id:
            raise StoreError(f"video_id {self.video_id!r}: expected a text of at least one character")
        try:
            self.video_id.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise StoreError(f"video_id {self.video_id!r}: no text that a file name can hold") from None
        if type(self.view) is not int or not 0 <= self.view < MOST_VIEWS:
            raise StoreError(
                f"view {self.view!r} of video {self.video_id!r}: expected an integer from 0 to {MOST_VIEWS - 1}"
            )


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
class Segment:
    """One step of the plan: rows that begin new shards, and rows that leave the store."""

    rows: tuple[RowKey, ...] = ()
    """A row that the store held before moves here, and is made anew."""
    removed: tuple[RowKey, ...] = ()


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
class Claim:
    """What a writer learns when it asks for a shard."""

    state: Literal["ours", "done", "held"]
    holder: str | None = None
    """Who has it, when it is held by another writer that is alive."""
