"""Prototypical networks: distance to the mean of each class.

Paper: Prototypical Networks for Few-shot Learning, 2017, https://arxiv.org/abs/1703.05175. Code consulted (for the
temperature): https://github.com/Sha-Lab/FEAT, commit fa66901.
Deviations: a cosine as well; cubes are averaged over time and space first, unless told otherwise.
"""

# E episodes, S supports, Q queries, N classes; C channels (or numbers of a whole cube)

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.losses import query_cross_entropy
from episodes.shots import at_least_float32, class_means, video_vectors


class ProtonetOptions(HeadOptions):
    """Knobs of the prototypical head."""

    distance: Literal["euclidean", "cosine"] = "euclidean"
    """What compares a query with a prototype: minus the squared distance (paper), or the cosine."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Divides the squared distance (paper: none, which is 1; the code consulted has 64 for long feature vectors)."""
    scale: float = Field(default=10.0, gt=0.0)
    """Factor of the cosine; 10 is usual where a network is trained with it."""
    average: bool = True
    """Whether cubes are averaged over time and space first; without, all numbers of a cube are compared one by one."""

    def without_effect(self) -> dict[str, str]:
        """The factor of the other distance."""
        other = "scale" if self.distance == "euclidean" else "temperature"
        return {other: f"the distance is {self.distance}"}


class ProtonetHead(HeadModule):
    """Scores by the distance to class means; it has no parameters."""

    def __init__(self, config: ProtonetOptions, inputs: HeadInputs) -> None:
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
        # Squared distances of long vectors lose their differences in half precision.
        with torch.autocast(batch.query.device.type, enabled=False):
            logits = self.scores(self.vectors(batch.query), self.prototypes(batch))
            losses = {} if batch.query_labels is None else {"few_shot": query_cross_entropy(logits, batch.query_labels)}
        return HeadOutput(logits, losses)

    def vectors(self, cubes: Tensor) -> Tensor:
        """What stands for each video: cubes (..., C, T, H, W) to (..., C), or all their numbers; float32 or wider."""
        return video_vectors(cubes) if self.config.average else at_least_float32(cubes).flatten(-4)

    def prototypes(self, batch: EpisodeBatch) -> Tensor:
        """Mean of the supports of each class, (E, N, C)."""
        return class_means(self.vectors(batch.support), batch)

    def scores(self, query: Tensor, prototypes: Tensor) -> Tensor:
        """Logits (E, Q, N) of queries (E, Q, C) and prototypes (E, N, C)."""
        if self.config.distance == "cosine":
            return self.config.scale * cosines(query, prototypes)
        return -squared_distances(query, prototypes) / self.config.temperature


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of each pair, (..., A, C) and (..., B, C) to (..., A, B); zero where a vector is zero."""
    return F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).transpose(-1, -2)


def squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """Squared Euclidean distance of each pair, (..., A, C) and (..., B, C) to (..., A, B).

    By differences: the product of the vectors would cancel where they are long and close together.
    """
    return (first[..., :, None, :] - second[..., None, :, :]).square().sum(dim=-1)
