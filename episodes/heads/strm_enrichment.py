"""The two enrichments of STRM: patches of a frame look at each other, then frames of a video do.

Paper and code: see `strm.py`.
"""

# E episodes, V videos of an episode; C channels, T time steps, H W grid; G patches along a side, L = G G patches of a frame

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.heads.sine_table import SineTable
from episodes.initial import make_linear
from episodes.noise import EpisodeNoise
from episodes.shots import at_least_float32


@dataclass(frozen=True, slots=True)
class EnrichedPatches:
    """Videos after the patches of each frame have looked at each other."""

    tokens: Tensor
    """(E, V, T, L, C)."""
    attention: Tensor
    """(E, V, T, L, L): how much a patch (second to last axis) attends to each (last axis)."""

    @property
    def frames(self) -> Tensor:
        """Average of the patches of each frame, (E, V, T, C)."""
        return self.tokens.mean(dim=-2)

    @property
    def received(self) -> Tensor:
        """Attention that each patch receives, averaged over the patches that give it: (E, V, T, G, G), a frame's sum is 1."""
        received = self.attention.mean(dim=-2)
        side = round(received.shape[-1] ** 0.5)
        return received.reshape(*received.shape[:-1], side, side)


class PatchEnrichment(nn.Module):
    """Self-attention over the patches of each frame, then a bottleneck over channels."""

    def __init__(self, channels: int, patches: int, dropout: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self.patches = patches
        self.dropout = dropout
        self.positions = SineTable(patches * patches, channels)
        self.query = make_linear(channels, channels, None, generator)
        self.key = make_linear(channels, channels, None, generator)
        self.value = make_linear(channels, channels, None, generator)
        # Zero at first, as published: the attention fades in.
        self.gamma = nn.Parameter(torch.zeros(1))
        narrow = max(1, channels // 2)
        self.mixer = _layers([channels, narrow, narrow, channels], generator)

    def forward(self, cubes: Tensor, noise: EpisodeNoise) -> EnrichedPatches:
        """Enrich cubes (E, V, C, T, H, W)."""
        placed = noise.dropout(self.positions(self.tokens(cubes)), self.dropout, is_on=self.training)
        query, key, value = (at_least_float32(layer(placed)) for layer in (self.query, self.key, self.value))
        with torch.autocast(cubes.device.type, enabled=False):
            # Without 1/sqrt(C), as published: half precision would be felt here first.
            attention = (query @ key.transpose(-1, -2)).softmax(dim=-1)
            attended = self.gamma * (attention @ value) + placed
        return EnrichedPatches(attended + at_least_float32(self.mixer(attended)), attention)

    def tokens(self, cubes: Tensor) -> Tensor:
        """Largest values of each patch: cubes (E, V, C, T, H, W) to (E, V, T, L, C), patches row by row."""
        episodes, videos, channels, steps, height, width = cubes.shape
        maps = at_least_float32(cubes).reshape(episodes * videos, channels * steps, height, width)
        pooled = F.adaptive_max_pool2d(maps, self.patches)
        return pooled.reshape(episodes, videos, channels, steps, -1).permute(0, 1, 3, 4, 2)


class FrameEnrichment(nn.Module):
    """A small network over the frames of each channel, then one over the channels of each frame."""

    def __init__(self, channels: int, num_steps: int, dropout: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self.dropout = dropout
        self.positions = SineTable(num_steps, channels)
        self.time_mixer = _layers([num_steps, num_steps, num_steps], generator)
        self.channel_mixer = _layers([channels, channels, channels], generator)

    def forward(self, frames: Tensor, noise: EpisodeNoise) -> Tensor:
        """Enrich frames (E, V, T, C)."""
        placed = noise.dropout(self.positions(frames), self.dropout, is_on=self.training)
        over_time = at_least_float32(self.time_mixer(placed.transpose(-1, -2))).transpose(-1, -2)
        mixed = placed + over_time
        return mixed + at_least_float32(self.channel_mixer(mixed))


def _layers(widths: Sequence[int], generator: torch.Generator | None) -> nn.Sequential:
    """Linear layers with a ReLU between each two."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [make_linear(inputs, outputs, None, generator), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
