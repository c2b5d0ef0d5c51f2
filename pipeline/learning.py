"""A model that learns: gradients of its share of a step, then the step that all ranks take together."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configs.training import TrainingConfig
from episodes.batch import EpisodeBatch
from episodes.head import HeadOutput, Phase
from episodes.losses import combine
from pipeline.interrupts import SIGNALS, StopRequest
from pipeline.model import FewShotModel
from pipeline.optimisation import Stepper, has_finite_weights
from pipeline.ranks import Ranks, watched
from pipeline.running_statistics import EpisodeOrder
from pipeline.step_plan import Part

# E episodes, Q queries

# Newer torch gave the argument another name, and warns of the old one.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_KEEPS_BUFFERS: dict[str, Any] = {
    ("forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"): False
}


class TrainingError(ValueError):
    """Training cannot go on; the message names the episodes. The model is as it was before their step."""

    def __init__(self, message: str, episodes: Sequence[int]) -> None:
        super().__init__(message)
        self.episodes = tuple(episodes)
        """Training episodes, for replay."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one optimiser step saw; the same on any number of ranks, up to rounding."""

    episode: int
    """Training episodes done after this step."""
    loss: float
    """Mean total loss of the step's episodes."""
    terms: Mapping[str, float]
    """Mean of each unweighted loss term over episodes and queries."""
    accuracy: float
    """Mean training accuracy of the step's episodes."""
    learning_rates: Mapping[str, float]
    """Of each group of parameters, in this step."""
    gradient_norm: float
    """Of all gradients together, before they were shortened."""
    was_skipped: bool = False
    """float16 gradients overflowed, so the scaler left this step out."""

    @property
    def learning_rate(self) -> float:
        """Of the first group, which is the head's."""
        return next(iter(self.learning_rates.values()))


@dataclass(frozen=True, slots=True)
class StepSpeed:
    """How long a step took on this rank."""

    clips: int
    """Videos (or clips) that passed through the model."""
    seconds: float
    """From the end of what came before to the end of the step."""
    seconds_waiting: float
    """Of these: until inputs were there."""


@dataclass(slots=True)
class Learner:
    """A model that trains on the episodes of the loop, with what belongs to it alone."""

    model: FewShotModel
    stepper: Stepper
    """Optimiser, schedule, scaler and moving average."""
    config: TrainingConfig
    on_step: Callable[[StepRecord, StepSpeed], None]
    """Called after every optimiser step, to note it."""
    between_steps: Callable[[], None] = lambda: None
    """Called when all learners have done a step; validation and saving happen in there, so that one that is stopped leaves the
    others at the same place."""
    done: int = 0
    """Training episodes done."""
    name: str = ""
    """What errors call it where several learn together; empty: there is one."""


@dataclass(slots=True)
class _Sums:
    """Over the episodes of one forward pass; tensors stay where the model is, so that the device is not waited for."""

    episodes: range
    totals: Tensor
    """(E,) total losses."""
    accuracies: Tensor
    """(E,)."""
    terms: dict[str, Tensor]
    """(E,) unweighted means over queries."""


@dataclass(frozen=True, slots=True)
class _Taught:
    """What comes out of one forward pass."""

    totals: Tensor
    """(E,) total losses, the way to the gradients."""
    output: HeadOutput
    """Of the head, without a way to them."""


class _Lesson(nn.Module):
    """A model up to its total losses: DistributedDataParallel waits for the gradient of whatever leads to what comes out."""

    def __init__(self, model: FewShotModel, query_reduction: Literal["mean", "sum"]) -> None:
        super().__init__()
        self.model = model
        self.query_reduction = query_reduction

    def forward(self, batch: EpisodeBatch, phase: Phase | None) -> _Taught:
        output: HeadOutput = self.model(batch)
        losses = {name: term for name, term in output.losses.items() if phase is None or name in phase.losses}
        totals = combine(losses, self.model.loss_weights, self.query_reduction)
        terms = {name: term.detach() for name, term in output.losses.items()}
        return _Taught(totals, replace(output, logits=output.logits.detach(), losses=terms, maps={}))


@dataclass(slots=True)
class Student:
    """A learner within one run of the loop, on one of the ranks."""

    learner: Learner
    ranks: Ranks
    statistics: EpisodeOrder = field(init=False)
    """Of the model's running statistics; open while the loop runs."""
    _lesson: nn.Module = field(init=False)
    _sums: list[_Sums] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        model = self.learner.model
        learns = any(parameter.requires_grad for parameter in model.parameters())
        self._lesson = _Lesson(model, self.learner.config.query_reduction or "mean")
        self.statistics = EpisodeOrder(model, self.ranks)
        if self.ranks.are_several and learns:
            # Buffers are the running statistics, which `EpisodeOrder` adds in the order of the episodes.
            with watched():
                self._lesson = DistributedDataParallel(self._lesson, find_unused_parameters=True, **_KEEPS_BUFFERS)

    def begin(self) -> None:
        """Before the first forward pass of a step."""
        self.learner.model.train()
        self.learner.stepper.optimizer.zero_grad(set_to_none=True)
        self.statistics.forget()
        self._sums = []

    def accumulate(self, batch: EpisodeBatch, part: Part, step_index: int) -> None:
        """Add the gradients of one forward pass."""
        learner, phase = self.learner, self._phase(step_index)
        waits = not part.is_last and isinstance(self._lesson, DistributedDataParallel)
        with self._lesson.no_sync() if waits else nullcontext(), watched():  # type: ignore[operator]
            taught: _Taught = self._lesson(batch, phase)
            totals, output = taught.totals, taught.output
            if totals.requires_grad:  # Neighbor without its classifier has nothing to learn on the cache
                # DistributedDataParallel divides the sum over the ranks by their number.
                weight = self.ranks.world_size / part.divisor if part.is_counted else 0.0
                learner.stepper.backward(totals.sum() * weight)
        if not part.is_counted:
            self.statistics.forget()
            totals = torch.zeros_like(totals)
        labels = batch.query_labels if output.labels is None else output.labels
        assert labels is not None
        right = (output.logits.argmax(dim=-1) == labels).double().mean(dim=1)
        terms = {name: values.double().mean(dim=1) for name, values in output.losses.items()}
        self._sums.append(_Sums(part.episodes if part.is_counted else range(0), totals.detach().double(), right, terms))

    def take_step(self, step: range, step_index: int, stop: StopRequest) -> StepRecord:
        """The optimiser's step, once the losses on all ranks are found finite.

        Raises:
            TrainingError: a loss, a gradient or what the running statistics would become is not finite, and nothing was changed; or the
                weights have become so, and nothing of it may be saved.
        """
        learner = self.learner
        means = self._means(len(step), stop)
        if not math.isfinite(means["loss"]):
            raise self._not_finite("loss", self._bad_episodes())
        # The ranks' last word in this step: if one is lost, the others have done all of the step or nothing of it.
        self.statistics.gather()
        if not self.statistics.is_finite():
            raise self._not_finite("running statistics", list(step))
        phase = self._phase(step_index)
        if phase is not None:
            for name, parameter in learner.model.head.named_parameters():
                if not name.startswith(phase.parameters):
                    parameter.grad = None
        rates = {str(group["name"]): float(group["lr"]) for group in learner.stepper.optimizer.param_groups}
        outcome = learner.stepper.take_step()
        if not outcome.is_finite and not outcome.was_skipped:
            raise self._not_finite("gradient", list(step))
        if not has_finite_weights(learner.model):
            raise self._not_finite("weights", list(step), "with their step")
        self.statistics.settle()
        learner.done = step.stop
        return StepRecord(
            episode=step.stop,
            loss=means.pop("loss"),
            accuracy=means.pop("accuracy"),
            terms=means,
            learning_rates=rates,
            gradient_norm=outcome.gradient_norm,
            was_skipped=outcome.was_skipped,
        )

    def _means(self, num_episodes: int, stop: StopRequest) -> dict[str, float]:
        """Means over the step's episodes on all ranks; in the same breath, ranks learn that one of them should stop."""
        names = list(self._sums[0].terms)
        columns = [
            torch.stack([each.totals, each.accuracies, *(each.terms[name] for name in names)]).sum(dim=1)
            * (1.0 if each.episodes else 0.0)
            for each in self._sums
        ]
        own = torch.stack(columns).sum(dim=0).tolist()
        stop.look()
        signals = [1.0 if stop.signal_number == number else 0.0 for number in SIGNALS]
        sums = self.ranks.total([*own, *signals])
        stop.agreed_number = next(
            (number for number, count in zip(SIGNALS, sums[len(own) :], strict=True) if count), None
        )
        stop.signal_number = stop.signal_number or stop.agreed_number
        means = [value / num_episodes for value in sums[: len(own)]]
        return dict(zip(["loss", "accuracy", *names], means, strict=True))

    def _bad_episodes(self) -> list[int]:
        own = [
            index
            for each in self._sums
            for index, total in zip(each.episodes, each.totals.tolist(), strict=False)
            if not math.isfinite(total)
        ]
        return [int(index) for given in self.ranks.gather(own) for index in given]  # type: ignore[attr-defined]

    def _not_finite(self, what: str, bad: list[int], since: str = "in") -> TrainingError:
        name = self.learner.name
        whose = f" of {name}" if name else ""
        rate = f"heads.{name}.training.learning_rate" if name else "training.learning_rate"
        verb = "are" if what.endswith("s") and what != "loss" else "is"
        kept = "last.pt holds the state from before this step" if since == "in" else "last.pt is what was saved before"
        return TrainingError(
            f"the {what}{whose} {verb} not finite {since} training episodes {bad}. Lower {rate}, or look at these episodes' videos "
            f"(not_finite.json names them); {kept}.",
            bad,
        )

    def _phase(self, step_index: int) -> Phase | None:
        """What this step trains; a function of the step's place alone, so that resuming needs no more than the episode."""
        phases = self.learner.model.head.phases
        return phases[step_index % len(phases)] if phases else None
