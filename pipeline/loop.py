"""The one training loop, on the cache and end to end alike.

Episode i of a run is a pure function of (split hash, protocol, seed, i), so the loop's whole position is one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from configs.schema import TrainingConfig
from episodes.batch import EpisodeBatch
from episodes.head import Phase
from episodes.losses import combine
from episodes.sampler import EpisodeSampler, draw_noise_seed, draw_views
from pipeline.interrupts import StopRequest
from pipeline.model import FewShotModel
from pipeline.sources import Source, assemble


class TrainingError(ValueError):
    """Training cannot go on; the message names the episodes."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one optimiser step saw."""

    episode: int
    """Training episodes done after this step."""
    loss: float
    """Mean total loss of the step's episodes."""
    terms: Mapping[str, float]
    """Mean of each unweighted loss term over episodes and queries."""
    accuracy: float
    """Mean training accuracy of the step's episodes."""
    learning_rate: float
    """Of the head, in this step."""


@dataclass(frozen=True, slots=True)
class TrainingBatches:
    """Makes the batches of training episodes: what to draw, where the inputs come from, how labels count."""

    sampler: EpisodeSampler
    source: Source
    global_index: Mapping[str, int]
    """Training class name -> global label."""
    train_views: int
    """Each video's view is drawn from 0 .. train_views - 1."""

    def make(self, indices: range) -> EpisodeBatch:
        """The batch of some training episodes; depends on the indices alone."""
        episodes = [self.sampler.episode(index) for index in indices]
        num_supports, num_queries = len(episodes[0].support_ids), len(episodes[0].query_ids)
        sampler, count = self.sampler, num_supports + num_queries
        views = np.stack(
            [draw_views(sampler.split_hash, sampler.seed, index, count, self.train_views) for index in indices]
        )  # (E, S + Q)
        seeds = [draw_noise_seed(sampler.split_hash, sampler.seed, index) for index in indices]
        return assemble(
            episodes, self.source, views[:, :num_supports], views[:, num_supports:], self.global_index, seeds
        )


@dataclass(slots=True)
class Learner:
    """A model that trains on the episodes of the loop, with what belongs to it alone."""

    model: FewShotModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    config: TrainingConfig
    on_step: Callable[[StepRecord], None]
    """Called after every optimiser step, to note it."""
    between_steps: Callable[[], None] = lambda: None
    """Called when all learners have done a step; validation and saving happen in there, so that one that is stopped leaves the
    others at the same place."""
    done: int = 0
    """Training episodes done."""
    name: str = ""
    """What errors call it where several learn together; empty: there is one."""


def run_loop(learners: Sequence[Learner], batches: TrainingBatches, device: torch.device, stop: StopRequest) -> None:
    """Train to ``config.episodes`` or until a stop is requested; several learners share one pass of the data.

    Gradients of a step are those of the mean loss over ``episodes_per_step`` episodes, however many pass at a time. Each learner
    goes on from its own position, and does what it would do alone.

    Args:
        learners: one or more, with the same mode, episodes, episodes per step and per forward pass.
        batches: makes the episodes.
        device: where the models are.
        stop: asked before every step.

    Raises:
        TrainingError: a loss is not finite; its episodes are named.
    """
    config = learners[0].config
    per_forward = config.episodes_per_forward or (1 if config.mode == "end_to_end" else config.episodes_per_step)
    first_episode = min(learner.done for learner in learners)
    steps = list(_steps(first_episode, config.episodes, config.episodes_per_step))
    chunks = [chunk for step in steps for chunk in _steps(step.start, step.stop, per_forward)]
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = pool.submit(batches.make, chunks[0]) if chunks else None
        position = 0
        for step in steps:
            if stop.signal_number is not None:
                break
            active = [learner for learner in learners if learner.done < step.stop]
            parts: list[list[_Part]] = [[] for _ in active]
            for learner in active:
                learner.model.train()
                learner.optimizer.zero_grad(set_to_none=True)
            while position < len(chunks) and chunks[position].start < step.stop:
                assert ahead is not None
                batch = ahead.result().to(device)
                position += 1
                ahead = pool.submit(batches.make, chunks[position]) if position < len(chunks) else None
                for learner, sums in zip(active, parts, strict=True):
                    sums.append(_accumulate(learner, batch, chunks[position - 1], step))
            for learner, sums in zip(active, parts, strict=True):
                _take_step(learner, sums, step)
            for learner in active:
                learner.between_steps()
        if ahead is not None:
            ahead.cancel()


def _take_step(learner: Learner, parts: list[_Part], step: range) -> None:
    phase = _phase(learner, step)
    if phase is not None:
        for name, parameter in learner.model.head.named_parameters():
            if not name.startswith(phase.parameters):
                parameter.grad = None
    learning_rate = float(learner.optimizer.param_groups[0]["lr"])
    learner.optimizer.step()
    learner.scheduler.step()
    learner.done = step.stop
    learner.on_step(_record(parts, step.stop, learning_rate))


def _phase(learner: Learner, step: range) -> Phase | None:
    """What this step trains; a function of the step's place alone, so that resuming needs no more than the episode."""
    phases = learner.model.head.phases
    return phases[step.start // learner.config.episodes_per_step % len(phases)] if phases else None


@dataclass(frozen=True, slots=True)
class _Part:
    """Sums over the episodes of one forward pass."""

    episodes: int
    loss: float
    terms: Mapping[str, float]
    accuracy: float


def _accumulate(learner: Learner, batch: EpisodeBatch, indices: range, step: range) -> _Part:
    model, phase = learner.model, _phase(learner, step)
    output = model(batch)
    losses = {name: term for name, term in output.losses.items() if phase is None or name in phase.losses}
    reduction = learner.config.query_reduction or "mean"
    totals = combine(losses, model.loss_weights, reduction)  # (E,)
    if not bool(torch.isfinite(totals).all()):
        bad = [index for index, total in zip(indices, totals.tolist(), strict=True) if not math.isfinite(total)]
        whose = f" of {learner.name}" if learner.name else ""
        rate = f"heads.{learner.name}.training.learning_rate" if learner.name else "training.learning_rate"
        raise TrainingError(
            f"the loss{whose} is not finite in training episodes {bad}. Lower {rate}, or look at these episodes' videos; "
            "last.pt is of the latest validation."
        )
    if totals.requires_grad:  # Neighbor without its classifier has nothing to learn on the cache
        (totals.sum() / len(step)).backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
    assert batch.query_labels is not None
    right = (output.logits.argmax(dim=-1) == batch.query_labels).double().mean(dim=1)
    terms = {name: float(values.detach().double().mean(dim=1).sum()) for name, values in output.losses.items()}
    return _Part(len(indices), float(totals.detach().double().sum()), terms, float(right.sum()))


def _record(parts: list[_Part], done: int, learning_rate: float) -> StepRecord:
    episodes = sum(part.episodes for part in parts)
    names = parts[0].terms
    return StepRecord(
        episode=done,
        loss=sum(part.loss for part in parts) / episodes,
        terms={name: sum(part.terms[name] for part in parts) / episodes for name in names},
        accuracy=sum(part.accuracy for part in parts) / episodes,
        learning_rate=learning_rate,
    )


def _steps(start: int, stop: int, size: int) -> Iterator[range]:
    for first in range(start, stop, size):
        yield range(first, min(first + size, stop))
