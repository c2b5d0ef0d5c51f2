"""The small network that both stages of TA2N read their alignment from (header of `episodes.heads.ta2n`)."""

# E episodes, M samples of an episode (videos or pairs), U channels; T time steps, H W grid

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from episodes.episode_norm import BatchMoments, EpisodeBatchNorm
from episodes.initial import make_conv3d, make_linear
from episodes.shots import at_least_float32

Widths = tuple[int, int, int]
"""Channels of the first convolution, of the second one, and of the hidden layer."""


@dataclass(frozen=True, slots=True)
class NetworkMoments:
    """Statistics of one use of the network, by its normalisations; None in evaluation."""

    first: BatchMoments | None
    second: BatchMoments | None


class AlignmentNetwork(nn.Module):
    """Cubes to two numbers, of a whole video or of each time step.

    A 3x3x3 convolution, batch normalisation, max-pool and relu, twice; the largest value over what is left of the grid (and of
    time); two linear layers with a relu between them. The first convolution is the caller's to apply, so that it may be split.
    """

    def __init__(
        self,
        channels: int,
        widths: Widths,
        *,
        first_bias: tuple[float, float],
        keeps_time: bool,
        generator: torch.Generator | None,
    ) -> None:
        """Build the network; the last layer starts at weight 0 and bias `first_bias`, as published.

        Args:
            channels: of the first convolution's input.
            widths: channels of the convolutions and of the hidden layer.
            first_bias: what the network says before training.
            keeps_time: whether there are two numbers for each time step, and the pools halve height and width alone.
            generator: randomness of the first weights.
        """
        super().__init__()
        first, second, hidden = widths
        self.keeps_time = keeps_time
        self.pool = (1, 2, 2) if keeps_time else (2, 2, 2)
        self.first = make_conv3d(channels, first, generator)
        self.first_norm = EpisodeBatchNorm(first)
        self.second = make_conv3d(first, second, generator)
        self.second_norm = EpisodeBatchNorm(second)
        self.hidden = make_linear(second, hidden, None, generator)
        self.out = make_linear(hidden, 2, None, generator)
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.bias.copy_(torch.tensor(first_bias))

    def forward(self, maps: Tensor, is_counted: Tensor | None = None) -> tuple[Tensor, NetworkMoments]:
        """All that follows the first convolution.

        Args:
            maps: what the first convolution returned, (E, M, U, T, H, W).
            is_counted: (E, M) bool, the samples that batch statistics are made of; None: all.

        Returns:
            (E, M, 2), or (E, M, T, 2) where time is kept, float32 or wider; and the statistics.
        """
        batch = maps.shape[:2]
        normalized, first = self.first_norm.normalize(at_least_float32(maps), is_counted=is_counted)
        # On a CPU, and in bfloat16 alone, convolutions over two time steps get wrong weight gradients (torch 2.15, oneDNN).
        with torch.autocast("cpu", enabled=False):
            maps = self.second(self._pooled(normalized))
        maps = at_least_float32(maps.reshape(*batch, *maps.shape[1:]))
        normalized, second = self.second_norm.normalize(maps, is_counted=is_counted)
        pooled = self._pooled(normalized)
        largest = pooled.amax(dim=(-2, -1)).transpose(-1, -2) if self.keeps_time else pooled.amax(dim=(-3, -2, -1))
        numbers = self.out(torch.relu(self.hidden(largest)))
        return at_least_float32(numbers.reshape(*batch, *numbers.shape[1:])), NetworkMoments(first, second)

    def update(self, uses: Sequence[NetworkMoments]) -> None:
        """Add the statistics of one call to the running ones, the uses of each episode in their order."""
        self.first_norm.update([use.first for use in uses])
        self.second_norm.update([use.second for use in uses])

    def _pooled(self, maps: Tensor) -> Tensor:
        """(E, M, U, T, H, W) to (EM, U, T', H', W')."""
        return torch.relu(functional.max_pool3d(maps.flatten(0, 1), self.pool))
