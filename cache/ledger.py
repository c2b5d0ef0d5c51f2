"""The ledger: what is done, the only truth about which rows are ready.

Each writer has its own log, `ledger/HOST-PID-RANDOM.jsonl`. A killed writer can leave its last line torn: readers ignore it,
and nobody but its writer ever appends to a log.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cache.errors import StoreDamaged
from cache.files import Files, Log, log_of
from cache.records import Record, decode_line, encode_line

FOLDER = "ledger"
HOLE = bytes(8)
"""Zeros that no line holds: blocks of a file that had got its length, but not its content, when the power went."""
ENDING = ".jsonl"


@dataclass(frozen=True, slots=True)
class Line:
    """What one line of a log says."""

    start: int
    """Its first byte within the data looked at."""
    data: bytes
    """Without the newline."""
    record: Record | None
    """None when it does not match its checksum."""
    is_torn: bool
    """Cut by a kill: the end of the log, without a newline, and not a whole line but for its newline."""


def split_lines(data: bytes) -> Iterator[Line]:
    """Every line of a log, good, torn or damaged."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        line = data[start:] if end < 0 else data[start:end]
        # The end of a log without a newline was torn by a kill, unless only its newline has flipped. A power cut may leave a hole.
        is_torn = (end < 0 and decode_line(line[:-1]) is None) or (start + len(line) + 1 >= len(data) and HOLE in line)
        yield Line(start, line, decode_line(line) if end >= 0 else None, is_torn)
        start += len(line) + 1


class Ledger:
    """Reads every writer's log, appends to its own."""

    def __init__(self, files: Files, store_id: str) -> None:
        self._files = files
        self._store_id = store_id
        self._bytes_read: dict[str, int] = {}
        self._own: Log | None = None

    def logs(self) -> dict[str, int]:
        """Names of all writers' logs -> bytes."""
        return {name: size for name, size in self._files.sizes(FOLDER).items() if name.endswith(ENDING)}

    def new_records(self) -> list[Record]:
        """Whole lines that were appended, by anyone, since the last call.

        Raises:
            StoreDamaged: a line does not match its checksum and was not torn by a kill, or belongs to another store.
        """
        records: list[Record] = []
        bytes_read: dict[str, int] = {}
        for name, size in sorted(self.logs().items()):
            start = self._bytes_read.get(name, 0)
            if size > start:
                found, num_good_bytes = self._good_lines(self._files.read(name, start), name, start)
                records += found
                bytes_read[name] = start + num_good_bytes
        # Only now: what an error kept from being handed over is read again.
        self._bytes_read |= bytes_read
        return records

    def _good_lines(self, data: bytes, name: str, start: int) -> tuple[list[Record], int]:
        """Records of the data, and how many bytes they fill; what remains is a torn last line."""
        records: list[Record] = []
        for line in split_lines(data):
            if line.record is None:
                if not line.is_torn:
                    raise StoreDamaged(
                        f"{self._files.path_of(name)} is damaged at byte {start + line.start}: a line does not match its "
                        f"checksum. Mend the store: mastaf store repair {self._files.url}"
                    )
                return records, line.start
            if line.record.store_id != self._store_id:
                raise StoreDamaged(
                    f"{self._files.path_of(name)} belongs to another store ({line.record.store_id}, here "
                    f"{self._store_id}). Move the file away"
                )
            records.append(line.record)
        return records, len(data)

    def append(self, record: Record) -> None:
        """Make the record durable. After an error nothing of it counts, and the next call begins another log."""
        log = self.claim()
        line = encode_line(record)
        try:
            log.append(line)
        except BaseException:
            self.close()
            raise
        self._bytes_read[log.name] = self._bytes_read.get(log.name, 0) + len(line)

    def claim(self) -> Log:
        """This writer's log, made at the first call: others see a living writer before data is written."""
        if self._own is None:
            # Under the lock: whoever removes litter there, having seen no living writer, must not meet a new one's files.
            with self._files.lock():
                self._own = self._files.new_log(FOLDER)
        return self._own

    @property
    def own_name(self) -> str | None:
        """Name of this writer's log; None before `claim`."""
        return None if self._own is None else self._own.name

    def beat(self) -> None:
        """Show that this writer is alive."""
        own = self._own
        if own is not None:
            own.beat()

    def others_alive(self) -> list[str]:
        """Logs of writers, other than this one, that are alive."""
        logs = sorted({log_of(name) for name in self.logs()})
        return [name for name in logs if name != self.own_name and self._files.is_alive(name)]

    def cut_torn_lines(self) -> None:
        """Cut the torn last lines that killed writers left. Call it after `new_records`."""
        for name, size in self.logs().items():
            start = self._bytes_read.get(name, 0)
            if size > start and not self._files.is_alive(name):
                _, num_good_bytes = self._good_lines(self._files.read(name, start), name, start)
                if start + num_good_bytes < size:
                    self._files.cut_log(name, start + num_good_bytes)

    def close(self) -> None:
        """This writer is gone."""
        if self._own is not None:
            self._own.close()
            self._own = None
