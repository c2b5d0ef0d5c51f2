"""SIGKILL at every call of the system by which a run writes to its folder (strace), and the run goes on. Loads no pytest."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from contracts.attacks_strace import EFFECTS, OPENS, Call, points, read_trace, trace
from contracts.attacks_training import (
    Tally,
    Trainers,
    empty_run,
    go_on_in_peace,
    partial_files,
    place_of,
)
from contracts.timed import timed
from contracts.training_recipes import Recipe

Start = Literal["new", "killed", "damaged"]
"""What the killed process began with: nothing, a run that was killed halfway, or one whose last.pt is damaged besides."""
STARTS: tuple[Start, ...] = ("new", "killed", "damaged")


def run_traced(
    trainers: Trainers, recipe: Recipe, run: Path, log: Path, calls: Sequence[str], attack: str = ""
) -> tuple[int, list[Call]]:
    """Train under strace, from after the imports to the end; exit status and calls.

    Args:
        calls: names to trace, of all threads.
        attack: strace's `inject` expression.
    """
    trainer = trainers.start(recipe, run, waits=True)
    # Of the texts, only the paths matter.
    status = trace(trainer, log, calls, attack, num_bytes=4096)
    return status, read_trace(log)


def kill_at_calls(
    trainers: Trainers, recipe: Recipe, folder: Path, start: Start, every: int = 1, seed: int = 0, writes_every: int = 1
) -> Tally:
    """One trial for each call that changes the run's folder or forces it to the disk: killed there, then run to the end.

    Args:
        start: what the killed process begins with.
        every: take one of so many calls, from a random first one.
        seed: of that first one.
        writes_every: of the calls that write bytes, take one of so many before that; checkpoints have many.
    """
    run, log = folder / "traced" / "run", folder / "trace.txt"
    half = None if start == "new" else _leave_half_done(trainers, recipe, folder, log, is_damaged=start == "damaged")

    def fresh() -> None:
        empty_run(run.parent)
        if half is not None:
            shutil.copytree(half, run)

    with timed(Tally()) as tally:
        fresh()
        status, calls = run_traced(trainers, recipe, run, log, (*EFFECTS, *OPENS))
        if status != 0:
            raise RuntimeError(f"the traced run failed with {status}")
        targets = [call for call in points(calls, str(run)) if call.name not in OPENS]
        writes = [call for call in targets if "write" in call.name]
        kept = set(map(id, writes[::writes_every]))
        targets = [call for call in targets if "write" not in call.name or id(call) in kept]
        for call in targets[random.Random(seed).randrange(every) :: every]:
            fresh()
            attack = f"{call.name}:signal=KILL:when={call.number}"
            status, _ = run_traced(trainers, recipe, run, log, [call.name], attack)
            tally.trials += 1
            tally.kills += 1
            tally.places[place_of(recipe, run, has_ended=status == 0)] += 1
            tally.in_a_write += bool(partial_files(run))
            found = [] if status == -signal.SIGKILL else [f"not reached, exit status {status}"]
            found += go_on_in_peace(trainers, recipe, run)
            name = call.path.removeprefix(str(run))
            where = f"{recipe.mode}, {start}, killed at {call.name} {call.number} ({name or '/'})"
            tally.bad += [f"{where}: {line}" for line in found]
    return tally


def _leave_half_done(trainers: Trainers, recipe: Recipe, folder: Path, log: Path, is_damaged: bool) -> Path:
    """A run that was killed while it forced a checkpoint to the disk."""
    run = empty_run(folder / "half")
    status, calls = run_traced(trainers, recipe, run, log, (*EFFECTS, *OPENS))
    syncs = [call for call in calls if call.name == "fsync" and Path(call.path).name.startswith(".last.pt")]
    run = empty_run(folder / "half")
    attack = f"fsync:signal=KILL:when={syncs[len(syncs) // 2].number}"
    status, _ = run_traced(trainers, recipe, run, log, ["fsync"], attack)
    if status != -signal.SIGKILL or not partial_files(run):
        raise RuntimeError(f"the run was not killed halfway: {status}")
    if is_damaged:
        last = recipe.folders(run)[0] / "last.pt"
        last.write_bytes(last.read_bytes()[:-1000])
    return run
