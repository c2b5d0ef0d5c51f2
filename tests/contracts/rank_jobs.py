"""What ranks do in tests, as functions that can be sent to them (`rank_processes.run_ranks`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import RunConfig
from episodes.batch import EpisodeBatch
from pipeline import training
from pipeline.batches import TrainingBatches
from pipeline.checkpoint import content_digest
from pipeline.interrupts import Stopped
from pipeline.learning import Learner, StepRecord, StepSpeed
from pipeline.loop import run_loop
from pipeline.outcomes import outcomes_digest
from pipeline.ranks import Ranks
from pipeline.scoring import evaluate_run, load_run

CPU = torch.device("cpu")
Runs = Sequence[tuple[RunConfig, Path]]
OnStep = Callable[[StepRecord, StepSpeed], None]


@dataclass(frozen=True, slots=True)
class Scored:
    """A run to evaluate; one that trained its backbone encodes the videos again."""

    folder: Path
    episodes: int


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a rank saw."""

    digests: Mapping[str, str]
    """As `train_runs` gives them."""
    scores: tuple[tuple[Mapping[str, Any], str | None], ...]
    """Of every evaluation the result, and the digest of each query's outcome."""
    written: tuple[str, ...]
    """Files and folders that this rank made, changed or removed."""
    has_drawn: bool
    """Whether torch's global generator moved."""


def train_runs(ranks: Ranks, runs: Runs, resume: bool = False) -> dict[str, str]:
    """Train runs together; by the name of its folder the digest of every model, as this rank has it in the end."""
    digests: list[str] = []

    def note_models(learners: Sequence[Learner], go: Callable[[], None]) -> None:
        go()
        digests.extend(content_digest(learner.model.state_dict()) for learner in learners)

    with _loop_replaced(note_models):
        training.train_together(runs, CPU, resume, ranks=ranks)
    return {folder.name: digest for (_, folder), digest in zip(runs, digests, strict=True)}


def train_and_evaluate(ranks: Ranks, cases: Sequence[Runs], scored: Sequence[Scored] = ()) -> RankReport:
    """Train runs, those of a case together, and evaluate others."""
    written: list[str] = []
    sys.addaudithook(lambda event, arguments: written.extend(_written(event, arguments)))
    before = torch.get_rng_state()
    digests: dict[str, str] = {}
    for runs in cases:
        digests |= train_runs(ranks, runs)
    scores = []
    for each in scored:
        run = load_run(each.folder, CPU, ranks=ranks)
        result, score = evaluate_run(run, "test", each.episodes, CPU, ranks=ranks)
        scores.append((result, outcomes_digest(score)))
    has_drawn = not torch.equal(before, torch.get_rng_state())
    return RankReport(digests, tuple(scores), tuple(written), has_drawn)


def stop_and_resume(
    ranks: Ranks, runs: Runs, signals: Mapping[int, int], episode: int, resumes: bool = True
) -> tuple[int, dict[str, str]]:
    """Train until signals come, when a step is done, and go on: the exit code of the stop and the digests of the models.

    Args:
        signals: what each rank gets; a rank that is not named gets none.
        episode: the last one of the step.
        resumes: else this ends with the stop, and without digests.
    """

    def signal_after_step(learners: Sequence[Learner], go: Callable[[], None]) -> None:
        first = learners[0]

        def on_step(record: StepRecord, speed: StepSpeed, note: OnStep = first.on_step) -> None:
            note(record, speed)
            if record.episode == episode and ranks.rank in signals:
                os.kill(os.getpid(), signals[ranks.rank])

        first.on_step = on_step
        go()

    exit_code = 0
    with _loop_replaced(signal_after_step):
        try:
            training.train_together(runs, CPU, ranks=ranks)
        except Stopped as stopped:
            exit_code = stopped.exit_code
    return exit_code, train_runs(ranks, runs, resume=True) if resumes else {}


def train_with_bad_numbers(ranks: Ranks, runs: Runs, episode: int) -> tuple[str, str]:
    """Train, with one episode whose cubes are not numbers; type and words of the error that ends it."""
    make = TrainingBatches.make

    def make_badly(batches: TrainingBatches, indices: range) -> EpisodeBatch:
        batch = make(batches, indices)
        if episode in indices:
            batch.query[indices.index(episode)] = float("nan")
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingBatches, "make", make_badly)
        return train_to_an_error(ranks, runs)


def train_to_an_error(ranks: Ranks, runs: Runs) -> tuple[str, str]:
    """Train; type and words of the error that ends it."""
    try:
        training.train_together(runs, CPU, ranks=ranks)
    except (ValueError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "", ""


@contextmanager
def _loop_replaced(loop: Callable[[Sequence[Learner], Callable[[], None]], None]) -> Iterator[None]:
    """Have `training` call this with the learners and a function that runs the real loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "run_loop", lambda learners, *rest: loop(learners, lambda: run_loop(learners, *rest)))
        yield


def _written(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """The paths that an audit event says are being changed."""
    if event == "open":
        path, _, flags = arguments
        changes = isinstance(path, str | bytes) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return [os.fsdecode(path)] if changes else []
    if event in ("os.mkdir", "os.remove", "os.rename", "os.link", "os.rmdir", "os.truncate"):
        return [os.fsdecode(each) for each in arguments if isinstance(each, str | bytes)]
    return []
