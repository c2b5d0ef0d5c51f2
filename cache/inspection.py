"""What can be read of a store that may be damaged: either copy of a document will do, bad lines are noted and passed over."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from cache.disk_store import matching_record
from cache.document import SPEC, Plan, StoreDocument, copy_of, segment_from_json, unseal
from cache.errors import StoreDamaged, StoreError
from cache.files import Files, owner_of
from cache.ledger import ENDING, FOLDER, split_lines
from cache.records import Record, ShardRecord
from cache.row_table import RowTable
from cache.rows import RowKey, Segment

Part = Literal["spec", "plan", "ledger", "derived", "data"]


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong with a store."""

    part: Part
    file: str
    """Name relative to the store."""
    what: str
    """A sentence for a person."""
    shard_index: int | None = None
    """The shard that has to be made anew, where it is known."""
    rows: tuple[RowKey, ...] = ()
    """Rows of the store that cannot be read."""


@dataclass(slots=True)
class Inspection:
    """A store as far as it can be read."""

    document: StoreDocument
    table: RowTable
    segments: list[Segment] = field(default_factory=list)
    """The steps of the plan."""
    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is not whole but no damage either: lines that killed writers left torn."""
    good_documents: dict[str, bytes] = field(default_factory=dict)
    """Name of a document's file, or of its copy -> the bytes it should hold."""
    good_logs: dict[str, bytes] = field(default_factory=dict)
    """Name of a log with bad lines -> its bytes without them."""
    metadata_bytes: int = 0


def inspect(files: Files) -> Inspection:
    """Read the documents and the ledger of a store.

    Raises:
        StoreDamaged: both copies of a document are lost; only a backup helps then.
    """
    damages: list[Damage] = []
    documents: dict[str, bytes] = {}
    data = _either_copy(files, SPEC, "spec", damages, documents)
    document = StoreDocument.from_json(data, files.path_of(SPEC))
    found = Inspection(document, RowTable(document.shard_rows), damages=damages, good_documents=documents)
    # Records first: whoever committed a shard had planned it before.
    records = list(_records(files, found))
    names = files.sizes("ledger")
    while (name := Plan.name(len(found.segments))) in names or copy_of(name) in names:
        data = _either_copy(files, name, "plan", damages, documents)
        found.segments.append(segment_from_json(data, document.store_id, files.path_of(name)))
        found.table.add_segment(found.segments[-1])
    found.metadata_bytes = sum(map(len, documents.values())) + sum(names.values())
    for record_file, record in records:
        _take_in(files, found, record_file, record)
    return found


def _either_copy(
    files: Files, name: str, part: Part, damages: list[Damage], documents: dict[str, bytes]
) -> dict[str, object]:
    good: bytes | None = None
    for copy in (name, copy_of(name)):
        try:
            data = files.read(copy)
        except FileNotFoundError:
            damages.append(Damage(part, copy, "missing"))
            continue
        if unseal(data) is None:
            damages.append(Damage(part, copy, "its content does not match its SHA-256"))
        elif good is None:
            good = data
        elif data != good:
            damages.append(Damage(part, copy, f"whole, but not equal to {name}"))
    document = None if good is None else unseal(good)
    if good is None or document is None:
        raise StoreDamaged(
            f"{files.path_of(name)} and its copy are both lost or damaged; put one of them back from a backup, "
            "or extract into a new store"
        )
    documents[name] = documents[copy_of(name)] = good
    return document


def _records(files: Files, found: Inspection) -> Iterator[tuple[str, Record]]:
    for name in sorted(files.sizes(FOLDER)):
        if not name.endswith(ENDING):
            continue
        data, good = files.read(name), bytearray()
        is_cut = False
        for line in split_lines(data):
            whole = data[line.start : line.start + len(line.data) + 1]
            if line.record is None and line.is_torn:
                is_cut = True
                if not files.is_alive(name):
                    found.notes.append(
                        f"{name}: the last line was cut off when {owner_of(name)} was killed; its shard was not committed"
                    )
            elif line.record is None:
                is_cut = True
                found.damages.append(
                    Damage("ledger", name, f"the line at byte {line.start} does not match its checksum")
                )
            elif line.record.store_id != found.document.store_id:
                is_cut = True
                found.damages.append(Damage("ledger", name, f"the line at byte {line.start} belongs to another store"))
            else:
                good += whole
                yield name, line.record
        if is_cut:
            found.good_logs[name] = bytes(good)


def _take_in(files: Files, found: Inspection, file: str, record: Record) -> None:
    try:
        if isinstance(record, ShardRecord):
            found.table.check_rows(record)
        other = found.table.take_in(record)
    except (StoreError, IndexError) as error:
        found.damages.append(Damage("ledger", file, f"a line does not fit the plan: {error}", record.shard_index))
        return
    if other is not None and isinstance(record, ShardRecord):
        found.table.records[record.shard_index] = matching_record(files, other, record)
        found.notes.append(f"shard {record.shard_index} was committed twice; the commit that the files match counts")
