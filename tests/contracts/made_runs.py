"""Runs on made-up cubes, trained in a moment: for tests of what is done with runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.cube import Spec
from cache.open import open_store
from cache.store import RowOutcome
from contracts.world import World
from episodes.datasets import Manifest, write_manifest
from episodes.video import Video
from extract.build import build_backbone
from pipeline import training
from pipeline.comparison import Asked, Comparison, compare_runs
from pipeline.extraction import build_spec
from pipeline.settings import DIGEST

CPU = torch.device("cpu")
CLASSES = {"train": 3, "val": 3, "test": 6}
CUBE_SHAPE = (6, 2, 3, 3)
VIDEOS_PER_CLASS = 6
NUM_EPISODES = 40


def make_manifest(folder: Path) -> World:
    """A manifest of videos that nobody decodes: their cubes are made up."""
    videos = tuple(
        Video(f"{split}{number}/{video}", f"{split}{number}/{video}.mp4", f"{split}{number}", split)
        for split, count in CLASSES.items()
        for number in range(count)
        for video in range(VIDEOS_PER_CLASS)
    )
    write_manifest(Manifest(videos, folder), folder / "videos.csv")
    return World(folder, folder / "videos.csv")


def fill_store(
    world: World,
    path: Path,
    weights: str = "random:1",
    rejected: Sequence[str] = (),
    absent: Sequence[str] = (),
    shard_rows: int = 8,
    forward_batch: int = 4,
) -> Path:
    """A store with noise around a random cube of each class."""
    sizes = (f"store.shard_rows={shard_rows}", f"extraction.forward_batch={forward_batch}")
    config = world.config(f"backbone.weights={weights}", *sizes)
    spec: Spec = build_spec(config, build_backbone(config.backbone, config.sampling), CPU)
    spec = replace(spec, arrays={"cube": replace(spec.arrays["cube"], shape=CUBE_SHAPE)})
    generator = np.random.default_rng(len(weights) + int(weights[-1]))
    classes = sorted({video.class_name for video in world.manifest.videos})
    middle_of = {name: generator.standard_normal(CUBE_SHAPE) for name in classes}
    class_of = {video.video_id: video.class_name for video in world.manifest.videos}
    with open_store(path, spec=spec, mode="a", shard_rows=shard_rows) as store:
        store.plan([video_id for video_id in class_of if video_id not in absent], [0])
        for shard in store.pending():
            cubes = [
                middle_of[class_of[row.video_id]] + 1.5 * generator.standard_normal(CUBE_SHAPE) for row in shard.rows
            ]
            outcomes = [
                RowOutcome("rejected", "not_a_video") if row.video_id in rejected else RowOutcome("ok")
                for row in shard.rows
            ]
            store.commit(shard, {"cube": np.stack(cubes).astype(np.float32)}, outcomes)
    return path


def train_run(world: World, store_path: Path, folder: Path, *overrides: str) -> Path:
    with open_store(store_path) as store:
        weights = f"backbone.weights={DIGEST}{store.spec.weights_digest}"
    config = world.config(
        f'store.path="{store_path}"', weights, "training.episodes=6", "training.validate_every=6",
        "training.validation_episodes=2", f"evaluation.episodes={NUM_EPISODES}", "episodes.n_query=2", *overrides,
    )  # fmt: skip
    training.train(config, folder, CPU)
    return folder


@dataclass(frozen=True, slots=True)
class MadeRuns:
    """A manifest, a store of it, and runs on that."""

    world: World
    store_path: Path
    heads: list[Path]
    """neighbor, mastaf, self and cross."""
    seeds: list[Path]
    """mastaf twice more, with other seeds."""


def make_runs(folder: Path) -> MadeRuns:
    """Six runs on one store."""
    world = make_manifest(folder)
    store_path = fill_store(world, folder / "cubes.zarr")
    heads = [
        train_run(world, store_path, folder / "runs" / name, f"head.name={name}")
        for name in ("neighbor", "mastaf", "self", "cross")
    ]
    seeds = [
        train_run(
            world, store_path, folder / "runs" / f"mastaf{seed}", f"training.seed={seed}", f"episodes.seed={seed}"
        )
        for seed in (1, 2)
    ]
    return MadeRuns(world, store_path, heads, seeds)


def compared(folders: Sequence[Path], **asked: Any) -> Comparison:
    """Compare runs on the CPU; `asked` are the fields of `Asked`."""
    return compare_runs(folders, Asked(**asked), CPU)
