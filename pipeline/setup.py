"""From a config to the objects of a run: manifest, samplers, sources, model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cache.disk_store import DiskStore
from cache.store import FeatureStore
from configs.schema import RunConfig
from episodes.build import HEADS, build_head
from episodes.checks import refuse_overlap
from episodes.datasets import Manifest, read_manifest
from episodes.sampler import EpisodeProtocol, EpisodeSampler
from extract.build import BackboneError, build_backbone
from pipeline.ancestry import SeenClasses, classes_behind
from pipeline.batchnorm import batch_statistics
from pipeline.classify import resolved_classification
from pipeline.classify_model import build_classifier
from pipeline.extraction import video_sources
from pipeline.model import (
    BackboneLearning,
    ClipEncoder,
    FewShotModel,
    cube_shape,
    describe_backbone,
    forward_in_full_batches,
)
from pipeline.settings import SetupError, open_configured_store, with_settings_of
from pipeline.sources import CachedCubes, LiveClips

OWN_TRAINING = frozenset(
    {
        *(
            "optimizer",
            "learning_rate",
            "rates",
            "freeze",
            "momentum",
            "nesterov",
            "weight_decay",
            "decay_norm_and_bias",
        ),
        *("schedule", "milestones", "milestone_factor", "warmup_episodes", "clip_gradient_norm", "ema_decay"),
        *("query_reduction", "seed", "initial_weights"),
    }
)
"""Keys of ``[training]`` in which heads that train on one pass of the data may differ."""


@dataclass(frozen=True, slots=True)
class Workplace:
    """The parts of a run that both training and evaluation need."""

    config: RunConfig
    manifest: Manifest
    model: FewShotModel
    source: CachedCubes | LiveClips
    """Where training inputs come from."""
    store: FeatureStore | None
    """The store behind the source, on the cache."""
    device: torch.device
    num_classes: int
    """Outputs of the classifier over the training classes."""
    inherited: SeenClasses = field(default_factory=SeenClasses)
    """Classes that the weights it starts from have seen."""


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
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise SetupError(f"--device {name!r} is not known; use auto, cpu, cuda or cuda:N.") from error


def load_manifest(config: RunConfig) -> Manifest:
    """The manifest of ``data.manifest``, refused where splits overlap.

    Raises:
        SetupError: no manifest is named.
    """
    if not config.data.manifest:
        raise SetupError(
            "data.manifest is not set. Give --set data.manifest=FILE.csv (made by `mastaf dataset scan DIR --out FILE.csv`)."
        )
    if not Path(config.data.manifest).exists():
        raise SetupError(
            f"manifest {config.data.manifest} is not there. If it was moved, say where it is now: --manifest FILE, or "
            "--set data.manifest=FILE for train."
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


def prepare(
    config: RunConfig,
    device: torch.device,
    checkpoint: Mapping[str, Any] | None = None,
    beside: Workplace | None = None,
) -> Workplace:
    """Put a training run together: on the cache, end to end, or in classification.

    Args:
        config: as the user gave it; the workplace holds it with paths made absolute and, on the cache, with the store's settings.
        device: where the model runs.
        checkpoint: of the run to resume; its backbone is rebuilt without the file that it once started from.
        beside: a workplace on the cache that this one shares its data with; configs may differ in ``[head]`` and `OWN_TRAINING`.
    """
    if config.training.mode == "classify":
        config = resolved_classification(config)
    config = _with_defaults_settled(config)
    if beside is not None:
        return _prepare_beside(config, device, beside, checkpoint)
    manifest = load_manifest(config)
    num_classes = len(global_index(config, manifest))
    config = with_absolute_paths(config)
    if config.training.mode == "cached":
        store = open_configured_store(config)
        config = with_settings_of(store, config)
        source = CachedCubes(store, config.head.array, config.training.cube_cache_bytes)
        model = build_model(config, nn.Identity(), source.cube_shape, num_classes, device)
        inherited = _inherited(config, store, checkpoint)
        return Workplace(config, manifest, model, source, store, device, num_classes, inherited)
    encoder = build_encoder(config, device, checkpoint)
    live = LiveClips.of(config, video_sources(manifest, config.data.allow_outside), device)
    build = build_classifier if config.training.mode == "classify" else build_model
    model = build(config, encoder, encoder_cube_shape(config, encoder, device), num_classes, device)
    return Workplace(config, manifest, model, live, None, device, num_classes, _inherited(config, None, checkpoint))


def _inherited(config: RunConfig, store: FeatureStore | None, checkpoint: Mapping[str, Any] | None) -> SeenClasses:
    if checkpoint is not None:
        return SeenClasses.from_json(checkpoint.get("inherited_classes"))
    started = classes_behind(config.training.initial_weights)
    if isinstance(store, DiskStore):
        return started | SeenClasses.from_json(store.origin.get("seen_classes"))
    return started | classes_behind(config.backbone.weights)


def _with_defaults_settled(config: RunConfig) -> RunConfig:
    """The config with what depends on its other parts written out, so that a later default cannot re-interpret the run."""
    training = config.training
    settled: dict[str, str | None] = {}
    if training.query_reduction is None:
        settled["query_reduction"] = HEADS[config.head.name].query_reduction
    if training.mode != "cached" and training.backbone_batchnorm is None:
        settled["backbone_batchnorm"] = batch_statistics(training, config.head.name)
    return config.model_copy(update={"training": training.model_copy(update=settled)})


def _prepare_beside(
    config: RunConfig, device: torch.device, first: Workplace, checkpoint: Mapping[str, Any] | None
) -> Workplace:
    if not isinstance(first.source, CachedCubes):
        raise SetupError(
            "several heads in one go train on the cache only: end to end each would need a backbone of its own. "
            'Set training.mode = "cached", or train them one by one.'
        )
    theirs, ours = first.config.training.model_dump(), config.training.model_dump()
    differing = [key for key in theirs if theirs[key] != ours[key] and key not in OWN_TRAINING]
    if differing:
        raise SetupError(
            f"heads that train together share training.{differing[0]}, but it is {theirs[differing[0]]!r} and {ours[differing[0]]!r}."
        )
    # The first config has its paths made absolute and the store's settings; only head and training are this one's own.
    config = with_absolute_paths(first.config.model_copy(update={"head": config.head, "training": config.training}))
    if config.head.array != first.source.array:
        raise SetupError(
            f"several heads in one go read one array, but head.array is {first.source.array!r} and {config.head.array!r}."
        )
    model = build_model(config, nn.Identity(), first.source.cube_shape, first.num_classes, device)
    return replace(first, config=config, model=model, inherited=_inherited(config, first.store, checkpoint))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with paths that hold from any folder, for the run's record."""
    tables = {"data": "manifest", "store": "path", "backbone": "weights", "training": "initial_weights"}
    changes = {}
    for table, key in tables.items():
        path = getattr(getattr(config, table), key)
        # What the user left out stays left out: only stated keys are held against a store.
        if path and Path(path).exists():
            changes[table] = getattr(config, table).model_copy(update={key: str(Path(path).resolve())})
    return config.model_copy(update=changes)


def build_encoder(config: RunConfig, device: torch.device, checkpoint: Mapping[str, Any] | None = None) -> ClipEncoder:
    """The backbone of a config, or that of a run's checkpoint, as the model's encoder."""
    backbone = (
        build_backbone(config.backbone, config.sampling) if checkpoint is None else trained_backbone(config, checkpoint)
    )
    return ClipEncoder(
        backbone.to(device),
        config.sampling,
        array=config.head.array,
        forward_batch=config.extraction.forward_batch,
        compute_dtype=config.extraction.compute_dtype,
        is_trained=config.training.backbone_learning_rate != 0,
        learning=BackboneLearning(
            batchnorm=batch_statistics(config.training, config.head.name),
            compute_dtype=config.training.compute_dtype or config.extraction.compute_dtype,
            clips_per_forward=config.training.clips_per_forward,
            gradient_checkpointing=config.training.gradient_checkpointing,
        ),
    )


def trained_backbone(config: RunConfig, checkpoint: Mapping[str, Any]) -> nn.Module:
    """The backbone of an end-to-end run with the run's weights, on the CPU and in evaluation mode.

    Built without the weights that the run started from where options alone decide the network; from the directory that it started
    from where there is one, which may say what is dropped while it learns. Either way it must be the network that the checkpoint
    describes.

    Raises:
        SetupError: it cannot be built as it was.
    """
    problems = []
    own = config.backbone.weights
    for weights in (own, "random:0") if Path(own).is_dir() else ("random:0", own):
        try:
            backbone = build_backbone(config.backbone.model_copy(update={"weights": weights}), config.sampling)
        except BackboneError as error:
            problems.append(str(error))
            continue
        if describe_backbone(backbone) == checkpoint["backbone"]:
            prefix = "encoder.backbone."
            state = {
                key.removeprefix(prefix): value for key, value in checkpoint["model"].items() if key.startswith(prefix)
            }
            backbone.load_state_dict(state)
            return backbone
        problems.append(f"with weights = {weights!r} it is {describe_backbone(backbone)}, not {checkpoint['backbone']}")
    raise SetupError(f"the run's backbone {config.backbone.name} cannot be built as it was: {'; '.join(problems)}")


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
