"""`mastaf extract`: from options to a filled store and its report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from cache.document import read_document
from cache.open import is_address, open_files, open_store
from cache.store import StoreError
from configs.load import ConfigError, find_recipe, load_config
from configs.schema import RunConfig
from extract.decode import VideoSource
from pipeline.console import progress, say
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.extraction_report import report_json, say_report
from pipeline.reextraction import build_extraction_backbone, make_origin
from pipeline.settings import SetupError
from pipeline.setup import choose_device, load_manifest
from pipeline.shares import Share


def extract_to_store(
    manifest: Path | None,
    backbone: str | None,
    weights: str | None,
    store: str | None,
    store_kind: str | None,
    recipe: str | None,
    from_run: Path | None,
    device: str,
    overrides: tuple[str, ...],
    retry_failed: bool = False,
    share: Share | None = None,
) -> dict[str, Any]:
    """Fill a store and say what happened; the report as a JSON-able dict."""
    config = extract_config(manifest, backbone, weights, store, store_kind, recipe, from_run, overrides)
    if from_run is None and config.backbone.weights == "none":
        say("warning: weights = none: the backbone is untrained, its cubes say little about what is in a video")
    chosen = choose_device(device)
    videos = wanted_videos(config)
    # The config of --from-run still names the weights that the run began with.
    run = from_run if weights is None else None
    built = build_extraction_backbone(config, run).to(chosen)
    spec = build_spec(config, built, chosen)
    opened = open_store(
        str(config.store.path),
        kind=config.store.kind,
        spec=spec,
        mode="a",
        shard_rows=config.store.shard_rows,
        compression=config.store.compression,
        origin=make_origin(config, run),
    )
    with opened, progress("extract") as on_progress:
        report = extract_videos(
            opened, videos, built, config, chosen, share=share, retry=retry_failed, on_progress=on_progress
        )
    say_report(report, str(config.store.path))
    return {"store": str(config.store.path), "fingerprint": spec.fingerprint, **report_json(report)}


def wanted_videos(config: RunConfig) -> list[VideoSource]:
    """What the manifest of a config names, but for excluded videos."""
    manifest = load_manifest(config)
    sources = video_sources(manifest, config.data.allow_outside)
    return [sources[video.video_id] for video in manifest.videos if not video.excluded]


def extract_config(
    manifest: Path | None,
    backbone: str | None,
    weights: str | None,
    store: str | None,
    store_kind: str | None,
    recipe: str | None,
    from_run: Path | None,
    overrides: tuple[str, ...],
) -> RunConfig:
    """The config that the options of `mastaf extract` make.

    Raises:
        ConfigError, SetupError: they contradict each other, or something is not named.
    """
    if backbone is not None and from_run is not None:
        raise ConfigError("--from-run takes the run's own backbone; leave --backbone out.")
    if recipe is not None and from_run is not None:
        raise ConfigError("--config and --from-run both give sampling and backbone; use one of them.")
    path = find_recipe(recipe) if recipe is not None else None
    tables: dict[str, dict[str, Any]] = {"data": {}, "backbone": {}, "store": {}}
    if from_run is not None:
        path = from_run / "config.toml"
        if not (from_run / "backbone.pt").is_file():
            raise _without_backbone(from_run)
    elif recipe is None and backbone is None:
        raise SetupError(
            "no backbone is named. Give --backbone NAME (see `mastaf list backbones`), --config RECIPE or --from-run RUN."
        )
    for table, key, value in (
        ("data", "manifest", manifest),
        ("backbone", "name", backbone),
        ("backbone", "weights", weights),
        ("store", "path", store),
        ("store", "kind", store_kind),
    ):
        if value is not None:
            tables[table][key] = str(value)
    config = load_config(path, overrides, tables)
    if not config.store.path:
        raise SetupError("no store is named. Give --store FOLDER.zarr.")
    if config.store.kind == "memory":
        raise SetupError("a store in memory would be gone when this command ends. Give --store FOLDER.zarr.")
    return config


def _without_backbone(run: Path) -> SetupError:
    """What to do about a run of --from-run that has no backbone.pt."""
    if not (run / "config.toml").is_file():
        return SetupError(
            f"{run} holds no run (no config.toml). Give the folder of an end-to-end or classification run."
        )
    config = load_config(run / "config.toml")
    if config.training.mode == "cached":
        return SetupError(
            f'{run} has no backbone of its own: with training.mode = "cached" it has learned a head on a store. '
            f"{_maker_of(config.store.path)}"
        )
    return SetupError(
        f"{run} holds no backbone.pt, which end-to-end and classification runs have when they have ended. Go on with "
        "`mastaf train` and --resume: an ended run trains nothing more, and writes it anew."
    )


def _maker_of(store_path: str | None) -> str:
    """How to extract with the backbone that filled a store, as far as the store tells."""
    unknown = "Extract with the run that filled the store (--from-run), or with --backbone NAME and --weights W."
    if not store_path or is_address(store_path) or not Path(store_path).exists():
        return unknown
    try:
        origin = read_document(open_files(store_path)).origin
        if origin.get("from_run"):
            return f"Extract with the run that filled {store_path}: --from-run {shlex.quote(origin['from_run'])}"
        name, weights = (shlex.quote(origin["config"]["backbone"][key]) for key in ("name", "weights"))
    except (StoreError, OSError, KeyError, TypeError):
        return unknown  # this is advice within another error
    return f"Extract with what filled {store_path}: --backbone {name} --weights {weights}"
