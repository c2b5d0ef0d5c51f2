"""From a resolved config to the objects of a run: manifest, samplers, sources, model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cache.open import open_store
from cache.store import FeatureStore, SpecMismatch
from configs.schema import RunConfig
from episodes.build import build_head
from episodes.checks import refuse_overlap
from episodes.datasets import Manifest, read_manifest
from episodes.sampler import EpisodeProtocol, EpisodeSampler
from extract.build import build_backbone
from extract.config import BackboneConfig, SamplingConfig
from pipeline.extraction import video_sources
from pipeline.model import ClipEncoder, FewShotModel, cube_shape, forward_in_full_batches
from pipeline.sources import CachedCubes, LiveClips, Source


class SetupError(ValueError):
    """A run cannot be put together; the message says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Workplace:
    """The parts of a run that both training and evaluation need."""

    config: RunConfig
    manifest: Manifest
    model: FewShotModel
    source: Source
    """Where training inputs come from."""
    store: FeatureStore | None
    """The store behind the source, on the cache."""
    device: torch.device


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        SetupError: CUDA asked for but absent, or another name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise SetupError(f"--device {name!r} is not known; use auto, cpu, cuda or cuda:N.")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SetupError(f"--device {name}, but torch sees no CUDA device here. Use --device cpu.")
    return torch.device(name)


def load_manifest(config: RunConfig) -> Manifest:
    """The manifest of ``data.manifest``, refused where splits overlap.

    Raises:
        SetupError: no manifest is named.
    """
    if not config.data.manifest:
        raise SetupError(
            "data.manifest is not set. Give --set data.manifest=FILE.csv (made by `mastaf dataset scan DIR --out FILE.csv`)."
        )
    manifest = read_manifest(Path(config.data.manifest), allow_outside=config.data.allow_outside)
    refuse_overlap(manifest, allow=config.data.allow_overlap)
    return manifest


def episode_protocol(config: RunConfig) -> EpisodeProtocol:
    """The protocol of the config in the sampler's words."""
    episodes = config.episodes
    return EpisodeProtocol(episodes.protocol, episodes.n_way, episodes.k_shot, episodes.n_query)


def make_sampler(config: RunConfig, manifest: Manifest, split: str) -> EpisodeSampler:
    """Training episodes come from ``episodes.seed``, validation and test episodes from ``evaluation.seed``: the same for all heads."""
    seed = config.episodes.seed if split == "train" else config.evaluation.seed
    return EpisodeSampler(manifest, split, episode_protocol(config), seed)


def global_index(config: RunConfig, manifest: Manifest) -> dict[str, int]:
    """Class name -> global label, for the classifier over the training classes."""
    names = manifest.classes("train") if config.data.global_labels == "train" else manifest.all_classes
    return {name: index for index, name in enumerate(names)}


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
    store = open_store(where, kind=config.store.kind)
    differing = _differing(config, store)
    if differing:
        store.close()
        raise SpecMismatch(
            f"{where} was made with other settings: {'; '.join(differing)}. Extract into another folder, or change the config."
        )
    return store


def _differing(config: RunConfig, store: FeatureStore) -> list[str]:
    stated: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
        "sampling": (
            config.sampling.model_dump(mode="json", include=config.sampling.model_fields_set - {"num_views"}),
            store.spec.sampling,
        ),
        "backbone": (
            config.backbone.model_dump(mode="json", include=config.backbone.model_fields_set - {"weights"}),
            store.spec.backbone,
        ),
    }
    return [
        f"{table}.{key}: store {stored.get(key)!r}, config {value!r}"
        for table, (wanted, stored) in stated.items()
        for key, value in wanted.items()
        if stored.get(key) != value
    ]


def _with_settings_of(store: FeatureStore, config: RunConfig) -> RunConfig:
    """The config with the frames and the backbone that the store was made with, so that the run's record of them is true."""
    sampling = {**store.spec.sampling, "num_views": max(config.episodes.train_views, config.sampling.num_views)}
    backbone = {
        "name": store.spec.backbone["name"],
        "options": store.spec.backbone["options"],
        "weights": config.backbone.weights,
    }
    return config.model_copy(
        update={
            "sampling": SamplingConfig.model_validate(sampling),
            "backbone": BackboneConfig.model_validate(backbone),
        }
    )


def build_model(
    config: RunConfig, encoder: nn.Module, shape: tuple[int, int, int, int], num_classes: int, device: torch.device
) -> FewShotModel:
    """The model of a config; the head's first weights depend on ``training.seed`` alone."""
    protocol = config.episodes
    # Published rule: no BatchNorm on the query's self map where an episode has exactly one query (reference 1.2).
    num_queries = protocol.n_query * (protocol.n_way if protocol.protocol == "per_class" else 1)
    head = build_head(
        config.head.name,
        config.head.options,
        shape,
        num_classes,
        default_meta_bn_query=num_queries > 1,
        generator=torch.Generator().manual_seed(config.training.seed),
    )
    return FewShotModel(encoder, head).to(device)


def prepare(config: RunConfig, device: torch.device) -> Workplace:
    """Put a training run together: on the cache, or end to end."""
    manifest = load_manifest(config)
    num_classes = len(global_index(config, manifest))
    if config.training.mode == "cached":
        store = open_configured_store(config)
        config = _with_settings_of(store, config)
        source = CachedCubes(store, config.head.array, config.training.cube_cache_bytes)
        model = build_model(config, nn.Identity(), source.cube_shape, num_classes, device)
        return Workplace(config, manifest, model, source, store, device)
    encoder = build_encoder(config, device)
    live = LiveClips(
        video_sources(manifest), config.sampling, config.training.decode_threads, config.training.clip_cache_bytes
    )
    model = build_model(config, encoder, encoder_cube_shape(config, encoder, device), num_classes, device)
    return Workplace(config, manifest, model, live, None, device)


def build_encoder(config: RunConfig, device: torch.device) -> ClipEncoder:
    """The backbone of a config as the model's encoder."""
    backbone = build_backbone(config.backbone, config.sampling).to(device)
    return ClipEncoder(
        backbone,
        config.sampling,
        array=config.head.array,
        forward_batch=config.extraction.forward_batch,
        compute_dtype=config.extraction.compute_dtype,
        is_trained=config.training.backbone_learning_rate != 0,
        batchnorm=config.training.backbone_batchnorm,
    )


def encoder_cube_shape(config: RunConfig, encoder: ClipEncoder, device: torch.device) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the array that the head reads, found by one pass of a black clip.

    Raises:
        SetupError: the backbone gives no array of that name.
    """
    sampling = config.sampling
    clip = torch.zeros(
        (1, sampling.num_frames, sampling.crop_size, sampling.crop_size, 3), dtype=torch.uint8, device=device
    )
    was_training = encoder.training
    encoder.eval()
    with torch.no_grad():
        cubes = forward_in_full_batches(encoder.backbone, clip, sampling, 1)
    encoder.train(was_training)
    if config.head.array not in cubes:
        raise SetupError(
            f"head.array = {config.head.array!r}, but backbone {config.backbone.name} gives {sorted(cubes)}."
        )
    return cube_shape(cubes[config.head.array])
