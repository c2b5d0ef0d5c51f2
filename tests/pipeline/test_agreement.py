"""Invariant 7: with a frozen backbone, cached and live training see the same numbers."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cache.store import MemoryStore
from configs.schema import RunConfig
from contracts.backbone_families import FAMILIES, family_config
from contracts.world import World
from episodes.datasets import Manifest
from episodes.losses import combine
from extract.build import build_backbone
from pipeline.batchnorm import BatchStatistics, is_batchnorm
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.model import BackboneLearning, ClipEncoder, FewShotModel
from pipeline.setup import build_model, global_index, make_sampler
from pipeline.sources import CachedCubes, LiveClips, assemble

CPU = torch.device("cpu")


def losses_of(world: World, dtype: str, *overrides: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Total losses of six training episodes with random views: through the store, and live."""
    config = world.config(
        f"store.dtype={dtype}",
        "sampling.num_views=3",
        "episodes.train_views=3",
        "sampling.crop=random",
        "sampling.flip=true",
        *overrides,
    )
    manifest = world.manifest
    backbone = build_backbone(config.backbone, config.sampling)
    store = MemoryStore(build_spec(config, backbone, CPU), config.store.shard_rows)
    sources = video_sources(manifest)
    extract_videos(store, list(sources.values()), backbone, config, CPU)
    cached, live = CachedCubes(store), LiveClips(sources, config.sampling)
    encoder = ClipEncoder(backbone, config.sampling, forward_batch=config.extraction.forward_batch, is_trained=False)
    cached_model = build_model(config, nn.Identity(), cached.cube_shape, len(global_index(config, manifest)), CPU)
    live_model = FewShotModel(encoder, cached_model.head)
    return totals(config, manifest, cached, cached_model, 6), totals(config, manifest, live, live_model, 6)


def totals(
    config: RunConfig, manifest: Manifest, source: CachedCubes | LiveClips, model: FewShotModel, num_episodes: int
) -> torch.Tensor:
    """Total losses of training episodes, each by itself."""
    index, sampler = global_index(config, manifest), make_sampler(config, manifest, "train")
    num_views = config.episodes.train_views
    model.train()
    rows = []
    for number in range(num_episodes):
        episode = sampler.episode(number)
        num_supports, num_videos = len(episode.support_ids), len(episode.support_ids) + len(episode.query_ids)
        views = np.random.default_rng(number).integers(0, num_views, (1, num_videos))
        batch = assemble([episode], source, views[:, :num_supports], views[:, num_supports:], index)
        output = model(batch)
        assert set(output.losses) == {"few_shot", "global"}
        rows.append(combine(output.losses, model.loss_weights, "mean").detach())
    return torch.cat(rows)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("torchvision", "r3d") else name for name in FAMILIES],
)
def test_cached_and_live_losses_agree_for_every_family_in_parts(world: World, tmp_path: Path, family: str) -> None:
    config = family_config(world, family, tmp_path)
    manifest = Manifest(tuple(world.manifest.videos_of("train")), world.manifest.root)
    backbone = build_backbone(config.backbone, config.sampling)
    store = MemoryStore(build_spec(config, backbone, CPU), config.store.shard_rows)
    sources = video_sources(manifest)
    extract_videos(store, list(sources.values()), backbone, config, CPU)
    cached, live = CachedCubes(store), LiveClips(sources, config.sampling)
    model = build_model(config, nn.Identity(), cached.cube_shape, len(global_index(config, manifest)), CPU)
    expected = totals(config, manifest, cached, model, 3)
    for is_trained in (False, True):
        encoder = ClipEncoder(
            deepcopy(backbone),
            config.sampling,
            forward_batch=config.extraction.forward_batch,
            is_trained=is_trained,
            learning=BackboneLearning(clips_per_forward=3, gradient_checkpointing=True),
        )
        found = totals(config, manifest, live, FewShotModel(encoder, model.head), 3)
        # As the design promises where parts are no batches of the store's shape; rounding of a transformer's matrix products also
        # depends on a clip's place in the batch.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
        assert is_trained or family == "vivit" or torch.equal(found, expected)


def test_cached_and_live_losses_are_bit_equal_in_float32(world: World) -> None:
    cached, live = losses_of(world, "float32")
    assert torch.equal(cached, live)


def test_cached_and_live_losses_agree_with_a_float16_store(world: World) -> None:
    cached, live = losses_of(world, "float16")
    # 1e-3 as the design promises: float16 keeps 11 bits.
    torch.testing.assert_close(cached, live, rtol=1e-3, atol=0.0)


def test_cached_and_live_losses_agree_in_another_batch_shape(world: World) -> None:
    config = world.config()
    backbone = build_backbone(config.backbone, config.sampling)
    clips = LiveClips(video_sources(world.manifest), config.sampling).read(["right/0", "left/1", "down/2"], [0, 0, 0])
    shapes = [
        ClipEncoder(backbone, config.sampling, forward_batch=size, is_trained=False)(clips[None]) for size in (1, 4, 8)
    ]
    for other in shapes[1:]:
        torch.testing.assert_close(other, shapes[0], rtol=1e-5, atol=1e-6)


def test_frozen_backbone_is_always_in_evaluation_mode(world: World) -> None:
    config = world.config()
    encoder = ClipEncoder(build_backbone(config.backbone, config.sampling), config.sampling, is_trained=False)
    encoder.train()
    assert not any(module.training for module in encoder.backbone.modules())
    assert not any(parameter.requires_grad for parameter in encoder.backbone.parameters())


@pytest.mark.parametrize("batchnorm", ["episode", "frozen"])
def test_batchnorm_policy_decides_which_modules_train(world: World, batchnorm: BatchStatistics) -> None:
    config = world.config()
    learning = BackboneLearning(batchnorm=batchnorm)
    encoder = ClipEncoder(build_backbone(config.backbone, config.sampling), config.sampling, learning=learning)
    encoder.train()
    norms = [module for module in encoder.backbone.modules() if is_batchnorm(module)]
    assert norms
    assert all(module.training == (batchnorm == "episode") for module in norms)


@pytest.mark.parametrize("batchnorm", ["episode", "supports_then_queries", "frozen"])
def test_episodes_of_one_call_do_not_share_batch_statistics(world: World, batchnorm: BatchStatistics) -> None:
    config = world.config()
    learning = BackboneLearning(batchnorm=batchnorm)
    encoder = ClipEncoder(build_backbone(config.backbone, config.sampling), config.sampling, learning=learning).train()
    live = LiveClips(video_sources(world.manifest), config.sampling)
    clips = torch.stack([live.read(["right/0", "left/1"], [0, 0]), live.read(["down/0", "up/1"], [0, 0])])
    together = encoder(clips, 1)
    alone = torch.cat([encoder(clips[:1], 1), encoder(clips[1:], 1)])
    assert torch.equal(together, alone)
