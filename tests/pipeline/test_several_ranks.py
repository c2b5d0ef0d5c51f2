"""Several ranks of real processes: the losses, weights, statistics and scores of one; stops and errors that all of them share."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.open import open_store
from configs.schema import RunConfig
from contracts.rank_jobs import (
    RankReport,
    Scored,
    stop_and_resume,
    train_and_evaluate,
    train_runs,
    train_to_an_error,
    train_with_bad_numbers,
)
from contracts.rank_processes import run_ranks
from contracts.world import World, make_world
from extract.build import build_backbone
from pipeline.checkpoint import load_checkpoint
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.setup import make_sampler

CPU = torch.device("cpu")

# Sums over ranks add the same float32 numbers in another order. Rates are small, so that a rounding error stays one.
LOSS = 1e-5
WEIGHT_RELATIVE, WEIGHT_ABSOLUTE = 1e-5, 1e-6

KNOBS = (
    "training.published_first_step=true",
    "training.episodes_per_forward=1",
    "training.momentum=0.9",
    "training.ema_decay=0.5",
    "training.clip_gradient_norm=0.05",
    "training.save_seconds=0.001",
)
END_TO_END = ("training.mode=end_to_end", "training.learning_rate=0.001")
SYNCHRONISED = ("training.episodes=10", "training.validate_every=10")

QUICK: Mapping[str, Sequence[str]] = {
    "knobs": KNOBS,
    "protogan": ("head.name=protogan",),  # trains its parts in turns
    "neighbor": ("head.name=neighbor",),
    "protonet": ("head.name=protonet",),  # has nothing to learn
    "episode": (
        *END_TO_END,
        "training.backbone_batchnorm=episode",
        "training.gradient_checkpointing=true",
        "training.episodes_per_forward=2",
    ),
    "synchronised": (*END_TO_END, *SYNCHRONISED, "training.backbone_batchnorm=synchronised"),
    "classify": ("training.mode=classify", "training.learning_rate=0.001", *SYNCHRONISED),
}
SLOW: Mapping[str, Sequence[str]] = {
    "plain": (),
    "all_at_once": ("training.episodes_per_step=12",),
    "arn": ("head.name=arn",),
    "frozen": (
        *END_TO_END,
        "training.gradient_checkpointing=true",
        "training.clips_per_forward=1",
        "training.clip_gradient_norm=0.3",
        "training.ema_decay=0.5",
    ),
    "frozen_backbone": (*END_TO_END, "training.backbone_learning_rate=0"),
    "published": (*END_TO_END, "head.name=bi_mhm", "training.backbone_batchnorm=published"),
    "classify_frozen": (
        "training.mode=classify",
        "training.learning_rate=0.001",
        "training.backbone_batchnorm=frozen",
        'training.freeze=["encoder.backbone.stem.*"]',
    ),
}
TOGETHER = ("protogan", "neighbor", "protonet")
"""Trained on one pass of the data."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Videos, their cubes, and a folder for runs."""

    world: World
    store_path: Path
    folder: Path

    def config(self, *overrides: str) -> RunConfig:
        """Steps of five episodes, the last one of two: neither can be shared evenly."""
        is_cached = not any(each.startswith("training.mode") for each in overrides)
        return self.world.config(
            *((f'store.path="{self.store_path}"',) if is_cached else ()),
            "training.episodes_per_step=5",
            "training.validate_every=10",
            *overrides,
        )

    def cases(self, knobs: Mapping[str, Sequence[str]], folder: Path) -> list[list[tuple[RunConfig, Path]]]:
        """Runs by the names of their knobs."""
        runs = {name: (self.config(*given), folder / name) for name, given in knobs.items()}
        together = [runs.pop(name) for name in TOGETHER if name in runs]
        return [*([together] if together else []), *([run] for run in runs.values())]


@pytest.fixture(scope="module")
def bench(world: World, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("ranks")
    config = world.config()
    backbone = build_backbone(config.backbone, config.sampling)
    with open_store(folder / "cubes.zarr", spec=build_spec(config, backbone, CPU), mode="a", shard_rows=8) as store:
        extract_videos(store, list(video_sources(world.manifest).values()), backbone, config, CPU)
    return Bench(world, folder / "cubes.zarr", folder)


@pytest.fixture(scope="module")
def trained(bench: Bench) -> dict[int, list[RankReport]]:
    """By number of ranks what each rank reports; all of them score the runs that one rank has trained."""
    scored = [Scored(bench.folder / f"1/{name}", 40) for name in ("knobs", "episode")]
    return {
        size: run_ranks(size, train_and_evaluate, bench.cases(QUICK, bench.folder / str(size)), scored)
        for size in (1, 2, 4)
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(run: Path, other: Path) -> None:
    """Every loss, accuracy and gradient norm, every weight and every running statistic: equal up to rounding."""
    for line, expected in zip(metrics(run), metrics(other), strict=True):
        assert line.pop("kind") == expected.pop("kind")
        assert line == pytest.approx(expected, rel=LOSS, abs=LOSS), run
    for name in ("last.pt", "best.pt"):
        weights, others = load_checkpoint(run / name)["model"], load_checkpoint(other / name)["model"]
        torch.testing.assert_close(weights, others, rtol=WEIGHT_RELATIVE, atol=WEIGHT_ABSOLUTE)


def assert_same_bits(run: Path, other: Path) -> None:
    """What a run that was stopped or broken must be to one that was not."""
    assert metrics(run) == metrics(other)
    for name in ("last.pt", "best.pt"):
        weights, others = load_checkpoint(run / name)["model"], load_checkpoint(other / name)["model"]
        torch.testing.assert_close(weights, others, rtol=0, atol=0)


def with_a_video_first_seen_in_episode(episode: int, world: World, *knobs: str) -> tuple[RunConfig, str]:
    """A config whose training meets some video in this episode and in none before it."""
    for seed in range(100):
        config = world.config(*knobs, f"episodes.seed={seed}")
        sampler = make_sampler(config, world.manifest, "train")
        drawn = [sampler.episode(index) for index in range(episode + 1)]
        ids = [{*each.support_ids, *each.query_ids} for each in drawn]
        new = ids[-1].difference(*ids[:-1])
        if new:
            return config, min(new)
    raise AssertionError("no such video")


def test_one_two_and_four_ranks_train_the_same(bench: Bench, trained: dict[int, list[RankReport]]) -> None:
    for size in set(trained) - {1}:
        for name in QUICK:
            assert_same_training(bench.folder / str(size) / name, bench.folder / "1" / name)


def test_all_ranks_end_with_the_same_bits(trained: dict[int, list[RankReport]]) -> None:
    for reports in trained.values():
        assert reports[0].digests.keys() == QUICK.keys()
        assert all(report.digests == reports[0].digests for report in reports)


def test_any_number_of_ranks_scores_every_query_alike(trained: dict[int, list[RankReport]]) -> None:
    expected = trained[1][0].scores
    assert all(0 < result["accuracy"] < 1 and digest for result, digest in expected)
    for reports in trained.values():
        assert all(report.scores == expected for report in reports)


def test_only_the_first_rank_writes_and_none_draws_from_the_global_generator(
    bench: Bench, trained: dict[int, list[RankReport]]
) -> None:
    for reports in trained.values():
        assert not any(report.has_drawn for report in reports)
        assert any(str(bench.folder) in path for path in reports[0].written)
        for report in reports[1:]:
            assert not [path for path in report.written if str(bench.folder) in path]


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ({0: signal.SIGUSR1}, 143),
        pytest.param({1: signal.SIGTERM}, 143, marks=pytest.mark.slow),
        pytest.param({0: signal.SIGINT, 1: signal.SIGINT}, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_rank_stops_all_and_they_go_on_as_if_nothing_had_been(
    bench: Bench, trained: dict[int, list[RankReport]], tmp_path: Path, signals: dict[int, int], code: int
) -> None:
    [case] = bench.cases({"knobs": KNOBS}, tmp_path)
    answers = run_ranks(2, stop_and_resume, case, signals, 4)
    assert [answer[0] for answer in answers] == [code, code]
    whole = bench.folder / "2/knobs"
    assert_same_bits(tmp_path / "knobs", whole)
    assert [answer[1] for answer in answers] == [{"knobs": trained[2][0].digests["knobs"]}] * 2


def test_an_episode_that_is_not_finite_is_named_by_every_rank(bench: Bench, tmp_path: Path) -> None:
    [case] = bench.cases({"plain": ()}, tmp_path)
    answers = run_ranks(2, train_with_bad_numbers, case, 8)  # the second rank's, in the second step
    assert answers[0] == answers[1]
    assert answers[0][0] == "TrainingError"
    assert "episodes [8]" in answers[0][1]
    run = tmp_path / "plain"
    assert load_checkpoint(run / "last.pt")["progress"]["episode"] == 5
    assert [each["index"] for each in json.loads((run / "not_finite.json").read_text())["episodes"]] == [8]


@pytest.mark.slow
def test_a_video_that_one_rank_cannot_read_ends_all_and_the_run_goes_on_when_it_is_mended(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    steps = ("training.episodes=6", "training.episodes_per_step=2")
    knobs = (*END_TO_END, *steps, "training.check_videos=false")
    config, video_id = with_a_video_first_seen_in_episode(3, world, *knobs)
    whole = run_ranks(2, train_runs, [(config, tmp_path / "whole/run")])
    path = world.folder / f"videos/{video_id}.mp4"
    good = path.read_bytes()
    path.write_bytes(b"this is no video")
    answers = run_ranks(2, train_to_an_error, [(config, tmp_path / "run")])
    assert [answer[0] for answer in answers] == ["RankLost", "SourceError"]
    assert "another rank of this job has ended" in answers[0][1]
    assert video_id in answers[1][1]
    assert load_checkpoint(tmp_path / "run/last.pt")["progress"]["episode"] == 2
    path.write_bytes(good)
    assert run_ranks(2, train_runs, [(config, tmp_path / "run")], True) == whole
    assert_same_bits(tmp_path / "run", tmp_path / "whole/run")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_way_to_train_is_the_same_on_several_ranks(
    bench: Bench, trained: dict[int, list[RankReport]], alone: Path, size: int
) -> None:
    del trained  # QUICK on one rank, for the number of ranks that it leaves out
    knobs = {**SLOW, **(QUICK if size == 3 else {})}
    folder = bench.folder / f"slow{size}"
    scored = [Scored(alone / "plain", 70), Scored(alone / "frozen", 70), Scored(bench.folder / "1/episode", 70)]
    reports = run_ranks(size, train_and_evaluate, bench.cases(knobs, folder), scored)
    assert all(report.digests == reports[0].digests for report in reports)
    assert all(report.scores == reports[0].scores for report in reports)
    assert reports[0].scores == run_ranks(1, train_and_evaluate, [], scored)[0].scores
    for name in knobs:
        assert_same_training(folder / name, (alone if name in SLOW else bench.folder / "1") / name)


@pytest.fixture(scope="module")
def alone(bench: Bench) -> Path:
    """Runs of `SLOW` by one rank; read only."""
    folder = bench.folder / "slow1"
    run_ranks(1, train_and_evaluate, bench.cases(SLOW, folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knobs", "episode", "synchronised"])
def test_three_ranks_stop_and_go_on_to_the_same_bits(bench: Bench, tmp_path: Path, name: str) -> None:
    """With three addends the order of a sum shows: it is the same before and after."""
    knobs = (*QUICK[name], "training.episodes=15")
    [whole], [cut] = (bench.cases({name: knobs}, tmp_path / each) for each in ("whole", "cut"))
    digests = run_ranks(3, train_runs, whole)
    answers = run_ranks(3, stop_and_resume, cut, {2: signal.SIGTERM}, 4 if name == "knobs" else 5, False)
    assert [answer[0] for answer in answers] == [143] * 3
    assert run_ranks(3, train_runs, cut, True) == digests
    assert_same_bits(tmp_path / "cut" / name, tmp_path / "whole" / name)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 3), (4, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(
    bench: Bench, trained: dict[int, list[RankReport]], tmp_path: Path, sizes: tuple[int, int]
) -> None:
    del trained  # for the whole run
    [case] = bench.cases({"knobs": KNOBS}, tmp_path)
    run_ranks(sizes[0], stop_and_resume, case, {0: signal.SIGTERM}, 4, False)
    assert load_checkpoint(tmp_path / "knobs/last.pt")["progress"]["episode"] < 12
    run_ranks(sizes[1], train_runs, case, True)
    assert_same_training(tmp_path / "knobs", bench.folder / "1/knobs")
