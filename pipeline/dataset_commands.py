"""`mastaf dataset`: scan, splits, check, exclude."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from episodes.checks import check_manifest
from episodes.datasets import Manifest, ManifestError, exclude, read_manifest, write_manifest
from episodes.published import published_manifest
from episodes.scan import parse_shares, scan_folder
from pipeline.console import say, shortened

SPLITS = ("train", "val", "test")
USUAL_WAY = 5


def scan_to_file(folder: Path, out: Path, split: str, seed: int) -> None:
    """Write the manifest of a folder and say what was found."""
    _refuse_existing(out)
    scan = scan_folder(folder, parse_shares(split), seed)
    write_manifest(scan.manifest, out)
    if scan.uses_split_folders:
        say(f"{folder} holds train, val and test: these are the splits")
    for names, what in (
        (scan.empty_classes, "class folders without a video, in no split"),
        (scan.ignored, "files or folders that are no video"),
        (scan.outside, "videos that are links out of the folder (training needs data.allow_outside = true)"),
    ):
        if names:
            say(f"{len(names)} {what}: {shortened(names)}")
    if scan.num_hidden:
        say(f"{scan.num_hidden} hidden files or folders skipped")
    _say_sizes(scan.manifest, out)


def splits_to_file(name: str, videos: Path, lists: Path | None, out: Path) -> None:
    """Write the manifest of a published protocol and say what is not on the disk."""
    _refuse_existing(out)
    published = published_manifest(name, videos, lists)
    write_manifest(published.manifest, out)
    for names, what in (
        (
            published.missing,
            "listed videos are not on the disk; they stay in the manifest, so that the split hash is everybody's",
        ),
        (published.missing_classes, "classes have no folder"),
        (published.unknown_folders, "folders are no class of the protocol"),
        (published.unknown_lists, "lists differ from the published ones"),
    ):
        if names:
            say(f"{len(names)} {what}: {shortened(names)}")
    if published.num_unlisted:
        say(f"{published.num_unlisted} videos on the disk are in no list")
    _say_sizes(published.manifest, out)


def check_file(path: Path, name: str | None, allow_overlap: bool) -> tuple[dict[str, Any], list[str], bool]:
    """Look at a manifest and its files.

    Returns:
        The report as a JSON-able dict, the same as readable lines, and whether nothing speaks against using it.
    """
    found = check_manifest(read_manifest(path, allow_outside=True), name)
    lines = [
        f"{split:<6} {size.classes:>4} classes {size.videos:>7} videos, {size.smallest_class} to {size.largest_class} a class"
        for split, size in found.splits.items()
    ]
    lines.append(f"split hash {found.split_hash}")
    if found.excluded:
        lines.append(f"{found.excluded} videos are excluded from all episodes")
    if found.missing:
        lines.append(f"{len(found.missing)} videos have no file: {shortened(found.missing)}")
    lines += [f"overlap: {overlap.kind} {overlap.name} is in {', '.join(overlap.splits)}" for overlap in found.overlaps]
    lines += [
        f"twice in one split: {' and '.join(duplicate.video_ids)} are {duplicate.path}"
        for duplicate in found.duplicates
    ]
    lines += [f"nearly the same class names: {', '.join(names)}" for names in found.similar_classes]
    if name is not None:
        differences = found.differences or ()
        lines += [f"differs from {name}: {difference}" for difference in differences] or [
            f"the counts are those of {name}"
        ]
    return found.to_dict(), lines, not found.missing and (allow_overlap or not found.overlaps)


def exclude_to_file(manifest_path: Path, store_path: str, out: Path) -> None:
    """Write a manifest without the videos that a store rejected.

    Raises:
        ManifestError: the store rejected nothing that the manifest holds.
    """
    # Imported here: the other commands need no store, and zarr takes a third of a second.
    from cache.open import open_store
    from cache.summary import failures

    _refuse_existing(out)
    manifest = read_manifest(manifest_path, allow_outside=True)
    known = {video.video_id for video in manifest.videos}
    with open_store(store_path) as store:
        reasons = {
            row["video_id"]: f"{row['reason']}: {row['detail']}" if row["detail"] else str(row["reason"])
            for row in failures(store)
            if row["status"] == "rejected" and row["video_id"] in known
        }
    if not reasons:
        raise ManifestError(f"{store_path} rejected no video of {manifest_path}; there is nothing to exclude.")
    smaller = exclude(manifest, reasons)
    write_manifest(smaller, out)
    for video_id, reason in reasons.items():
        say(f"excluded: {video_id}: {reason}")
    say(f"{len(reasons)} videos excluded; split hash {manifest.split_hash[:12]} -> {smaller.split_hash[:12]}")
    _say_sizes(smaller, out)


def _say_sizes(manifest: Manifest, out: Path) -> None:
    sizes = ", ".join(
        f"{split} {len(manifest.classes(split))} classes {len(manifest.videos_of(split))} videos" for split in SPLITS
    )
    say(f"{out}: {sizes}; split hash {manifest.split_hash[:12]}")
    few = [split for split in SPLITS if len(manifest.classes(split)) < USUAL_WAY]
    if few:
        say(
            f"note: fewer than {USUAL_WAY} classes in {', '.join(few)}: the usual 5-way episodes cannot be drawn there. "
            "Lower episodes.n_way, or give them more classes (dataset scan --split)"
        )


def _refuse_existing(out: Path) -> None:
    """Runs and stores depend on a manifest's split hash: one is never replaced by the way."""
    if out.exists():
        raise ManifestError(f"{out} exists already. Give another --out, or remove it first if no run depends on it.")
