"""What the loop trains: an encoder (the backbone, or nothing where cubes come from the cache) and a head.

E episodes, V videos of an episode (supports, then queries), S supports, Q queries; F frames, H W pixels or grid; C channels, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from episodes.batch import EpisodeBatch
from episodes.draws import key_of
from episodes.head import HeadModule, HeadOutput
from extract.backbone import Preprocessing
from extract.config import SamplingConfig
from extract.transform import to_input
from pipeline.backbone_memory import checkpoint_blocks
from pipeline.batchnorm import BatchStatistics, convert_batchnorm, is_batchnorm, noted_moments
from pipeline.half_precision import keep_convolutions_whole

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


@dataclass(frozen=True, slots=True)
class BackboneLearning:
    """How a backbone passes clips while it learns."""

    batchnorm: BatchStatistics = "frozen"
    """Over what its BatchNorm takes statistics."""
    compute_dtype: str = "float32"
    """As `run_backbone` takes it; in evaluation the encoder's own counts."""
    clips_per_forward: int | None = None
    """Clips that pass at a time, each part again for its gradient; None: all at once, kept for the gradient."""
    gradient_checkpointing: bool = False
    """Whether its blocks keep their inputs only and are run again for the gradient."""


class ClipEncoder(nn.Module):
    """The backbone in the loop: clips of whole episodes in, cubes out.

    While it learns, the clips of one episode pass together and an episode never changes another, unless BatchNorm takes its statistics
    over all of them. In evaluation (and always when frozen) clips pass in the store's batch shape, so that a cube is bit-equal to the
    one that `mastaf extract` writes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sampling: SamplingConfig,
        array: str = "cube",
        forward_batch: int = 8,
        compute_dtype: str = "float32",
        is_trained: bool = True,
        learning: BackboneLearning | None = None,
    ) -> None:
        """Take over a backbone; one that learns is fitted out for it in place, under the same names.

        Args:
            backbone: `extract.backbone.Backbone`.
            sampling: its `normalization` is applied.
            array: which of the backbone's outputs to give.
            forward_batch: clips per forward pass in evaluation.
            compute_dtype: of evaluation, as `run_backbone` takes it.
            is_trained: whether the backbone learns; else it stays in evaluation mode.
            learning: how it does; None: the defaults.

        Raises:
            ValueError: the backbone cannot learn this way.
        """
        super().__init__()
        self.backbone = backbone
        self.sampling = sampling
        self.array = array
        self.forward_batch = forward_batch
        self.compute_dtype = compute_dtype
        self.is_trained = is_trained
        self.learning = learning or BackboneLearning()
        self.backbone.requires_grad_(is_trained)
        if is_trained:
            self._fit_out()
        self.train(self.training)

    def _fit_out(self) -> None:
        learning = self.learning
        if learning.batchnorm != "frozen":
            if learning.clips_per_forward is not None and any(map(is_batchnorm, self.backbone.modules())):
                raise ValueError(
                    f"training.clips_per_forward = {learning.clips_per_forward} splits the clips that the backbone's BatchNorm takes "
                    f'statistics over ({learning.batchnorm}). Set training.backbone_batchnorm = "frozen", or use '
                    "training.gradient_checkpointing instead."
                )
            convert_batchnorm(self.backbone, is_shared=learning.batchnorm == "synchronised")
        if learning.compute_dtype != "float32":
            keep_convolutions_whole(self.backbone)
        if learning.gradient_checkpointing:
            checkpoint_blocks(self.backbone)

    def rest(self) -> None:
        """Learn nothing from now on: the backbone is frozen, as one that was built so."""
        self.is_trained = False
        self.backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ClipEncoder:
        """Switch to training; a frozen backbone, frozen statistics and a BatchNorm whose scale does not learn stay in evaluation."""
        super().train(mode)
        if not self.is_trained:
            self.backbone.eval()
        for module in self.backbone.modules():
            if is_batchnorm(module):
                weight = module.weight
                is_fixed = isinstance(weight, nn.Parameter) and not weight.requires_grad
                if self.learning.batchnorm == "frozen" or is_fixed:
                    module.eval()
        return self

    def forward(self, clips: Tensor, num_supports: int = 0, seeds: Tensor | None = None) -> Tensor:
        """Encode the clips of E episodes, supports before queries.

        Args:
            clips: (E, V, F, H, W, 3) uint8.
            num_supports: how many of the V are supports; 0 in classification, where all clips may pass at once.
            seeds: (E,) int64 on the CPU, for backbones that draw (dropout) while they learn; where episodes pass at once the first
                counts for all.

        Returns:
            Cubes (E, V, C, T, H, W) float32.

        Raises:
            ValueError: the backbone drew random numbers without seeds, or with ``clips_per_forward``.
        """
        if not (self.training and self.is_trained):
            with torch.no_grad():
                cubes = forward_in_full_batches(
                    self.backbone, clips.flatten(0, 1), self.sampling, self.forward_batch, self.compute_dtype
                )[self.array]
            return cubes.reshape(*clips.shape[:2], *cubes.shape[1:])
        policy = self.learning.batchnorm
        each_seed: list[int | None] = [None] * len(clips) if seeds is None else list(seeds.tolist())
        if policy == "synchronised" or (policy == "frozen" and num_supports == 0):
            cubes = self._learn_from(clips.flatten(0, 1), 0, each_seed[0])
            return cubes.reshape(*clips.shape[:2], *cubes.shape[1:])
        return torch.stack(
            [self._learn_from(one, num_supports, seed) for one, seed in zip(clips, each_seed, strict=True)]
        )

    def _learn_from(self, clips: Tensor, num_supports: int, seed: int | None) -> Tensor:
        """Cubes (V, C, T, H, W) of clips (V, F, H, W, 3) that share statistics and noise."""
        is_split = self.learning.batchnorm == "supports_then_queries" and num_supports > 0
        calls = clips.tensor_split([num_supports]) if is_split else (clips,)
        refusal, at_once = None, self.learning.clips_per_forward
        if at_once is not None and at_once < len(clips):
            refusal = (
                f"training.clips_per_forward = {at_once}: the backbone draws random numbers while it learns "
                "(dropout), and each part of the clips would get others than the whole. Use training.gradient_checkpointing, which "
                "changes no result."
            )
        elif seed is None:
            refusal = (
                "the backbone drew random numbers (dropout), and the batch has no seeds for them; give EpisodeBatch.seeds, "
                "one for each episode"
            )
        with noted_moments(self.backbone), own_noise(seed, clips.device, refusal):
            return torch.cat([self._in_parts(call) for call in calls])

    def _in_parts(self, clips: Tensor) -> Tensor:
        if self.learning.clips_per_forward is None:
            return self._cubes(clips)
        # An unsigned byte per pixel is all that is kept of a part.
        starts = range(0, len(clips), self.learning.clips_per_forward)
        parts = [clips[start : start + starts.step] for start in starts]
        return torch.cat([checkpoint(self._cubes, part, use_reentrant=False) for part in parts])

    def _cubes(self, clips: Tensor) -> Tensor:
        return run_backbone(self.backbone, clips, self.sampling, self.learning.compute_dtype)[self.array]


@contextmanager
def own_noise(seed: int | None, device: torch.device, refusal: str | None = None) -> Iterator[None]:
    """Let what torch's layers draw (dropout) come from a seed alone, and leave the global generators as they were.

    Args:
        seed: of an episode; the stream is not the one that its head draws from. None: 0 takes its place.
        device: where the layers are.
        refusal: what is wrong with drawing; None: it is allowed.

    Raises:
        ValueError: something was drawn all the same.
    """
    generators = [torch.default_generator]
    devices = []
    if device.type == "cuda":
        devices = [torch.cuda.current_device() if device.index is None else device.index]
        generators.append(torch.cuda.default_generators[devices[0]])
    with torch.random.fork_rng(devices=devices):
        first = 0 if seed is None else key_of("mastaf backbone noise 1", seed)[0]
        for generator in generators:
            generator.manual_seed(first)
        before = [generator.get_state() for generator in generators]
        yield
        if refusal is not None and not all(
            torch.equal(state, generator.get_state()) for state, generator in zip(before, generators, strict=True)
        ):
            raise ValueError(refusal)


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

    @property
    def few_shot_head(self) -> HeadModule:
        """What scores few-shot episodes on this model's cubes."""
        return self.head

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of every episode in the batch."""
        output: HeadOutput = self.head(self.encoded(batch), with_maps=with_maps)
        return output

    def encoded(self, batch: EpisodeBatch) -> EpisodeBatch:
        """The batch with float32 cubes in the place of its inputs."""
        num_supports = batch.support.shape[1]
        inputs = torch.cat([batch.support, batch.query], dim=1)
        context = (num_supports, batch.seeds) if isinstance(self.encoder, ClipEncoder) else ()
        videos = self.encoder(inputs, *context)  # (E, V, C, T, H, W)
        return replace(batch, support=videos[:, :num_supports].float(), query=videos[:, num_supports:].float())
