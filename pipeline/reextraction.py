"""Extraction from what a store says of its own origin: damaged shards are made anew with no more than the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cache.cube import Spec
from cache.document import StoreDocument, read_document
from cache.open import open_disk_store, open_files, store_kind
from cache.rows import RowRecord
from cache.store import RowKey, SpecMismatch
from configs.load import ConfigError, parse_config
from configs.schema import RunConfig
from episodes.datasets import ManifestError
from extract.build import BackboneError, build_backbone
from extract.decode import VideoSource
from pipeline.ancestry import classes_behind
from pipeline.console import progress, say
from pipeline.extraction import ChangedInput, build_spec, extract_videos, video_sources
from pipeline.extraction_feed import is_other_input, source_text
from pipeline.extraction_report import report_json, say_report
from pipeline.scoring import read_run
from pipeline.settings import SetupError
from pipeline.setup import choose_device, load_manifest, trained_backbone, with_absolute_paths

TABLES = ("data", "sampling", "backbone", "extraction", "store")
"""Tables of a config that extraction uses."""
SHOWN_VIDEOS = 3
"""That an error names; the others are counted."""


class Rebuilt(NamedTuple):
    """What `extract_videos` needs."""

    videos: list[VideoSource]
    backbone: nn.Module
    config: RunConfig


def build_extraction_backbone(config: RunConfig, from_run: Path | None) -> nn.Module:
    """The backbone of a config, or the trained one of an end-to-end run; on the CPU, in evaluation mode."""
    if from_run is None:
        return build_backbone(config.backbone, config.sampling)
    return trained_backbone(config, read_run(from_run, torch.device("cpu"))[1])


def make_origin(config: RunConfig, from_run: Path | None) -> dict[str, Any]:
    """What a store keeps about where its cubes come from, as a JSON object; its paths hold from any folder.

    Args:
        config: that the store is filled with.
        from_run: the run whose trained backbone it is.
    """
    resolved = with_absolute_paths(config).model_dump(mode="json", include=set(TABLES))
    seen = classes_behind(from_run / "best.pt" if from_run is not None else config.backbone.weights)
    return {
        "config": resolved,
        "from_run": str(from_run.resolve()) if from_run is not None else None,
        "seen_classes": seen.to_json(),
    }


def rebuild_for(
    store_path: str,
    document: StoreDocument,
    weights_override: str | None,
    manifest: Path,
    device: torch.device,
    allow_outside: bool = False,
) -> Rebuilt:
    """Videos, backbone (on the device) and config that a store was filled with; says which weights are loaded.

    Args:
        document: of the store; its origin is from `make_origin`.
        weights_override: where the weights are now, when they are no longer where they were.
        manifest: where the videos are now.
        allow_outside: whether they may lie outside of the manifest's root. The user's word, whatever the store says: it may
            come from elsewhere.

    Raises:
        SetupError: the store does not say enough, or the weights or the run are gone.
        SpecMismatch: what was built would give other numbers; every differing field is listed.
    """
    origin = document.origin
    config = _config_of(store_path, origin, weights_override, manifest, allow_outside)
    from_run = Path(origin["from_run"]) if origin["from_run"] and weights_override is None else None
    source = f"trained in {from_run}" if from_run is not None else f"with weights {config.backbone.weights}"
    say(f"extracting with the backbone {config.backbone.name} {source}")
    try:
        backbone = build_extraction_backbone(config, from_run).to(device)
    except (BackboneError, SetupError) as error:
        way_out = (
            ""
            if weights_override
            else " If they were moved, say where the weights (of a run: its backbone.pt) are with --weights."
        )
        raise SetupError(f"the backbone of {store_path} cannot be built: {error}{way_out}") from error
    _refuse_other_spec(store_path, document.spec, build_spec(config, backbone, device))
    return Rebuilt(_videos_of(store_path, origin, config), backbone, config)


def _videos_of(store_path: str, origin: dict[str, Any], config: RunConfig) -> list[VideoSource]:
    try:
        manifest = load_manifest(config)
    except ManifestError as error:
        if origin["config"]["data"].get("allow_outside") and not config.data.allow_outside:
            raise SetupError(
                f"{error}. {store_path} was made so; if that is to be trusted, add --allow-outside"
            ) from error
        raise
    return list(video_sources(manifest, config.data.allow_outside).values())


def _config_of(
    store_path: str, origin: dict[str, Any], weights: str | None, manifest: Path, allow_outside: bool
) -> RunConfig:
    try:
        tables = {name: dict(origin["config"][name]) for name in TABLES}
        tables["data"] |= {"manifest": str(manifest), "allow_outside": allow_outside}
        tables["store"]["path"] = store_path
        if weights is not None:
            tables["backbone"]["weights"] = weights
        return parse_config(tables)
    except (KeyError, TypeError, ValueError) as error:
        why = str(error) if isinstance(error, ConfigError) else "its origin is not recorded"
        raise SetupError(
            f"{store_path} does not tell how it was made ({why}). Finish it with the options that it was made with: "
            f"mastaf extract --manifest M --backbone NAME --weights W --store {store_path}"
        ) from error


def _refuse_other_spec(store_path: str, stored: Spec, rebuilt: Spec) -> None:
    differences = stored.differences(rebuilt)
    if differences:
        raise SpecMismatch(
            f"what {store_path} was made with cannot be had again: {'; '.join(differences)}. Use the weights and library "
            "versions that it was made with, or extract into another store"
        )


def rows_without_a_video(rows: Iterable[RowRecord], videos: Sequence[VideoSource]) -> list[RowKey]:
    """Those of the rows that cannot be made anew, since their videos are not in the manifest."""
    known = {video.video_id for video in videos}
    return [row.key for row in rows if row.key.video_id not in known]


def refuse_other_inputs(rows: Iterable[RowRecord], videos: Sequence[VideoSource]) -> None:
    """Hold what rows were made from against what there is now. Rejected rows may come from any file, a mended one too.

    Raises:
        SetupError: files of good rows are gone or out of reach.
        ChangedInput: good rows were made from other files or stretches.
    """
    by_id = {video.video_id: video for video in videos}
    stored = {
        row.key.video_id: row.outcome.source
        for row in rows
        if row.outcome.status != "rejected" and row.key.video_id in by_id
    }
    now = {video_id: source_text(by_id[video_id]) for video_id in stored}
    missing = [f"{video_id} ({by_id[video_id].path})" for video_id in stored if not is_reachable(by_id[video_id].path)]
    if missing:
        raise SetupError(
            f"the files of {len(missing)} videos that have to be extracted anew cannot be found: {_first(missing)}. Nothing was "
            "changed. Put them back (is a disk not mounted?), or take these videos out of the store with `mastaf store remove`"
        )
    changed = [
        f"{video_id} (stored from {source}, now {now[video_id]})"
        for video_id, source in stored.items()
        if source is not None and is_other_input(source, now[video_id])
    ]
    if changed:
        raise ChangedInput(
            f"{len(changed)} videos that have to be extracted anew were made from other input: {_first(changed)}. Nothing "
            "was changed. Give the manifest of the files that they were made from, or take these videos out of the store with "
            "`mastaf store remove`"
        )


def is_reachable(path: Path) -> bool:
    """Whether there is something at a path that can be looked at."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_VIDEOS} more" if len(names) > SHOWN_VIDEOS else ""
    return "; ".join(names[:SHOWN_VIDEOS]) + more


def finish_pending(
    store_path: str, manifest: Path, weights: str | None = None, device: str = "auto", allow_outside: bool = False
) -> dict[str, Any]:
    """Extract the rows of a store that are planned and not done, and nothing else; the report as a JSON-able dict.

    Raises:
        As `rebuild_for` and `extract_videos`.
    """
    chosen = choose_device(device)
    document = read_document(open_files(store_path))
    return extract_pending(
        store_path, rebuild_for(store_path, document, weights, manifest, chosen, allow_outside), chosen
    )


def extract_pending(store_path: str, rebuilt: Rebuilt, device: torch.device) -> dict[str, Any]:
    """`finish_pending` with what `rebuild_for` gave."""
    with (
        open_disk_store(store_path, store_kind(store_path, None), mode="a") as store,
        progress("extract") as on_progress,
    ):
        report = extract_videos(store, *rebuilt, device, only_pending=True, on_progress=on_progress)
    say_report(report, store_path)
    return report_json(report)
