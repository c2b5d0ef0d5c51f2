"""What an optimiser step computes: gradients worked out by hand, learning rates, and what a resumed run goes on from."""

# E episodes, S supports, Q queries, N classes; C channels

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache.open import open_store
from configs.schema import RunConfig
from configs.training import TrainingConfig
from contracts.world import World
from episodes.batch import EpisodeBatch
from episodes.datasets import Manifest, write_manifest
from episodes.head import HeadModule, HeadOutput
from episodes.sampler import EpisodeProtocol, EpisodeSampler, draw_views
from episodes.video import Video
from extract.build import build_backbone
from pipeline import training
from pipeline.batches import TrainingBatches
from pipeline.checkpoint import load_checkpoint
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.interrupts import Stopped, StopRequest
from pipeline.learning import Learner, StepRecord, StepSpeed
from pipeline.loop import run_loop
from pipeline.model import FewShotModel
from pipeline.optimisation import Stepper
from pipeline.setup import prepare

CPU = torch.device("cpu")
NUM_VIEWS = 4
FIRST_WEIGHT = (0.5, -0.3, 0.8)
MATCH_SHARE, SIZE_SHARE = 0.5, 0.25
FIRST_RATE, DECAY_OF_RATE = 0.2, 0.5


class TinyHead(HeadModule):
    """Three weights: score of class n is sum_c weight_c query_c prototype_nc; a second loss term is weight . query."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(FIRST_WEIGHT))
        self.loss_weights = {"match": MATCH_SHARE, "size": SIZE_SHARE}

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Inputs (E, S, C) with one support per class and (E, Q, C)."""
        assert not with_maps
        assert batch.query_labels is not None
        order = batch.support_labels.argsort(dim=1)[..., None].expand_as(batch.support)
        logits = torch.einsum("eqc,enc,c->eqn", batch.query, batch.support.gather(1, order), self.weight)
        match = F.cross_entropy(logits.flatten(0, 1), batch.query_labels.flatten(), reduction="none")
        return HeadOutput(logits, {"match": match.view(logits.shape[:2]), "size": batch.query @ self.weight})


class Table:
    """A source of three numbers for each video and view."""

    def __init__(self, video_ids: Sequence[str]) -> None:
        generator = np.random.Generator(np.random.Philox(key=5))
        self.rows = {
            (video_id, view): generator.normal(size=3).astype(np.float32)
            for video_id in video_ids
            for view in range(NUM_VIEWS)
        }

    def check(self, video_ids: Sequence[str], views: Sequence[int]) -> None:
        """Everything that was asked for at birth is there."""

    def read(self, video_ids: Sequence[str], views: Sequence[int]) -> Tensor:
        """(V, 3)."""
        return torch.from_numpy(np.stack([self.rows[key] for key in zip(video_ids, views, strict=True)]))


@dataclass(frozen=True, slots=True)
class HandStep:
    """One step worked out in numpy."""

    weight: np.ndarray
    loss: float
    terms: dict[str, float]


def tiny_sampler() -> EpisodeSampler:
    videos = tuple(Video(f"{name}{number}", f"{name}{number}", name, "train") for name in "abc" for number in range(4))
    return EpisodeSampler(Manifest(videos, Path()), "train", EpisodeProtocol("per_class", 2, 1, 1), 3)


def episode_by_hand(
    sampler: EpisodeSampler, table: Table, index: int, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients (Q, 3) and unweighted terms (Q, 2) of an episode's queries."""
    episode = sampler.episode(index)
    ids = [*episode.support_ids, *episode.query_ids]
    views = draw_views(sampler.split_hash, sampler.seed, index, len(ids), NUM_VIEWS)
    rows = np.stack([table.rows[video_id, int(view)] for video_id, view in zip(ids, views, strict=True)])
    prototypes = rows[:2][np.argsort(episode.support_labels)].astype(np.float64)
    gradients, terms = [], []
    for query, label in zip(rows[2:].astype(np.float64), episode.query_labels, strict=True):
        products = query * prototypes  # (N, C)
        odds = np.exp(products @ weight)
        share = odds / odds.sum()
        terms.append([-math.log(share[label]), float(query @ weight)])
        # Softmax minus one-hot, times what each score's slope in the weight is.
        gradients.append(MATCH_SHARE * (share - np.eye(2)[label]) @ products + SIZE_SHARE * query)
    return np.stack(gradients), np.array(terms)


def steps_by_hand(steps: Sequence[range], query_reduction: str) -> list[HandStep]:
    """Plain gradient descent whose rate falls after every step."""
    sampler = tiny_sampler()
    table = Table(sampler.video_ids)
    weight, rate = np.array(FIRST_WEIGHT), FIRST_RATE
    reduce = np.mean if query_reduction == "mean" else np.sum
    done = []
    for step in steps:
        by_episode = [episode_by_hand(sampler, table, index, weight) for index in step]
        weight = weight - rate * np.mean([reduce(gradients, axis=0) for gradients, _ in by_episode], axis=0)
        totals = [reduce(terms @ [MATCH_SHARE, SIZE_SHARE]) for _, terms in by_episode]
        match, size = np.mean([terms.mean(axis=0) for _, terms in by_episode], axis=0)
        done.append(HandStep(weight, float(np.mean(totals)), {"match": float(match), "size": float(size)}))
        rate *= DECAY_OF_RATE
    return done


def run_tiny(config: TrainingConfig) -> tuple[list[np.ndarray], list[StepRecord]]:
    """The loop on the tiny head: weights and records after each step."""
    sampler = tiny_sampler()
    batches = TrainingBatches(sampler, Table(sampler.video_ids), {"a": 0, "b": 1, "c": 2}, NUM_VIEWS)
    head = TinyHead()
    optimizer = torch.optim.SGD([{"params": head.parameters(), "name": "head"}], lr=FIRST_RATE)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, DECAY_OF_RATE)
    found: list[np.ndarray] = []
    records: list[StepRecord] = []

    def note(record: StepRecord, speed: StepSpeed) -> None:
        assert speed.clips > 0
        found.append(head.weight.detach().numpy().copy())
        records.append(record)

    model = FewShotModel(nn.Identity(), head)
    stepper = Stepper(model, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False))
    learner = Learner(model, stepper, config, note)
    run_loop([learner], batches, CPU, StopRequest())
    assert learner.done == config.episodes
    return found, records


@pytest.mark.parametrize("per_forward", [1, 2, 3])
@pytest.mark.parametrize("query_reduction", ["mean", "sum"])
def test_steps_follow_the_gradients_worked_out_by_hand(query_reduction: Any, per_forward: int) -> None:
    """Eight episodes by three: steps of three, three and two, each the mean over its own episodes."""
    config = TrainingConfig(
        episodes=8, episodes_per_step=3, episodes_per_forward=per_forward, query_reduction=query_reduction
    )
    found, records = run_tiny(config)
    expected = steps_by_hand([range(3), range(3, 6), range(6, 8)], query_reduction)
    # The loop counts in float32, the hand in float64.
    np.testing.assert_allclose(found, [step.weight for step in expected], rtol=1e-5, atol=1e-6)
    assert [record.loss for record in records] == pytest.approx([step.loss for step in expected], rel=1e-5)
    for record, step in zip(records, expected, strict=True):
        assert record.terms == pytest.approx(step.terms, rel=1e-4, abs=1e-5)
    assert [record.episode for record in records] == [3, 6, 8]
    assert [record.learning_rate for record in records] == pytest.approx([0.2, 0.1, 0.05])


@pytest.fixture(scope="module")
def store_path(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cubes") / "cubes.zarr"
    config = world.config()
    backbone = build_backbone(config.backbone, config.sampling)
    with open_store(path, spec=build_spec(config, backbone, CPU), mode="a", shard_rows=8) as store:
        extract_videos(store, list(video_sources(world.manifest).values()), backbone, config, CPU)
    return path


def cached(world: World, store_path: Path, *overrides: str) -> RunConfig:
    return world.config(f'store.path="{store_path}"', "training.validation_episodes=2", *overrides)


def trained(config: RunConfig, folder: Path) -> dict[str, Tensor]:
    """All weights and statistics after training."""
    training.train(config, folder, CPU)
    return dict(load_checkpoint(folder / "last.pt")["model"])


def fresh(config: RunConfig) -> tuple[dict[str, Tensor], set[str]]:
    """All weights and statistics before training, and which of them are parameters."""
    model = prepare(config, CPU).model
    return model.state_dict(), {name for name, _ in model.named_parameters()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_takes_its_share_of_each_weight(
    world: World, store_path: Path, tmp_path: Path, optimizer: str
) -> None:
    config = cached(
        world,
        store_path,
        "training.episodes=3",
        "training.learning_rate=0.5",
        f"training.optimizer={optimizer}",
        "training.weight_decay=0.0",
    )
    decayed_config = config.model_copy(update={"training": config.training.model_copy(update={"weight_decay": 0.2})})
    before, parameters = fresh(config)
    plain, decayed = trained(config, tmp_path / "plain"), trained(decayed_config, tmp_path / "decayed")
    farthest = 0.0
    for name in parameters:
        taken = 0.5 * 0.2 * before[name]
        torch.testing.assert_close(decayed[name], plain[name] - taken, rtol=1e-5, atol=1e-6)
        farthest = max(farthest, float(taken.abs().max()))
    assert farthest > 1e-3


def test_momentum_repeats_its_share_of_the_first_step(world: World, store_path: Path, tmp_path: Path) -> None:
    settings = ("training.episodes=6", "training.learning_rate=0.5")
    before, parameters = fresh(cached(world, store_path, *settings))
    one = trained(cached(world, store_path, *settings, "training.episodes=3"), tmp_path / "one")
    two = trained(cached(world, store_path, *settings), tmp_path / "two")
    momentum = trained(cached(world, store_path, *settings, "training.momentum=0.9"), tmp_path / "momentum")
    farthest = 0.0
    for name in parameters:
        carried = 0.9 * (one[name] - before[name])
        torch.testing.assert_close(momentum[name], two[name] + carried, rtol=1e-5, atol=1e-6)
        farthest = max(farthest, float(carried.abs().max()))
    assert farthest > 1e-3


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_recorded_learning_rates_follow_the_schedule(
    world: World, store_path: Path, tmp_path: Path, schedule: str
) -> None:
    """Eleven episodes by three: the fourth step has two, and counts as a whole one for the schedule."""
    config = cached(
        world,
        store_path,
        "training.episodes=11",
        f"training.schedule={schedule}",
        "training.optimizer=adam",
        "training.learning_rate=0.02",
    )
    training.train(config, tmp_path / "run", CPU)
    steps = [line for line in metrics(tmp_path / "run") if line["kind"] == "step"]
    assert [line["episode"] for line in steps] == [3, 6, 9, 11]
    cosine = [0.01 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert [line["learning_rate"] for line in steps] == pytest.approx([0.02] * 4 if schedule == "constant" else cosine)
    validated = [line["episode"] for line in metrics(tmp_path / "run") if line["kind"] == "validation"]
    assert validated == [6, 11]


def test_resumed_run_goes_on_with_its_moments_and_its_schedule(world: World, store_path: Path, tmp_path: Path) -> None:
    config = cached(
        world, store_path, "training.optimizer=adam", "training.schedule=cosine", "training.learning_rate=0.02"
    )
    whole = trained(config, tmp_path / "whole")

    def stop_after_two_steps(line: Mapping[str, Any]) -> None:
        if line["kind"] == "step" and line["episode"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        training.train(config, tmp_path / "cut", CPU, report=stop_after_two_steps)
    training.train(config, tmp_path / "cut", CPU, resume=True)
    cut = load_checkpoint(tmp_path / "cut/last.pt")["model"]
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_validating_more_often_changes_no_weight_and_no_statistic(
    world: World, store_path: Path, tmp_path: Path
) -> None:
    often = trained(cached(world, store_path, "training.validate_every=3", "training.track_test=true"), tmp_path / "a")
    once = trained(cached(world, store_path, "training.validate_every=1000"), tmp_path / "b")
    assert all(torch.equal(often[name], once[name]) for name in once)


def test_without_validation_split_the_last_checkpoint_is_the_best(
    world: World, store_path: Path, tmp_path: Path
) -> None:
    kept = tuple(video for video in world.manifest.videos if video.split != "val")
    write_manifest(Manifest(kept, world.manifest.root), tmp_path / "videos.csv")
    config = cached(world, store_path, f'data.manifest="{tmp_path / "videos.csv"}"', "training.track_test=true")
    last = trained(config, tmp_path / "run")
    card = json.loads((tmp_path / "run/card.json").read_text())
    assert card["selected_on"].startswith("nothing")
    assert (card["val_accuracy"], card["val_interval95"], card["best_episode"]) == (None, None, 12)
    best = load_checkpoint(tmp_path / "run/best.pt")
    assert best["progress"]["episode"] == 12
    assert all(torch.equal(best["model"][name], last[name]) for name in last)
    assert not any("val_accuracy" in line for line in metrics(tmp_path / "run"))
