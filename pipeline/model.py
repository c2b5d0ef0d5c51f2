"""What the loop trains: an encoder (the backbone, or nothing where cubes come from the cache) and a head.

E episodes, V videos of an episode (supports, then queries), S supports, Q queries; F frames, H W pixels or grid; C channels, T time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from episodes.batch import EpisodeBatch
from episodes.head import HeadModule, HeadOutput
from extract.backbone import Preprocessing
from extract.config import SamplingConfig
from extract.transform import to_input

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def forward_in_full_batches(
    backbone: nn.Module, clips: Tensor, sampling: SamplingConfig, batch_size: int, compute_dtype: str = "float32"
) -> dict[str, Tensor]:
    """Run clips through a backbone in batches that are always full, so that a clip's cube does not depend on how many came with it.

    Args:
        backbone: `extract.backbone.Backbone`.
        clips: (V, F, H, W, 3) uint8.
        sampling: its `normalization` is applied.
        batch_size: clips per forward pass; the last batch is filled up with black clips.
        compute_dtype: "float32", or autocast to "bfloat16" / "float16".

    Returns:
        Named cubes, each (V, C, T, H, W) float32.
    """
    outputs: dict[str, list[Tensor]] = {}
    for start in range(0, len(clips), batch_size):
        part = clips[start : start + batch_size]
        missing = batch_size - len(part)
        if missing:
            part = torch.cat([part, part.new_zeros((missing, *part.shape[1:]))])
        for name, cubes in run_backbone(backbone, part, sampling, compute_dtype).items():
            outputs.setdefault(name, []).append(cubes[: batch_size - missing])
    return {name: torch.cat(parts) for name, parts in outputs.items()}


def run_backbone(
    backbone: nn.Module, clips: Tensor, sampling: SamplingConfig, compute_dtype: str = "float32"
) -> dict[str, Tensor]:
    """One forward pass of (V, F, H, W, 3) uint8 clips; named cubes (V, C, T, H, W) float32."""
    frames = to_input(clips, preprocessing_of(backbone), sampling.normalization)
    dtype = AUTOCAST[compute_dtype]
    with torch.autocast(clips.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        cubes = backbone(frames)
    return {name: cube.float() for name, cube in cubes.items()}


def cube_shape(cubes: Tensor) -> tuple[int, int, int, int]:
    """(C, T, H, W) of a batch of cubes."""
    _, channels, time_steps, height, width = cubes.shape
    return channels, time_steps, height, width


def preprocessing_of(backbone: nn.Module) -> Preprocessing:
    """What the backbone's weights were trained with."""
    return cast(Preprocessing, backbone.preprocessing)


def describe_backbone(backbone: nn.Module) -> dict[str, Any]:
    """What a backbone computes, apart from its weights: JSON-able, for specs and checkpoints."""
    preprocessing = preprocessing_of(backbone)
    return {
        "architecture": cast(dict[str, Any], backbone.architecture),
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }


class ClipEncoder(nn.Module):
    """The backbone in the loop: clips of whole episodes in, cubes out.

    While it learns, all clips of one episode pass together and its BatchNorm sees just them, as in the published code; an episode
    never changes another. In evaluation (and always when frozen) clips pass in the store's batch shape, so that a cube is
    bit-equal to the one that `mastaf extract` writes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sampling: SamplingConfig,
        array: str = "cube",
        forward_batch: int = 8,
        compute_dtype: str = "float32",
        is_trained: bool = True,
        batchnorm: str = "episode",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.sampling = sampling
        self.array = array
        self.forward_batch = forward_batch
        self.compute_dtype = compute_dtype
        self.is_trained = is_trained
        self.batchnorm = batchnorm
        self.backbone.requires_grad_(is_trained)
        self.train(self.training)

    def train(self, mode: bool = True) -> ClipEncoder:
        """Switch to training; a frozen backbone and frozen BatchNorm stay in evaluation."""
        super().train(mode)
        if not self.is_trained:
            self.backbone.eval()
        elif self.batchnorm == "frozen":
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, clips: Tensor) -> Tensor:
        """Encode clips (E, V, F, H, W, 3) uint8 into cubes (E, V, C, T, H, W) float32."""
        if self.training and self.is_trained:
            return torch.stack(
                [run_backbone(self.backbone, one, self.sampling, self.compute_dtype)[self.array] for one in clips]
            )
        with torch.no_grad():
            cubes = forward_in_full_batches(
                self.backbone, clips.flatten(0, 1), self.sampling, self.forward_batch, self.compute_dtype
            )[self.array]
        return cubes.reshape(*clips.shape[:2], *cubes.shape[1:])


class FewShotModel(nn.Module):
    """An encoder (`ClipEncoder`, or `nn.Identity` on the cache) followed by a head."""

    def __init__(self, encoder: nn.Module, head: HeadModule) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term of the head."""
        return self.head.loss_weights

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of every episode in the batch."""
        num_supports = batch.support.shape[1]
        videos = self.encoder(torch.cat([batch.support, batch.query], dim=1))  # (E, V, C, T, H, W)
        encoded = replace(batch, support=videos[:, :num_supports].float(), query=videos[:, num_supports:].float())
        output: HeadOutput = self.head(encoded, with_maps=with_maps)
        return output

    def parameter_groups(self, learning_rate: float, backbone_learning_rate: float | None) -> list[dict[str, object]]:
        """Parameters with their learning rates: the head's, then the backbone's if it learns."""
        groups: list[dict[str, object]] = [{"params": list(self.head.parameters()), "lr": learning_rate}]
        backbone = _trainable(self.encoder.parameters())
        if backbone:
            groups.append(
                {"params": backbone, "lr": learning_rate if backbone_learning_rate is None else backbone_learning_rate}
            )
        return [group for group in groups if group["params"]]


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]
