"""How MASTAF compares attended cubes, without building them.

An attended cube is a cube times one weight per position, so averages, inner products and norms of attended cubes are
sums over positions of weights times what is computed once per video.
"""

# E episodes, Q queries, N classes; C channels, L positions. An axis written Q|1 or N|1 is there to be broadcast.

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Fusion = Literal["logit_sum", "prob_mean"]

# Vectors shorter than this are divided by this, as in the released code.
SMALLEST_NORM = 1e-12


@dataclass(frozen=True, slots=True)
class EpisodeCubes:
    """The cubes of E episodes with their positions in one axis."""

    prototypes: Tensor
    """(E, N, C, L)."""
    queries: Tensor
    """(E, Q, C, L)."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One way of attending: a weight per position of every query and every prototype."""

    share: float
    """Weight of this branch beside the others."""
    query_weights: Tensor
    """(E, Q, N|1, L)."""
    prototype_weights: Tensor
    """(E, N, Q|1, L)."""


def prototype_direction(cubes: EpisodeCubes, branch: Branch) -> Tensor:
    """Unit vectors of the attended and averaged prototypes, (E, Q|1, N, C)."""
    return F.normalize(average(cubes.prototypes, branch.prototype_weights), dim=-1, eps=SMALLEST_NORM).transpose(1, 2)


def average(cubes: Tensor, weights: Tensor) -> Tensor:
    """Average over the positions of weighted cubes.

    Args:
        cubes: (E, V, C, L).
        weights: (E, V, W, L).

    Returns:
        (E, V, W, C).
    """
    return weights @ cubes.transpose(-1, -2) / cubes.shape[-1]


def pooled_cosine(cubes: EpisodeCubes, branch: Branch) -> Tensor:
    """Cosine of the averaged attended cubes, (E, Q, N)."""
    query = F.normalize(average(cubes.queries, branch.query_weights), dim=-1, eps=SMALLEST_NORM)
    return (query * prototype_direction(cubes, branch)).sum(dim=-1)


def position_cosine(queries: Tensor, direction: Tensor) -> Tensor:
    """Cosine of each query position with each prototype.

    A positive weight does not turn a position's vector, so the plain query serves for every attended one.

    Args:
        queries: (E, Q, C, L).
        direction: (E, Q|1, N, C).

    Returns:
        (E, Q, N, L).
    """
    return direction @ F.normalize(queries, dim=-2, eps=SMALLEST_NORM)


def whole_cube_cosine(cubes: EpisodeCubes, branch: Branch) -> Tensor:
    """Cosine of the flattened attended cubes, (E, Q, N)."""
    by_position = torch.einsum("eqcl,encl->eqnl", cubes.queries, cubes.prototypes)
    query_energy = cubes.queries.square().sum(dim=2)[:, :, None]  # (E, Q, 1, L)
    prototype_energy = cubes.prototypes.square().sum(dim=2)[:, None]  # (E, 1, N, L)
    query_weights, prototype_weights = branch.query_weights, branch.prototype_weights.transpose(1, 2)
    product = (query_weights * prototype_weights * by_position).sum(dim=-1)
    return product / (_length(query_weights, query_energy) * _length(prototype_weights, prototype_energy))


def fuse(scores: Sequence[Tensor], shares: Sequence[float], fusion: Fusion) -> Tensor:
    """Join the scores of the branches.

    Args:
        scores: one tensor per branch, (E, Q|1, N, ...).
        shares: weight of each branch.
        fusion: "logit_sum": the weighted sum; "prob_mean": the logarithm of the weighted mean of the softmaxes.

    Returns:
        (E, Q, N, ...).
    """
    if fusion == "logit_sum":
        return reduce(torch.add, [share * score for share, score in zip(shares, scores, strict=True)])
    total = sum(shares)
    logarithms = [
        F.log_softmax(score, dim=2) + math.log(share / total)
        for share, score in zip(shares, scores, strict=True)
        if share > 0.0
    ]
    return torch.stack(logarithms).logsumexp(dim=0)


def _length(weights: Tensor, energy: Tensor) -> Tensor:
    # The clamp keeps the gradient of the root finite for an all-zero cube.
    return (weights.square() * energy).sum(dim=-1).clamp_min(SMALLEST_NORM**2).sqrt()
