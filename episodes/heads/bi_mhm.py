"""Bi-MHM: the set matching of HyRSM, with its hybrid relation module as an option.

Paper: Hybrid Relation Guided Set Matching for Few-shot Action Recognition (CVPR 2022), https://arxiv.org/abs/2204.13423.
Code consulted: https://github.com/alibaba-mmai-research/HyRSM, commit 3d88d37 (`CNN_HyRSM_1shot`, `CNN_HyRSM_5shot`).
Where they differ the code is the default: the minima over frames are summed (paper: averaged), and several shots are
averaged frame by frame into a prototype (the code's 5-shot head; its 1-shot head averages distances). Published with the
relation module: a classifier of all frames of supports and queries over the training classes. Deviations: the metric alone
(without the relation, our default) has no parameters; `projection` adds a layer in front of it, as
https://github.com/jbertrand89/matching_based_fsar has for its matchers on frozen features.
"""

# E episodes, Q queries, S supports, N classes, Z training classes; M what a query is matched with (supports or prototypes)
# C channels, T U time steps of query and support, H W grid

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.heads.frame_matching import FrameTuples, class_average, frame_cosines, weight_of_pairs
from episodes.heads.hybrid_relation import HybridRelation, RelationRates
from episodes.initial import make_linear
from episodes.losses import position_cross_entropy, query_cross_entropy
from episodes.noise import EpisodeNoise
from episodes.shots import class_means, frame_vectors

_OF_RELATION = (
    "heads",
    "position_scale",
    "position_weight",
    "position_dropout",
    "intra_dropout",
    "attention_dropout",
    "inter_dropout",
    "global_classifier",
    "lambda_global",
)


class BiMhmConfig(HeadOptions):
    """Knobs of the set matching. Defaults are those of the released code, but for `relation`, which is the whole of HyRSM."""

    shots: Literal["prototype", "mean"] = "prototype"
    """Whether a class is its supports averaged frame by frame (code with several shots), or its distance is the mean of
    those to its supports (code with one shot)."""
    frame_reduction: Literal["sum", "mean"] = "sum"
    """Whether the smallest distances are summed over the frames (code) or averaged (paper)."""
    projection: int = Field(default=0, ge=0)
    """Width of a linear layer with layer normalisation in front of everything; 0: none (published)."""
    relation: bool = False
    """Whether frames and videos are related before they are matched (HyRSM)."""
    heads: int = Field(default=8, ge=1)
    """Attention heads of both relations (code: 8). Their width is that of the frames (code: 2048 channels)."""
    position_scale: float = Field(default=10.0, gt=0.0)
    """A: frames are multiplied by sqrt(C / A) before their position is added (code: 10, on Kinetics 2048)."""
    position_weight: float = Field(default=1.0, ge=0.0)
    """B: factor of the position (code: 1, on Kinetics 0.01)."""
    position_dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout of frames with their position (code: 0.1)."""
    intra_dropout: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Dropout behind the attention between frames (code: 0.2)."""
    attention_dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout of the attention between videos (code: 0.1)."""
    inter_dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Dropout behind the attention between videos (code: 0.05)."""
    global_classifier: bool = True
    """Whether a classifier of frames over all training classes is trained along (code: yes)."""
    lambda_global: float = Field(default=0.6, ge=0.0)
    """Weight of its loss (code: 0.6 on SSv2, 0.4 on Kinetics, 0.15 on HMDB)."""

    def without_effect(self) -> dict[str, str]:
        """Options that change no number as the others are set, each with the reason."""
        if not self.relation:
            return dict.fromkeys(_OF_RELATION, "there is no relation module (relation = false)")
        return {} if self.global_classifier else {"lambda_global": "there is no global classifier"}


class BiMhmHead(HeadModule):
    """Scores are minus the bidirectional mean Hausdorff distance to each class."""

    def __init__(self, config: BiMhmConfig, inputs: HeadInputs) -> None:
        """Build the head.

        Raises:
            ValueError: more attention heads than channels.
        """
        super().__init__()
        self.config = config
        self.cube_shape = inputs.cube_shape
        channels, num_steps = inputs.cube_shape[:2]
        self.frames = FrameTuples(channels, num_steps, 1, config.projection, inputs.generator)
        width = self.frames.width
        self.relation = self._make_relation(width, num_steps, inputs.generator) if config.relation else None
        has_classifier = config.relation and config.global_classifier and bool(inputs.num_classes)
        self.classifier = (
            make_linear(width, inputs.num_classes or 0, None, inputs.generator) if has_classifier else None
        )
        self.loss_weights = {"few_shot": 1.0, **({"global": config.lambda_global} if has_classifier else {})}

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W); frames are averages over their grids.
            with_maps: whether to hand back the weight of each pair of frames in the distance: "class_alignment"
                (E, Q, N, T, U) with prototypes, else "alignment" (E, Q, S, T, U).

        Returns:
            Logits (E, Q, N) float32 or wider; "few_shot" losses where the batch has labels, in training with a
            classifier "global" ones too: a mean over all frames of the episode, which each of its queries repeats.
        """
        self.refuse_other_shape(batch)
        # Distances of good matches differ in the third digit: half precision would swap the best ones.
        with torch.autocast(batch.query.device.type, enabled=False):
            noise = EpisodeNoise(batch.seeds)
            support, query = (self.frames(frame_vectors(cubes)) for cubes in (batch.support, batch.query))
            if self.relation is not None:
                support, query = self.relation.within(support, noise), self.relation.within(query, noise)
            losses = self._global_losses(support, query, batch)
            distances = self._distances(support, query, batch, noise)
            pairs = self._hausdorff(distances)
            is_by_class = self.config.shots == "prototype"
            logits = -(pairs if is_by_class else class_average(pairs, batch))
            if batch.query_labels is not None:
                losses["few_shot"] = query_cross_entropy(logits, batch.query_labels)
            maps = {}
            if with_maps:
                maps["class_alignment" if is_by_class else "alignment"] = weight_of_pairs(self._hausdorff, distances)
        return HeadOutput(logits, losses, maps)

    def _distances(self, support: Tensor, query: Tensor, batch: EpisodeBatch, noise: EpisodeNoise) -> Tensor:
        """Of all frames of queries and prototypes or supports: (E, S, U, C) and (E, Q, T, C) to (E, Q, M, T, U)."""
        is_present = batch.support_labels >= 0
        if self.config.shots == "prototype":
            support = class_means(support, batch)
            is_present = is_present.new_ones(support.shape[:2])
        if self.relation is not None:
            query, support = self.relation.between(query, support, is_present, noise)
        return 1.0 - frame_cosines(query, support, eps=0.0)

    def _hausdorff(self, distances: Tensor) -> Tensor:
        """From each frame to the nearest of the other video, both ways: (..., T, U) to (...)."""
        of_query, of_support = distances.amin(dim=-1), distances.amin(dim=-2)
        if self.config.frame_reduction == "sum":
            return of_query.sum(dim=-1) + of_support.sum(dim=-1)
        return of_query.mean(dim=-1) + of_support.mean(dim=-1)

    def _global_losses(self, support: Tensor, query: Tensor, batch: EpisodeBatch) -> dict[str, Tensor]:
        global_labels, class_labels = batch.global_labels, batch.class_global_labels
        if not self.training or self.classifier is None or global_labels is None or class_labels is None:
            return {}
        labels = torch.cat([class_labels.gather(1, batch.support_labels.clamp(min=0)), global_labels], dim=1)
        logits = self.classifier(torch.cat([support, query], dim=1))  # (E, S + Q, T, Z)
        of_video = position_cross_entropy(logits.transpose(-1, -2), labels)
        weight = torch.cat([batch.support_labels >= 0, global_labels >= 0], dim=1).to(of_video.dtype)
        mean = (of_video * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)
        return {"global": mean.expand(global_labels.shape)}

    def _make_relation(self, width: int, num_steps: int, generator: torch.Generator | None) -> HybridRelation:
        config = self.config
        if config.heads > width:
            raise ValueError(
                f"head.heads = {config.heads}, but frames have {width} channels; 1 to {width} heads are allowed, "
                "or set head.projection to a larger width"
            )
        rates = RelationRates(
            config.position_dropout, config.intra_dropout, config.attention_dropout, config.inter_dropout
        )
        position = (config.position_scale, config.position_weight)
        return HybridRelation(width, num_steps, config.heads, position, rates, generator)
