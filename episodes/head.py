"""What a head is: one call that scores queries against supports, and what it hands back."""

# E episodes, Q queries, N classes; C channels, T time steps, H W grid; Z training classes

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from episodes.batch import EpisodeBatch


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What one call of a head says about E episodes."""

    logits: Tensor
    """(E, Q, N) scores that predict; larger is closer."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Loss terms by name, (E, Q) each: neither weighted nor reduced over queries. Empty without labels."""
    maps: dict[str, Tensor] = field(default_factory=dict)
    """What there is to see, on request: attention, alignment paths, offsets, chosen tokens; `episodes.maps` has the names."""
    labels: Tensor | None = None
    """(E, Q) int64 classes that training accuracy is counted against where they are not the batch's: of mixed clips the class of
    most weight."""

    def __post_init__(self) -> None:
        if self.logits.ndim != 3:
            raise ValueError(
                f"logits have shape {tuple(self.logits.shape)}, but (episodes, queries, classes) is needed"
            )
        for name, term in self.losses.items():
            if term.shape != self.logits.shape[:2]:
                raise ValueError(f"loss {name!r} is {tuple(term.shape)}, but one per query is {self.logits.shape[:2]}")


class HeadOptions(BaseModel):
    """The knobs of a head: a pydantic model with a docstring under every field. This one has none."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def without_effect(self) -> dict[str, str]:
        """Options that change no number as the others are set, each with the reason; giving one is an error."""
        return {}


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What a head is built for, beside its options."""

    cube_shape: tuple[int, int, int, int]
    """(C, T, H, W) of every video."""
    num_classes: int | None = None
    """Training classes Z, for heads that classify over them; None or 0: none."""
    has_several_queries: bool = True
    """Whether an episode has more than one query in all."""
    generator: torch.Generator | None = None
    """Randomness of the first weights; None: torch's global one."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What one optimiser step trains, in heads that train their parts in turns (adversarial ones)."""

    losses: frozenset[str]
    """Names of the loss terms."""
    parameters: tuple[str, ...]
    """Beginnings of the names of the head's parameters that learn; a backbone learns in every phase."""


class Head(Protocol):
    """Scores the queries of independent episodes; keeps nothing between calls.

    A head may also offer `encode(cubes)`, done once per video, and `score(batch)` of what `encode` returned, with
    `forward` the one after the other. A head without them encodes by the identity.
    """

    loss_weights: dict[str, float]
    """Weight of each loss term by name; the loop applies them."""

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score a batch; the result of E episodes in one call equals that of E calls."""
        ...


class HeadModule(nn.Module):
    """A torch module that is a `Head`: what `build_head` returns."""

    phases: ClassVar[tuple[Phase, ...]] = ()
    """What the optimiser steps train in turns; empty: every step trains everything."""

    loss_weights: dict[str, float]
    cube_shape: tuple[int, int, int, int]

    def refuse_other_shape(self, batch: EpisodeBatch) -> None:
        """Raise ValueError where the batch does not hold cubes of the shape that the head was built for."""
        if tuple(batch.query.shape[2:]) != self.cube_shape:
            raise ValueError(
                f"the batch holds {tuple(batch.query.shape[2:])}, the head was built for {self.cube_shape}"
            )
