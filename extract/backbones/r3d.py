"""3-D ResNets of Hara et al., depths 18 to 101.

Paper: "Can Spatiotemporal 3D CNNs Retrace the History of 2D CNNs and ImageNet?", CVPR 2018, https://arxiv.org/abs/1711.09577;
checkpoints: "Would Mega-scale Datasets Further Enhance Spatiotemporal 3D CNNs?", 2020, https://arxiv.org/abs/2004.04968.
Code consulted: https://github.com/kenshohara/3D-ResNets-PyTorch at commit 540a0ea, for names, shapes and strides.
Deviations: no average pooling and no fc at the end; shortcut type B only.

Letters: B clips; F frames; H W pixels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from extract.backbone import KINETICS_HARA
from extract.config import BackboneConfig, SamplingConfig
from extract.weights import NoOptions, StateDict, WeightsError, checked_options, load_weights, trunk_state_dict

STAGE_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Depth -> blocks in each stage. From 50 on the blocks are bottlenecks."""
STAGE_WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3x3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, F, H, W) -> (B, width, F', H', W')."""
        hidden = F.relu(self.bn1(self.conv1(inputs)))
        hidden = self.bn2(self.conv2(hidden))
        return F.relu(hidden + (inputs if self.downsample is None else self.downsample(inputs)))


class Bottleneck(nn.Module):
    """1x1x1, 3x3x3 with the stride, 1x1x1 to four times the width."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        channels = width * self.expansion
        self.conv1 = nn.Conv3d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(channels)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, F, H, W) -> (B, 4 width, F', H', W')."""
        hidden = F.relu(self.bn1(self.conv1(inputs)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        hidden = self.bn3(self.conv3(hidden))
        return F.relu(hidden + (inputs if self.downsample is None else self.downsample(inputs)))


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    """Type B: a convolution where the shape changes, else nothing; the names are those of the published files."""
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(nn.Conv3d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm3d(channels))


class R3D(nn.Module):
    """The trunk up to the last stage. The cube is (512 or 2048, F/16, H/32, W/32), each rounded up."""

    preprocessing = KINETICS_HARA

    def __init__(self, depth: int) -> None:
        super().__init__()
        block = Bottleneck if depth >= 50 else BasicBlock
        self.conv1 = nn.Conv3d(3, 64, 7, (1, 2, 2), 3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.maxpool = nn.MaxPool3d(3, 2, 1)
        channels = 64
        stages: list[nn.Sequential] = []
        for stage, (width, num_blocks) in enumerate(zip(STAGE_WIDTHS, STAGE_BLOCKS[depth], strict=True), start=1):
            blocks: list[nn.Module] = []
            for block_index in range(num_blocks):
                stride = 2 if stage > 1 and block_index == 0 else 1
                blocks.append(block(channels, width, stride))
                channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.channels = channels
        self.architecture: dict[str, Any] = {"depth": depth, "shortcut": "B"}
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """Embed clips: (B, 3, F, H, W) float32 -> {"cube": (B, C, F/16, H/32, W/32)}."""
        hidden = self.maxpool(F.relu(self.bn1(self.conv1(frames))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden = stage(hidden)
        return {"cube": hidden}


def published_state_dict(content: Mapping[str, Any], path: Path) -> StateDict:
    """Trunk weights out of any file of this family.

    Takes Hara's training files ("state_dict"), STAF's training checkpoints ("model_state_dict") and final files (bare),
    and our own trunks; `module.` is removed wherever it occurs, and fc and the parts of STAF's head are left out.
    """
    inner = content.get("model_state_dict")
    state = trunk_state_dict(inner if isinstance(inner, Mapping) else content, path, dropped=("fc.",))
    if any(key.startswith("base.") for key in state):
        state = {key.removeprefix("base."): value for key, value in state.items() if key.startswith("base.")}
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def _refuse_other_networks(state: StateDict, depth: int, path: Path) -> None:
    """Two common mix-ups get their own sentence instead of a list of names."""
    blocks = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    is_bottleneck = "layer1.0.conv3.weight" in state
    depths = [d for d, counts in STAGE_BLOCKS.items() if counts == blocks and (d >= 50) == is_bottleneck]
    if depths and depths[0] != depth:
        raise WeightsError(
            f"{path} holds a 3-D ResNet of depth {depths[0]}, not {depth}. Use --backbone r3d{depths[0]}"
        )
    if depths and not any("downsample" in key for key in state):
        raise WeightsError(
            f"{path} was trained with shortcut type A (it has no downsample weights); this network has type B. "
            "Use one of the r3d*_200ep.pth files, which have type B"
        )


def build_r3d(config: BackboneConfig, sampling: SamplingConfig, *, depth: int) -> nn.Module:
    """The trunk of one depth with its weights."""
    del sampling  # any clip size will do
    checked_options(NoOptions, config.options, config.name)

    def convert(content: Mapping[str, Any], path: Path) -> StateDict:
        state = published_state_dict(content, path)
        _refuse_other_networks(state, depth, path)
        return state

    module = R3D(depth)
    load_weights(module, config, convert)
    return module
