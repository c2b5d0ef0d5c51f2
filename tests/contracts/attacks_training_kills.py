"""Runs that are killed, stopped and damaged at random, and run again with the same command. Loads no pytest."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from contracts.attacks_training import (
    Tally,
    Trainer,
    Trainers,
    empty_run,
    go_on_in_peace,
    partial_files,
    place_of,
)
from contracts.equal_runs import unequal
from contracts.timed import timed
from contracts.training_recipes import EPISODES, STEP_EPISODES, VALIDATE_EVERY, Recipe
from pipeline.checkpoint import CheckpointError, load_checkpoint
from pipeline.interrupts import SIGNALS, exit_code
from pipeline.run_files import is_begun, load_for_resume

SHARE_OF_WRITES = 0.4
"""Of the kills, those that wait until a file is being written aside, and then up to `WRITE_SECONDS`."""
WRITE_SECONDS = 0.002
SHARE_OF_CLOCK = 0.3
"""Of the kills, those at a time that is drawn from the whole run; the others wait for a line of metrics.jsonl."""
NUM_LINES = EPISODES // STEP_EPISODES + EPISODES // VALIDATE_EVERY
"""Of metrics.jsonl in the end."""
SHARE_OF_REPEATS = 0.25
"""Of the trials, those in which a run is killed two to five times before it may end."""
FRESH_EVERY = 20
"""One trial of so many has processes that begin with `python cli.py`; the others are forked."""
ORPHAN_SECONDS = 20.0
"""Until decoding processes must have seen that their parent is gone, on a busy machine too."""


def kill_many(
    trainers: Trainers, recipe: Recipe, folder: Path, num_trials: int, seed: int, fresh_every: int = FRESH_EVERY
) -> Tally:
    """SIGKILL at random instants, before the beginning and after the end too.

    Args:
        fresh_every: see `FRESH_EVERY`; 0: all processes are forked.
    """
    draws = random.Random(f"kills {recipe.mode} {seed}")
    with timed(Tally()) as tally:
        fresh_seconds = recipe.seconds
        if fresh_every:
            run = empty_run(folder / "fresh")
            fresh_seconds = trainers.run(recipe, run, is_fresh=True)
            tally.bad += [f"{recipe.mode}, a process of its own: {line}" for line in recipe.differences(run)]
        for trial in range(num_trials):
            is_fresh = fresh_every > 0 and trial % fresh_every == fresh_every - 1
            run = empty_run(folder / "killed")
            num_kills = draws.randint(2, 5) if draws.random() < SHARE_OF_REPEATS else 1
            found, generators = [], None
            for _ in range(num_kills):
                trainer = trainers.start(recipe, run, recipe.variation(trial), is_fresh)
                found += _kill(recipe, trainer, run, draws, fresh_seconds if is_fresh else recipe.seconds, tally)
                generators = generators or _generators(recipe, run)
            tally.trials += 1
            found += go_on_in_peace(trainers, recipe, run, is_fresh)
            found += unequal(generators, _generators(recipe, run), "generators") if generators and not found else []
            tally.bad += [f"{recipe.mode}, kill trial {trial} ({num_kills} kills): {line}" for line in found]
    return tally


def _kill(recipe: Recipe, trainer: Trainer, run: Path, draws: random.Random, seconds: float, tally: Tally) -> list[str]:
    """Kill a process that takes so many seconds at a random instant; what is wrong."""
    _wait_for_an_instant(recipe, trainer, run, draws, seconds)
    if draws.random() < SHARE_OF_WRITES:
        wait_until(lambda: bool(partial_files(run)) or trainer.has_ended)
        time.sleep(draws.uniform(0, WRITE_SECONDS))
    children = trainer.children()
    trainer.send(signal.SIGKILL)
    status = trainer.wait()
    tally.kills += 1
    tally.places[place_of(recipe, run, has_ended=status == 0)] += 1
    tally.in_a_write += bool(partial_files(run))
    found = [] if status in (0, -signal.SIGKILL) else [f"ended by itself with {status}: {trainer.errors[-500:]}"]
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (left := [child for child in children if is_alive(child)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [*found, f"its processes {left} outlive it"] if left else found


def _generators(recipe: Recipe, run: Path) -> dict[str, Any] | None:
    """The state of torch's global generators, which goes from process to process with the run."""
    folder = recipe.folders(run)[0]
    with suppress(CheckpointError):
        return dict(load_for_resume(folder).content["generators"]) if is_begun(folder) else None
    return None


def _wait_for_an_instant(recipe: Recipe, trainer: Trainer, run: Path, draws: random.Random, seconds: float) -> None:
    """By the clock, or after so many lines of the run and some of the time of one, which hits its middle on a busy machine too."""
    if draws.random() < SHARE_OF_CLOCK:
        time.sleep(draws.uniform(0, 1.05 * seconds))
        return
    num_lines = draws.randint(0, NUM_LINES)
    if num_lines:
        metrics = recipe.folders(run)[0] / "metrics.jsonl"
        wait_until(lambda: _num_lines(metrics) >= num_lines or trainer.has_ended)
    time.sleep(draws.uniform(0, seconds / (NUM_LINES if num_lines else 2)))


def _num_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def stop_many(trainers: Trainers, recipe: Recipe, folder: Path, num_trials: int, seed: int) -> Tally:
    """SIGINT, SIGTERM and SIGUSR1 by turns at random instants of the run: saved, the right exit code, the same end."""
    draws = random.Random(f"stops {recipe.mode} {seed}")
    with timed(Tally()) as tally:
        for trial in range(num_trials):
            number = SIGNALS[trial % len(SIGNALS)]
            run = empty_run(folder / "stopped")
            trainer = trainers.start(recipe, run, recipe.variation(trial))
            wait_until(lambda: run.exists() or trainer.has_ended)  # noqa: B023  called within this trial
            time.sleep(draws.uniform(0, recipe.seconds))
            trainer.send(number)
            status = trainer.wait()
            tally.trials += 1
            tally.kills += 1
            tally.places[place_of(recipe, run, has_ended=status == 0)] += 1
            found = [] if status in (0, exit_code(number)) else [f"exit status {status}: {trainer.errors[-500:]}"]
            found += [f"{name} was left behind" for name in partial_files(run)]
            found += go_on_in_peace(trainers, recipe, run)
            tally.bad += [f"{recipe.mode}, {signal.Signals(number).name}, trial {trial}: {line}" for line in found]
    return tally


def damage_many(trainers: Trainers, recipe: Recipe, folder: Path, num_trials: int, seed: int) -> Tally:
    """A killed run whose last checkpoint is damaged, and whose logs end in half a line: the checkpoint before it must do.

    Half of them are killed once more while they go on, when only one good checkpoint is left.
    """
    draws = random.Random(f"damage {recipe.mode} {seed}")
    with timed(Tally()) as tally:
        while tally.trials < num_trials:
            run = empty_run(folder / "damaged")
            trainer = trainers.start(recipe, run)
            _kill(recipe, trainer, run, draws, recipe.seconds, tally)
            folder_of_one = draws.choice(recipe.folders(run))
            last = folder_of_one / "last.pt"
            previous = folder_of_one / "previous.pt"
            if not previous.is_file():
                continue  # too early: there is one checkpoint, or none
            content = load_checkpoint(last)
            where = f"{recipe.mode}, damage trial {tally.trials} ({_damage(folder_of_one, draws)})"
            try:
                if unequal(content, load_checkpoint(last), "last.pt"):
                    tally.bad.append(f"{where}: a damaged last.pt is taken for a good one")
                continue  # a byte that nothing depends on
            except CheckpointError:
                pass
            if tally.trials % 2:
                trainer = trainers.start(recipe, run)
                _kill(recipe, trainer, run, draws, recipe.seconds / 2, tally)
                warnings = trainer.errors
                found = go_on_in_peace(trainers, recipe, run)
            else:
                trainer = trainers.start(recipe, run)
                is_good, warnings = trainer.wait() == 0, trainer.errors
                found = recipe.differences(run) if is_good else [f"does not go on: {warnings[-500:]}"]
                if f"warning: {last}" not in warnings:
                    found.append("without a warning")
            tally.trials += 1
            tally.passed_over += f"warning: {last}" in warnings
            tally.bad += [f"{where}: {line}" for line in found]
    return tally


def _damage(run: Path, draws: random.Random) -> str:
    """Damage last.pt and tear the logs; what was done."""
    path = run / "last.pt"
    data = path.read_bytes()
    how = draws.choice(("cut", "empty", "zeros", "flipped"))
    if how == "cut":
        path.write_bytes(data[: draws.randrange(1, len(data))])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "zeros":
        start = draws.randrange(len(data) // 2)
        path.write_bytes(data[:start] + bytes(len(data) - start))
    else:
        place = draws.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << draws.randrange(8)]) + data[place + 1 :])
    for name in ("metrics.jsonl", "steps.csv"):
        if (run / name).is_file():
            with (run / name).open("ab") as file:
                file.write(b'{"kind": "st'[: draws.randrange(12)])
    return how


def refuse_second(trainers: Trainers, recipe: Recipe, folder: Path) -> list[str]:
    """Two processes on one folder: the second is refused in one line, and the first comes to its end undisturbed; what is wrong."""
    while True:
        run = empty_run(folder / "two")
        first = trainers.start(recipe, run)
        last = recipe.folders(run)[-1] / "last.pt"
        wait_until(lambda: last.exists() or first.has_ended)  # noqa: B023  called within this round
        first.send(signal.SIGSTOP)
        if not last.with_name("card.json").exists():
            break
        first.send(signal.SIGCONT)  # it was too fast
        first.wait()
    second = trainers.start(recipe, run)
    status, said = second.wait(), second.errors.splitlines()
    first.send(signal.SIGCONT)
    found = [] if first.wait() == 0 else [f"the first failed: {first.errors[-500:]}"]
    if status != 2 or len(said) != 1 or "another process is training" not in said[0]:
        found.append(f"the second ended with {status} and {said}")
    return [*found, *recipe.differences(run)]


def evaluate_both(trainers: Trainers, recipe: Recipe, run: Path) -> list[str]:
    """`mastaf evaluate` of the run that nobody disturbed and of another one: the same numbers; what is wrong."""
    results = []
    peaceful = shutil.copytree(recipe.peaceful, empty_run(run.parents[1] / "evaluated"))
    for folder in (recipe.folders(peaceful)[0], recipe.folders(run)[0]):
        scorer = trainers.command(["evaluate", str(folder), "--split", "test", "--episodes", "30", "--json"])
        if scorer.wait() != 0:
            return [f"{folder} is not evaluated: {scorer.errors[-500:]}"]
        results.append({**json.loads(scorer.output), "run": None})
    return unequal(results[0], results[1], "evaluation")


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when it holds."""
    while not condition():
        time.sleep(0.0002)


def is_alive(pid: int) -> bool:
    """Whether a process runs that is not this one's child."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False
