"""Lines of the ledger: commits of shards, and the word that a commit no longer holds.

A line is `{"crc32":"89abcdef","record":{...}}`, where the checksum is zlib.crc32 of the record's bytes.
"""

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache.cube import canonical_json
from cache.errors import StoreDamaged
from cache.rows import FileRecord, RowKey, RowOutcome, RowRecord

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError)
"""What reading JSON of an unexpected form raises."""
_LINE = re.compile(rb'\{"crc32":"([0-9a-f]{8})","record":(\{.*\})\}', re.DOTALL)
_STATUS = re.compile(rb'"status":"([odr])[a-z]*","video_id":')


def checksum(data: bytes) -> str:
    """zlib.crc32 as eight hex digits."""
    return f"{zlib.crc32(data):08x}"


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """The ledger's word on one shard: its rows are ready from here on.

    A store of a million rows keeps all records in memory, so the rows stay text until somebody asks.
    """

    shard_index: int
    generation: int
    """How many earlier commits of the shard had been dropped; the commit of the latest generation holds."""
    store_id: str
    """Of the store that the line belongs to."""
    files: dict[str, FileRecord | None]
    """Name of each data file; None when every row of the shard was rejected, which needs no file."""
    rows_text: bytes
    """Canonical JSON of the rows."""
    initials: bytes
    """First letter of each row's status."""

    @property
    def rows(self) -> tuple[RowRecord, ...]:
        """One per row of the shard, in order."""
        return tuple(
            RowRecord(
                RowKey(row["video_id"], row["view"]),
                RowOutcome(row["status"], row["reason"], row["detail"], row["source"]),
                row["sha256"],
            )
            for row in json.loads(self.rows_text)
        )


@dataclass(frozen=True, slots=True)
class ShardDrop:
    """The word that a commit, and all before it, no longer hold: `repair` found the data damaged."""

    shard_index: int
    generation: int
    """Of the commit that is dropped."""
    store_id: str
    why: str


Record = ShardRecord | ShardDrop


def status_initials(rows_text: bytes) -> bytes:
    """First letter of each row's status; a quote inside of a JSON text has a backslash before it and never matches."""
    return b"".join(_STATUS.findall(rows_text))


def rows_to_text(rows: Sequence[RowRecord]) -> bytes:
    """Canonical JSON of the rows of one shard."""
    return canonical_json(
        [
            {
                "video_id": row.key.video_id,
                "view": row.key.view,
                "status": row.outcome.status,
                "reason": row.outcome.reason,
                "detail": row.outcome.detail,
                "source": row.outcome.source,
                "sha256": row.sha256,
            }
            for row in rows
        ]
    ).encode("ascii")


def encode_line(record: Record) -> bytes:
    """One record as a line of the ledger."""
    document: dict[str, Any] = {
        "generation": record.generation,
        "kind": "commit" if isinstance(record, ShardRecord) else "drop",
        "shard": record.shard_index,
        "store": record.store_id,
    }
    if isinstance(record, ShardRecord):
        document["files"] = {
            name: None if file is None else {"bytes": file.num_bytes, "crc32": file.crc32}
            for name, file in record.files.items()
        }
        # "rows" comes last, so that its text can be put in as it is and cut out as it was.
        text = canonical_json(document).encode("ascii")[:-1] + b',"rows":' + record.rows_text + b"}"
    else:
        text = canonical_json({**document, "why": record.why}).encode("ascii")
    return b'{"crc32":"' + checksum(text).encode("ascii") + b'","record":' + text + b"}\n"


def decode_line(line: bytes) -> Record | None:
    """The inverse, without the newline; None when the line does not match its checksum."""
    match = _LINE.fullmatch(line)
    if match is None or checksum(match[2]) != match[1].decode("ascii"):
        return None
    try:
        return _record(match[2])
    except MALFORMED as error:
        # The checksum is right, so this was written on purpose.
        raise StoreDamaged(f"a ledger line is none of this version: {type(error).__name__}: {error}") from error


def _record(text: bytes) -> Record:
    document = json.loads(text)
    kind, index, generation = document["kind"], document["shard"], document["generation"]
    if type(index) is not int or type(generation) is not int or generation < 0:
        raise ValueError(f"shard {index!r}, generation {generation!r}: expected integers from 0")
    if kind == "drop":
        return ShardDrop(index, generation, str(document["store"]), str(document["why"]))
    if kind != "commit":
        raise ValueError(f"kind {kind!r}: written by a newer version, update to read it")
    files = {
        str(name): None if file is None else FileRecord(int(file["bytes"]), str(file["crc32"]))
        for name, file in document["files"].items()
    }
    rows_text = text[text.index(b',"rows":') + len(b',"rows":') : -1]
    initials = status_initials(rows_text)
    if len(initials) != len(document["rows"]):
        raise ValueError(f"{len(document['rows'])} rows, {len(initials)} of them with a status")
    return ShardRecord(index, generation, str(document["store"]), files, rows_text, initials)
