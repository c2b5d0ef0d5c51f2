"""Soft windows over the grid, placed by an offset (header of `episodes.heads.ta2n`)."""

# T time steps, H W grid; P perturbations

import torch
from torch import Tensor

_STEP = 0.2
PERTURBATIONS = tuple((x * _STEP, y * _STEP) for x in (0, 1, -1) for y in (0, 1, -1))
"""Shifts (x, y) that a window is averaged over: none, both ways along each axis, and the diagonals."""


def window(offsets: Tensor, size: int) -> Tensor:
    """Weights along one axis of the grid.

    Args:
        offsets: (...), in half grid sizes.
        size: number of grid points, at -1 to 1.

    Returns:
        (..., size): 1 where |point + offset| < 1, falling to 0 over one grid step outside.
    """
    points = torch.linspace(-1.0, 1.0, size, dtype=offsets.dtype, device=offsets.device)
    distance = (points + offsets[..., None]).abs()
    falling = (1.0 - (distance - 1.0) * ((size - 1) / 2)).clamp(min=0.0)
    # Not a clamp at 1: at |.| = 1 exactly, where every offset starts, the published slope is that of the fall.
    return torch.where(distance < 1.0, torch.ones_like(falling), falling)


def region_masks(offsets: Tensor, grid: tuple[int, int], *, perturb: bool) -> Tensor:
    """Weights over the grid that sum to 1, windows averaged over the perturbations of their offset.

    Args:
        offsets: (..., 2), pairs (x, y) within -1 to 1 with their perturbation.
        grid: (H, W).
        perturb: whether to average over the nine perturbations, or to take the offset alone.

    Returns:
        (..., H, W).
    """
    shifts = offsets.new_tensor(PERTURBATIONS if perturb else PERTURBATIONS[:1])
    shifted = offsets[..., None, :] + shifts  # (..., P, 2)
    columns, rows = (window(shifted[..., axis], size) for axis, size in ((0, grid[1]), (1, grid[0])))
    columns, rows = (weights / weights.sum(dim=-1, keepdim=True) for weights in (columns, rows))
    # A product of sums is the sum of the products, so that the outer products sum to 1 as well.
    return rows.transpose(-1, -2) @ columns / len(shifts)
