"""The one training loop, on the cache and end to end alike.

Episode i of a run is a pure function of (split hash, protocol, seed, i), so the loop's whole position is one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from configs.schema import TrainingConfig
from episodes.batch import EpisodeBatch
from episodes.losses import combine
from episodes.sampler import EpisodeSampler, draw_views
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
        return assemble(episodes, self.source, views[:, :num_supports], views[:, num_supports:], self.global_index)


def run_loop(
    model: FewShotModel,
    batches: TrainingBatches,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    config: TrainingConfig,
    device: torch.device,
    first_episode: int,
    stop: StopRequest,
    on_step: Callable[[StepRecord], None],
) -> int:
    """Train from `first_episode` to ``config.episodes`` or until a stop is requested.

    Gradients of a step are those of the mean loss over ``episodes_per_step`` episodes, however many pass at a time.

    Args:
        on_step: called after every optimiser step; validation and saving happen in there.

    Returns:
        Training episodes done.

    Raises:
        TrainingError: a loss is not finite; its episodes are named.
    """
    per_forward = config.episodes_per_forward or (1 if config.mode == "end_to_end" else config.episodes_per_step)
    steps = list(_steps(first_episode, config.episodes, config.episodes_per_step))
    chunks = [chunk for step in steps for chunk in _steps(step.start, step.stop, per_forward)]
    done = first_episode
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = pool.submit(batches.make, chunks[0]) if chunks else None
        position = 0
        for step in steps:
            if stop.signal_number is not None:
                break
            model.train()
            optimizer.zero_grad(set_to_none=True)
            parts: list[_Part] = []
            while position < len(chunks) and chunks[position].start < step.stop:
                assert ahead is not None
                batch = ahead.result().to(device)
                position += 1
                ahead = pool.submit(batches.make, chunks[position]) if position < len(chunks) else None
                parts.append(_accumulate(model, batch, config, chunks[position - 1], len(step)))
            learning_rate = float(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            done = step.stop
            on_step(_record(parts, done, learning_rate))
        if ahead is not None:
            ahead.cancel()
    return done


@dataclass(frozen=True, slots=True)
class _Part:
    """Sums over the episodes of one forward pass."""

    episodes: int
    loss: float
    terms: Mapping[str, float]
    accuracy: float


def _accumulate(
    model: FewShotModel, batch: EpisodeBatch, config: TrainingConfig, indices: range, step_size: int
) -> _Part:
    output = model(batch)
    totals = combine(output.losses, model.loss_weights, config.query_reduction)  # (E,)
    if not bool(torch.isfinite(totals).all()):
        bad = [index for index, total in zip(indices, totals.tolist(), strict=True) if not math.isfinite(total)]
        raise TrainingError(
            f"the loss is not finite in training episodes {bad}. Lower training.learning_rate, or look at these episodes' videos; "
            "last.pt is of the latest validation."
        )
    if totals.requires_grad:  # Neighbor without its classifier has nothing to learn on the cache
        (totals.sum() / step_size).backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
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
