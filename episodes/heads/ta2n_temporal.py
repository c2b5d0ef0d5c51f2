"""Stage 1 of TA2N: each video is warped in time, then the shots of a class are laid onto its first one.

Header of `episodes.heads.ta2n`.
"""

# E episodes, V videos, N classes, K most shots of any class; C channels, T time steps, S source time steps, H W grid

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from episodes.heads.ta2n_network import AlignmentNetwork, NetworkMoments, Widths
from episodes.initial import make_linear
from episodes.shots import at_least_float32, frame_vectors


@dataclass(frozen=True, slots=True)
class Warped:
    """Videos after the temporal transformation."""

    cubes: Tensor
    """(E, V, C, T, H, W)."""
    warp: Tensor
    """(E, V, 2): (a, b) of source time = a t + b, with time from -1 to 1."""
    moments: NetworkMoments
    """Statistics of this use."""


class TemporalTransformation(nn.Module):
    """Chooses for each video where its T time steps are read: at a t + b, linear in between, zero outside the clip."""

    def __init__(self, channels: int, widths: Widths, generator: torch.Generator | None) -> None:
        """Build it; before training every video is read at tanh(2) t."""
        super().__init__()
        self.network = AlignmentNetwork(channels, widths, first_bias=(2.0, 0.0), keeps_time=False, generator=generator)

    def forward(self, cubes: Tensor, is_counted: Tensor | None = None) -> Warped:
        """Warp videos.

        Args:
            cubes: (E, V, C, T, H, W).
            is_counted: (E, V) bool, the videos that batch statistics are made of; None: all.
        """
        maps = self.network.first(cubes.flatten(0, 1))
        numbers, moments = self.network(maps.reshape(*cubes.shape[:2], *maps.shape[1:]), is_counted)
        warp = numbers.tanh()
        return Warped(warp_time(cubes, warp), warp, moments)


def warp_time(cubes: Tensor, warp: Tensor) -> Tensor:
    """Read videos at time a t + b, for T times t from -1 to 1 (the first and last time step).

    Args:
        cubes: (..., C, T, H, W).
        warp: (..., 2), the pair (a, b).

    Returns:
        (..., C, T, H, W) float32 or wider; linear between time steps, zero beyond the clip.
    """
    num_steps = cubes.shape[-3]
    steps = torch.linspace(-1.0, 1.0, num_steps, dtype=warp.dtype, device=warp.device)
    place = (warp[..., :1] * steps + warp[..., 1:] + 1.0) * ((num_steps - 1) / 2)  # (..., T)
    # By neighbours rather than as a tent max(0, 1 - |d|), whose slope vanishes where a time step is met exactly.
    before = place.floor()
    share = (place - before)[..., None]
    source = torch.arange(num_steps, device=warp.device)
    weights = (source == before[..., None]) * (1.0 - share) + (source == before[..., None] + 1.0) * share  # (..., T, S)
    with torch.autocast(cubes.device.type, enabled=False):
        warped: Tensor = weights[..., None, :, :] @ at_least_float32(cubes).flatten(-2).to(weights.dtype)
    return warped.reshape(cubes.shape)


class ShotFusion(nn.Module):
    """Lays the shots of a class onto its first one in time, and averages them."""

    def __init__(self, channels: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.key, self.query, self.value = (
            make_linear(channels, channels, None, generator, with_bias=False) for _ in range(3)
        )

    def forward(self, shots: Tensor, is_present: Tensor) -> Tensor:
        """Prototypes of classes.

        Args:
            shots: warped videos, (E, N, K, C, T, H, W); the first shot of a class is the reference.
            is_present: (E, N, K) bool.

        Returns:
            (E, N, C, T, H, W) float32 or wider.
        """
        frames = frame_vectors(shots)  # (E, N, K, T, C)
        reference, keys = at_least_float32(self.query(frames[:, :, 0])), at_least_float32(self.key(frames))
        with torch.autocast(shots.device.type, enabled=False):
            scores = reference[:, :, None] @ keys.transpose(-1, -2) / math.sqrt(frames.shape[-1])  # (E, N, K, T, S)
            present = is_present.to(scores.dtype)
            weights = scores.softmax(dim=-1) * (present / present.sum(dim=-1, keepdim=True))[..., None, None]
            laid = torch.einsum("enkts,enkcsp->enctp", weights, shots.flatten(-2)).reshape(shots[:, :, 0].shape)
        # The value map is linear, so that it is applied once per class instead of once per shot.
        return self.values(laid)

    def values(self, cubes: Tensor) -> Tensor:
        """The value map at every position: (E, V, C, T, H, W) to the same, float32 or wider."""
        return at_least_float32(self.value.weight @ cubes.flatten(-3)).reshape(cubes.shape)
