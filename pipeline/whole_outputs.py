"""What the stages of a pipeline leave on disk, as hashes of its parts: whether a stage is finished is read off these."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache.errors import StoreError
from cache.open import FORMATS, open_files, open_store
from cache.verify import verify
from configs.load import parse_config
from episodes.datasets import Manifest
from pipeline.card_reading import CardError, read_card
from pipeline.checkpoint import content_digest, load_checkpoint
from pipeline.extraction import video_sources
from pipeline.extraction_feed import has_file, is_other_input, source_text
from pipeline.reextraction import is_reachable
from pipeline.run_files import is_begun, load_for_resume
from pipeline.weights_files import folder_sha256, plain_files

VERIFY_THREADS = 2


class OutputDamaged(ValueError):
    """An output is not whole."""


def run_hashes(folder: Path) -> dict[str, str]:
    """Of a run that has ended: its best weights, and its backbone where it trained one.

    Its config only has to be there: what it says of the weights stands in best.pt too.

    Raises:
        OutputDamaged: a file is missing, or the card is damaged or that of other weights.
        CheckpointError: a checkpoint cannot be read.
    """
    missing = [name for name in ("best.pt", "config.toml", "card.json") if not (folder / name).is_file()]
    if missing:
        raise OutputDamaged(f"{missing[0]} is missing")
    found = {"weights": content_digest(load_checkpoint(folder / "best.pt")["model"])}
    try:
        card = read_card(folder)
    except CardError as error:
        raise OutputDamaged(str(error)) from error
    if card.get("best_weights_sha256") != found["weights"]:
        raise OutputDamaged("card.json is that of other weights")
    if (folder / "backbone.pt").is_file():
        found["backbone"] = content_digest(load_checkpoint(folder / "backbone.pt")["state_dict"])
    return found


def is_mended_by_going_on(folder: Path, recorded: Mapping[str, str]) -> bool:
    """Whether going on with an ended run that is not whole trains nothing, but only writes what is missing around its weights.

    Args:
        folder: of the run.
        recorded: what `run_hashes` gave when it ended.
    """
    try:
        best = content_digest(load_checkpoint(folder / "best.pt")["model"])
        return best == recorded["weights"] and is_begun(folder) and _has_ended(load_for_resume(folder).content)
    except DAMAGE:
        return False


def _has_ended(checkpoint: Mapping[str, Any]) -> bool:
    episodes = parse_config(tomllib.loads(checkpoint["config"])).training.episodes
    return bool(checkpoint["progress"]["validated_episode"] >= episodes)


def store_hashes(folder: Path, is_full: bool) -> dict[str, str]:
    """Of a filled store: the fingerprint of its spec, and its content.

    Args:
        folder: of the store.
        is_full: also read every byte; otherwise only sizes of files are held against the ledger.

    Raises:
        OutputDamaged: rows are not extracted yet, or files are damaged.
        StoreError: it is no store that can be opened.
    """
    with open_store(folder) as store:
        num_pending = len(store.pending())
        found = {"fingerprint": store.spec.fingerprint, "content": store.content_hash()}
    report = verify(open_files(folder), FORMATS.__getitem__, is_full, VERIFY_THREADS)
    if not report.is_whole:
        first = report.damages[0]
        more = f", and {len(report.damages) - 1} more" if len(report.damages) > 1 else ""
        raise OutputDamaged(f"{first.file}: {first.what}{more}")
    if num_pending:
        raise OutputDamaged(f"{num_pending} shards are not extracted yet")
    return found


def files_hashes(folder: Path, num_files: int = 1) -> dict[str, str]:
    """Of a folder of plain files: all of them by name and content.

    Raises:
        OutputDamaged: there are fewer than `num_files`.
    """
    if len(plain_files(folder)) < num_files:
        raise OutputDamaged("files are missing")
    return {"files": folder_sha256(folder)}


def manifest_hashes(manifest: Manifest) -> dict[str, str]:
    """Of a manifest: what episodes are drawn from, and every row with the place of its file."""
    rows = [json.dumps(asdict(video), sort_keys=True) for video in manifest.videos]
    return {"split_hash": manifest.split_hash, "content": _hash(rows)}


def video_files_hash(manifest: Manifest, splits: Iterable[str], allow_outside: bool) -> str | None:
    """Of the sizes of the files of some splits, and the stretch of each that is used.

    None where a file cannot be reached: whether the others are what they were cannot be told without it.

    Args:
        manifest: names the files.
        splits: whose videos.
        allow_outside: whether they may lie outside of the manifest's root.
    """
    sources = video_sources(manifest, allow_outside)
    lines = []
    for split in splits:
        for video in manifest.videos_of(split):
            source = sources[video.video_id]
            text = source_text(source)
            if not has_file(text) and not is_reachable(source.path):
                return None
            lines.append(json.dumps([video.video_id, text]))
    return _hash(lines)


def changed_inputs(folder: Path, manifest: Manifest, allow_outside: bool) -> list[str]:
    """Videos of a store whose good rows were made from another file or stretch than the manifest names now, one line each.

    A store that cannot be read has none: that it is damaged is found elsewhere.
    """
    sources = video_sources(manifest, allow_outside)
    changed = {}
    try:
        with open_store(folder) as store:
            for row, outcome in store.outcomes(sources):
                if outcome is None or outcome.status == "rejected" or outcome.source is None:
                    continue
                now = source_text(sources[row.video_id])
                if is_other_input(outcome.source, now):
                    changed[row.video_id] = f"{row.video_id} (from {outcome.source}, now {now})"
    except DAMAGE:
        return []
    return list(changed.values())


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


DAMAGE = (OutputDamaged, StoreError, OSError, ValueError, KeyError)
"""What looking at an output raises when it is not what a stage left."""
