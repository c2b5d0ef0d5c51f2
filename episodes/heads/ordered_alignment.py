"""The ordered alignment of two videos: cheapest paths through their frame distances, hard or smooth.

Paper: Few-Shot Video Classification via Temporal Alignment (OTAM), 2019, https://arxiv.org/abs/1906.11415. Its code was
never released; the recursion is that of https://github.com/alibaba-mmai-research/HyRSM, commit 3d88d37, and of
https://github.com/tobyperrett/few-shot-action-recognition, commit 3687f3a:

With a column of zeros before and after the distances D (columns 0 and U + 1), G[l, m] is

- in the first row the running sum of D (hard, where the paper relaxes it too);
- in columns 1 and U + 1: D[l, m] + min(G[l-1, m-1], G[l, m-1], G[l-1, m]), where a path may wait;
- elsewhere D[l, m] + min(G[l-1, m-1], G[l, m-1]);

with min(x) = -smoothing log sum exp(-x / smoothing). The distance is the last entry. The second repository's earlier commit
0b5b5b8 has no waiting in column U + 1: min(G[l-1, m-1], G[l, m-1]) there too. Deviation: the sum of exponentials is taken
relative to its largest term, so that long videos do not underflow.
"""

# T U time steps of the two videos; "..." stands for any axes in front

from typing import Literal

import torch
from torch import Tensor

from episodes.heads.frame_matching import weight_of_pairs

Directions = Literal["sum", "mean"]


def cumulative_distances(distances: Tensor, smoothing: float) -> Tensor:
    """Distance of the best path to each pair of frames.

    Args:
        distances: of frames, (..., T, U), T and U at least 1.
        smoothing: of the minimum; 0 is the hard minimum.

    Returns:
        (..., T, U + 2), with the columns before the first and after the last frame.
    """
    return torch.stack(_columns(distances, smoothing), dim=-1)


def alignment_distance(distances: Tensor, smoothing: float) -> Tensor:
    """Distance of the best path through frame distances (..., T, U), in one direction: (...)."""
    return _columns(distances, smoothing)[-1][..., -1]


def two_way_distance(distances: Tensor, smoothing: float, directions: Directions) -> Tensor:
    """Sum or mean of the alignment distances of (..., T, U) and of its transpose: (...)."""
    there = alignment_distance(distances, smoothing)
    total = there + alignment_distance(distances.transpose(-1, -2), smoothing)
    return total if directions == "sum" else total / 2.0


def expected_alignment(distances: Tensor, smoothing: float) -> Tensor:
    """Which pairs of frames the path visits, averaged over both directions.

    Args:
        distances: of frames, (..., T, U).
        smoothing: of the minimum.

    Returns:
        Weights in [0, 1], (..., T, U): the probability that the path passes there (the gradient of its distance); with
        the hard minimum the path itself, or the mean of equally good ones.
    """
    return weight_of_pairs(lambda pairs: two_way_distance(pairs, smoothing, "mean"), distances)


def _columns(distances: Tensor, smoothing: float) -> list[Tensor]:
    """Columns 0 to U + 1 of the cumulative distances, (..., T) each; the loops are over time only."""
    zeros = torch.zeros_like(distances[..., 0])
    columns = [zeros, _waiting_column(distances[..., 0], zeros, smoothing)]
    for step in range(1, distances.shape[-1]):
        left, here = columns[-1], distances[..., step]
        # All rows of a column at once: they depend on the column to the left only.
        best = torch.cat([left[..., :1], _minimum([left[..., :-1], left[..., 1:]], smoothing)], dim=-1)
        columns.append(here + best)
    columns.append(_waiting_column(zeros, columns[-1], smoothing))
    return columns


def _waiting_column(here: Tensor, left: Tensor, smoothing: float) -> Tensor:
    """A column in which a path may come from above, too: row by row."""
    values = [here[..., 0] + left[..., 0]]
    for row in range(1, here.shape[-1]):
        best = _minimum([left[..., row - 1], left[..., row], values[-1]], smoothing)
        values.append(here[..., row] + best)
    return torch.stack(values, dim=-1)


def _minimum(choices: list[Tensor], smoothing: float) -> Tensor:
    stacked = torch.stack(choices)
    if smoothing == 0.0:
        return stacked.amin(dim=0)
    return -smoothing * torch.logsumexp(-stacked / smoothing, dim=0)
