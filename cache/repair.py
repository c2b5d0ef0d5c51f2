"""`repair`: put back what can be put back, and give up, openly, the shards that have to be extracted anew.

Documents come back from their other copy, files that follow from the plan are made again, bad lines of the ledger are taken
out, and damaged shards are dropped. Then the store is whole, but some of its rows are pending. Nothing else is touched.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cache.disk_store import DiskStore, MakeFormat
from cache.errors import StoreError
from cache.files import Files, owner_of
from cache.inspection import Damage, inspect
from cache.ledger import Ledger
from cache.rows import RowKey
from cache.verify import OnProgress, verify


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
    found = inspect(files)
    _refuse_company(files, found.document.store_id)
    report = verify(files, make_format, True, num_threads, on_progress)
    restored = _restore_metadata(files)
    store = DiskStore(files, make_format(found.document.backend), "a")  # writes what follows from the plan
    restored += [damage.file for damage in report.damages if damage.part == "derived"]
    with store:
        hashes, dropped = {}, []
        for index in sorted({damage.shard_index for damage in report.damages if damage.shard_index is not None}):
            why = "; ".join(f"{d.file}: {d.what}" for d in report.damages if d.shard_index == index)
            for row in store.drop(index, why):
                hashes[row.key] = row.sha256
            dropped.append(index)
    return RepairReport(report.damages, tuple(restored), tuple(dropped), hashes)


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
