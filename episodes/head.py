"""What a head is: one call that scores queries against supports, and what it hands back."""

# E episodes, Q queries, N classes

from dataclasses import dataclass, field
from typing import Protocol

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
    """What there is to see, on request: attention, alignment paths, offsets, chosen tokens."""

    def __post_init__(self) -> None:
        if self.logits.ndim != 3:
            raise ValueError(
                f"logits have shape {tuple(self.logits.shape)}, but (episodes, queries, classes) is needed"
            )
        for name, term in self.losses.items():
            if term.shape != self.logits.shape[:2]:
                raise ValueError(f"loss {name!r} is {tuple(term.shape)}, but one per query is {self.logits.shape[:2]}")


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

    loss_weights: dict[str, float]
