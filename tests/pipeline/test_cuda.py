"""On a GPU: stage 1, training and evaluation give the CPU's numbers. ``REQUIRE_CUDA=1`` makes the absence of one a failure."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.store import MemoryStore
from contracts.head_cases import CASES, make_batch, make_head
from contracts.world import World
from extract.build import build_backbone
from pipeline.checkpoint import load_checkpoint
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.interrupts import Stopped
from pipeline.scoring import evaluate_run, load_run
from pipeline.training import train


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        if os.environ.get("REQUIRE_CUDA") == "1":
            pytest.fail("REQUIRE_CUDA=1, but torch sees no CUDA device")
        pytest.skip("no CUDA device here; REQUIRE_CUDA=1 makes this a failure")
    return torch.device("cuda")


def test_cubes_of_a_gpu_are_those_of_the_cpu(world: World, cuda: torch.device) -> None:
    config = world.config()
    cubes = []
    for device in (torch.device("cpu"), cuda):
        backbone = build_backbone(config.backbone, config.sampling).to(device)
        store = MemoryStore(build_spec(config, backbone, device), config.store.shard_rows)
        extract_videos(store, list(video_sources(world.manifest).values()), backbone, config, device)
        cubes.append(torch.from_numpy(store.read(store.ids(), [0] * len(store.ids()))))
    # Convolutions on a GPU may use TF32 (10 bits of mantissa) and another order of sums.
    torch.testing.assert_close(cubes[1], cubes[0], rtol=1e-2, atol=1e-2)


def test_training_and_evaluation_run_on_a_gpu(world: World, cuda: torch.device, tmp_path: Path) -> None:
    scores = []
    for device in (torch.device("cpu"), cuda):
        folder = tmp_path / device.type
        train(world.config("training.mode=end_to_end", "training.episodes=0"), folder, device)
        result, _ = evaluate_run(load_run(folder, device), "test", 50, device)
        scores.append(result["accuracy"])
        assert result["episode_hash"]
    train(world.config("training.mode=end_to_end"), tmp_path / "trained", cuda)
    assert scores[1] == pytest.approx(scores[0], abs=0.05)


def test_every_head_gives_the_cpus_scores_and_losses_on_a_gpu(cuda: torch.device) -> None:
    for case in CASES:
        batch = make_batch(cube_shape=case.cube_shape)
        for training in (False, True):
            head = make_head(case).train(training)
            there = copy.deepcopy(head).to(cuda)
            expected, found = head(batch), there(batch.to(cuda))
            # Double precision has no TF32; what is left is the order of sums.
            torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=1e-6, atol=1e-6, msg=str(case))
            for name, term in expected.losses.items():
                torch.testing.assert_close(found.losses[name].cpu(), term, rtol=1e-6, atol=1e-6, msg=f"{case} {name}")


END_TO_END = ("training.mode=end_to_end", "training.backbone_batchnorm=episode", "training.optimizer=adamw")


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ((), 2e-2),
        (("training.gradient_checkpointing=true",), 2e-2),
        (("training.backbone_batchnorm=frozen", "training.clips_per_forward=1"), 2e-2),
        # Eight bits of mantissa in every layer, and a step that follows from them.
        (("training.compute_dtype=bfloat16",), 1e-1),
        (("training.compute_dtype=float16",), 5e-2),
    ],
)
def test_end_to_end_losses_of_a_gpu_are_those_of_the_cpu(
    world: World, cuda: torch.device, tmp_path: Path, changes: tuple[str, ...], tolerance: float
) -> None:
    kept = [change for change in END_TO_END if change.split("=")[0] not in {each.split("=")[0] for each in changes}]
    reference = [change for change in changes if "compute_dtype" not in change]
    train(world.config(*kept, *reference), tmp_path / "cpu", torch.device("cpu"))
    train(world.config(*kept, *changes), tmp_path / "cuda", cuda)
    assert losses_of(tmp_path / "cuda") == pytest.approx(losses_of(tmp_path / "cpu"), rel=tolerance)


def test_a_run_on_a_gpu_resumes_to_the_bit_with_deterministic_algorithms(
    world: World, cuda: torch.device, tmp_path: Path
) -> None:
    config = world.config(*END_TO_END, "training.deterministic=true")
    train(config, tmp_path / "whole", cuda)

    def stop(line: Mapping[str, Any]) -> None:
        if line["kind"] == "step" and line["episode"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(config, tmp_path / "cut", cuda, report=stop)
    train(config, tmp_path / "cut", cuda, resume=True)
    whole, cut = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("whole", "cut"))
    for name, value in whole.items():
        assert torch.equal(cut[name], value), name
