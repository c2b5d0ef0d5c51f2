"""Several heads on one pass of the data: each run is the one that it would be alone."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.open import open_store
from configs.load import ConfigError, load_config, to_toml
from configs.schema import RunConfig
from contracts.world import World
from extract.build import build_backbone
from pipeline import training_job
from pipeline.checkpoint import load_checkpoint
from pipeline.evaluation import Accuracy, evaluate_model
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.interrupts import Stopped
from pipeline.learning import TrainingError
from pipeline.settings import SetupError
from pipeline.train_heads import head_configs, train_heads
from pipeline.training import train, train_together

CPU = torch.device("cpu")
HEADS = ("mastaf", "neighbor", "cross")


@pytest.fixture(scope="module")
def recipe(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    config = world.config(f'store.path="{folder / "cubes.zarr"}"', "head.alpha=0.5")
    backbone = build_backbone(config.backbone, config.sampling)
    spec = build_spec(config, backbone, CPU)
    with open_store(folder / "cubes.zarr", spec=spec, mode="a", shard_rows=8) as store:
        extract_videos(store, list(video_sources(world.manifest).values()), backbone, config, CPU)
    path = folder / "recipe.toml"
    path.write_text(to_toml(config))
    return path


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(folder / "last.pt")["model"])


def assert_same_runs(first: Path, second: Path) -> None:
    ours, theirs = model_of(first), model_of(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert (first / "metrics.jsonl").read_text() == (second / "metrics.jsonl").read_text()
    assert (first / "config.toml").read_text() == (second / "config.toml").read_text()


def together(recipe: Path, folder: Path, *overrides: str) -> dict[str, RunConfig]:
    configs = head_configs(recipe, HEADS, overrides)
    train_together([(config, folder / name) for name, config in configs.items()], CPU)
    return configs


def test_each_head_is_what_it_would_be_alone(recipe: Path, tmp_path: Path) -> None:
    own = ("heads.cross.training.learning_rate=0.5", "heads.cross.tau=0.1")
    for name, config in together(recipe, tmp_path / "together", *own).items():
        train(config, tmp_path / "alone" / name, CPU)
        assert_same_runs(tmp_path / "alone" / name, tmp_path / "together" / name)
    configs = head_configs(recipe, HEADS, own)
    assert configs["cross"].training.learning_rate == 0.5
    assert configs["cross"].head.options["tau"] == 0.1
    assert configs["neighbor"].training.learning_rate == configs["mastaf"].training.learning_rate == 0.01


def test_the_recipes_options_are_those_of_its_own_head(recipe: Path) -> None:
    configs = head_configs(recipe, HEADS, ())
    assert configs["mastaf"].head.options["alpha"] == 0.5
    assert configs["cross"].head.options == configs["neighbor"].head.options == {}


def test_stopped_heads_go_on_each_from_its_own_position(recipe: Path, tmp_path: Path) -> None:
    configs = together(recipe, tmp_path / "whole")
    runs = [(config, tmp_path / "cut" / name) for name, config in configs.items()]

    def stop_at_once(run: Path, line: Mapping[str, Any]) -> None:
        if run.name == "neighbor" and line["kind"] == "step" and line["episode"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train_together(runs, CPU, report=stop_at_once)
    # One of them further than the others, as after a kill between two saves.
    train(configs["cross"], tmp_path / "cut/cross", CPU, resume=True)
    train_together(runs, CPU, resume=True)
    for name in configs:
        assert_same_runs(tmp_path / "whole" / name, tmp_path / "cut" / name)


def test_a_signal_while_one_head_validates_loses_no_head_a_step(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = together(recipe, tmp_path / "whole")
    runs = [(config, tmp_path / "cut" / name) for name, config in configs.items()]
    validate = evaluate_model

    def validate_and_stop(*arguments: Any) -> Accuracy:
        if load_checkpoint(tmp_path / "cut/mastaf/last.pt")["progress"]["episode"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments)

    monkeypatch.setattr(training_job, "evaluate_model", validate_and_stop)
    with pytest.raises(Stopped):
        train_together(runs, CPU)
    monkeypatch.undo()
    reached = {name: load_checkpoint(tmp_path / f"cut/{name}/last.pt")["progress"]["episode"] for name in configs}
    assert reached == dict.fromkeys(HEADS, 6)
    train_together(runs, CPU, resume=True)
    for name in configs:
        assert_same_runs(tmp_path / "whole" / name, tmp_path / "cut" / name)


def test_what_a_recipe_says_of_its_own_heads_loss_is_no_statement_about_the_others(
    recipe: Path, tmp_path: Path
) -> None:
    summed = tmp_path / "summed.toml"
    config = load_config(recipe, ["training.query_reduction=sum"])
    summed.write_text(to_toml(config))
    own = head_configs(summed, ("mastaf", "neighbor"), ())
    assert [own[name].training.query_reduction for name in ("mastaf", "neighbor")] == ["sum", None]
    for_all = head_configs(summed, ("mastaf", "neighbor"), ("training.query_reduction=sum",))
    assert for_all["neighbor"].training.query_reduction == "sum"


PROTOGAN = ("heads.protogan.hidden=16", "training.optimizer=adam", "training.learning_rate=0.01")


def changed_parts(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name.removeprefix("head.").split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_parts_that_learn_in_turns_change_in_their_steps_only(recipe: Path, tmp_path: Path) -> None:
    weights = []
    for episodes in (0, 3, 6, 9):
        config = head_configs(recipe, ("protogan",), (*PROTOGAN, f"training.episodes={episodes}"))["protogan"]
        train(config, tmp_path / str(episodes), CPU)
        weights.append(model_of(tmp_path / str(episodes)))
    turns = [changed_parts(*pair) for pair in itertools.pairwise(weights)]
    assert turns[0] == turns[2] == {"critic"}
    assert "generator" in turns[1]
    assert "critic" not in turns[1]


def test_turns_go_on_where_a_stop_left_them(recipe: Path, tmp_path: Path) -> None:
    config = head_configs(recipe, ("protogan",), PROTOGAN)["protogan"]
    train(config, tmp_path / "whole", CPU)

    def stop_between_turns(line: Mapping[str, Any]) -> None:
        if line["kind"] == "step" and line["episode"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(config, tmp_path / "cut", CPU, report=stop_between_turns)
    train(config, tmp_path / "cut", CPU, resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_command_writes_a_run_for_each_head(recipe: Path, tmp_path: Path) -> None:
    cards = train_heads(str(recipe), "neighbor, self", tmp_path / "runs", False, "cpu", ("training.episodes=3",))
    assert [card["head"] for card in cards] == ["neighbor", "self"]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"neighbor", "self"}
    assert [card["heads_trained_together"] for card in cards] == [2, 2]
    with pytest.raises(
        SetupError, match=r"has no run of cross, mastaf yet\. Train them by --heads cross,mastaf without"
    ):
        train_heads(str(recipe), "cross,neighbor,mastaf", tmp_path / "runs", True, "cpu", ())


def test_a_head_that_diverges_is_named_with_its_own_rate(recipe: Path, tmp_path: Path) -> None:
    overrides = ("training.optimizer=sgd", "heads.cross.training.learning_rate=1e30")
    with pytest.raises(TrainingError, match=r"the loss of cross is not finite .*heads\.cross\.training\.learning_rate"):
        train_heads(str(recipe), "mastaf,cross", tmp_path / "runs", False, "cpu", overrides)


def test_an_array_that_the_store_does_not_have_is_refused_by_name(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"head\.array = .nope., but .* holds cube\. Change head\.array"):
        train_heads(str(recipe), "mastaf,cross", tmp_path / "runs", False, "cpu", ("head.array=nope",))


@pytest.mark.parametrize(
    ("heads", "overrides", "message"),
    [
        ("mastaf,nieghbor", (), "no head 'nieghbor'; the heads are mastaf"),
        ("mastaf,self,mastaf", (), "'mastaf' twice"),
        ("mastaf,self", ("head.tau=1",), "say which one: heads.NAME.tau=1"),
        ("mastaf,self", ("heads.cross.tau=1",), "'cross' is none of the heads"),
        ("mastaf,self", ("heads.self.training.episodes=9",), "differ in .*learning_rate"),
        ("mastaf,self", ("training.mode=end_to_end",), "on the cache only"),
    ],
)
def test_what_cannot_train_together_is_refused(
    recipe: Path, tmp_path: Path, heads: str, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SetupError, match=message):
        train_heads(str(recipe), heads, tmp_path, False, "cpu", overrides)
    assert not any(tmp_path.iterdir())


def test_an_option_that_the_head_does_not_have_is_refused_by_name(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="head 'self' has no option 'taau'"):
        train_heads(str(recipe), "mastaf,self", tmp_path, False, "cpu", ("heads.self.taau=1",))


def test_heads_of_which_some_were_begun_all_come_to_the_end(recipe: Path, tmp_path: Path) -> None:
    """As after a kill between the first checkpoints of two heads."""
    configs = together(recipe, tmp_path / "whole")
    runs = [(config, tmp_path / "cut" / name) for name, config in configs.items()]

    def stop(_: Path, line: Mapping[str, Any]) -> None:
        if line["kind"] == "step":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train_together(runs[:1], CPU, report=stop)
    train_together(runs, CPU, resume=None)
    for name in configs:
        assert_same_runs(tmp_path / "whole" / name, tmp_path / "cut" / name)
