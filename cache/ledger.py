"""The ledger: what is done, the only truth about which rows are ready.

Each writer has its own file, `HOST-PID-RANDOM.jsonl`, with one line per committed shard:
`{"crc32":"89abcdef","record":{...}}`, where the checksum is zlib.crc32 of the record's bytes.
A killed writer can leave its last line torn: readers ignore it, and nobody but its writer ever appends to the file.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import zlib
from pathlib import Path
from typing import IO, Any

from cache.cube import canonical_json
from cache.durable import fsync_path, lock
from cache.rows import FileRecord, RowKey, RowOutcome, RowRecord, ShardRecord, StoreError

_LINE = re.compile(rb'\{"crc32":"([0-9a-f]{8})","record":(\{.*\})\}', re.DOTALL)


def checksum(data: bytes) -> str:
    """zlib.crc32 as eight hex digits."""
    return f"{zlib.crc32(data):08x}"


def encode_line(record: ShardRecord) -> bytes:
    """One commit as a line of the ledger."""
    rows = [
        {
            "video_id": row.key.video_id,
            "view": row.key.view,
            "status": row.outcome.status,
            "reason": row.outcome.reason,
            "detail": row.outcome.detail,
            "source": row.outcome.source,
            "sha256": row.sha256,
        }
        for row in record.rows
    ]
    files = {
        name: None if file is None else {"bytes": file.num_bytes, "crc32": file.crc32}
        for name, file in record.files.items()
    }
    document = {
        "kind": "commit",
        "fingerprint": record.fingerprint,
        "shard": record.shard_index,
        "rows": rows,
        "files": files,
    }
    text = canonical_json(document).encode("ascii")
    return b'{"crc32":"' + checksum(text).encode("ascii") + b'","record":' + text + b"}\n"


def decode_line(line: bytes) -> ShardRecord | None:
    """The inverse, without the newline; None when the line does not match its checksum."""
    match = _LINE.fullmatch(line)
    if match is None or checksum(match[2]) != match[1].decode("ascii"):
        return None
    document = json.loads(match[2])
    if document.get("kind") != "commit":
        raise StoreError(f"ledger line of kind {document.get('kind')!r}: written by a newer version, update to read it")
    return ShardRecord(
        shard_index=document["shard"],
        rows=tuple(_decode_row(row) for row in document["rows"]),
        files={
            name: None if file is None else FileRecord(file["bytes"], file["crc32"])
            for name, file in document["files"].items()
        },
        fingerprint=document["fingerprint"],
    )


def _decode_row(row: dict[str, Any]) -> RowRecord:
    # Older lines name no source.
    outcome = RowOutcome(row["status"], row["reason"], row["detail"], row.get("source"))
    return RowRecord(RowKey(row["video_id"], row["view"]), outcome, row["sha256"])


def _host_name() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname()) or "host"


class Ledger:
    """Reads every writer's file in the folder, appends to its own."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self._bytes_read: dict[Path, int] = {}
        self._own_file: IO[bytes] | None = None

    def new_records(self) -> list[ShardRecord]:
        """Whole lines that were appended, by anyone, since the last call."""
        records: list[ShardRecord] = []
        for path in sorted(self.folder.glob("*.jsonl")):
            start = self._bytes_read.get(path, 0)
            if path.stat().st_size > start:
                with path.open("rb") as file:
                    file.seek(start)
                    data = file.read()
                found, num_good_bytes = self._decode(data, path, start)
                records += found
                self._bytes_read[path] = start + num_good_bytes
        return records

    def _decode(self, data: bytes, path: Path, start: int) -> tuple[list[ShardRecord], int]:
        """Records of the data, and how many bytes they fill; what remains is a torn last line."""
        records: list[ShardRecord] = []
        position = 0
        while position < len(data):
            end = data.find(b"\n", position)
            record = decode_line(data[position:end]) if end >= 0 else None
            if record is None:
                if 0 <= end < len(data) - 1:
                    raise StoreError(
                        f"{path} is damaged at byte {start + position}: a line does not match its checksum. "
                        "Restore the file from a copy, or move it away to extract its shards anew"
                    )
                break
            if record.fingerprint != self._fingerprint:
                raise StoreError(
                    f"{path} belongs to another store: spec {record.fingerprint[:12]}, here {self._fingerprint[:12]}. "
                    "Move the file away"
                )
            records.append(record)
            position = end + 1
        return records, position

    def append(self, record: ShardRecord) -> None:
        """Make the record durable. After an error nothing of it counts, and the next call begins another file."""
        file = self.claim()
        path = Path(file.name)
        start = self._bytes_read.get(path, 0)
        line = encode_line(record)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "short write to the ledger", str(path))
            os.fsync(file.fileno())
        except BaseException:
            # A torn line may only ever be the last one of its file, and an unsynced one must not look durable.
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), start)
            self.close()
            raise
        self._bytes_read[path] = start + len(line)

    def claim(self) -> IO[bytes]:
        """This writer's file, made and locked at the first call: others see a living writer before data is written."""
        if self._own_file is None:
            path = self.folder / f"{_host_name()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
            self._own_file = path.open("xb", buffering=0)
            lock(self._own_file, wait=True)
            fsync_path(self.folder)
        return self._own_file

    def recover(self) -> bool:
        """Cut the torn last lines that killed writers of this machine left. Returns whether a writer may be alive.

        Call it after `new_records`: only what was not readable then is looked at.
        """
        may_be_alive = False
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open("rb+") as file:
                if lock(file, wait=False) != "held":
                    may_be_alive = True
                elif path.name.rsplit("-", 2)[0] == _host_name():
                    # Elsewhere the lock may not reach; a torn line that stays is ignored all the same.
                    start = file.seek(self._bytes_read.get(path, 0))
                    data = file.read()
                    _, num_good_bytes = self._decode(data, path, start)
                    if num_good_bytes < len(data):
                        file.truncate(start + num_good_bytes)
                        os.fsync(file.fileno())
        return may_be_alive

    def close(self) -> None:
        """Free the lock on this writer's file."""
        if self._own_file is not None:
            self._own_file.close()
            self._own_file = None
