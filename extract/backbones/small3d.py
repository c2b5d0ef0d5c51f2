"""A small 3-D residual network of our own, for the demo and for tests on a CPU. It follows no paper.

About 116 million multiply-adds for a clip of 8 x 64 x 64 at width 24. Time is halved once only, in the last stage,
so that short motions keep their order.

Letters: B clips; F frames; H W pixels.
"""

from typing import Any

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from extract.backbone import HALF
from extract.config import BackboneConfig, SamplingConfig
from extract.weights import checked_options, load_weights


class Small3DOptions(BaseModel):
    """Size of the network."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    width: int = Field(default=24, ge=4, le=512)
    """Channels after the stem; the cube has four times as many."""
    depth: int = Field(default=1, ge=1, le=8)
    """Residual blocks in each of the two stages."""
    subtract_mean: bool = False
    """Take the clip's mean over time off every frame first, so that what stands still vanishes. Trained on a few hundred
    videos of moving objects without it, the network learns the videos by their looks and nothing of the motion."""


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels or stride != (1, 1, 1):
            self.shortcut = nn.Sequential(
                nn.Conv3d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm3d(channels)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, F, H, W) -> (B, C', F', H', W')."""
        hidden = F.relu(self.bn1(self.conv1(inputs)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(inputs))


class Small3D(nn.Module):
    """Stem, pooling, two stages. The cube is (4 width, F/2, H/16, W/16)."""

    preprocessing = HALF

    def __init__(self, options: Small3DOptions) -> None:
        super().__init__()
        width = options.width
        self.channels = 4 * width
        self.architecture: dict[str, Any] = options.model_dump(mode="json")
        self.subtract_mean = options.subtract_mean
        self.stem = nn.Sequential(
            nn.Conv3d(3, width, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        self.stage1 = _stage(width, 2 * width, (1, 2, 2), options.depth)
        self.stage2 = _stage(2 * width, 4 * width, (2, 2, 2), options.depth)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """Embed clips: (B, 3, F, H, W) float32 -> {"cube": (B, 4 width, F/2, H/16, W/16)}, sizes rounded up."""
        if self.subtract_mean:
            frames = frames - frames.mean(dim=2, keepdim=True)
        return {"cube": self.stage2(self.stage1(self.stem(frames)))}


def _stage(in_channels: int, channels: int, stride: tuple[int, int, int], depth: int) -> nn.Sequential:
    blocks = [ResidualBlock(in_channels, channels, stride)]
    blocks += [ResidualBlock(channels, channels, (1, 1, 1)) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def build_small3d(config: BackboneConfig, sampling: SamplingConfig) -> nn.Module:
    """The network with its weights; `config.options` are the fields of Small3DOptions."""
    del sampling  # any clip size will do
    options: dict[str, Any] = dict(config.options)
    module = Small3D(checked_options(Small3DOptions, options, config.name))
    load_weights(module, config)
    return module
