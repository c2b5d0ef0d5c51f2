"""A model that learns on one rank or on several, as separate processes: `python -m contracts.learning_ranks FOLDER`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from episodes.batch import EpisodeBatch
from episodes.build import build_head
from extract.build import build_backbone
from extract.config import BackboneConfig, SamplingConfig
from pipeline.batchnorm import running_statistics
from pipeline.model import BackboneLearning, ClipEncoder, FewShotModel

ROOT = Path(__file__).parents[2]
SAMPLING = SamplingConfig(num_frames=4, resize_size=28, crop_size=24)
LEARNINGS = {
    "synchronised": BackboneLearning(batchnorm="synchronised"),
    "synchronised, blocks again": BackboneLearning(batchnorm="synchronised", gradient_checkpointing=True),
    "per episode, blocks again": BackboneLearning(batchnorm="episode", gradient_checkpointing=True),
    "frozen, in parts, blocks again": BackboneLearning(gradient_checkpointing=True, clips_per_forward=2),
}


def made_batch(num_episodes: int, n_way: int = 2, n_query: int = 2) -> EpisodeBatch:
    """Episodes of random clips of 4 frames of 24 pixels, one support per class."""
    source = torch.Generator().manual_seed(7)
    clips = torch.randint(0, 256, (num_episodes, n_way + n_query, 4, 24, 24, 3), generator=source, dtype=torch.uint8)
    return EpisodeBatch(
        support=clips[:, :n_way],
        support_labels=torch.arange(n_way).repeat(num_episodes, 1),
        query=clips[:, n_way:],
        query_labels=torch.arange(n_query).remainder(n_way).repeat(num_episodes, 1),
        n_way=n_way,
        class_global_labels=torch.arange(n_way).repeat(num_episodes, 1),
        seeds=torch.arange(num_episodes),
    )


def part_of(batch: EpisodeBatch, episodes: slice) -> EpisodeBatch:
    """Some of the episodes."""
    assert batch.query_labels is not None
    assert batch.class_global_labels is not None
    assert batch.seeds is not None
    return replace(
        batch,
        support=batch.support[episodes],
        support_labels=batch.support_labels[episodes],
        query=batch.query[episodes],
        query_labels=batch.query_labels[episodes],
        class_global_labels=batch.class_global_labels[episodes],
        seeds=batch.seeds[episodes],
    )


def made_model(learning: BackboneLearning) -> FewShotModel:
    """A small backbone and the MASTAF head, always with the same weights."""
    backbone = build_backbone(BackboneConfig(name="small3d", weights="random:3", options={"width": 4}), SAMPLING)
    head = build_head("mastaf", {}, (16, 2, 2, 2), 3, True, torch.Generator().manual_seed(1))
    return FewShotModel(ClipEncoder(backbone, SAMPLING, learning=learning), head).train()


def learn(learning: BackboneLearning, episodes: slice) -> dict[str, Any]:
    """Losses, gradients of the sum over all ranks, and moments, of one step on some of five episodes."""
    model: Any = made_model(learning)
    norms = running_statistics(model)
    for norm in norms:
        norm.waiting = []
    callee = model
    if dist.is_initialized():
        callee = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    output = callee(part_of(made_batch(5), episodes))
    losses = output.losses["few_shot"] + output.losses["global"]
    losses.sum().backward()
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    gradients: dict[str, Tensor] = {
        name: parameter.grad * num_ranks for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    moments = [torch.cat(norm.waiting) if norm.waiting else None for norm in norms]
    return {"losses": losses.detach(), "gradients": gradients, "moments": moments}


def learn_on_ranks(folder: Path, shares: list[slice]) -> list[dict[str, dict[str, Any]]]:
    """What `learn` gives under every learning, of each of several processes with its share of the episodes."""
    torch.save(shares, folder / "shares.pt")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "contracts.learning_ranks", str(folder)],
            cwd=ROOT,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(len(shares)),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            },
        )
        for rank in range(len(shares))
    ]
    for process in processes:
        if process.wait(120):
            raise RuntimeError(f"a rank ended with {process.returncode}")
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(shares))]


def main(folder: Path) -> None:
    """One rank."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world_size)
    share = torch.load(folder / "shares.pt", weights_only=False)[rank]
    torch.save({name: learn(learning, share) for name, learning in LEARNINGS.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
