"""The two networks of ARN: spatial attention over a video, and the relation of two second-order matrices.

Paper: Few-shot Action Recognition with Permutation-invariant Attention, 2020, https://arxiv.org/abs/2001.03905. Code
consulted: https://github.com/HongguangZhang/arn-eccv20-master, commit c682474 (evaluation and networks; training is
not released). Deviations: `episodes/heads/arn.py`.
"""

# E episodes, M samples of an episode (videos or pairs), U channels, V channels inside; T time steps, H W grid

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.episode_norm import BatchMoments, EpisodeBatchNorm
from episodes.initial import make_linear
from episodes.shots import at_least_float32

ATTENTION_CHANNELS = 16
RELATION_CHANNELS = 64
NUM_POOLS = 4
"""Halvings of the relation image, hence its smallest size 2^4."""

Moments = list[BatchMoments | None]


def make_conv(
    kind: type[nn.Conv2d] | type[nn.Conv3d], inputs: int, outputs: int, kernel: int, generator: torch.Generator | None
) -> nn.Conv2d | nn.Conv3d:
    """A convolution that keeps the size, drawn as the released code draws all of its convolutions.

    Args:
        kind: two or three dimensions.
        inputs: channels that come in.
        outputs: channels that go out.
        kernel: size along every axis; odd.
        generator: source of randomness; None: torch's global one.

    Returns:
        Weights normal with variance 2 / (kernel^2 * outputs), in three dimensions too; biases zero.
    """
    layer = kind(inputs, outputs, kernel, padding=kernel // 2, device="meta").to_empty(device="cpu")
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight.normal_(0.0, math.sqrt(2.0 / (kernel**2 * outputs)), generator=generator)
        layer.bias.zero_()
    return layer


def make_constant_bias_linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer as the released code draws it: weights of standard deviation 0.01, biases one."""
    layer = make_linear(inputs, outputs, 0.01, generator)
    with torch.no_grad():
        layer.bias.fill_(1.0)
    return layer


def over_samples(layer: nn.Module, values: Tensor) -> Tensor:
    """Apply a convolution to (E, M, U, ...); the result is float32 or wider."""
    # On the CPU, torch (2.15) fills the gradient of a bfloat16 conv3d's weights with whatever was in memory, where the video
    # has two time steps; so no automatic mixed precision there.
    with torch.autocast("cpu", enabled=False):
        found: Tensor = layer(values.flatten(0, 1))
    return at_least_float32(found).reshape(*values.shape[:2], *found.shape[1:])


class SpatialAttention(nn.Module):
    """Weights between zero and one for the places of a video, the same at all of its time steps."""

    def __init__(self, channels: int, momentum: float, generator: torch.Generator | None) -> None:
        super().__init__()
        widths = (channels, ATTENTION_CHANNELS, ATTENTION_CHANNELS)
        self.convs = nn.ModuleList(
            make_conv(nn.Conv3d, inputs, outputs, 3, generator) for inputs, outputs in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(EpisodeBatchNorm(width, momentum=momentum) for width in widths[1:])
        self.last = make_conv(nn.Conv3d, ATTENTION_CHANNELS, 1, 1, generator)

    def forward(self, features: Tensor, is_counted: Tensor | None) -> tuple[Tensor, Moments]:
        """Attend to the places of each video.

        Args:
            features: (E, M, U, T, H, W).
            is_counted: (E, M) bool, the videos that batch statistics are made of; None: all.

        Returns:
            Weights (E, M, 1, 1, H, W), and the statistics of the two normalisations.
        """
        moments: Moments = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            assert isinstance(norm, EpisodeBatchNorm)
            features, use = norm.normalize(over_samples(conv, features), is_counted=is_counted)
            moments.append(use)
            features = halve_time(F.relu(features))
        weights = torch.sigmoid(over_samples(self.last, features))
        # Five time steps, as published, are down to one by now; of a longer video the highest weight counts.
        return weights.amax(dim=3, keepdim=True), moments

    def update(self, uses: Sequence[Moments]) -> None:
        """Update the running statistics with the uses of one call, in their order."""
        update_norms(self.norms, uses)


class RelationNetwork(nn.Module):
    """Compares two U x U matrices, laid over each other as the channels of one image."""

    def __init__(self, size: int, hidden: int, momentum: float, generator: torch.Generator | None) -> None:
        super().__init__()
        widths = (2, *[RELATION_CHANNELS] * NUM_POOLS)
        self.convs = nn.ModuleList(
            make_conv(nn.Conv2d, inputs, outputs, 3, generator) for inputs, outputs in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(EpisodeBatchNorm(width, momentum=momentum) for width in widths[1:])
        num_flat = RELATION_CHANNELS * (size // 2**NUM_POOLS) ** 2
        self.hidden = make_constant_bias_linear(num_flat, hidden, generator)
        self.last = make_constant_bias_linear(hidden, 1, generator)

    def forward(self, images: Tensor) -> tuple[Tensor, Moments]:
        """Relate pairs of matrices.

        Args:
            images: (E, M, 2, U, U), support and query.

        Returns:
            Relation before the sigmoid, (E, M), and the statistics of the four normalisations.
        """
        moments: Moments = []
        values = images
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            assert isinstance(norm, EpisodeBatchNorm)
            found, use = norm.normalize(over_samples(conv, values))
            moments.append(use)
            found = F.relu(found)
            pooled = F.max_pool2d((found if index == 0 else found + values).flatten(0, 1), 2)
            values = pooled.reshape(*images.shape[:2], *pooled.shape[1:])
        hidden = F.relu(at_least_float32(self.hidden(values.flatten(2))))
        relation: Tensor = self.last(hidden)
        return at_least_float32(relation).squeeze(-1), moments

    def update(self, uses: Sequence[Moments]) -> None:
        """Update the running statistics with the uses of one call, in their order."""
        update_norms(self.norms, uses)


def halve_time(values: Tensor) -> Tensor:
    """Maximum of each two time steps of (E, M, V, T, H, W); a last odd one is left out, a single one stays."""
    if values.shape[3] < 2:
        return values
    pooled = F.max_pool3d(values.flatten(0, 1), (2, 1, 1))
    return pooled.reshape(*values.shape[:2], *pooled.shape[1:])


def update_norms(norms: nn.ModuleList, uses: Sequence[Moments]) -> None:
    """Add the statistics of one call to every normalisation; `uses` has the moments of all of them per use."""
    for index, norm in enumerate(norms):
        assert isinstance(norm, EpisodeBatchNorm)
        norm.update([use[index] for use in uses])
