"""The ARN head: second-order pooling under spatial attention, and a relation network on pairs of matrices.

Paper: Few-shot Action Recognition with Permutation-invariant Attention, 2020, https://arxiv.org/abs/2001.03905. Code
consulted: https://github.com/HongguangZhang/arn-eccv20-master, commit c682474: networks, their first weights and the
evaluation are released, the training is not.

As released: spatial attention and features * (1 + attention); S = F F^T / n, divided by its trace; power normalisation
2 sigmoid(100 x) - 1; prototypes as means of the shots' matrices; the relation network; batch normalisation with
momentum 1, supports before queries; the prediction is the class with the highest relation.

Interpretation: the training loss (squared error of the sigmoid scores, as in relation networks, or cross-entropy).
Deviations: the encoder is whatever made the cubes, with a 1x1x1 convolution down to 64 channels in its place and no
ReLU after it; time is halved twice as published where there are time steps to halve, and a video that still has
several counts the highest weight of each place; batch statistics of one episode and without padding; logits are the
relation before the sigmoid (the same order, without ties where it saturates). Self-supervision (jigsaw, rotation) and the
alignment of attention need permuted clips, which a cube is not, and are left out; their weights are zero by default in
the released code.
"""

# E episodes, S supports, Q queries, N classes; C channels, U channels after projection, T time steps, H W grid

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.heads.arn_network import NUM_POOLS, Moments, RelationNetwork, SpatialAttention, make_conv, over_samples
from episodes.losses import query_cross_entropy
from episodes.shots import at_least_float32, class_means

SMALLEST_TRACE = 1e-12


class ArnConfig(HeadOptions):
    """Knobs of the ARN head."""

    channels: int = Field(default=64, ge=2**NUM_POOLS)
    """Channels U that a cube is projected to; matrices are U x U (code: 64). At least 16: the relation network halves
    them four times."""
    attention: bool = True
    """Whether places are weighted by 1 + attention (code: yes)."""
    power: float = Field(default=100.0, gt=0.0)
    """Slope of the power normalisation (code: 100)."""
    hidden: int = Field(default=8, ge=1)
    """Hidden units of the relation network (code: 8)."""
    norm_momentum: float = Field(default=1.0, gt=0.0, le=1.0)
    """Momentum of the running statistics; 1 keeps those of the last training episode alone (code: 1)."""
    loss: Literal["squared", "cross_entropy"] = "squared"
    """The few-shot loss: mean over the classes of the squared error of the sigmoid scores, or cross-entropy of the
    scores before the sigmoid. Ours: the training is not released."""


class ArnHead(HeadModule):
    """Second-order pooling and a relation network."""

    def __init__(self, config: ArnConfig, inputs: HeadInputs) -> None:
        """Build the head."""
        super().__init__()
        self.config = config
        self.cube_shape = inputs.cube_shape
        self.loss_weights = {"few_shot": 1.0}
        generator, momentum = inputs.generator, config.norm_momentum
        self.project = make_conv(torch.nn.Conv3d, inputs.cube_shape[0], config.channels, 1, generator)
        self.attention = SpatialAttention(config.channels, momentum, generator) if config.attention else None
        self.relation = RelationNetwork(config.channels, config.hidden, momentum, generator)

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W).
            with_maps: whether to hand back the spatial attention of supports and queries, (E, S, 1, H, W) and
                (E, Q, 1, H, W).

        Returns:
            Logits (E, Q, N), before the sigmoid; "few_shot" losses where the batch has labels.
        """
        self.refuse_other_shape(batch)
        support, query = (over_samples(self.project, at_least_float32(each)) for each in (batch.support, batch.query))
        weights: dict[str, Tensor] = {}
        if self.attention is not None:
            is_real = batch.support_labels >= 0
            weights["patch_support"], support_use = self.attention(support, None if bool(is_real.all()) else is_real)
            weights["patch_query"], query_use = self.attention(query, None)
            if self.training:
                self.attention.update([support_use, query_use])
            support, query = support * (1.0 + weights["patch_support"]), query * (1.0 + weights["patch_query"])
        with torch.autocast(batch.query.device.type, enabled=False):
            prototypes = class_means(self.second_order(support), batch)
            matrices = self.second_order(query)
        logits, relation_use = self.relate(prototypes, matrices)
        if self.training:
            self.relation.update([relation_use])
        maps = {name: each[:, :, 0] for name, each in weights.items()} if with_maps else {}
        return HeadOutput(logits, self._losses(batch, logits), maps)

    def second_order(self, features: Tensor) -> Tensor:
        """Power-normalised second-order matrices (E, M, U, U) of features (E, M, U, T, H, W)."""
        flat = features.flatten(3)
        matrices = flat @ flat.transpose(-1, -2) / flat.shape[-1]
        trace = matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp_min(SMALLEST_TRACE)
        return 2.0 * torch.sigmoid(self.config.power * matrices / trace[..., None, None]) - 1.0

    def relate(self, prototypes: Tensor, matrices: Tensor) -> tuple[Tensor, Moments]:
        """Relation (E, Q, N) before the sigmoid of every query matrix to every prototype, (E, Q, U, U), (E, N, U, U)."""
        (num_queries, size), n_way = matrices.shape[1:3], prototypes.shape[1]
        shape = (-1, num_queries, n_way, size, size)
        images = torch.stack([prototypes[:, None].expand(shape), matrices[:, :, None].expand(shape)], dim=3)
        relation, moments = self.relation(images.flatten(1, 2))
        return relation.reshape(-1, num_queries, n_way), moments

    def _losses(self, batch: EpisodeBatch, logits: Tensor) -> dict[str, Tensor]:
        if batch.query_labels is None:
            return {}
        if self.config.loss == "cross_entropy":
            return {"few_shot": query_cross_entropy(logits, batch.query_labels)}
        targets = F.one_hot(batch.query_labels, batch.n_way).to(logits.dtype)
        return {"few_shot": (torch.sigmoid(logits) - targets).square().mean(dim=-1)}
