"""The TA2N head: two-stage alignment of action in time and space before frames are compared.

Paper: TA2N: Two-Stage Action Alignment Network for Few-Shot Action Recognition, 2021, https://arxiv.org/abs/2107.04782.
Code consulted: https://github.com/R00Kie-Liu/TA2N, commit 2becdd8.

Stage 1 warps every video in time and lays the shots of a class onto its first one (`ta2n_temporal`); stage 2 aligns each query with
each class by attention over time, and averages both over regions that are moved towards each other (`ta2n_coordination`).

Deviations: any T, H, W of 4 or more, where the code has 8, 7, 7; batched over episodes with batch statistics of each; supports are
sorted by video id, since the first shot of a class is the reference; classes may have unequal shots, and then those with one shot
pass the fusion as well; the first convolution on pairs is split (same numbers), and neither pairs nor warps through a sampling
grid are built; the `--metric` option, which the code ignores, is `distance` here; its layer norm over class distances
(`--dist_norm`), tied to five ways and to their order, is left out; the perturbations may be turned off in evaluation.
"""

# E episodes, S supports, Q queries, N classes; C channels, T time steps, H W grid

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.heads.ta2n_alignment import Aligned, TemporalSpatialAlignment
from episodes.heads.ta2n_softdtw import soft_dtw
from episodes.losses import query_cross_entropy
from episodes.noise import EpisodeNoise
from episodes.shots import at_least_float32, class_shots

_Width = Annotated[int, Field(ge=1)]


class TA2NOptions(HeadOptions):
    """Knobs of the TA2N head; the defaults are those of the released code."""

    dropout: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Share of the cubes' elements set to zero in training (code: 0.5)."""
    temporal_channels: tuple[_Width, _Width, _Width] = (64, 128, 32)
    """Channels of stage 1's network: two convolutions and the hidden layer (code: 64, 128, 32)."""
    offset_channels: tuple[_Width, _Width, _Width] = (128, 128, 64)
    """Channels of the network that finds the offsets: two convolutions and the hidden layer (code: 128, 128, 64)."""
    perturb_in_evaluation: bool = True
    """Whether regions are averaged over nine perturbed offsets in evaluation too (code: always)."""
    distance: Literal["time_step", "soft_dtw"] = "time_step"
    """How aligned videos are compared: cosine distances of frames at the same time step, summed (code), or soft dynamic time
    warping over them, which the code ships and leaves unused."""
    soft_dtw_gamma: float = Field(default=0.1, gt=0.0, le=100.0)
    """Temperature of the soft minimum of soft_dtw (code: 0.1)."""
    factored: bool = True
    """Whether the first convolution on pairs is split into class, query and shift. The numbers are the same; false builds the pairs
    as published, at about eight times the cost, for comparison."""

    def without_effect(self) -> dict[str, str]:
        """The temperature, where nothing is warped."""
        return {} if self.distance == "soft_dtw" else {"soft_dtw_gamma": 'distance is not "soft_dtw"'}


class TA2NHead(HeadModule):
    """Aligns each query with each class in time and space, then compares them frame by frame."""

    def __init__(self, config: TA2NOptions, inputs: HeadInputs) -> None:
        """Build the head.

        Raises:
            ValueError: the cubes have fewer than 4 time steps, rows or columns.
        """
        super().__init__()
        self.config = config
        self.cube_shape = inputs.cube_shape
        self.loss_weights = {"few_shot": 1.0}
        self.alignment = TemporalSpatialAlignment(
            inputs.cube_shape,
            config.temporal_channels,
            config.offset_channels,
            is_factored=config.factored,
            perturb_in_evaluation=config.perturb_in_evaluation,
            generator=inputs.generator,
        )

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W); in training with seeds, unless there is no dropout.
            with_maps: whether to hand back the warps, the offsets, the regions and the attention between frames. A query's
                region lies at its offset, that of the class at minus the offset.

        Returns:
            Logits (E, Q, N), minus the distances; "few_shot" losses (E, Q) where the batch has labels.
        """
        self.refuse_other_shape(batch)
        aligned = self._align(batch.in_order())
        logits = -self.distances(aligned).transpose(1, 2)
        if self.training:
            self.alignment.update(aligned)
        losses = {} if batch.query_labels is None else {"few_shot": query_cross_entropy(logits, batch.query_labels)}
        return HeadOutput(logits, losses, _maps(aligned, batch) if with_maps else {})

    def distances(self, aligned: Aligned) -> Tensor:
        """Distance of each query to each class, (E, N, Q) float32 or wider."""
        pair = aligned.coordinated
        with torch.autocast(pair.support.device.type, enabled=False):
            if self.config.distance == "soft_dtw":
                return soft_dtw(pair.support, pair.query, self.config.soft_dtw_gamma)
            return (1.0 - functional.cosine_similarity(pair.support, pair.query, dim=-1)).sum(dim=-1)

    def _align(self, batch: EpisodeBatch) -> Aligned:
        noise = EpisodeNoise(batch.seeds)
        support, query = (
            noise.dropout(at_least_float32(cubes), self.config.dropout, is_on=self.training)
            for cubes in (batch.support, batch.query)
        )
        return self.alignment.align(support, query, class_shots(batch), _is_counted(batch))


def _is_counted(batch: EpisodeBatch) -> Tensor | None:
    """(E, S) bool, False for padding; None where there is none."""
    is_video = batch.support_labels >= 0
    return None if bool(is_video.all()) else is_video


def _maps(aligned: Aligned, batch: EpisodeBatch) -> dict[str, Tensor]:
    pair = aligned.coordinated
    return {
        "warp_support": _as_given(aligned.support.warp, batch),
        "warp_query": aligned.query.warp,
        "class_alignment": pair.attention.permute(0, 2, 1, 4, 3),
        "offset": pair.offsets.transpose(1, 2),
        "mask_support": pair.support_masks.transpose(1, 2),
        "mask_query": pair.query_masks.transpose(1, 2),
    }


def _as_given(values: Tensor, batch: EpisodeBatch) -> Tensor:
    """Values (E, S, 2) of the sorted supports in the order of the batch."""
    if batch.support_order is None:
        return values
    place = batch.support_order.argsort(dim=1).argsort(dim=1)
    return values.gather(1, place[..., None].expand_as(values))
