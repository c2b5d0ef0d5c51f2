"""Soft dynamic time warping between sequences of frames, as shipped beside TA2N (header of `episodes.heads.ta2n`).

It is not OTAM's recursion: every cell has three predecessors, and a row of zeros stands before and behind the first sequence.
"""

# T time steps of one sequence, U of the other; C channels

import torch
from torch import Tensor
from torch.nn import functional

# Beyond any path's cost (each step costs 2 at most), and with any temperature below a thousand its share of a soft minimum
# is zero, while its gradient stays finite (infinity's would not).
_FAR = 1e6


def soft_dtw(first: Tensor, second: Tensor, gamma: float) -> Tensor:
    """Soft alignment cost of cosine distances, the mean of both directions.

    Args:
        first: (..., T, C).
        second: (..., U, C).
        gamma: temperature of the soft minimum, above 0.

    Returns:
        (...), smaller is closer; may be negative.
    """
    directions = functional.normalize(first, dim=-1), functional.normalize(second, dim=-1)
    distances = 1.0 - directions[0] @ directions[1].transpose(-1, -2)
    return (_one_direction(distances, gamma) + _one_direction(distances.transpose(-1, -2), gamma)) / 2


def _one_direction(distances: Tensor, gamma: float) -> Tensor:
    """Costs (..., T, U) to the soft cost of the cheapest way from the first to the last cell, (...)."""
    padded = functional.pad(distances, (0, 0, 1, 1))
    num_rows, num_columns = padded.shape[-2:]
    far = padded.new_full(padded.shape[:-2], _FAR)
    # One antidiagonal after the other: its cells depend on the two before it alone. A cell is named by its row.
    before_last: dict[int, Tensor] = {}
    last: dict[int, Tensor] = {}
    for diagonal in range(num_rows + num_columns - 1):
        rows = range(max(0, diagonal - num_columns + 1), min(num_rows, diagonal + 1))
        costs = torch.stack([padded[..., row, diagonal - row] for row in rows], dim=-1)
        if diagonal:
            ways = [[last.get(row, far), last.get(row - 1, far), before_last.get(row - 1, far)] for row in rows]
            reached = torch.stack([torch.stack(each, dim=-1) for each in ways], dim=-2)  # (..., cells, 3)
            costs = costs - gamma * torch.logsumexp(-reached / gamma, dim=-1)
        before_last, last = last, dict(zip(rows, costs.unbind(dim=-1), strict=True))
    return last[num_rows - 1]
