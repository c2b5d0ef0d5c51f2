"""Every family of backbones through the whole circle: train end to end, load the run, extract with it, score the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cache.store import MemoryStore
from configs.schema import RunConfig
from contracts.world import World
from extract.build import BACKBONES
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.scoring import evaluate_run, load_run, read_run
from pipeline.setup import trained_backbone
from pipeline.sources import CachedCubes
from pipeline.training import train

CPU = torch.device("cpu")
FAMILIES = {
    "r3d": ["backbone.name=r3d18"],
    "torchvision": ["backbone.name=tv_r3d_18"],
    "tsn": ["backbone.name=tsn_resnet18", "head.average_time=true"],
    "small3d": [],
    "vivit": ["backbone.name=vivit"],
}
TINY_VIVIT: dict[str, Any] = {
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 24,
    "num_frames": 8,
    "tubelet_size": [2, 8, 8],
    "hidden_act": "relu",
}


def family_config(world: World, family: str, tmp_path: Path) -> RunConfig:
    overrides = [*FAMILIES[family], "training.mode=end_to_end", "training.episodes=2", "training.episodes_per_step=1"]
    config = world.config(
        *overrides, "training.validate_every=2", "training.validation_episodes=4", "sampling.num_frames=8"
    )
    changes: dict[str, object] = {} if family == "small3d" else {"options": {}}
    if family == "vivit":
        changes["weights"] = str(tiny_vivit(tmp_path / "vivit"))
    return config.model_copy(update={"backbone": config.backbone.model_copy(update=changes)})


def tiny_vivit(folder: Path) -> Path:
    """A directory as transformers saves it, whose architecture is not the default one."""
    from transformers import VivitConfig, VivitModel

    torch.manual_seed(0)
    VivitModel(VivitConfig(**TINY_VIVIT)).save_pretrained(folder)
    return folder


def test_every_backbone_belongs_to_a_tested_family() -> None:
    prefixes = {"r3d": "r3d", "torchvision": "tv_", "tsn": "tsn_", "small3d": "small3d", "vivit": "vivit"}
    assert prefixes.keys() == FAMILIES.keys()
    assert all(any(name.startswith(prefix) for prefix in prefixes.values()) for name in BACKBONES)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("torchvision", "r3d") else name for name in FAMILIES],
)
def test_run_is_rebuilt_as_it_was_and_its_cubes_score_the_same(world: World, tmp_path: Path, family: str) -> None:
    config = family_config(world, family, tmp_path)
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
