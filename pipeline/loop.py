"""The one loop: on the cache, end to end and in classification, in one process or in several.

Episode i of a run is a pure function of (split hash, protocol, seed, i), so the loop's whole position is one number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from episodes.batch import EpisodeBatch
from pipeline.batches import TrainingBatches
from pipeline.interrupts import StopRequest
from pipeline.learning import Learner, StepSpeed, Student
from pipeline.ranks import ALONE, Ranks
from pipeline.step_plan import StepPlan


def run_loop(
    learners: Sequence[Learner],
    batches: TrainingBatches,
    device: torch.device,
    stop: StopRequest,
    ranks: Ranks = ALONE,
) -> None:
    """Train to ``config.episodes`` or until a stop is requested; several learners share one pass of the data.

    Gradients of a step are those of the mean loss over its episodes, however many pass at a time and on however many ranks. Each
    learner goes on from its own position, and does what it would do alone.

    Args:
        learners: one or more, with the same mode, episodes, episodes per step and per forward pass.
        batches: makes the episodes.
        device: where the models are.
        stop: asked before every step; ranks stop together.
        ranks: of this job; each takes its slice of every step.

    Raises:
        TrainingError: a loss or a gradient is not finite; its episodes are named.
        RankLost: another rank has ended.
    """
    plan = StepPlan(learners[0].config, ranks, first_episode=min(learner.done for learner in learners))
    students = [Student(learner, ranks) for learner in learners]
    with ExitStack() as held:
        for student in students:
            held.enter_context(student.statistics)
        # A video may never be decoded; ranks, which leave together, wait for it.
        next_batch = held.enter_context(
            batches.ahead((part.episodes for part in plan.parts()), lambda: _is_over(stop, ranks))
        )
        began = time.monotonic()
        for step in plan.steps():
            if _is_over(stop, ranks):
                break
            active = [student for student in students if student.learner.done < step.stop]
            clips, waiting = _pass_parts(active, plan, step, next_batch, device, lambda: _is_over(stop, ranks))
            if _is_over(stop, ranks):
                # The step that was begun has changed nothing yet; it is done again from its first episode.
                for student in active:
                    student.begin()
                break
            for student in active:
                record = student.take_step(step, plan.step_index(step), stop)
                student.learner.on_step(record, StepSpeed(clips, time.monotonic() - began, waiting))
            for student in active:
                student.learner.between_steps()
            if _is_over(stop, ranks):
                break
            began = time.monotonic()


def _pass_parts(
    active: Sequence[Student],
    plan: StepPlan,
    step: range,
    next_batch: Callable[[], EpisodeBatch | None],
    device: torch.device,
    is_over: Callable[[], bool],
) -> tuple[int, float]:
    """Gather the gradients of a step, or of its beginning where the run is over; clips that passed, and seconds of waiting for them."""
    clips, waiting = 0, 0.0
    for student in active:
        student.begin()
    for part in plan.parts_of(step):
        asked = time.monotonic()
        made = next_batch()
        if made is None:
            break  # over
        batch = made.to(device, non_blocking=True)
        waiting += time.monotonic() - asked
        clips += batch.num_videos if part.is_counted else 0
        for student in active:
            student.accumulate(batch, part, plan.step_index(step))
        if is_over():
            break
    return clips, waiting


def _is_over(stop: StopRequest, ranks: Ranks) -> bool:
    """Whether to leave between two steps: ranks leave together, so what only one of them has heard does not count yet."""
    return (stop.agreed_number if ranks.are_several else stop.signal_number) is not None
