"""Every family of backbones through the whole circle: train end to end, load the run, extract with it, score the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache.store import MemoryStore
from contracts.backbone_families import FAMILIES, family_config
from contracts.world import World
from extract.build import BACKBONES
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.scoring import evaluate_run, load_run, read_run
from pipeline.setup import trained_backbone
from pipeline.sources import CachedCubes
from pipeline.training import train

CPU = torch.device("cpu")


def test_every_backbone_belongs_to_a_tested_family() -> None:
    prefixes = {"r3d": "r3d", "torchvision": "tv_", "tsn": "tsn_", "small3d": "small3d", "vivit": "vivit"}
    assert prefixes.keys() == FAMILIES.keys()
    assert all(any(name.startswith(prefix) for prefix in prefixes.values()) for name in BACKBONES)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("torchvision", "r3d") else name for name in FAMILIES],
)
def test_run_is_rebuilt_as_it_was_and_its_cubes_score_the_same(world: World, tmp_path: Path, family: str) -> None:
    steps = ["training.episodes=2", "training.episodes_per_step=1", "training.validate_every=2"]
    config = family_config(
        world, family, tmp_path, "training.mode=end_to_end", *steps, "training.validation_episodes=4"
    )
    train(config, tmp_path / "run", CPU)
    run = load_run(tmp_path / "run", CPU)
    live, _ = evaluate_run(run, "test", 12, CPU)

    run_config, checkpoint = read_run(tmp_path / "run", CPU)
    backbone = trained_backbone(run_config, checkpoint)
    store = MemoryStore(build_spec(run_config, backbone, CPU), run_config.store.shard_rows)
    extract_videos(store, list(video_sources(world.manifest).values()), backbone, run_config, CPU)
    ids = [video.video_id for video in world.manifest.videos_of("test")]
    source = CachedCubes(store)
    cached, live_cubes = source.read(ids, [0] * len(ids)).float(), run.source.read(ids, [0] * len(ids))
    # 1e-5 of the largest value, as the design promises: the place in the forward batch may change the order of sums.
    assert float((cached - live_cubes).abs().max() / live_cubes.abs().max()) <= 1e-5
    assert live["store_fingerprint"] == store.spec.fingerprint
