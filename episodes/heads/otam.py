"""OTAM: ordered temporal alignment of query and support frames.

Paper: Few-Shot Video Classification via Temporal Alignment, 2019, https://arxiv.org/abs/1906.11415. Its code was never
released; consulted: https://github.com/alibaba-mmai-research/HyRSM, commit 3d88d37, and
https://github.com/tobyperrett/few-shot-action-recognition ("the library"), commit 3687f3a, whose forms agree: the sum of
both directions, and 0.01 added to the product of the norms. An earlier commit of the library, 0b5b5b8 (the one read for
`pal.py` and `tsn_mean.py`), differs in three ways: it takes the mean of both directions, adds nothing to the norms, and in
the column after the last frame a path comes from the left only, so that it cannot wait there. `directions = "mean"`,
`eps = 0` give that version but for the column, which is not offered.

Deviations: all pairs at once, a stable logarithm, the mean of both directions and the hard minimum as options. The head has
no parameters (the library trains the backbone through it); `projection` adds the layer that
https://github.com/jbertrand89/matching_based_fsar trains in front of OTAM on frozen features.
"""

# E episodes, Q queries, S supports, N classes; C channels, T U time steps of query and support, H W grid

import torch
from pydantic import Field

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.heads.frame_matching import FrameTuples, class_average, frame_cosines
from episodes.heads.ordered_alignment import Directions, expected_alignment, two_way_distance
from episodes.losses import query_cross_entropy
from episodes.shots import frame_vectors


class OtamConfig(HeadOptions):
    """Knobs of OTAM. Defaults are those of HyRSM's repository and of the library's commit 3687f3a."""

    directions: Directions = "sum"
    """How the alignment of the query to the support and that of the support to the query are joined (code: sum;
    the library's earlier commit 0b5b5b8: mean)."""
    eps: float = Field(default=0.01, ge=0.0)
    """Added to the product of the norms in the cosine (code: 0.01; the library's earlier commit 0b5b5b8: none)."""
    smoothing: float = Field(default=0.1, ge=0.0)
    """Smoothing of the minimum over paths, in units of distance (paper and code: 0.1); 0 is the hard minimum."""
    projection: int = Field(default=0, ge=0)
    """Width of a linear layer with layer normalisation in front of the matching; 0: none (library). On a cache, where
    the backbone is frozen, it is what there is to train (matching_based_fsar: 1152)."""


class OtamHead(HeadModule):
    """Scores are minus the mean alignment distance to the supports of each class."""

    def __init__(self, config: OtamConfig, inputs: HeadInputs) -> None:
        """Build the head."""
        super().__init__()
        self.config = config
        self.cube_shape = inputs.cube_shape
        channels, num_steps = inputs.cube_shape[:2]
        self.frames = FrameTuples(channels, num_steps, 1, config.projection, inputs.generator)
        self.loss_weights = {"few_shot": 1.0}

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W); frames are averages over their grids.
            with_maps: whether to hand back "alignment" (E, Q, S, T, U), the pairs of frames on the path: averaged over
                both directions, whatever `directions` says.

        Returns:
            Logits (E, Q, N) float32 or wider; "few_shot" losses where the batch has labels.
        """
        self.refuse_other_shape(batch)
        # The smooth minimum divides differences of distances by 0.1: half precision would move them visibly.
        with torch.autocast(batch.query.device.type, enabled=False):
            query, support = (self.frames(frame_vectors(cubes)) for cubes in (batch.query, batch.support))
            distances = 1.0 - frame_cosines(query, support, self.config.eps)  # (E, Q, S, T, U)
            pairs = two_way_distance(distances, self.config.smoothing, self.config.directions)
            logits = -class_average(pairs, batch)
            labels = batch.query_labels
            losses = {} if labels is None else {"few_shot": query_cross_entropy(logits, labels)}
            maps = {"alignment": expected_alignment(distances, self.config.smoothing)} if with_maps else {}
        return HeadOutput(logits, losses, maps)
