"""Attacks on a run while it trains: real processes are killed, the same command goes on, and the end must be that of a run in peace.

The command is `mastaf train RECIPE --out RUN --resume-or-start`, as cluster jobs use it, before the first checkpoint and after the
end as well. Loads no pytest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from configs.load import to_toml
from contracts.training_recipes import (
    COMMON,
    EPISODES,
    MODES,
    VALIDATE_EVERY,
    Recipe,
    make_store,
)
from contracts.world import make_world
from pipeline.checkpoint import CheckpointError
from pipeline.run_files import is_begun, load_for_resume

ROOT = Path(__file__).parents[2]
PLACES = ("begin", "train", "validate", "finish", "over")
"""Where a process was killed: before the first checkpoint, between two validations, in one, after the last one, after its end."""
ENVIRONMENT = {
    **os.environ,
    # One thread, so that forks are whole, and so that forked and fresh processes count alike.
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "PYTHONDONTWRITEBYTECODE": "1",
}


@dataclass(slots=True)
class Tally:
    """What became of the trials of one attack."""

    trials: int = 0
    kills: int = 0
    places: Counter[str] = field(default_factory=Counter)
    """Of the kills."""
    in_a_write: int = 0
    """Kills that left a file written aside."""
    passed_over: int = 0
    """Damaged checkpoints that were passed over with a warning."""
    bad: list[str] = field(default_factory=list)
    """Everything that must not happen, one line each."""
    seconds: float = 0.0


class Trainer:
    """A process that runs `mastaf train`."""

    def __init__(self, pid: int, wait: Callable[[], int], output: Path, errors: Path) -> None:
        self.pid = pid
        self._wait = wait
        self._output = output
        self._errors = errors
        self._status: int | None = None

    def send(self, signal_number: int) -> None:
        """A signal; nothing happens to one that has ended and was not waited for."""
        os.kill(self.pid, signal_number)

    def wait(self) -> int:
        """Exit status, negative for a signal."""
        if self._status is None:
            self._status = self._wait()
        return self._status

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to kill. Before `wait` only."""
        return _state(self.pid) == "Z"

    @property
    def output(self) -> str:
        """What it wrote to stdout."""
        return self._output.read_text()

    @property
    def errors(self) -> str:
        """What it wrote to stderr."""
        return self._errors.read_text()

    def children(self) -> list[int]:
        """Its processes."""
        try:
            lists = [(task / "children").read_text() for task in Path(f"/proc/{self.pid}/task").iterdir()]
        except OSError:
            return []
        return [int(word) for line in lists for word in line.split()]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]
    except OSError:
        return "Z"


class Trainers:
    """Starts them; a context manager. Most are forked from one that has everything imported."""

    def __init__(self, folder: Path) -> None:
        """`folder` takes what they say."""
        self._folder = folder
        self._count = 0

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "pipeline" / "trainer_nursery.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> int:
        """One line there, one number back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def start(
        self, recipe: Recipe, run: Path, overrides: Sequence[str] = (), is_fresh: bool = False, waits: bool = False
    ) -> Trainer:
        """Begin or go on with a run.

        Args:
            is_fresh: a process that begins with `python cli.py`, instead of a forked one.
            waits: a forked one stops itself before it begins, until SIGCONT.
        """
        words = ["train", str(recipe.path), "--out", str(run), "--resume-or-start", "--device", "cpu", *recipe.words]
        return self.command([*words, *(word for each in overrides for word in ("--set", each))], is_fresh, waits)

    def command(self, arguments: Sequence[str], is_fresh: bool = False, waits: bool = False) -> Trainer:
        """Run `mastaf` with these arguments."""
        name = self._folder / f"trainer-{self._count:06d}"
        self._count += 1
        output, errors = name.with_suffix(".out"), name.with_suffix(".err")
        with output.open("wb") as said, errors.open("wb") as complained:
            if is_fresh:
                command = [sys.executable, str(ROOT / "cli.py"), *arguments]
                process = subprocess.Popen(command, stdout=said, stderr=complained, env=ENVIRONMENT)
                return Trainer(process.pid, process.wait, output, errors)
        pid = self._ask({"arguments": [*arguments], "output": str(output), "errors": str(errors), "waits": waits})
        return Trainer(pid, lambda: self._ask({"wait": pid}), output, errors)

    def run(self, recipe: Recipe, run: Path, overrides: Sequence[str] = (), is_fresh: bool = False) -> float:
        """Train to the end; the seconds it took.

        Raises:
            RuntimeError: it failed.
        """
        began = time.perf_counter()
        trainer = self.start(recipe, run, overrides, is_fresh)
        if trainer.wait() != 0:
            raise RuntimeError(f"a run that nobody disturbed failed: {trainer.errors}")
        return time.perf_counter() - began


def make_recipes(trainers: Trainers, folder: Path, modes: Sequence[str] = tuple(MODES)) -> dict[str, Recipe]:
    """Videos, a store, and of each mode the recipe and a run in peace."""
    world = make_world(folder / "world")
    recipes = {}
    for mode in modes:
        data: tuple[str, ...] = ()
        if mode in ("cached", "heads"):
            if not (folder / "cubes.zarr").exists():
                make_store(world, folder / "cubes.zarr")
            data = (f'store.path="{folder / "cubes.zarr"}"',)
        path = folder / mode / "recipe.toml"
        path.parent.mkdir()
        path.write_text(to_toml(world.config(*COMMON, *MODES[mode], *data)))
        recipe = Recipe(mode, path, folder / mode / "peaceful" / "run")
        trainers.run(recipe, recipe.peaceful)
        # Timed the second time: the first may have waited for the imports, and with a decoding process it takes longer.
        seconds = trainers.run(recipe, empty_run(folder / mode / "timed"), recipe.variation(1))
        recipes[mode] = Recipe(mode, path, recipe.peaceful, seconds)
    return recipes


def empty_run(folder: Path) -> Path:
    """Where the next trial's run goes; what was there is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder / "run"


def partial_files(run: Path) -> list[str]:
    """What is being written aside, or was when its process was killed."""
    found = []
    try:
        # Polled, and walking with Path takes longer.
        for entry in os.scandir(run):
            names = os.listdir(entry) if entry.is_dir() else [entry.name]  # noqa: PTH208
            found += [name for name in names if name.endswith(".partial")]
    except OSError:
        pass  # it has just been made, or removed
    return found


def place_of(recipe: Recipe, run: Path, has_ended: bool) -> str:
    """One of `PLACES`, by what the killed process has left; of several heads that of the one that is least far."""
    if has_ended:
        return "over"
    return min((_place_of(folder) for folder in recipe.folders(run)), key=PLACES.index)


def _place_of(folder: Path) -> str:
    if not is_begun(folder):
        return "begin"
    try:
        progress = load_for_resume(folder).content["progress"]
    except CheckpointError:
        return "begin"  # and it will not go on, which is what the attacks look for
    episode, validated = progress["episode"], progress["validated_episode"]
    if episode == validated == EPISODES:
        return "finish"
    is_due = episode == EPISODES or (episode > 0 and episode % VALIDATE_EVERY == 0)
    return "validate" if is_due and validated < episode else "train"


def go_on_in_peace(trainers: Trainers, recipe: Recipe, run: Path, is_fresh: bool = False) -> list[str]:
    """Let a run come to its end, and hold it against the one that nobody disturbed; what is wrong."""
    trainer = trainers.start(recipe, run, is_fresh=is_fresh)
    if trainer.wait() != 0:
        return [f"does not go on: {trainer.errors[-500:]}"]
    return recipe.differences(run)
