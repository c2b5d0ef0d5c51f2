"""TSN++: mean over frames, then the mean similarity to the shots of each class.

Papers: Temporal Segment Networks, 2016, https://arxiv.org/abs/1608.00859 (the features); the few-shot baseline is named
in the tables of Few-Shot Video Classification via Temporal Alignment, 2020, https://arxiv.org/abs/1906.11415.
Code consulted: https://github.com/tobyperrett/few-shot-action-recognition, commit 0b5b5b8.
Deviations: that version normalises the vectors by a learnt layer normalisation and takes inner products; here they are
compared by the cosine of the method's description, or by distance, without parameters.
"""

# E episodes, S supports, Q queries, N classes; C channels

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.heads.protonet import cosines, squared_distances
from episodes.losses import query_cross_entropy
from episodes.shots import class_means, video_vectors


class TsnMeanOptions(HeadOptions):
    """Knobs of the TSN++ head."""

    similarity: Literal["cosine", "euclidean"] = "cosine"
    """What compares two videos: the cosine of their averages, or minus their squared distance."""
    scale: float = Field(default=1.0, gt=0.0)
    """Factor of the similarity (as described: none, which is 1)."""


class TsnMeanHead(HeadModule):
    """Scores by the mean similarity to the shots, without a prototype; it has no parameters."""

    def __init__(self, config: TsnMeanOptions, inputs: HeadInputs) -> None:
        super().__init__()
        self.config = config
        self.cube_shape = inputs.cube_shape
        self.loss_weights = {"few_shot": 1.0}

    # ARG002: every head takes `with_maps`; this one has nothing to show.
    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:  # noqa: ARG002
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W).
            with_maps: without effect; there is nothing to see.

        Returns:
            Logits (E, Q, N); "few_shot" losses where the batch has labels.
        """
        self.refuse_other_shape(batch)
        with torch.autocast(batch.query.device.type, enabled=False):
            similarity = self.similarity(video_vectors(batch.support), video_vectors(batch.query))
            logits = self.config.scale * class_means(similarity, batch).transpose(1, 2)
            losses = {} if batch.query_labels is None else {"few_shot": query_cross_entropy(logits, batch.query_labels)}
        return HeadOutput(logits, losses)

    def similarity(self, support: Tensor, query: Tensor) -> Tensor:
        """Similarity (E, S, Q) of supports (E, S, C) and queries (E, Q, C)."""
        compare = cosines if self.config.similarity == "cosine" else _minus_squared_distances
        return compare(support, query)


def _minus_squared_distances(first: Tensor, second: Tensor) -> Tensor:
    return -squared_distances(first, second)
