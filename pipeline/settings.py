"""What a config states about cubes, held against what a store says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache.open import open_store
from cache.store import FeatureStore, SpecMismatch
from configs.schema import RunConfig
from extract.build import build_backbone, weights_digest
from extract.config import BackboneConfig, SamplingConfig

DIGEST = "digest:"
"""Begins the record of a cached run's weights in its config: what follows is the store's weights digest."""


class SetupError(ValueError):
    """A run cannot be put together; the message says what is missing and what to do."""


def open_configured_store(config: RunConfig, path: str | None = None) -> FeatureStore:
    """Open ``store.path`` for reading and hold it against what the config says about frames and backbone.

    Only keys that the config states are compared, so a recipe without ``[backbone]`` works on any store.

    Raises:
        SetupError: no store is named.
        SpecMismatch: the store was made with other settings; every differing field is listed.
    """
    where = path or config.store.path
    if not where:
        raise SetupError("store.path is not set. Give --set store.path=FOLDER.zarr (filled by `mastaf extract`).")
    if "://" not in where and not Path(where).exists():
        raise SetupError(
            f"there is no store at {where}. If it was moved, say where it is now: --store PATH, or --set store.path=PATH for train; "
            f"or make it: mastaf extract --store {where}"
        )
    store = open_store(where, kind=config.store.kind)
    if config.head.array not in store.spec.arrays:
        store.close()
        raise SetupError(
            f"head.array = {config.head.array!r}, but {where} holds {', '.join(sorted(store.spec.arrays))}. Change head.array."
        )
    differing = _differing(config, store)
    if differing:
        store.close()
        raise SpecMismatch(
            f"{where} was made with other settings: {'; '.join(differing)}. Extract into another folder, or change the config."
        )
    return store


def _differing(config: RunConfig, store: FeatureStore) -> list[str]:
    spec = store.spec
    stated = config.sampling.model_dump(mode="json", include=config.sampling.model_fields_set - {"num_views"})
    rows: list[tuple[str, Any, Any]] = [
        (f"sampling.{key}", spec.sampling.get(key), value) for key, value in stated.items()
    ]
    if "name" in config.backbone.model_fields_set:
        rows.append(("backbone.name", spec.backbone["name"], config.backbone.name))
    # Options that only say where weights come from are not in the spec; the weights digest stands for them.
    known = spec.backbone["architecture"]
    options = {key: value for key, value in config.backbone.options.items() if key in known}
    rows += [(f"backbone.options.{key}", known[key], value) for key, value in options.items()]
    for key, field in (("compute_dtype", "dtype"), ("forward_batch", "forward_batch")):
        if key in config.extraction.model_fields_set:
            rows.append((f"extraction.{key}", spec.compute[field], getattr(config.extraction, key)))
    if "dtype" in config.store.model_fields_set:
        rows.append(("store.dtype", spec.arrays[config.head.array].dtype, config.store.dtype))
    differing = [f"{key}: store {stored!r}, config {wanted!r}" for key, stored, wanted in rows if stored != wanted]
    if not differing and "weights" in config.backbone.model_fields_set:
        differing = _differing_weights(config, spec.weights_digest)
    return differing


def _differing_weights(config: RunConfig, stored: str) -> list[str]:
    weights = config.backbone.weights
    if weights.startswith(DIGEST):
        digest = weights.removeprefix(DIGEST)
    else:
        digest = weights_digest(build_backbone(config.backbone, config.sampling))
    return [] if digest == stored else [f"backbone.weights: store {stored[:12]}, config {weights!r} ({digest[:12]})"]


def with_settings_of(store: FeatureStore, config: RunConfig) -> RunConfig:
    """The config with the frames, the backbone and the numbers that the store was made with, so that the run's record is true.

    Raises:
        SetupError: the store holds fewer views than training would draw from.
    """
    spec, layout = store.spec, store.layout()
    views, forward_batch = layout["views"], spec.compute["forward_batch"]
    if config.episodes.train_views > len(views):
        raise SetupError(
            f"episodes.train_views = {config.episodes.train_views}, but the store holds {len(views)} views of each video. "
            "Lower it, or extract more with sampling.num_views."
        )
    architecture = spec.backbone["architecture"]
    options = {key: architecture.get(key, value) for key, value in config.backbone.options.items()}
    return config.model_copy(
        update={
            "sampling": SamplingConfig.model_validate({**spec.sampling, "num_views": len(views)}),
            "backbone": BackboneConfig(
                name=spec.backbone["name"], weights=DIGEST + spec.weights_digest, options=options
            ),
            "extraction": config.extraction.model_copy(
                update={"forward_batch": forward_batch, "compute_dtype": spec.compute["dtype"]}
            ),
            "store": config.store.model_copy(
                update={
                    "dtype": spec.arrays[config.head.array].dtype,
                    # A config wants whole batches in a shard; a store that a program made may have none.
                    "shard_rows": forward_batch if layout["shard_rows"] % forward_batch else layout["shard_rows"],
                }
            ),
        }
    )
