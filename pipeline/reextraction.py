"""Extraction from what a store says of its own origin: damaged shards are made anew with no more than the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cache.cube import Spec
from cache.document import read_document
from cache.open import open_disk_store, open_files, store_kind
from cache.store import SpecMismatch
from configs.load import ConfigError, parse_config
from configs.schema import RunConfig
from extract.build import BackboneError, build_backbone
from extract.decode import VideoSource
from pipeline.console import progress
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.extraction_report import report_json, say_report
from pipeline.scoring import read_run
from pipeline.settings import SetupError
from pipeline.setup import choose_device, load_manifest, trained_backbone, with_absolute_paths

TABLES = ("data", "sampling", "backbone", "extraction", "store")
"""Tables of a config that extraction uses."""


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
    return {"config": resolved, "from_run": str(from_run.resolve()) if from_run is not None else None}


def rebuild_for(
    store_path: str, origin: dict[str, Any], weights_override: str | None, manifest: Path, device: torch.device
) -> Rebuilt:
    """Videos, backbone (on the device) and config that a store was filled with.

    Args:
        origin: from `make_origin`.
        weights_override: where the weights are now, when they are no longer where they were.
        manifest: where the videos are now.

    Raises:
        SetupError: the store does not say enough, or the weights or the run are gone.
        SpecMismatch: what was built would give other numbers; every differing field is listed.
    """
    config = _config_of(store_path, origin, weights_override, manifest)
    from_run = Path(origin["from_run"]) if origin["from_run"] and weights_override is None else None
    try:
        backbone = build_extraction_backbone(config, from_run).to(device)
    except BackboneError as error:
        way_out = "" if weights_override else " If they were moved, say where the weights are with --weights."
        raise SetupError(f"the backbone of {store_path} cannot be built: {error}{way_out}") from error
    spec = read_document(open_files(store_path)).spec
    _refuse_other_spec(store_path, spec, build_spec(config, backbone, device))
    videos = video_sources(load_manifest(config), config.data.allow_outside)
    return Rebuilt(list(videos.values()), backbone, config)


def _config_of(store_path: str, origin: dict[str, Any], weights: str | None, manifest: Path) -> RunConfig:
    try:
        tables = {name: dict(origin["config"][name]) for name in TABLES}
        tables["data"]["manifest"] = str(manifest)
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


def finish_pending(store_path: str, manifest: Path, weights: str | None = None, device: str = "auto") -> dict[str, Any]:
    """Extract the rows of a store that are planned and not done, and nothing else; the report as a JSON-able dict.

    Raises:
        As `rebuild_for` and `extract_videos`.
    """
    chosen = choose_device(device)
    with open_disk_store(store_path, store_kind(store_path, None), mode="a") as store:
        rebuilt = rebuild_for(store_path, store.origin, weights, manifest, chosen)
        with progress("extract") as on_progress:
            report = extract_videos(store, *rebuilt, chosen, only_pending=True, on_progress=on_progress)
    say_report(report, store_path)
    return report_json(report)
