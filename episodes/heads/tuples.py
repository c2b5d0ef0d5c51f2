"""Ordered tuples of frames and their linear maps, as TRX and STRM use them.

A linear map of k concatenated frames is the sum of k maps, one per place in the tuple, of single frames. So each frame
is mapped once per place and the maps are added tuple by tuple: the same numbers for a fraction of the products (8 frames:
a quarter for pairs, a ninth for triples), and the concatenated tuples are never built.
"""

# E episodes, S supports, Q queries, N classes; C channels, T time steps, P tuples of K frames, D width of a mapped tuple

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.shots import at_least_float32

MOST_NUMBERS = 2**26
"""Numbers in the largest tensor that is made for several queries at once: 256 MiB in float32."""


@dataclass(frozen=True, slots=True)
class EpisodeFrames:
    """One vector per frame of every video."""

    support: Tensor
    """(E, S, T, C)."""
    query: Tensor
    """(E, Q, T, C)."""


def frame_tuples(num_steps: int, cardinality: int) -> Tensor:
    """Every ordered choice of K of T frames, (P, K) int64, in lexicographic order."""
    return torch.combinations(torch.arange(num_steps), cardinality)


def refuse_short_cubes(cardinalities: Sequence[int], cube_shape: tuple[int, int, int, int]) -> None:
    """Raise ValueError where a cube has fewer time steps than a tuple has frames."""
    num_steps, most = cube_shape[1], max(cardinalities)
    if most > num_steps:
        up_to = "" if num_steps == 1 else f" (tuples of up to {num_steps} frames are possible)"
        raise ValueError(
            f"head.cardinalities = {list(cardinalities)} asks for tuples of {most} frames, but a cube {cube_shape} has "
            f"{num_steps} time step{'s' if num_steps > 1 else ''}; set head.cardinalities = [1]{up_to}"
        )


def project_tuples(frames: Tensor, weight: Tensor, bias: Tensor, tuples: Tensor, factored: bool) -> Tensor:
    """Linear map of the concatenated frames of each tuple.

    Args:
        frames: (..., T, C).
        weight: (D, K C), the first frame's columns first.
        bias: (D,).
        tuples: (P, K) int64 time steps, ascending in each tuple.
        factored: whether frames are mapped before tuples are made, or concatenated first as in the published code.

    Returns:
        (..., P, D) float32 or wider.
    """
    if not factored:
        joined = frames[..., tuples, :].flatten(-2)  # (..., P, K C)
        return at_least_float32(F.linear(joined, weight, bias))
    cardinality = tuples.shape[1]
    # In place r of a tuple stand the frames r to T - K + r only.
    num_candidates = frames.shape[-2] - cardinality + 1
    total = at_least_float32(bias)
    for place, part in enumerate(weight.chunk(cardinality, dim=1)):
        mapped = at_least_float32(F.linear(frames[..., place : place + num_candidates, :], part))
        total = total + mapped.index_select(-2, tuples[:, place] - place)
    return total


def query_slices(num_queries: int, numbers_per_query: int) -> list[slice]:
    """The queries in parts that keep intermediate results below `MOST_NUMBERS` where one query does."""
    step = max(1, MOST_NUMBERS // max(1, numbers_per_query))
    return [slice(start, start + step) for start in range(0, num_queries, step)]
