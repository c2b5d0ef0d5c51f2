"""Stage 2 of TA2N: each query is coordinated with each class, first in time, then in space.

Header of `episodes.heads.ta2n`.
"""

# E episodes, N classes, Q queries; C channels, T time steps, H W grid, U channels of the first convolution

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from episodes.heads.ta2n_masks import region_masks
from episodes.heads.ta2n_network import AlignmentNetwork, NetworkMoments, Widths
from episodes.initial import make_linear
from episodes.shots import at_least_float32, frame_vectors

OFFSET_SCALE = 0.75
"""Largest offset, in half grid sizes (code)."""

# Which of the three taps of a kernel meet the cube at its first place, in between, and at its last place along an axis.
_TAPS = ((0.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 0.0))


@dataclass(frozen=True, slots=True)
class Coordinated:
    """Classes and queries, pair by pair; float32 or wider."""

    support: Tensor
    """(E, N, Q, T, C): classes, averaged over their region."""
    query: Tensor
    """(E, N, Q, T, C): queries aligned with the class, averaged over their region."""
    offsets: Tensor
    """(E, N, Q, T, 2): (x, y) in half grid sizes, perturbations apart."""
    support_masks: Tensor
    """(E, N, Q, T, H, W), each sums to 1."""
    query_masks: Tensor
    """(E, N, Q, T, H, W), each sums to 1."""
    attention: Tensor
    """(E, N, Q, T, T): of each time step of the class over those of the query; sums to 1 over the last axis."""
    support_shift: Tensor
    """(E, N, T, C): what is added to the class, at every place of the grid."""
    query_shift: Tensor
    """(E, N, Q, T, C): what is added to the query beside that class, at every place of the grid."""
    moments: NetworkMoments
    """Statistics of this use."""


class ActionCoordination(nn.Module):
    """Temporal coordination by attention between frames, spatial coordination by regions moved towards each other."""

    def __init__(self, channels: int, widths: Widths, *, is_factored: bool, generator: torch.Generator | None) -> None:
        """Build it; before training all offsets are 0.

        Args:
            channels: C.
            widths: of the network that finds the offsets.
            is_factored: whether its first convolution is split into class, query and shift; the numbers are the same.
            generator: randomness of the first weights.
        """
        super().__init__()
        self.is_factored = is_factored
        self.key, self.query, self.value = (
            make_linear(channels, channels, None, generator, with_bias=False) for _ in range(3)
        )
        self.network = AlignmentNetwork(
            2 * channels, widths, first_bias=(0.0, 0.0), keeps_time=True, generator=generator
        )

    def forward(self, classes: Tensor, queries: Tensor, *, perturb: bool) -> Coordinated:
        """Coordinate every query with every class.

        Args:
            classes: prototypes, (E, N, C, T, H, W).
            queries: (E, Q, C, T, H, W).
            perturb: whether regions are averaged over the nine perturbations of their offset.
        """
        class_frames, query_frames = frame_vectors(classes), frame_vectors(queries)  # (E, N | Q, T, C)
        keys, wanted = (at_least_float32(each) for each in (self.key(class_frames), self.query(query_frames)))
        class_shift, values = (at_least_float32(self.value(frames)) for frames in (class_frames, query_frames))
        with torch.autocast(classes.device.type, enabled=False):
            scores = keys[:, :, None] @ wanted[:, None].transpose(-1, -2) / math.sqrt(keys.shape[-1])
            attention = scores.softmax(dim=-1)  # (E, N, Q, T, T)
            query_shift = attention @ values[:, None]  # (E, N, Q, T, C)
        shifted = classes + _as_cubes(class_shift)
        first = self._first_of_parts if self.is_factored else self._first_of_pairs
        numbers, moments = self.network(first(shifted, queries, query_shift).flatten(1, 2))
        offsets = OFFSET_SCALE * numbers.tanh().reshape(*attention.shape[:4], 2)
        with torch.autocast(classes.device.type, enabled=False):
            support_masks, query_masks = (
                region_masks(sign * offsets, (classes.shape[-2], classes.shape[-1]), perturb=perturb)
                for sign in (1.0, -1.0)
            )
            # Masks sum to 1: what is added everywhere is added once to the average.
            support = _region_means(support_masks, classes, "enqtp,enctp->enqtc") + class_shift[:, :, None]
            query = _region_means(query_masks, queries, "enqtp,eqctp->enqtc") + query_shift
        return Coordinated(
            support, query, offsets, support_masks, query_masks, attention, class_shift, query_shift, moments
        )

    def _first_of_pairs(self, classes: Tensor, queries: Tensor, query_shift: Tensor) -> Tensor:
        """The first convolution as published, on every class beside every aligned query: (E, N, Q, U, T, H, W)."""
        aligned = queries[:, None] + _as_cubes(query_shift)
        beside = classes[:, :, None].expand_as(aligned)
        pairs = torch.cat([beside, aligned], dim=3)  # (E, N, Q, 2C, T, H, W)
        maps = _convolve(pairs.flatten(0, 2), self.network.first.weight)
        return maps.reshape(*pairs.shape[:3], *maps.shape[1:]) + self._first_bias()

    def _first_of_parts(self, classes: Tensor, queries: Tensor, query_shift: Tensor) -> Tensor:
        """The same as a sum: of each class, of each query, and of the shift of each pair, the pairs never built."""
        weight = self.network.first.weight
        channels = weight.shape[1] // 2
        of_class, of_query = weight[:, :channels], weight[:, channels:]
        class_part, query_part = (
            _convolve(cubes.flatten(0, 1), part).reshape(*cubes.shape[:2], -1, *cubes.shape[3:])
            for cubes, part in ((classes, of_class), (queries, of_query))
        )
        shift_part = _convolve_constant(query_shift, of_query, (classes.shape[-2], classes.shape[-1]))
        return class_part[:, :, None] + query_part[:, None] + shift_part + self._first_bias()

    def _first_bias(self) -> Tensor:
        bias = self.network.first.bias
        assert bias is not None
        return bias[:, None, None, None]


def _convolve(cubes: Tensor, weight: Tensor) -> Tensor:
    return at_least_float32(functional.conv3d(cubes, weight, padding=1))


def _convolve_constant(values: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """A 3x3x3 convolution of what is the same at every place of the grid.

    At the border of the zero-padded grid some taps meet nothing, so that there are three kinds of row and three of column:
    the taps of each kind are summed, and a convolution along time is left.

    Args:
        values: (E, N, Q, T, C).
        weight: (U, C, 3, 3, 3).
        grid: (H, W), 2 or more each.

    Returns:
        (E, N, Q, U, T, H, W) float32 or wider.
    """
    taps = weight.new_tensor(_TAPS)
    kinds = torch.einsum("hi,octij,wj->hwoct", taps, weight, taps)  # (3, 3, U, C, 3)
    along_time = functional.conv1d(values.flatten(0, 2).transpose(1, 2), kinds.flatten(0, 2), padding=1)
    by_kind = at_least_float32(along_time).reshape(*values.shape[:3], 3, 3, weight.shape[0], values.shape[3])
    rows, columns = (_kinds_of_place(size, values.device) for size in grid)
    return by_kind.permute(0, 1, 2, 5, 6, 3, 4).index_select(-2, rows).index_select(-1, columns)


def _kinds_of_place(size: int, device: torch.device) -> Tensor:
    """Which kind of `_TAPS` each place along an axis is, (size,) int64."""
    kinds = torch.ones(size, dtype=torch.int64, device=device)
    kinds[0], kinds[-1] = 0, 2
    return kinds


def _region_means(masks: Tensor, cubes: Tensor, axes: str) -> Tensor:
    return torch.einsum(axes, masks.flatten(-2), at_least_float32(cubes).flatten(-2).to(masks.dtype))


def _as_cubes(frames: Tensor) -> Tensor:
    """Vectors of time steps (..., T, C) as cubes of one place, (..., C, T, 1, 1)."""
    return frames.transpose(-1, -2)[..., None, None]
