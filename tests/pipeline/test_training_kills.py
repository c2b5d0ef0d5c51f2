"""Runs that are killed, stopped and damaged, and run again with the same command, end as if nothing had been. The long forms are
marked `campaign`, and benchmarks/training_kills.py prints them as a table."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from contracts.attacks_strace import EFFECTS, OPENS, points
from contracts.attacks_training import Trainers, empty_run, make_recipes
from contracts.attacks_training_calls import STARTS, Start, kill_at_calls, run_traced
from contracts.attacks_training_kills import damage_many, evaluate_both, kill_many, refuse_second, stop_many
from contracts.equal_runs import differences
from contracts.training_recipes import CPU, MODES, Recipe, make_store
from contracts.world import World
from pipeline import training, training_job
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.evaluation import evaluate_model
from pipeline.interrupts import Stopped

Recipes = Callable[[str], Recipe]


@pytest.fixture(scope="module")
def trainers(scratch: Path) -> Iterator[Trainers]:
    with Trainers(scratch / "said") as trainers:
        yield trainers


@pytest.fixture(scope="module")
def recipe_of(trainers: Trainers, scratch: Path) -> Recipes:
    """The recipe of a mode and its run in peace, made when first asked for."""

    @cache
    def recipe(mode: str) -> Recipe:
        return make_recipes(trainers, scratch / f"{mode}-recipe", [mode])[mode]

    return recipe


@pytest.fixture
def folder(scratch: Path) -> Iterator[Path]:
    """An empty folder of one test."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        yield Path(folder)


def test_run_that_is_killed_at_random_instants_ends_as_if_it_had_not_been(
    trainers: Trainers, recipe_of: Recipes, folder: Path
) -> None:
    tally = kill_many(trainers, recipe_of("cached"), folder, 6, seed=1, fresh_every=0)
    assert tally.bad == []
    assert tally.kills >= 6
    assert evaluate_both(trainers, recipe_of("cached"), folder / "killed" / "run") == []


def test_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(
    trainers: Trainers, recipe_of: Recipes, folder: Path
) -> None:
    tally = damage_many(trainers, recipe_of("cached"), folder, 4, seed=1)
    assert tally.bad == []
    assert tally.passed_over >= 2


def test_second_process_on_the_same_folder_is_refused_in_one_line(
    trainers: Trainers, recipe_of: Recipes, folder: Path
) -> None:
    assert refuse_second(trainers, recipe_of("cached"), folder) == []


def test_what_is_not_the_same_is_noticed(recipe_of: Recipes, folder: Path) -> None:
    """The attacks could not fail if this did not find what they look for."""
    peaceful = recipe_of("cached").peaceful

    def found_after(change: Callable[[Path], object]) -> list[str]:
        run = shutil.copytree(peaceful, empty_run(folder / "changed"))
        change(run)
        return differences(peaceful, run)

    def nudge(name: str, *keys: Any) -> Callable[[Path], object]:
        def change(run: Path) -> None:
            content = load_checkpoint(run / name)
            place = content
            for key in keys[:-1]:
                place = place[key]
            last = place[keys[-1]]
            place[keys[-1]] = torch.nextafter(last, last + 1) if isinstance(last, torch.Tensor) else last + 1
            save_checkpoint(run / name, {key: value for key, value in content.items() if key != "format"})

        return change

    def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
        return lambda run: (run / name).write_text((run / name).read_text().replace(old, new, 1))

    weight = next(iter(load_checkpoint(peaceful / "last.pt")["model"]))
    assert found_after(lambda run: run) == []
    assert found_after(nudge("last.pt", "model", weight)) == [f"last.pt: model: {weight} differs"]
    assert found_after(nudge("best.pt", "model", weight)) == [f"best.pt: model: {weight} differs"]
    assert found_after(nudge("last.pt", "progress", "best_episode"))
    assert found_after(nudge("previous.pt", "stepper", "optimizer", "state", 0, "exp_avg"))
    assert found_after(nudge("last.pt", "stepper", "scheduler", "last_epoch"))
    assert found_after(edit("metrics.jsonl", '"loss": ', '"loss":  ')) == ["metrics.jsonl has other bytes"]
    rows = (peaceful / "steps.csv").read_text().splitlines()
    assert found_after(edit("steps.csv", rows[3], f"{rows[3]}\n{rows[3]}"))
    assert found_after(edit("steps.csv", f"{rows[3]}\n", ""))
    assert found_after(edit("card.json", '"best_episode": ', '"best_episode": 1'))
    assert found_after(lambda run: (run / ".last.pt.1.partial").touch()) == [".last.pt.1.partial is too many"]
    (events,) = (peaceful / "tensorboard" / "steps").iterdir()
    again = events.with_name(f"{events.name}9").name
    assert found_after(lambda run: shutil.copy(events, run / "tensorboard" / "steps" / again))


@pytest.mark.usefixtures("one_thread")
def test_stop_while_the_test_split_is_scored_keeps_the_best_checkpoint(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation before it was the best, but that may count only when best.pt is written."""
    make_store(world, tmp_path / "s.zarr")
    config = world.config(f'store.path="{tmp_path / "s.zarr"}"', "training.track_test=true")
    training.train(config, tmp_path / "peaceful" / "run", CPU)

    def stopping(*arguments: Any) -> Any:
        if arguments[2].split == "test":
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_model(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(training_job, "evaluate_model", stopping)
        with pytest.raises(Stopped):
            training.train(config, tmp_path / "stopped" / "run", CPU)
    training.train(config, tmp_path / "stopped" / "run", CPU, resume=True)
    assert differences(tmp_path / "peaceful" / "run", tmp_path / "stopped" / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_modes_go_on_after_kills_in_forked_and_in_fresh_processes(
    trainers: Trainers, recipe_of: Recipes, folder: Path, mode: str
) -> None:
    tally = kill_many(trainers, recipe_of(mode), folder, 6, seed=2, fresh_every=6 if mode == "cached" else 0)
    assert tally.bad == []
    assert tally.kills >= 6


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_signals_save_and_go_on_to_the_same_end(
    trainers: Trainers, recipe_of: Recipes, folder: Path, mode: str
) -> None:
    tally = stop_many(trainers, recipe_of(mode), folder, 3, seed=2)
    assert tally.bad == []


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_kill_at_a_call_that_changes_the_folder_changes_no_end(
    trainers: Trainers, recipe_of: Recipes, folder: Path, start: Start
) -> None:
    tally = kill_at_calls(trainers, recipe_of("cached"), folder, start, every=17, writes_every=10)
    assert tally.bad == []
    assert tally.trials >= 4


@pytest.mark.slow
def test_file_system_without_hard_links_will_do(trainers: Trainers, recipe_of: Recipes, folder: Path) -> None:
    run = empty_run(folder / "no-links")
    status, _ = run_traced(
        trainers, recipe_of("cached"), run, folder / "trace.txt", ["link", "linkat"], "link,linkat:error=EPERM"
    )
    assert status == 0
    assert differences(recipe_of("cached").peaceful, run) == []


@pytest.mark.slow
def test_every_step_of_a_checkpoint_is_among_the_points_of_attack(
    trainers: Trainers, recipe_of: Recipes, folder: Path
) -> None:
    run = empty_run(folder / "traced")
    status, calls = run_traced(trainers, recipe_of("cached"), run, folder / "trace.txt", (*EFFECTS, *OPENS))
    assert status == 0
    found = [(call.name, Path(call.path).name) for call in points(calls, str(run))]
    steps = (
        ("fsync", "metrics.jsonl"),
        ("write", ".last.pt.*.partial"),
        ("fsync", ".last.pt.*.partial"),
        ("link", ".previous.pt.*.partial"),
        ("rename", "last.pt"),
        ("rename", "previous.pt"),
        ("fsync", "run"),
        ("rename", "best.pt"),
        ("rename", "card.json"),
    )
    position = 0
    for name, pattern in steps:
        later = [i for i in range(position, len(found)) if found[i][0] == name and Path(found[i][1]).match(pattern)]
        assert later, f"no {name} of {pattern} after call {position}"
        position = later[0]


@pytest.mark.campaign
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", MODES)
def test_hundred_kills_of_each_mode(trainers: Trainers, recipe_of: Recipes, folder: Path, mode: str) -> None:
    recipe = recipe_of(mode)
    assert kill_many(trainers, recipe, folder, 100, seed=3).bad == []
    assert stop_many(trainers, recipe, folder, 30, seed=3).bad == []
    assert damage_many(trainers, recipe, folder, 30, seed=3).bad == []


@pytest.mark.campaign
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("mode", MODES)
def test_kill_at_every_call_that_changes_the_folder(
    trainers: Trainers, recipe_of: Recipes, folder: Path, mode: str, start: Start
) -> None:
    assert kill_at_calls(trainers, recipe_of(mode), folder, start).bad == []
