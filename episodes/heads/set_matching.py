"""Chamfer++, max and diagonal: heads that reduce the frame-to-frame similarities of two videos to a number.

Paper: Rethinking matching-based few-shot action recognition, 2023, https://arxiv.org/abs/2303.16084. Code consulted:
https://github.com/jbertrand89/matching_based_fsar, commit 03e4e40. As there: frames (clip features), or ordered tuples of
them, pass a linear layer and a layer normalisation, their cosines are reduced, and the class similarity is multiplied by a
fixed factor and a learnt one. Deviations: classes may have unequal shots; the layer on tuples is applied per member (the
same numbers); the reduction by `diagonal` is offered per video only, since joined shots have no diagonal.
"""

# E episodes, Q queries, S supports, N classes, K most shots; C channels, T U time steps of query and support (or tuples)

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.heads.frame_matching import FrameTuples, class_average, frame_cosines, weight_of_pairs
from episodes.losses import query_cross_entropy
from episodes.shots import class_shots, frame_vectors

Shots = Literal["joint", "mean"]

PUBLISHED_TUPLE_LENGTH = 3
"""Of Chamfer++."""


class MatchingConfig(HeadOptions):
    """Knobs of the matching heads. Defaults are those of the released code and its training scripts."""

    projection: int = Field(default=1152, ge=0)
    """Width of the linear layer with layer normalisation in front of the matching (published: 1152); 0: none."""
    eps: float = Field(default=0.01, ge=0.0)
    """Added to the product of the norms in the cosine (published: 0.01)."""
    scale: float = Field(default=10.0, gt=0.0)
    """Fixed factor of the similarities (published: 10 by default, tuned per dataset)."""
    learn_scale: bool = True
    """Whether a learnt factor multiplies the fixed one (published: yes)."""
    scale_weight: float = 1.0
    """The learnt factor at the start (published: 1 by default, tuned per dataset; 0.1 beside a scale of 100)."""

    def without_effect(self) -> dict[str, str]:
        """Options that change no number as the others are set, each with the reason."""
        return {} if self.learn_scale else {"scale_weight": "learn_scale is off"}


class MaxConfig(MatchingConfig):
    """Knobs of the max matching."""

    shots: Shots = "mean"
    """Whether the shots of a class are one set of frames, or its similarity is the mean of theirs (published: mean)."""


class ChamferConfig(MatchingConfig):
    """Knobs of Chamfer++; `shots = "mean"`, `tuple_length = 1` is the plain Chamfer matching."""

    shots: Shots = "joint"
    """Whether the shots of a class are one set of frames, or its similarity is the mean of theirs (Chamfer++: joint)."""
    direction: Literal["both", "query", "support"] = "both"
    """Whose frames look for their best match: the query's, the supports', or the mean of both (Chamfer++: both)."""
    tuple_length: int | None = Field(default=None, ge=1)
    """Frames in an ordered tuple, the thing that is matched. None: 3 (Chamfer++), or all time steps where there are
    fewer. 1 matches single frames, and is blind to their order. The similarities of tuples of 3 grow with the sixth
    power of the time steps."""


class MatchingHead(HeadModule):
    """Scores are scaled similarities of the query to each class."""

    def __init__(self, config: MatchingConfig, inputs: HeadInputs, tuple_length: int = 1) -> None:
        """Build what stands around the matching.

        Args:
            config: knobs.
            inputs: what the head is built for.
            tuple_length: frames in what is matched.
        """
        super().__init__()
        self.cube_shape = inputs.cube_shape
        self.eps, self.scale = config.eps, config.scale
        channels, num_steps = inputs.cube_shape[:2]
        self.frames = FrameTuples(channels, num_steps, tuple_length, config.projection, inputs.generator)
        self.scale_weight = nn.Parameter(torch.tensor(config.scale_weight)) if config.learn_scale else None
        self.loss_weights = {"few_shot": 1.0}

    @abstractmethod
    def class_similarities(self, similarities: Tensor, batch: EpisodeBatch) -> Tensor:
        """Similarity to each class: (E, Q, S, T, U) to (E, Q, N)."""

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W); frames are averages over their grids.
            with_maps: whether to hand back "alignment" (E, Q, S, T, U): the weight of each pair of frames in the
                similarity to the support's class. The weights of a class sum to one.

        Returns:
            Logits (E, Q, N) float32 or wider; "few_shot" losses where the batch has labels.
        """
        self.refuse_other_shape(batch)
        # Cosines of good matches differ in the third digit: half precision would swap the best ones.
        with torch.autocast(batch.query.device.type, enabled=False):
            query, support = (self.frames(frame_vectors(cubes)) for cubes in (batch.query, batch.support))
            similarities = frame_cosines(query, support, self.eps)
            logits = self.scale * self.class_similarities(similarities, batch)
            if self.scale_weight is not None:
                logits = self.scale_weight * logits
            labels = batch.query_labels
            losses = {} if labels is None else {"few_shot": query_cross_entropy(logits, labels)}
            maps = {"alignment": self._alignment(similarities, batch)} if with_maps else {}
        return HeadOutput(logits, losses, maps)

    def _alignment(self, similarities: Tensor, batch: EpisodeBatch) -> Tensor:
        weights = weight_of_pairs(lambda pairs: self.class_similarities(pairs, batch), similarities)
        return self.frames.spread(weights)


class DiagonalHead(MatchingHead):
    """Frames are compared with the frame at the same time step only."""

    def class_similarities(self, similarities: Tensor, batch: EpisodeBatch) -> Tensor:
        """Mean of the diagonal, then over the shots: (E, Q, S, T, T) to (E, Q, N)."""
        return class_average(similarities.diagonal(dim1=-2, dim2=-1).mean(dim=-1), batch)


class MaxHead(MatchingHead):
    """The best pair of frames speaks for the video."""

    def __init__(self, config: MaxConfig, inputs: HeadInputs) -> None:
        """Build the head."""
        super().__init__(config, inputs)
        self.shots = config.shots

    def class_similarities(self, similarities: Tensor, batch: EpisodeBatch) -> Tensor:
        """Largest similarity of a video or of all shots: (E, Q, S, T, U) to (E, Q, N)."""
        best = similarities.amax(dim=(-2, -1))
        if self.shots == "mean":
            return class_average(best, batch)
        return _over_shots(best[..., None], batch).squeeze(-1)


class ChamferHead(MatchingHead):
    """Every frame looks for its best match in the other video, or among all shots of the class."""

    def __init__(self, config: ChamferConfig, inputs: HeadInputs) -> None:
        """Build the head.

        Raises:
            ValueError: the cubes have fewer time steps than a tuple has members.
        """
        num_steps = inputs.cube_shape[1]
        if config.tuple_length is not None and config.tuple_length > num_steps:
            raise ValueError(
                f"head.tuple_length = {config.tuple_length}, but the cubes have {num_steps} time step(s); "
                f"1 to {num_steps} is allowed, or leave it out"
            )
        super().__init__(config, inputs, config.tuple_length or min(PUBLISHED_TUPLE_LENGTH, num_steps))
        self.shots, self.direction = config.shots, config.direction

    def class_similarities(self, similarities: Tensor, batch: EpisodeBatch) -> Tensor:
        """Mean of the best matches, of either side or both: (E, Q, S, T, U) to (E, Q, N)."""
        of_support = class_average(similarities.amax(dim=-2).mean(dim=-1), batch)
        if self.direction == "support":
            return of_support
        best = similarities.amax(dim=-1)  # (E, Q, S, T)
        by_class = _over_shots(best, batch) if self.shots == "joint" else class_average(best, batch)
        of_query = by_class.mean(dim=-1)
        return of_query if self.direction == "query" else (of_query + of_support) / 2.0


def _over_shots(best: Tensor, batch: EpisodeBatch) -> Tensor:
    """Largest over the shots of each class: (E, Q, S, T) to (E, Q, N, T)."""
    by_class = class_shots(batch).take(best.transpose(1, 2))  # (E, N, K, Q, T)
    # Absent shots repeat the first one, which leaves the largest as it is.
    return by_class.amax(dim=2).transpose(1, 2)
