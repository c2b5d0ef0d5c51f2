"""`mastaf extract`: from options to a filled store and its report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache.open import open_store
from configs.load import ConfigError, find_recipe, load_config
from configs.schema import RunConfig
from extract.build import build_backbone
from pipeline.console import progress, say
from pipeline.extraction import ExtractionReport, build_spec, extract_videos, video_sources
from pipeline.setup import SetupError, choose_device, load_manifest


def extract_to_store(
    manifest: Path | None,
    backbone: str | None,
    weights: str | None,
    store: Path | None,
    store_kind: str | None,
    recipe: str | None,
    from_run: Path | None,
    device: str,
    overrides: tuple[str, ...],
) -> dict[str, Any]:
    """Fill a store and say what happened; the report as a JSON-able dict."""
    config = _config(manifest, backbone, weights, store, store_kind, recipe, from_run, overrides)
    if not config.store.path:
        raise SetupError("no store is named. Give --store FOLDER.zarr.")
    if config.backbone.weights == "none":
        say("warning: --weights none: the backbone is untrained, its cubes say little about what is in a video")
    chosen = choose_device(device)
    videos = load_manifest(config)
    built = build_backbone(config.backbone, config.sampling).to(chosen)
    spec = build_spec(config, built, chosen)
    opened = open_store(
        config.store.path, kind=config.store.kind, spec=spec, mode="a",
        shard_rows=config.store.shard_rows, compression=config.store.compression,
    )  # fmt: skip
    sources = video_sources(videos)
    with opened, progress("extract") as on_progress:
        report = extract_videos(opened, list(sources.values()), built, config, chosen, on_progress=on_progress)
    _say_report(report, config.store.path)
    facts = asdict(report)
    facts["problems"] = [
        {"video_id": video_id, "status": outcome.status, "reason": outcome.reason, "detail": outcome.detail}
        for video_id, outcome in report.problems
    ]
    return {"store": str(config.store.path), "fingerprint": spec.fingerprint, **facts}


def _config(
    manifest: Path | None,
    backbone: str | None,
    weights: str | None,
    store: Path | None,
    store_kind: str | None,
    recipe: str | None,
    from_run: Path | None,
    overrides: tuple[str, ...],
) -> RunConfig:
    if recipe is not None and from_run is not None:
        raise ConfigError("--config and --from-run both give sampling and backbone; use one of them.")
    path = find_recipe(recipe) if recipe is not None else None
    tables: dict[str, dict[str, Any]] = {"data": {}, "backbone": {}, "store": {}}
    if from_run is not None:
        path = from_run / "config.toml"
        weights = weights or str(from_run / "backbone.pt")
        if not Path(weights).is_file():
            raise SetupError(
                f"{from_run} holds no trained backbone (backbone.pt); only end-to-end runs that have ended do."
            )
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
    return load_config(path, overrides, tables)


def _say_report(report: ExtractionReport, store: str) -> None:
    done = report.num_videos - report.num_skipped
    for video_id, outcome in report.problems:
        say(f"{outcome.status}: {video_id}: {outcome.reason}" + (f" ({outcome.detail})" if outcome.detail else ""))
    say(
        f"{report.num_videos} videos: {report.num_skipped} stored before, {report.num_ok} ok, {report.num_degraded} degraded, "
        f"{report.num_rejected} rejected; {done} in {report.seconds:.1f} s, {report.clips_per_second:.1f} clips/s, "
        f"bound by {report.bound_by}. Failures: mastaf store failures {store}"
    )
