"""The one loop: same seed, same run; stopped and resumed, same run; selection never sees the test split."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.open import open_store
from cache.summary import summarise
from configs.load import load_config, to_toml
from configs.schema import RunConfig
from contracts.world import World
from extract.build import build_backbone, weights_digest
from pipeline import training, training_job
from pipeline.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, write_file
from pipeline.evaluation import Accuracy
from pipeline.extract_command import extract_to_store
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.interrupts import Stopped
from pipeline.model import ClipEncoder
from pipeline.run_files import is_begun
from pipeline.scoring import evaluate_run, load_run
from pipeline.settings import SetupError
from pipeline.setup import make_sampler
from pipeline.sources import SourceError
from pipeline.statistics import mean_and_interval

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def store_path(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cubes") / "cubes.zarr"
    config = world.config()
    backbone = build_backbone(config.backbone, config.sampling)
    with open_store(path, spec=build_spec(config, backbone, CPU), mode="a", shard_rows=8) as store:
        extract_videos(store, list(video_sources(world.manifest).values()), backbone, config, CPU)
    return path


def config_of(world: World, mode: str, store_path: Path, *overrides: str) -> RunConfig:
    extra = [f'store.path="{store_path}"'] if mode == "cached" else ["training.mode=end_to_end"]
    return world.config(*extra, *overrides)


def weights(folder: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(folder / name)["model"])


def assert_same_weights(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("mode", ["cached", "end_to_end"])
def test_run_writes_its_files_and_is_reproducible(world: World, store_path: Path, tmp_path: Path, mode: str) -> None:
    config = config_of(world, mode, store_path)
    for name in ("a", "b"):
        training.train(config, tmp_path / name, CPU)
    assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"config.toml", "metrics.jsonl", "best.pt", "last.pt", "card.json"} <= files
    assert ("backbone.pt" in files) == (mode == "end_to_end")
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [line["episode"] for line in lines if line["kind"] == "step"] == [3, 6, 9, 12]
    assert [line["episode"] for line in lines if line["kind"] == "validation"] == [6, 12]
    card = json.loads((tmp_path / "a/card.json").read_text())
    assert card["split_hash"] == world.manifest.split_hash
    assert card["selected_on"] == "val"


@pytest.mark.parametrize("mode", ["cached", "end_to_end"])
def test_training_changes_what_it_should(world: World, store_path: Path, tmp_path: Path, mode: str) -> None:
    training.train(config_of(world, mode, store_path, "training.episodes=0"), tmp_path / "start", CPU)
    training.train(config_of(world, mode, store_path), tmp_path / "run", CPU)
    before, after = weights(tmp_path / "start"), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("head.cam") for name in changed)
    assert any(name.startswith("encoder.backbone") for name in changed) == (mode == "end_to_end")


@pytest.mark.parametrize("mode", ["cached", "end_to_end"])
def test_stopped_and_resumed_run_equals_an_uninterrupted_one(
    world: World, store_path: Path, tmp_path: Path, mode: str
) -> None:
    config = config_of(world, mode, store_path)
    training.train(config, tmp_path / "whole", CPU)

    def stop_after_three(line: Mapping[str, Any]) -> None:
        if line["kind"] == "step" and line["episode"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        training.train(config, tmp_path / "cut", CPU, report=stop_after_three)
    assert stopped.value.exit_code == 143
    assert load_checkpoint(tmp_path / "cut/last.pt")["progress"]["episode"] == 3
    training.train(config, tmp_path / "cut", CPU, resume=True)
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert_same_weights(weights(tmp_path / "whole", "best.pt"), weights(tmp_path / "cut", "best.pt"))
    metrics = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert metrics[0] == metrics[1]


def test_resume_refuses_another_config_field_by_field(world: World, store_path: Path, tmp_path: Path) -> None:
    training.train(config_of(world, "cached", store_path), tmp_path / "run", CPU)
    other = config_of(world, "cached", store_path, "training.learning_rate=0.5", "training.cube_cache_bytes=0")
    with pytest.raises(SetupError, match=r"training\.learning_rate: run 0\.01, now 0\.5") as refused:
        training.train(other, tmp_path / "run", CPU, resume=True)
    assert "cube_cache_bytes" not in str(refused.value)


def test_existing_run_is_never_overwritten(world: World, store_path: Path, tmp_path: Path) -> None:
    config = config_of(world, "cached", store_path, "training.episodes=0")
    training.train(config, tmp_path / "run", CPU)
    with pytest.raises(SetupError, match="finished run"):
        training.train(config, tmp_path / "run", CPU)
    (tmp_path / "run/card.json").unlink()
    training.train(config, tmp_path / "run", CPU)  # nothing was trained, so nothing is lost


def test_micro_batches_give_the_gradients_of_the_whole_step(world: World, store_path: Path, tmp_path: Path) -> None:
    results = []
    for size in (1, 2, 6):
        config = config_of(
            world,
            "cached",
            store_path,
            "training.episodes=6",
            "training.episodes_per_step=6",
            f"training.episodes_per_forward={size}",
        )
        training.train(config, tmp_path / str(size), CPU)
        results.append(weights(tmp_path / str(size)))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-7)


def test_cubes_read_on_demand_give_the_same_run_as_resident_ones(
    world: World, store_path: Path, tmp_path: Path
) -> None:
    training.train(config_of(world, "cached", store_path), tmp_path / "resident", CPU)
    training.train(config_of(world, "cached", store_path, "training.cube_cache_bytes=0"), tmp_path / "read", CPU)
    assert_same_weights(weights(tmp_path / "resident"), weights(tmp_path / "read"))


def test_best_checkpoint_follows_validation_and_never_the_test_split(
    world: World, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation falls while test rises: the first checkpoint must win, and the test number keeps its label."""
    scores = {"val": iter([0.9, 0.8, 0.7, 0.6]), "test": iter([0.1, 0.2, 0.3, 0.95])}

    def fake(_model: object, _source: object, sampler: Any, episodes: int, *_rest: object) -> Accuracy:
        return Accuracy(next(scores[sampler.split]), 0.01, episodes, "hash", ())

    monkeypatch.setattr(training_job, "evaluate_model", fake)
    config = config_of(world, "cached", store_path, "training.validate_every=3", "training.track_test=true")
    card = training.train(config, tmp_path / "run", CPU)
    assert card["best_episode"] == 3
    assert load_checkpoint(tmp_path / "run/best.pt")["progress"]["episode"] == 3
    assert card["val_accuracy"] == 0.9
    assert card["test_selected_accuracy_published_protocol"] == 0.95


def test_without_track_test_no_test_episode_is_drawn(
    world: World, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    make = make_sampler

    def spy(config: RunConfig, manifest: Any, split: str) -> Any:
        asked.append(split)
        return make(config, manifest, split)

    monkeypatch.setattr(training, "make_sampler", spy)
    training.train(config_of(world, "cached", store_path), tmp_path / "run", CPU)
    assert set(asked) == {"train", "val"}


def test_rejected_video_of_the_universe_is_refused_by_name(world: World, tmp_path: Path) -> None:
    config = world.config()
    backbone = build_backbone(config.backbone, config.sampling)
    sources = video_sources(world.manifest)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    sources["left/2"] = type(sources["left/2"])("left/2", broken)
    with open_store(tmp_path / "s.zarr", spec=build_spec(config, backbone, CPU), mode="a", shard_rows=8) as store:
        extract_videos(store, list(sources.values()), backbone, config, CPU)
    with pytest.raises(SourceError, match=r"left/2.*dataset exclude"):
        training.train(world.config(f'store.path="{tmp_path / "s.zarr"}"'), tmp_path / "run", CPU)


def test_evaluation_says_what_made_the_number(world: World, store_path: Path, tmp_path: Path) -> None:
    training.train(config_of(world, "cached", store_path), tmp_path / "run", CPU)
    run = load_run(tmp_path / "run", CPU)
    result, score = evaluate_run(run, "test", 30, CPU)
    again, _ = evaluate_run(load_run(tmp_path / "run", CPU), "test", 30, CPU)
    assert result == again
    assert result["split_hash"] == world.manifest.split_hash
    with open_store(store_path) as store:
        assert result["store_fingerprint"] == store.spec.fingerprint
    assert len(score.per_episode) == 30
    assert (result["accuracy"], result["interval95"]) == mean_and_interval(score.per_episode)


def test_end_to_end_run_scores_the_same_live_and_through_its_re_extracted_cubes(world: World, tmp_path: Path) -> None:
    config = config_of(world, "end_to_end", tmp_path)
    training.train(config, tmp_path / "run", CPU)
    trained = world.config(f'backbone.weights="{tmp_path / "run/backbone.pt"}"')
    backbone = build_backbone(trained.backbone, trained.sampling)
    with open_store(tmp_path / "s.zarr", spec=build_spec(trained, backbone, CPU), mode="a", shard_rows=8) as store:
        extract_videos(store, list(video_sources(world.manifest).values()), backbone, trained, CPU)
    live, _ = evaluate_run(load_run(tmp_path / "run", CPU), "test", 40, CPU)
    cached, _ = evaluate_run(load_run(tmp_path / "run", CPU, str(tmp_path / "s.zarr")), "test", 40, CPU)
    assert live["accuracy"] == cached["accuracy"]
    assert live["store_fingerprint"] == cached["store_fingerprint"]


def test_store_of_a_run_names_it_and_a_head_on_it_may_start_from_the_runs(
    world: World, store_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, store = tmp_path / "run", tmp_path / "s.zarr"
    training.train(config_of(world, "end_to_end", tmp_path, "training.optimizer=adam"), run, CPU)
    extract_to_store(world.manifest_path, None, None, str(store), None, None, run, "cpu", ())
    with open_store(store) as opened:
        facts = summarise(opened)
    config = load_config(run / "config.toml", tables={"backbone": {"weights": str(run / "backbone.pt")}})
    assert facts["from_run"] == str(run)
    assert facts["weights_digest"] == weights_digest(build_backbone(config.backbone, config.sampling))
    start = (f'training.initial_weights="{run / "best.pt"}"', f'backbone.weights="{run / "backbone.pt"}"')
    training.train(config_of(world, "cached", store, "training.episodes=0", *start), tmp_path / "head", CPU)
    trained = weights(run, "best.pt")
    for name, value in weights(tmp_path / "head").items():
        assert torch.equal(value, trained[name]), name
    assert "it starts on features that it does not know" not in capfd.readouterr().err
    training.train(config_of(world, "cached", store_path, "training.episodes=0", start[0]), tmp_path / "other", CPU)
    assert "it starts on features that it does not know" in capfd.readouterr().err


def test_interval_is_that_of_the_reference() -> None:
    # 1.96 times the population standard deviation over the root of the count (reference 8.1): p = 0.75, n = 4.
    mean, half = mean_and_interval([1.0, 1.0, 1.0, 0.0])
    assert mean == 0.75
    assert half == pytest.approx(1.96 * (0.75 * 0.25) ** 0.5 / 2)


def test_torn_checkpoint_is_one_plain_error(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", {"model": {"w": torch.zeros(1000)}})
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="whole"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_signal_saves_and_exits_with_its_code(
    world: World, store_path: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    recipe = tmp_path / "r.toml"
    write_file(recipe, to_toml(config_of(world, "cached", store_path, "training.episodes=1000000")).encode())
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "train", str(recipe), "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    assert process.stderr is not None
    with process.stderr as stderr:
        assert "--resume" in stderr.read()
    assert load_checkpoint(tmp_path / "run/last.pt")["progress"]["episode"] > 0


def test_a_lengthened_run_is_the_run_that_always_had_that_length(
    world: World, store_path: Path, tmp_path: Path
) -> None:
    steps = ("training.schedule=multi_step", "training.milestones=[9,15]", "training.validate_every=6")
    configs = {
        count: config_of(world, "cached", store_path, *steps, f"training.episodes={count}") for count in (12, 18)
    }
    training.train(configs[18], tmp_path / "long", CPU)
    training.train(configs[12], tmp_path / "grown", CPU)
    training.train(configs[18], tmp_path / "grown", CPU, resume=True)
    assert_same_weights(weights(tmp_path / "long"), weights(tmp_path / "grown"))
    assert (tmp_path / "long/metrics.jsonl").read_bytes() == (tmp_path / "grown/metrics.jsonl").read_bytes()
    assert json.loads((tmp_path / "grown/card.json").read_text())["episodes"] == 18
    assert json.loads((tmp_path / "grown/card_after_12_episodes.json").read_text())["episodes"] == 12


@pytest.mark.parametrize("change", ["training.schedule=cosine", "training.episodes_per_step=5"])
def test_a_run_whose_numbers_depend_on_its_length_is_not_lengthened(
    world: World, store_path: Path, tmp_path: Path, change: str
) -> None:
    short, long = (config_of(world, "cached", store_path, change, f"training.episodes={count}") for count in (12, 18))
    training.train(short, tmp_path / "run", CPU)
    with pytest.raises(SetupError, match=r"training\.episodes: run 12, now 18"):
        training.train(long, tmp_path / "run", CPU, resume=True)


def test_a_start_with_another_config_leaves_nothing_of_the_one_before(
    world: World, store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (config_of(world, "cached", store_path, f"training.learning_rate={rate}") for rate in (0.01, 0.5))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    training.train(config_of(world, "cached", store_path, "training.episodes=0"), tmp_path / "run", CPU)
    (tmp_path / "run/card.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(training_job.TrainingJob, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            training.train(second, tmp_path / "run", CPU)
    assert not is_begun(tmp_path / "run")
    training.train(second, tmp_path / "run", CPU)
    with pytest.raises(SetupError, match="holds a run already"):
        training.train(first, tmp_path / "run", CPU)


def test_resuming_on_other_cubes_of_the_same_kind_is_refused(world: World, tmp_path: Path) -> None:
    config = config_of(world, "cached", tmp_path / "cubes.zarr")
    backbone = build_backbone(config.backbone, config.sampling)
    sources = list(video_sources(world.manifest).values())
    for name, paths in (("cubes.zarr", sources), ("other.zarr", [*sources[1:], sources[0]])):
        # The same videos under each other's names: alike in all but the numbers.
        renamed = [replace(source, path=other.path) for source, other in zip(sources, paths, strict=True)]
        with open_store(tmp_path / name, spec=build_spec(config, backbone, CPU), mode="a", shard_rows=8) as store:
            extract_videos(store, renamed, backbone, config, CPU)
    training.train(config, tmp_path / "run", CPU)
    training.train(config, tmp_path / "run", CPU, resume=True)
    with pytest.raises(SetupError, match="cubes of the store are not those that the run began with"):
        training.train(config_of(world, "cached", tmp_path / "other.zarr"), tmp_path / "run", CPU, resume=True)


def test_a_signal_is_heard_between_the_passes_of_a_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of twelve clips' passes: the wish comes in its first one, and the step is not finished before saving."""
    config = config_of(world, "end_to_end", tmp_path, "training.episodes=24", "training.episodes_per_step=12")
    training.train(config, tmp_path / "whole", CPU)
    passes = 0
    encode = ClipEncoder.forward

    def counted(self: ClipEncoder, *arguments: Any) -> torch.Tensor:
        nonlocal passes
        passes += self.training
        if passes == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(ClipEncoder, "forward", counted)
        with pytest.raises(Stopped):
            training.train(config, tmp_path / "cut", CPU)
    assert passes == 14
    assert load_checkpoint(tmp_path / "cut/last.pt")["progress"]["episode"] == 12
    training.train(config, tmp_path / "cut", CPU, resume=True)
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
