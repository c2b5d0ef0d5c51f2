"""`repair`: put back what can be put back, and give up, openly, the shards that have to be extracted anew.

Documents come back from their other copy, files that follow from the plan are made again, bad lines of the ledger are taken
out, and damaged shards are dropped. Then the store is whole, but some of its rows are pending. Nothing else is touched.

`plan_repair` looks and changes nothing, so that a caller can ask whether the rows can be had again before `apply_repair` drops
them.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from cache.disk_store import DiskStore, MakeFormat
from cache.document import StoreDocument
from cache.errors import StoreError
from cache.files import Files, owner_of
from cache.inspection import Damage, inspect
from cache.ledger import Ledger, split_lines
from cache.records import ShardRecord
from cache.row_table import RowTable
from cache.rows import RowKey, RowRecord, Shard
from cache.verify import OnProgress, verify


@dataclass(frozen=True, slots=True)
class DamagedShard:
    """A committed shard whose files are not what they were."""

    index: int
    generation: int
    """Of its commit."""
    rows: tuple[RowRecord, ...]
    """What the ledger says of those of its rows that are in the store; some of them may still be readable."""
    why: str


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What `repair` would do."""

    document: StoreDocument
    damages: tuple[Damage, ...]
    damaged: tuple[DamagedShard, ...]
    pending: tuple[Shard, ...]
    """Shards that are pending, or are once the bad lines of the ledger are taken out."""
    given_up: tuple[RowRecord, ...]
    """Of rows in pending shards: what was committed before an earlier repair dropped it."""


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What `repair` found and did."""

    damages: tuple[Damage, ...]
    restored: tuple[str, ...]
    """Files that were written anew from what the store itself knows."""
    dropped: tuple[int, ...]
    """Shards that were committed and are pending now."""
    hashes: dict[RowKey, dict[str, str]]
    """Of the rows in dropped shards: array -> SHA-256 of what was there, to hold the new rows against."""


def repair(
    files: Files,
    make_format: Callable[[str], MakeFormat],
    num_threads: int = 2,
    on_progress: OnProgress = lambda done, total: None,
) -> RepairReport:
    """Make a damaged store whole.

    Raises:
        StoreError: a writer is alive, or both copies of a document are lost.
    """
    return apply_repair(files, make_format, plan_repair(files, make_format, num_threads, on_progress))


def plan_repair(
    files: Files,
    make_format: Callable[[str], MakeFormat],
    num_threads: int = 2,
    on_progress: OnProgress = lambda done, total: None,
) -> RepairPlan:
    """Find out what is damaged and what was there; nothing is changed.

    Raises:
        StoreError: a writer is alive, or both copies of a document are lost.
    """
    found = inspect(files)
    _refuse_company(files, found.document.store_id)
    damages = verify(files, make_format, True, num_threads, on_progress).damages
    damaged = []
    for index in sorted({damage.shard_index for damage in damages if damage.shard_index is not None}):
        record = found.table.records.get(index)
        if record is not None:
            why = "; ".join(f"{damage.file}: {damage.what}" for damage in damages if damage.shard_index == index)
            damaged.append(DamagedShard(index, record.generation, _rows_in_place(found.table, record), why))
    pending = found.table.pending()
    earlier = _latest_commits(files, found.document.store_id) if pending else {}
    given_up = [
        row for shard in pending if shard.index in earlier for row in _rows_in_place(found.table, earlier[shard.index])
    ]
    return RepairPlan(found.document, damages, tuple(damaged), tuple(pending), tuple(given_up))


def apply_repair(
    files: Files, make_format: Callable[[str], MakeFormat], plan: RepairPlan, kept: Collection[int] = ()
) -> RepairReport:
    """Do what was planned.

    Args:
        kept: damaged shards that are not dropped: they stay damaged, and their good rows stay readable.

    Raises:
        StoreError: a writer is alive.
    """
    _refuse_company(files, plan.document.store_id)
    restored = _restore_metadata(files)
    store = DiskStore(files, make_format(plan.document.backend), "a")  # writes what follows from the plan
    restored += [damage.file for damage in plan.damages if damage.part == "derived"]
    with store:
        hashes: dict[RowKey, dict[str, str]] = {}
        dropped = []
        for shard in plan.damaged:
            if shard.index not in kept and store.drop(shard.index, shard.why, shard.generation):
                hashes |= {row.key: row.sha256 for row in shard.rows}
                dropped.append(shard.index)
    return RepairReport(plan.damages, tuple(restored), tuple(dropped), hashes)


def _rows_in_place(table: RowTable, record: ShardRecord) -> tuple[RowRecord, ...]:
    """The rows of a commit that were neither removed nor planned anew since."""
    first = record.shard_index * table.shard_rows
    return tuple(row for position, row in enumerate(record.rows) if table.place(row.key) == first + position)


def _latest_commits(files: Files, store_id: str) -> dict[int, ShardRecord]:
    """The last commit of each shard, whether it was dropped or not; bad lines are passed over."""
    latest: dict[int, ShardRecord] = {}
    for name in sorted(Ledger(files, store_id).logs()):
        for line in split_lines(files.read(name)):
            record = line.record
            if isinstance(record, ShardRecord) and record.store_id == store_id:
                known = latest.get(record.shard_index)
                if known is None or record.generation > known.generation:
                    latest[record.shard_index] = record
    return latest


def _refuse_company(files: Files, store_id: str) -> None:
    alive = Ledger(files, store_id).others_alive()
    if alive:
        raise StoreError(
            f"{files.url} is being written by {', '.join(map(owner_of, alive))}; wait for its end, or stop it, and "
            "repair then"
        )


def _restore_metadata(files: Files) -> list[str]:
    with files.lock():
        found = inspect(files)
        bad = {damage.file for damage in found.damages}
        names = [name for name in found.good_documents if name in bad]
        for name in names:
            files.put(name, found.good_documents[name])
        for name, data in found.good_logs.items():
            files.put(name, data)
        return names + [name for name in found.good_logs if name in bad]
