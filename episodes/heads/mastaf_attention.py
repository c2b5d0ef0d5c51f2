"""The attention of MASTAF: a relation map, a learnt kernel over it, a softmax.

Paper: MASTAF: A Model-Agnostic Spatio-Temporal Attention Fusion Network for Few-shot Video Classification, 2021,
https://arxiv.org/abs/2112.04585, Eqs. 2 to 7. Code consulted: https://github.com/lxhit/STAF, commit 10c7d9a.
Deviations: the L x L relation map is never built (exact identities, see `cross_relation`); batch statistics belong to
one episode; the number of positions is free.
"""

# E episodes, M maps of one use in an episode, A attended and B partner cubes; C channels, L positions, U hidden units

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.episode_norm import BatchMoments, EpisodeBatchNorm
from episodes.initial import make_linear


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a meta-learner makes of the averaged relation maps of one use."""

    values: Tensor
    """Weights of the partner's positions, (E, ..., L)."""
    moments: BatchMoments | None
    """Statistics to add to the running ones; None where none were taken."""


@dataclass(frozen=True, slots=True)
class Relation:
    """One use of the attention, with its intermediate values."""

    relation_mean: Tensor
    """Relation map averaged over the attended positions, (E, ..., L) over the partner's positions."""
    kernel: Kernel
    """What the meta-learner made of it."""
    attention: Tensor
    """A of Eq. 3, (E, ..., L) over the attended positions; sums to one."""


class KernelMaker(Protocol):
    """Turns averaged relation maps into kernels."""

    def __call__(self, relation_mean: Tensor, normalize: bool) -> Kernel:
        """Kernels (E, ..., L) of the maps (E, ..., L); `normalize` is whether this use is batch-normalised."""
        ...


@dataclass(frozen=True, slots=True)
class RelationRule:
    """How a kernel becomes attention."""

    kernel_reduce: Literal["mean", "sum"]
    """Mean (released code) or sum (Eq. 3) over the partner's positions."""
    tau: float
    """Temperature of the softmax."""


class MetaLearner(nn.Module):
    """Two linear layers over the positions, L to U to L, with batch normalisation and ReLU between (Eq. 4)."""

    def __init__(
        self, num_positions: int, hidden: int, *, with_norm: bool, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        # Published initialisation: weights normal with variance 2 / (outputs), biases as torch does for a layer.
        self.reduce = make_linear(num_positions, hidden, math.sqrt(2.0 / hidden), generator)
        self.norm = EpisodeBatchNorm(hidden) if with_norm else None
        self.expand = make_linear(hidden, num_positions, math.sqrt(2.0 / num_positions), generator)

    def forward(self, relation_mean: Tensor, normalize: bool) -> Kernel:
        """Kernels (E, ..., L) of averaged relation maps (E, ..., L)."""
        hidden = self.reduce(relation_mean)
        moments = None
        if normalize and self.norm is not None:
            flat, moments = self.norm.normalize(
                hidden.flatten(1, -2),
                'use more queries or classes, or head.meta_bn_query = false with head.meta_bn = "reference"',
            )
            hidden = flat.reshape(hidden.shape)
        return Kernel(self.expand(F.relu(hidden)), moments)

    def update(self, uses: Sequence[Kernel]) -> None:
        """Update the running statistics with the uses of one call, in their published order."""
        if self.norm is not None:
            self.norm.update([use.moments for use in uses])


class UniformKernel(nn.Module):
    """Stands in for the meta-learner in its ablation: every position of the partner weighs the same."""

    def forward(self, relation_mean: Tensor, normalize: bool) -> Kernel:
        """Ones, (E, ..., L)."""
        # Part of the call that every kernel maker answers; there is nothing to normalise here.
        del normalize
        return Kernel(torch.ones_like(relation_mean), None)

    def update(self, uses: Sequence[Kernel]) -> None:
        """Nothing to update."""


def self_relation(features: Tensor, kernel_maker: KernelMaker, rule: RelationRule, *, normalize: bool) -> Relation:
    """Attention of each cube to itself.

    Args:
        features: what the correlations are of, (E, A, C, L).
        kernel_maker: the meta-learner.
        rule: how its kernel becomes attention.
        normalize: whether this use is batch-normalised.

    Returns:
        A relation with (E, A, L) everywhere.
    """
    mean = features.mean(dim=-1, keepdim=True).transpose(-1, -2)
    relation_mean = (mean @ features).squeeze(-2)
    kernel = kernel_maker(relation_mean, normalize)
    direction = kernel.values[..., None, :] @ features.transpose(-1, -2)
    attention = _softmax((direction @ features).squeeze(-2), rule)
    return Relation(relation_mean, kernel, attention)


def cross_relation(
    attended: Tensor, partner: Tensor, kernel_maker: KernelMaker, rule: RelationRule, *, normalize: bool
) -> Relation:
    """Attention of every attended cube to every partner cube.

    With the map M = attended^T partner (attended positions by partner positions), the mean over its rows is
    partner^T mean(attended), and M d is attended^T (partner d). Both are matrix-vector products, so M is never built.

    Args:
        attended: features whose positions get attention, (E, A, C, L).
        partner: features they are compared with, (E, B, C, L).
        kernel_maker: the meta-learner.
        rule: how its kernel becomes attention.
        normalize: whether this use is batch-normalised, over all A * B maps of an episode.

    Returns:
        A relation with (E, B, A, L) means and kernels, and (E, A, B, L) attention.
    """
    mean = attended.mean(dim=-1)
    relation_mean = mean[:, None] @ partner
    kernel = kernel_maker(relation_mean, normalize)
    direction = kernel.values @ partner.transpose(-1, -2)
    attention = _softmax(direction.transpose(1, 2) @ attended, rule)  # (E, A, B, L)
    return Relation(relation_mean, kernel, attention)


def _softmax(scores: Tensor, rule: RelationRule) -> Tensor:
    divisor = rule.tau * (scores.shape[-1] if rule.kernel_reduce == "mean" else 1)
    return torch.softmax(scores / divisor, dim=-1)
