"""The alignment of TA2N: both stages in sequence, usable without the head (header of `episodes.heads.ta2n`)."""

# E episodes, S supports, Q queries, N classes, K shots, M queries of one episode; C channels, T time steps, H W grid

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from episodes.heads.ta2n_coordination import ActionCoordination, Coordinated
from episodes.heads.ta2n_network import Widths
from episodes.heads.ta2n_temporal import ShotFusion, TemporalTransformation, Warped
from episodes.shots import ClassShots

SMALLEST_SIZE = 4
"""Time steps, rows and columns: two pools halve each of them, and one place must be left."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """Both stages of E episodes."""

    support: Warped
    """Supports after stage 1, in the order that they came in."""
    query: Warped
    """Queries after stage 1."""
    prototypes: Tensor
    """(E, N, C, T, H, W): one cube per class."""
    coordinated: Coordinated
    """Stage 2 of prototypes and queries."""


class TemporalSpatialAlignment(nn.Module):
    """Aligns queries with classes in time and in space; `forward` takes one episode of cubes, `align` E of them."""

    def __init__(
        self,
        cube_shape: tuple[int, int, int, int],
        temporal_channels: Widths = (64, 128, 32),
        offset_channels: Widths = (128, 128, 64),
        *,
        is_factored: bool = True,
        perturb_in_evaluation: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        """Build both stages.

        Args:
            cube_shape: (C, T, H, W).
            temporal_channels: widths of stage 1's network (two convolutions, hidden layer).
            offset_channels: widths of stage 2's network.
            is_factored: whether stage 2's first convolution is split so that pairs are never built.
            perturb_in_evaluation: whether regions are averaged over the nine perturbations in evaluation too.
            generator: randomness of the first weights; None: torch's global one.

        Raises:
            ValueError: the cube is too small for the pools.
        """
        super().__init__()
        channels, *sizes = cube_shape
        if min(sizes) < SMALLEST_SIZE:
            raise ValueError(
                f"TA2N needs {SMALLEST_SIZE} or more time steps, rows and columns, since its networks halve them twice, but a cube is "
                f"{tuple(cube_shape)} (C, T, H, W); extract with more frames or larger crops, or cache an earlier layer"
            )
        self.perturb_in_evaluation = perturb_in_evaluation
        self.temporal = TemporalTransformation(channels, temporal_channels, generator)
        self.fusion = ShotFusion(channels, generator)
        self.coordination = ActionCoordination(channels, offset_channels, is_factored=is_factored, generator=generator)

    def forward(self, support: Tensor, query: Tensor, k_shot: int = 1) -> tuple[Tensor, Tensor]:
        """Align the queries of one episode with its classes, as `ta2n(support, query)` of the released code does.

        In training the running statistics move on, as in any module with batch normalisation.

        Args:
            support: cubes class by class, (N * k_shot, C, T, H, W); the first shot of a class is the reference.
            query: cubes, (M, C, T, H, W).
            k_shot: shots of every class.

        Returns:
            Pairs (N, M, 2C, T, 1, 1), channels of the class before those of the query, averaged over their regions; and offsets
            (N * M, T, 2), (x, y) in half grid sizes. Both float32 or wider.

        Raises:
            ValueError: the supports are not a multiple of `k_shot`.
        """
        if k_shot < 1 or len(support) % k_shot:
            raise ValueError(
                f"{len(support)} supports do not make classes of k_shot = {k_shot}; give all shots of each class"
            )
        index = torch.arange(len(support), device=support.device).reshape(1, -1, k_shot)
        shots = ClassShots(index, torch.ones_like(index, dtype=torch.bool))
        aligned = self.align(support[None], query[None], shots)
        if self.training:
            self.update(aligned)
        pair = aligned.coordinated
        joined = torch.cat([pair.support, pair.query], dim=-1)[0].transpose(-1, -2)  # (N, M, 2C, T)
        return joined[..., None, None], pair.offsets[0].flatten(0, 1)

    def align(self, support: Tensor, query: Tensor, shots: ClassShots, is_counted: Tensor | None = None) -> Aligned:
        """Both stages of E episodes; running statistics stay as they are until `update`.

        Args:
            support: (E, S, C, T, H, W).
            query: (E, Q, C, T, H, W).
            shots: which supports each class has.
            is_counted: (E, S) bool, False for padding; None: there is none.
        """
        warped_support = self.temporal(support, is_counted)
        warped_query = self.temporal(query)
        prototypes, queries = self._fused(warped_support.cubes, warped_query.cubes, shots)
        perturb = self.training or self.perturb_in_evaluation
        return Aligned(
            warped_support, warped_query, prototypes, self.coordination(prototypes, queries, perturb=perturb)
        )

    def update(self, aligned: Aligned) -> None:
        """Move the running statistics on by one call, supports before queries as published."""
        self.temporal.network.update([aligned.support.moments, aligned.query.moments])
        self.coordination.network.update([aligned.coordinated.moments])

    def _fused(self, support: Tensor, query: Tensor, shots: ClassShots) -> tuple[Tensor, Tensor]:
        """One cube per class, (E, N, C, T, H, W), and the queries beside them.

        An episode with one shot of every class has no fusion, for the queries neither; with more shots of any class, all its
        classes and queries pass the value map, so that they stay comparable.
        """
        taken = shots.take(support)  # (E, N, K, C, T, H, W)
        single = taken[:, :, 0]
        if taken.shape[2] == 1:
            return single, query
        has_several = shots.is_present[:, :, 1:].any(dim=2).any(dim=1)[:, None, None, None, None, None]
        return (
            torch.where(has_several, self.fusion(taken, shots.is_present), single),
            torch.where(has_several, self.fusion.values(query), query),
        )
