"""STRM: patches and frames are enriched before TRX compares tuples of frames.

Paper: Spatio-temporal Relation Modeling for Few-shot Action Recognition, CVPR 2022, https://arxiv.org/abs/2112.05132. Code
consulted: https://github.com/Anirudh257/strm, commit 54368fe.
Deviations: those of TRX (`trx.py`), whose head this one ends in; grids of any size are pooled to patches (smaller ones
repeat positions). The code forgets to register the auxiliary projections: they are random, never trained, never saved,
and their dropout stays on when testing. `aux_head = "trained"`, our default, trains them; "frozen_random" is as published but
for two things: the random projections are saved with the head (an unsaved draw could not be reproduced), and in
evaluation the queries of an episode share one dropout mask (a query would else depend on the others).
"""

# E episodes, S supports, Q queries, N classes; C channels, T time steps, H W grid; G patches along a side

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOutput
from episodes.heads.strm_auxiliary import NearestTuples
from episodes.heads.strm_enrichment import EnrichedPatches, FrameEnrichment, PatchEnrichment
from episodes.heads.trx import TupleOptions, TupleScores, make_transformers, mean_logits
from episodes.heads.tuples import EpisodeFrames
from episodes.losses import query_cross_entropy
from episodes.noise import EpisodeNoise
from episodes.shots import class_shots


class StrmConfig(TupleOptions):
    """Knobs of the STRM head: those of TRX, and its own. Defaults are those of the released code but for `aux_head`."""

    cardinalities: tuple[int, ...] = (2,)
    """Frames in a tuple, one transformer and one auxiliary projection for each number (code: pairs)."""
    patches: int = Field(default=4, ge=1)
    """Patches along each side of a frame (code: 4)."""
    aux_head: Literal["frozen_random", "trained"] = "trained"
    """The projections behind the similarity of patch-enriched frames: "trained", or "frozen_random" as the released code has
    them by mistake (random, never trained, with dropout in evaluation too)."""
    aux_weight: float = Field(default=0.1, ge=0.0)
    """Weight of that similarity, in the logits and in the loss (code: 0.1)."""

    def without_effect(self) -> dict[str, str]:
        """The kind of the auxiliary projections, where they weigh nothing."""
        return {"aux_head": "aux_weight = 0"} if self.aux_weight == 0.0 else {}


@dataclass(frozen=True, slots=True)
class StrmStages:
    """What each stage of the head gives."""

    support: EnrichedPatches
    """The supports after the patches."""
    query: EnrichedPatches
    """The queries after the patches."""
    frames: EpisodeFrames
    """All videos after the frames, (E, videos, T, C)."""
    auxiliary: list[Tensor]
    """Logits of the patch-enriched frames by cardinality, (E, Q, N)."""
    tuples: list[TupleScores]
    """What TRX says of the frame-enriched frames, by cardinality."""


class StrmHead(HeadModule):
    """Patch enrichment, frame enrichment, then tuples of frames."""

    def __init__(self, config: StrmConfig, inputs: HeadInputs) -> None:
        super().__init__()
        channels, num_steps = inputs.cube_shape[:2]
        self.config = config
        self.cube_shape = inputs.cube_shape
        self.loss_weights = {"few_shot": 1.0, "patch": config.aux_weight}
        self.transformers = make_transformers(config, inputs)
        self.patches = PatchEnrichment(channels, config.patches, config.dropout, inputs.generator)
        self.frames = FrameEnrichment(channels, num_steps, config.dropout, inputs.generator)
        self.auxiliary = nn.ModuleList(
            NearestTuples(
                inputs.cube_shape,
                cardinality,
                config.dropout,
                is_frozen=config.aux_head == "frozen_random",
                factored=config.factored,
                generator=inputs.generator,
            )
            for cardinality in config.cardinalities
        )

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W); with seeds in training, and with `aux_head =
                "frozen_random"` always, for dropout.
            with_maps: whether to hand back the best tuples and the attention that patches receive, (E, videos, T, G, G).

        Returns:
            Logits (E, Q, N); where the batch has labels, "few_shot" losses of the tuples and "patch" losses.
        """
        stages = self.stages(batch, with_maps)
        tuple_logits = mean_logits(each.logits for each in stages.tuples)
        patch_logits = mean_logits(stages.auxiliary)
        losses = {}
        if batch.query_labels is not None:
            losses["few_shot"] = query_cross_entropy(tuple_logits, batch.query_labels)
            losses["patch"] = query_cross_entropy(patch_logits, batch.query_labels)
        maps = {name: values for each in stages.tuples for name, values in each.maps.items()}
        if with_maps:
            maps |= {"patch_support": stages.support.received, "patch_query": stages.query.received}
        return HeadOutput(tuple_logits + self.config.aux_weight * patch_logits, losses, maps)

    def stages(self, batch: EpisodeBatch, with_maps: bool = False) -> StrmStages:
        """Every stage of one call."""
        self.refuse_other_shape(batch)
        shots, noise = class_shots(batch), EpisodeNoise(batch.seeds)
        support, query = (self.patches(cubes, noise) for cubes in (batch.support, batch.query))
        after_patches = EpisodeFrames(support.frames, query.frames)
        auxiliary = [nearest(after_patches, shots, batch.support_order, noise) for nearest in self.auxiliary]
        enriched = (self.frames(values, noise) for values in (after_patches.support, after_patches.query))
        frames = EpisodeFrames(*enriched)
        tuples = [transformer(frames, shots, noise, with_maps) for transformer in self.transformers]
        return StrmStages(support, query, frames, auxiliary, tuples)
