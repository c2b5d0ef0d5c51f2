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
from cache.repair import RepairPlan, RepairReport
from cache.store import RowKey, StoreError
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
        say(f"{damage.part}: {damage.file}: {damage.what}" + (f"; rows {_names(damage.rows)}" if damage.rows else ""))
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
    path: str, manifest: Path | None, weights: str | None, device: str, num_workers: int, allow_outside: bool = False
) -> tuple[dict[str, Any], bool]:
    """Put back what the store itself knows, and extract anew what it does not; whether nothing is left to do.

    Without a manifest, damaged shards are dropped and their rows stay pending. With one, they are dropped only when it is known
    that each of their rows can be made again from the same input; a shard with videos that the manifest lacks is kept as it is.

    Raises:
        SetupError, SpecMismatch, ChangedInput: rows could not be made again as they were; nothing was changed.
    """
    from cache.repair import apply_repair, plan_repair

    files = _files(path)
    with progress("verify") as on_progress:
        plan = plan_repair(files, FORMATS.__getitem__, num_workers, on_progress)
    _say_damages(plan.damages)
    if not plan.damages:
        say("nothing was damaged")
    again, kept = None, frozenset[int]()
    if manifest is not None and (plan.pending or any(shard.rows for shard in plan.damaged)):
        again = _Again(path, plan, manifest, weights, device, allow_outside)
        kept = again.kept
    report = apply_repair(files, FORMATS.__getitem__, plan, kept)
    for name in report.restored:
        say(f"restored: {name}")
    facts: dict[str, Any] = {
        "store": path,
        "damages": [_damage_json(damage) for damage in report.damages],
        "restored": list(report.restored),
        "dropped_shards": list(report.dropped),
        "kept_shards": sorted(kept),
        "num_rows_pending": _num_pending_rows(path),
        "num_rows_changed": None,
        "num_rows_lost": None,
    }
    if again is not None and facts["num_rows_pending"]:
        facts |= again.extract(report)
    elif facts["num_rows_pending"]:
        say(f"{facts['num_rows_pending']} rows have to be extracted: mastaf store repair {path} --manifest M")
    return facts, not (facts["num_rows_pending"] or facts["num_rows_lost"] or kept)


class _Again:
    """Everything that the extraction of damaged and pending shards needs, made and checked before anything is dropped."""

    def __init__(
        self, path: str, plan: RepairPlan, manifest: Path, weights: str | None, device: str, allow_outside: bool
    ) -> None:
        from pipeline import reextraction
        from pipeline.setup import choose_device

        self._path = path
        self._device = choose_device(device)
        self._rebuilt = reextraction.rebuild_for(path, plan.document, weights, manifest, self._device, allow_outside)
        videos = self._rebuilt.videos
        unknown = {shard.index: reextraction.rows_without_a_video(shard.rows, videos) for shard in plan.damaged}
        self.kept = frozenset(index for index, rows in unknown.items() if rows)
        """Damaged shards that hold videos which the manifest lacks."""
        self._before = {row.key: row for row in plan.given_up}
        for shard in plan.damaged:
            if shard.index not in self.kept:
                self._before |= {row.key: row for row in shard.rows}
        reextraction.refuse_other_inputs(self._before.values(), videos)
        for index in sorted(self.kept):
            names = [key.video_id for key in unknown[index]]
            say(
                f"shard {index} stays as it is, with what can still be read of it: {len(names)} of its rows are of videos that "
                f"{manifest} lacks ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
            )

    def extract(self, report: RepairReport) -> dict[str, Any]:
        """Make the pending rows, and say how they differ from what they were; facts for the report."""
        from pipeline.reextraction import extract_pending

        extraction = extract_pending(self._path, self._rebuilt, self._device)
        with open_disk_store(self._path, store_kind(self._path, None)) as store:
            pending = store.pending()
            num_pending = sum(sum(store.wanted(shard)) for shard in pending)
            now = {key: store.outcome(key.video_id, key.view) for key in self._before}
            good = [key for key, row in self._before.items() if row.sha256 and now[key] is not None]
            lost = [key for key in good if (found := now[key]) is not None and found.status == "rejected"]
            changed = [key for key in good if key not in lost and store.row_hashes(key) != self._before[key].sha256]
        if lost:
            say(
                f"LOST: {len(lost)} rows were good and are rejected now: {_names(lost)}. See mastaf store failures {self._path}"
            )
        if changed:
            say(
                f"warning: {len(changed)} of {len(good)} rows differ in some bits from what they were (another machine, device or "
                f"library version than the one that made them?): {_names(changed)}"
            )
        left = {shard.index for shard in pending}
        say(
            f"repaired: {len(report.restored)} files restored, {len(set(report.dropped) - left)} of {len(report.dropped)} dropped "
            f"shards extracted anew; {num_pending} rows are pending"
        )
        return {
            "extraction": extraction,
            "num_rows_pending": num_pending,
            "num_rows_changed": len(changed),
            "num_rows_lost": len(lost),
        }


def _names(keys: Sequence[RowKey]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(f"{key.video_id} (view {key.view})" for key in keys[:3]) + more


def _num_pending_rows(path: str) -> int:
    with open_disk_store(path, store_kind(path, None)) as store:
        return sum(sum(store.wanted(shard)) for shard in store.pending())


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
