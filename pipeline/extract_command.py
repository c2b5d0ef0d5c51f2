"""`mastaf extract`: from options to a filled store and its report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cache.open import open_store
from configs.load import ConfigError, find_recipe, load_config
from configs.schema import RunConfig
from extract.build import build_backbone
from pipeline.console import progress, say
from pipeline.extraction import ExtractionReport, build_spec, extract_videos, video_sources
from pipeline.scoring import read_run
from pipeline.settings import SetupError
from pipeline.setup import choose_device, load_manifest, trained_backbone


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
    if config.store.kind == "memory":
        raise SetupError("a store in memory would be gone when this command ends. Give --store FOLDER.zarr.")
    if from_run is None and config.backbone.weights == "none":
        say("warning: weights = none: the backbone is untrained, its cubes say little about what is in a video")
    chosen = choose_device(device)
    videos = load_manifest(config)
    if from_run is None or weights is not None:
        built = build_backbone(config.backbone, config.sampling).to(chosen)
    else:
        built = trained_backbone(config, read_run(from_run, torch.device("cpu"))[1]).to(chosen)
    spec = build_spec(config, built, chosen)
    opened = open_store(
        config.store.path,
        kind=config.store.kind,
        spec=spec,
        mode="a",
        shard_rows=config.store.shard_rows,
        compression=config.store.compression,
    )
    sources = video_sources(videos)
    wanted = [sources[video.video_id] for video in videos.videos if not video.excluded]
    with opened, progress("extract") as on_progress:
        report = extract_videos(opened, wanted, built, config, chosen, on_progress=on_progress)
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
    if backbone is not None and from_run is not None:
        raise ConfigError("--from-run takes the run's own backbone; leave --backbone out.")
    if recipe is not None and from_run is not None:
        raise ConfigError("--config and --from-run both give sampling and backbone; use one of them.")
    path = find_recipe(recipe) if recipe is not None else None
    tables: dict[str, dict[str, Any]] = {"data": {}, "backbone": {}, "store": {}}
    if from_run is not None:
        path = from_run / "config.toml"
        if not (from_run / "backbone.pt").is_file():
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
    done = report.num_videos - report.num_skipped - report.num_pending
    for video_id, outcome in report.problems:
        say(f"{outcome.status}: {video_id}: {outcome.reason}" + (f" ({outcome.detail})" if outcome.detail else ""))
    if report.num_rows_left:
        say(
            f"warning: {report.num_rows_left} planned rows were left alone, since their shards hold videos that are not in this manifest "
            f"({report.num_pending} videos of this one are waiting there). Extract once with the manifest that they were planned by."
        )
    say(
        f"{report.num_videos} videos: {report.num_ok} ok, {report.num_degraded} degraded, {report.num_rejected} rejected"
        + (f", {report.num_pending} pending" if report.num_pending else "")
        + f"; {report.num_skipped} were stored before, {done} done in {report.seconds:.1f} s, {report.clips_per_second:.1f} clips/s, "
        f"bound by {report.bound_by}. Failures: mastaf store failures {store}"
    )
