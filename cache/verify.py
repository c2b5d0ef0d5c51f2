"""`verify`: is every byte of a store what it was when it was committed?

Every file is covered: documents by their SHA-256 and a second copy, each line of the ledger by a checksum, the files that
follow from the plan by making them again, data files by size and checksum in the ledger, and each row by its SHA-256.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from cache.cube import sha256_of_row
from cache.disk_store import MakeFormat
from cache.files import Files
from cache.format import CHECKSUM, Format
from cache.inspection import Damage, Inspection, inspect
from cache.records import ShardRecord, checksum
from cache.row_table import RowTable
from cache.rows import RowKey

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` looked at and found."""

    is_full: bool
    """Whether the bytes of the data files were read, and not only their sizes."""
    num_shards: int
    """Committed shards."""
    num_rows: int
    """Rows of the store that are ok or degraded."""
    num_pending_shards: int
    """Planned, not committed: no damage, but not finished."""
    num_bytes: int
    """Bytes read."""
    damages: tuple[Damage, ...]
    notes: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """No damage was found."""
        return not self.damages


def verify(
    files: Files,
    make_format: Callable[[str], MakeFormat],
    is_full: bool = True,
    num_threads: int = 2,
    on_progress: OnProgress = lambda done, total: None,
) -> VerifyReport:
    """Check a whole store; nothing is changed.

    Args:
        make_format: backend name -> how its format is made.
        is_full: also read every data file; otherwise only their sizes are held against the ledger.
        num_threads: data files read at the same time.
        on_progress: called with (shards done, shards).
    """
    found = inspect(files)
    form = make_format(found.document.backend)(found.document, files)
    try:
        num_bytes = found.metadata_bytes + _check_derived(files, form, found)
        records = [found.table.records[index] for index in sorted(found.table.records)]
        sizes = _sizes(files, form)
        # Rows are found through the metadata: with damage there, checksums of whole files have to do.
        are_rows_readable = is_full and not any(damage.part == "derived" for damage in found.damages)

        def check(record: ShardRecord) -> tuple[list[Damage], int]:
            live = _live_rows(found, record)
            damages, size = _data_files(files, record, sizes, is_full, live)
            if are_rows_readable and not damages:
                damages += _rows(form, record, live)
            return damages, size

        with ThreadPoolExecutor(num_threads) as pool:
            checks = _in_order(pool, check, records)
            for done, (damages, size) in enumerate(checks, 1):
                found.damages += damages
                num_bytes += size
                on_progress(done, len(records))
    finally:
        form.close()
    return VerifyReport(
        is_full=is_full,
        num_shards=len(records),
        num_rows=sum(row.outcome.status != "rejected" for row in found.table.live_records()),
        num_pending_shards=len(found.table.pending()),
        num_bytes=num_bytes,
        damages=tuple(found.damages),
        notes=tuple(found.notes),
    )


def _check_derived(files: Files, form: Format, found: Inspection) -> int:
    """Compare the files that follow from the plan, and note damages; how many bytes were read."""
    num_bytes = 0
    differing: dict[str, bytes | None] = {}
    for name, wanted in form.derived(found.table):
        data = _content(files, name)
        num_bytes += len(data or b"")
        if data != wanted:
            differing[name] = data
    earlier = _earlier(form, found) if differing else {}
    foreign: set[str] = set()
    for name, data in differing.items():
        if data == earlier.get(name):
            found.notes.append(
                f"{name}: as it was before the plan's last step; the next opening for writing brings it up to date"
            )
        elif data is not None and _content(files, name + CHECKSUM) == checksum(data).encode("ascii") + b"\n":
            foreign.add(name + CHECKSUM)
            found.notes.append(
                f"{name}: whole, but written by another version of its library, or before the plan grew; "
                "the next opening for writing brings it up to date"
            )
        elif name not in foreign:
            what = "missing" if data is None else "not what follows from the plan"
            found.damages.append(Damage("derived", name, what))
    return num_bytes


def _earlier(form: Format, found: Inspection) -> dict[str, bytes]:
    """What followed from the plan before its last step: a writer that grows the store, or was killed then, has it half replaced."""
    if not found.segments:
        return {}
    table = RowTable(found.document.shard_rows)
    for segment in found.segments[:-1]:
        table.add_segment(segment)
    return dict(form.derived(table))


def _content(files: Files, name: str) -> bytes | None:
    try:
        return files.read(name)
    except FileNotFoundError:
        return None


def _sizes(files: Files, form: Format) -> dict[str, int]:
    folders = {name.rsplit("/", 1)[0] for name in form.file_names(0)}
    return {name: size for folder in folders for name, size in files.sizes(folder).items()}


def _in_order(
    pool: ThreadPoolExecutor,
    check: Callable[[ShardRecord], tuple[list[Damage], int]],
    records: Iterable[ShardRecord],
) -> Iterator[tuple[list[Damage], int]]:
    """Results in order, with a bounded number of shards in memory."""
    remaining = iter(records)
    waiting = [pool.submit(check, record) for record in islice(remaining, 8)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(check, record) for record in islice(remaining, 1)]


def _live_rows(found: Inspection, record: ShardRecord) -> tuple[RowKey, ...]:
    first = record.shard_index * found.table.shard_rows
    return tuple(
        row.key
        for position, row in enumerate(record.rows)
        if row.outcome.status != "rejected" and found.table.place(row.key) == first + position
    )


def _data_files(
    files: Files, record: ShardRecord, sizes: dict[str, int], is_full: bool, live: tuple[RowKey, ...]
) -> tuple[list[Damage], int]:
    """Damages of a shard's files, and how many bytes were read."""
    damages, num_bytes = [], 0
    for name, file in record.files.items():
        what = None
        if file is None:
            what = "there is a file, although every row of the shard was rejected" if name in sizes else None
        elif name not in sizes:
            what = "missing"
        elif sizes[name] != file.num_bytes:
            what = f"has {sizes[name]} bytes instead of {file.num_bytes}"
        elif is_full:
            data = files.read(name)
            num_bytes += len(data)
            what = None if checksum(data) == file.crc32 else "its bytes do not match the checksum in the ledger"
        if what is not None:
            damages.append(Damage("data", name, what, record.shard_index, live))
    return damages, num_bytes


def _rows(form: Format, record: ShardRecord, live: tuple[RowKey, ...]) -> list[Damage]:
    """Damages of a shard whose files are what was written: do they also hold the rows that were committed?"""
    names = sorted({name for row in record.rows for name in row.sha256})
    file = next((name for name, size in record.files.items() if size is not None), "")
    bad: set[RowKey] = set()
    for name in names:
        try:
            block = form.decode(record.shard_index, name)
        # Codecs and metadata raise many types; each means that these rows cannot be had.
        except Exception as error:
            return [Damage("data", file, f"cannot be decoded: {error}", record.shard_index, live)]
        for row, values in zip(record.rows, block, strict=False):
            if name in row.sha256 and sha256_of_row(values) != row.sha256[name]:
                bad.add(row.key)
    return (
        [Damage("data", file, "rows differ from their SHA-256", record.shard_index, tuple(sorted(bad)))] if bad else []
    )
