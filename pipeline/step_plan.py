"""Which episodes make a step, and which of them this rank passes through the model at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from configs.training import TrainingConfig
from pipeline.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Part:
    """One forward pass of this rank."""

    episodes: range
    """Of this pass."""
    divisor: int
    """What the sum of the step's losses is divided by."""
    is_last: bool
    """Whether the rank's share of the step ends with it."""
    is_counted: bool
    """False where a rank has no episode in a short last step: it passes one of the others' for company, with weight 0."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The steps that are left of a run, as this rank sees them; a function of the config and the position alone."""

    config: TrainingConfig
    ranks: Ranks
    first_episode: int = 0
    """Training episodes done before."""

    def __post_init__(self) -> None:
        per_step, world_size = self.config.episodes_per_step, self.ranks.world_size
        if per_step < world_size:
            raise ValueError(
                f"training.episodes_per_step = {per_step} cannot be shared by {world_size} ranks. Start at most "
                f"{per_step} ranks, or raise episodes_per_step."
            )
        if self.config.backbone_batchnorm == "synchronised" and self.config.episodes:
            self._refuse_steps_without_an_episode_for_each_rank()

    def _refuse_steps_without_an_episode_for_each_rank(self) -> None:
        # Only the first and the last step may be shorter than the others.
        per_step, shift = self.config.episodes_per_step, self._shift
        first = min(self.config.episodes, per_step - shift)
        last = (self.config.episodes + shift) % per_step or per_step
        shortest = min(first, last) if self.config.episodes > first else first
        if shortest < self.ranks.world_size:
            raise ValueError(
                f"training.episodes = {self.config.episodes} in steps of {per_step} makes a step of {shortest}, fewer than "
                f"{self.ranks.world_size} ranks, which statistics over all ranks need. Change training.episodes, or start fewer ranks."
            )

    @property
    def _shift(self) -> int:
        # The released codes count from 1, so that their first step comes one episode early (reference 1.7).
        return 1 if self.config.published_first_step else 0

    def steps(self) -> Iterator[range]:
        """Episodes of each step, in order."""
        config = self.config
        start = 0
        while start < config.episodes:
            stop = min(config.episodes, start + config.episodes_per_step - (self._shift if start == 0 else 0))
            if stop > self.first_episode:
                yield range(start, stop)
            start = stop

    def step_index(self, step: range) -> int:
        """Steps before this one."""
        return (step.start + self._shift) // self.config.episodes_per_step

    def parts_of(self, step: range) -> list[Part]:
        """The forward passes of this rank in a step, at least one."""
        own = self.ranks.slice_of(step)
        is_published_first = self.config.published_first_step and step.start == 0
        divisor = self.config.episodes_per_step if is_published_first else len(step)
        if not own:
            return [Part(step[:1], divisor, is_last=True, is_counted=False)]
        size = self._episodes_per_forward(len(own))
        starts = range(own.start, own.stop, size)
        return [
            Part(range(start, min(start + size, own.stop)), divisor, start == starts[-1], is_counted=True)
            for start in starts
        ]

    def parts(self) -> Iterator[Part]:
        """The forward passes of all steps."""
        for step in self.steps():
            yield from self.parts_of(step)

    def _episodes_per_forward(self, own: int) -> int:
        config = self.config
        if config.episodes_per_forward is not None:
            return config.episodes_per_forward
        is_one_by_one = config.mode == "end_to_end" and config.backbone_batchnorm != "synchronised"
        return 1 if is_one_by_one else own
