"""`mastaf store verify | repair | remove | convert`: from options to what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache.cube import CUBE_DTYPES
from cache.files import Files
from cache.inspection import Damage
from cache.open import FORMATS, is_store, open_disk_store, open_files, store_kind
from cache.repair import RepairReport
from cache.store import StoreError
from cache.verify import VerifyReport
from pipeline.console import progress, say

SHOWN_DAMAGES = 20


def _files(path: str) -> Files:
    files = open_files(path)
    if not is_store(files):
        raise StoreError(f"there is no store at {path}; check the path")
    return files


def verify_store(path: str, is_fast: bool, num_workers: int) -> tuple[dict[str, Any], bool]:
    """Check every byte of a store and say what is wrong; the report as a JSON-able dict, and whether all is well."""
    from cache.verify import verify

    with progress("verify") as on_progress:
        report = verify(_files(path), FORMATS.__getitem__, not is_fast, num_workers, on_progress)
    _say_damages(report.damages)
    for note in report.notes:
        say(f"note: {note}")
    say(_verdict(path, report))
    facts = asdict(report)
    facts["damages"] = [_damage_json(damage) for damage in report.damages]
    return {"store": path, "is_whole": report.is_whole, **facts}, report.is_whole


def _verdict(path: str, report: VerifyReport) -> str:
    read = "every byte read" if report.is_full else "sizes of data files compared, their bytes not read"
    counts = f"{report.num_shards} shards, {report.num_rows} rows, {report.num_bytes:,} bytes; {read}"
    unfinished = f"; {report.num_pending_shards} shards are planned and not extracted yet" * (
        report.num_pending_shards > 0
    )
    if report.is_whole:
        return f"whole: {counts}{unfinished}"
    return (
        f"DAMAGED in {len(report.damages)} places: {counts}{unfinished}. Mend: mastaf store repair {path} --manifest M"
    )


def _say_damages(damages: Sequence[Damage]) -> None:
    for damage in damages[:SHOWN_DAMAGES]:
        rows = [f"{key.video_id} (view {key.view})" for key in damage.rows[:3]]
        more = f" and {len(damage.rows) - 3} more" if len(damage.rows) > 3 else ""
        say(f"{damage.part}: {damage.file}: {damage.what}" + (f"; rows {', '.join(rows)}{more}" if rows else ""))
    if len(damages) > SHOWN_DAMAGES:
        say(f"... and {len(damages) - SHOWN_DAMAGES} more; all of them with --json")


def _damage_json(damage: Damage) -> dict[str, Any]:
    return {
        "part": damage.part,
        "file": damage.file,
        "what": damage.what,
        "shard": damage.shard_index,
        "rows": [[key.video_id, key.view] for key in damage.rows],
    }


def repair_store(
    path: str, manifest: Path | None, weights: str | None, device: str, num_workers: int
) -> tuple[dict[str, Any], bool]:
    """Put back what the store itself knows, then extract anew what it does not; whether nothing is left to do."""
    from cache.repair import repair

    with progress("verify") as on_progress:
        report = repair(_files(path), FORMATS.__getitem__, num_workers, on_progress)
    _say_damages(report.damages)
    for name in report.restored:
        say(f"restored: {name}")
    if not report.damages:
        say("nothing was damaged")
    pending = _num_pending_rows(path)
    facts: dict[str, Any] = {
        "store": path,
        "damages": [_damage_json(damage) for damage in report.damages],
        "restored": list(report.restored),
        "dropped_shards": list(report.dropped),
        "num_rows_pending": pending,
        "num_rows_changed": None,
    }
    if manifest is None or not pending:
        if pending:
            say(f"{pending} rows have to be extracted: mastaf store repair {path} --manifest M")
        return facts, not pending
    from pipeline.reextraction import finish_pending

    facts["extraction"] = finish_pending(path, manifest, weights, device)
    facts["num_rows_pending"] = _num_pending_rows(path)
    facts["num_rows_changed"] = changed = _num_changed(path, report)
    if changed:
        say(
            f"warning: {changed} of {len(report.hashes)} rows differ in some bits from what they were (another machine, "
            "device or library version than the one that made them?)"
        )
    say(f"repaired: {len(report.restored)} files restored, {len(report.dropped)} shards extracted anew")
    return facts, not facts["num_rows_pending"]


def _num_pending_rows(path: str) -> int:
    with open_disk_store(path, store_kind(path, None)) as store:
        return sum(sum(store.wanted(shard)) for shard in store.pending())


def _num_changed(path: str, report: RepairReport) -> int:
    with open_disk_store(path, store_kind(path, None)) as store:
        return sum(store.row_hashes(key) != hashes for key, hashes in report.hashes.items() if hashes)


def remove_from_store(path: str, video_ids: Sequence[str], listed: Path | None) -> dict[str, Any]:
    """Take videos out of a store; its shards stay as they are."""
    names = list(video_ids)
    if listed is not None:
        names += [line for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise StoreError("no video is named; give ids, or a file with one id per line after --from")
    with open_disk_store(path, store_kind(path, None), mode="a") as store:
        store.remove(names)
        left = len(store.ids())
    say(f"removed {len(names)} videos, {left} are left; `mastaf store convert` into another store gives the space back")
    return {"store": path, "num_removed": len(names), "num_videos": left}


def convert_store(
    source: str, target: str, kind: str | None, dtype: str | None, shard_rows: int | None, compression: str
) -> dict[str, Any]:
    """Copy a store into another backend, number type or layout; the report as a JSON-able dict."""
    from cache.convert import convert

    if dtype is not None and dtype not in CUBE_DTYPES:
        raise StoreError(f"dtype {dtype!r}: allowed are {', '.join(CUBE_DTYPES)}")
    with open_disk_store(source, store_kind(source, None)) as opened, progress("convert") as on_progress:
        report = convert(opened, target, kind, dtype, shard_rows, compression, on_progress)
        is_same = report.content_hash == opened.content_hash()
    if report.num_rows_left_out:
        say(f"warning: {report.num_rows_left_out} rows are not extracted yet and were left out")
    if report.num_overflowed:
        say(f"warning: {report.num_overflowed} rows hold values too large for {dtype}; they are rejected as not_finite")
    say(
        f"{report.num_rows} rows in {target}; content hash "
        + ("equal to that of the source" if is_same else f"{report.content_hash[:12]} (other numbers or fewer rows)")
    )
    return {"source": source, "store": target, **asdict(report)}
