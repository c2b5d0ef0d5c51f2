"""The MASTAF head on cubes of any size.

Paper: MASTAF: A Model-Agnostic Spatio-Temporal Attention Fusion Network for Few-shot Video Classification, 2021,
https://arxiv.org/abs/2112.04585. Code consulted: https://github.com/lxhit/STAF, commit 10c7d9a.
Deviations: any number of positions; batched over episodes with batch statistics of each; the attended cubes and the
relation maps are never built (exact identities); the global classifier is left out in evaluation, where the code
computes and discards it; whether the query's self map is normalised is said by the config, not by a shape.
"""

# E episodes, S supports, Q queries, N classes, Z global classes; C channels, T time steps, H W grid, L = THW positions

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOutput
from episodes.heads.mastaf_attention import (
    MetaLearner,
    Relation,
    RelationRule,
    UniformKernel,
    cross_relation,
    self_relation,
)
from episodes.heads.mastaf_config import MastafConfig
from episodes.heads.mastaf_scores import (
    SMALLEST_NORM,
    Branch,
    EpisodeCubes,
    average,
    fuse,
    pooled_cosine,
    position_cosine,
    prototype_direction,
    whole_cube_cosine,
)
from episodes.initial import make_linear
from episodes.losses import position_cross_entropy
from episodes.shots import at_least_float32, class_means

USES = ("self_support", "self_query", "cross_support", "cross_query")
"""The uses of the attention, in the order in which the released code updates its running statistics."""


class MastafHead(HeadModule):
    """Spatio-temporal self and cross attention, fused, with a global classifier trained along."""

    def __init__(self, config: MastafConfig, inputs: HeadInputs) -> None:
        """Build the head; where the config leaves `meta_bn_query` to the protocol, one query in all means no."""
        super().__init__()
        cube_shape, generator, num_classes = inputs.cube_shape, inputs.generator, inputs.num_classes
        self.config = config
        self.cube_shape = cube_shape
        self.grid = (1, *cube_shape[2:]) if config.average_time else cube_shape[1:]
        self.num_positions = math.prod(self.grid)
        wanted = config.meta_bn_query
        self.meta_bn_query = inputs.has_several_queries if wanted is None else wanted
        self.rule = RelationRule(config.kernel_reduce, config.tau)
        self.gain = float(self.num_positions) if config.attention_gain == "L" else config.attention_gain
        shared = config.share_cam and (config.self_attention or config.cross_attention)
        self.cam = self._make_cam(generator) if shared else None
        self.cam_self = self._make_cam(generator) if config.self_attention and not shared else None
        self.cam_cross = self._make_cam(generator) if config.cross_attention and not shared else None
        has_classifier = config.global_classifier and bool(num_classes)
        self.classifier = make_linear(cube_shape[0], num_classes or 0, None, generator) if has_classifier else None
        self.loss_weights = {"few_shot": config.lambda_few}
        if has_classifier:
            self.loss_weights["global"] = config.lambda_global
        elif config.lambda_few == 0.0:
            raise ValueError("lambda_few = 0 leaves no loss to train with, since there is no global classifier")

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W).
            with_maps: whether to hand back the attention, by use: (E, N, T, H, W) and (E, Q, T, H, W) for the self
                maps of support and query, (E, Q, N, T, H, W) for the cross maps; T is 1 where time is averaged.

        Returns:
            Logits (E, Q, N); "few_shot" losses where the batch has labels, "global" ones also in training.
        """
        # The softmax divides correlations by tau = 0.025: half precision would move the attention visibly.
        with torch.autocast(batch.query.device.type, enabled=False):
            cubes = self.cubes(batch)
            relations = self.relations(cubes)
            branches = self.branches(cubes, relations)
            logits = self.scores(cubes, branches, self.config.eval_similarity).squeeze(-1)
            losses = self._losses(batch, cubes, branches)
        if self.training:
            self._update_running_statistics(relations)
        return HeadOutput(logits, losses, self._maps(relations) if with_maps else {})

    def cubes(self, batch: EpisodeBatch) -> EpisodeCubes:
        """Prototypes (averages of the supports of each class) and queries, positions in one axis."""
        self.refuse_other_shape(batch)
        support, query = (self._positions(at_least_float32(cubes)) for cubes in (batch.support, batch.query))
        return EpisodeCubes(class_means(support, batch), query)

    def relations(self, cubes: EpisodeCubes) -> dict[str, Relation]:
        """The uses of the attention by name (`USES`), those of the branches that are on."""
        config, rule = self.config, self.rule
        support, query = cubes.prototypes, cubes.queries
        if config.normalize_corr:
            support, query = (F.normalize(features, dim=-2, eps=SMALLEST_NORM) for features in (support, query))
        always = config.meta_bn == "always"
        several = always or support.shape[1] > 1
        relations = {}
        if (cam := self.cam or self.cam_self) is not None and config.self_attention:
            relations["self_support"] = self_relation(support, cam, rule, normalize=several)
            relations["self_query"] = self_relation(query, cam, rule, normalize=always or self.meta_bn_query)
        if (cam := self.cam or self.cam_cross) is not None and config.cross_attention:
            relations["cross_support"] = cross_relation(support, query, cam, rule, normalize=several)
            relations["cross_query"] = cross_relation(query, support, cam, rule, normalize=several)
        return relations

    def branches(self, cubes: EpisodeCubes, relations: dict[str, Relation]) -> list[Branch]:
        """The cross branch, then the self branch, with the weights 1 + gA; one of ones where there is no attention."""
        weights = {use: self._weights(relation) for use, relation in relations.items()}
        branches = []
        if "cross_query" in weights:
            branches.append(Branch(1.0, weights["cross_query"], weights["cross_support"]))
        if "self_query" in weights:
            share = self.config.alpha if branches else 1.0
            branches.append(Branch(share, weights["self_query"][:, :, None], weights["self_support"][:, :, None]))
        if not branches:
            ones = (torch.ones_like(each[:, :, :1]) for each in (cubes.queries, cubes.prototypes))
            branches.append(Branch(1.0, *ones))
        return branches

    def scores(self, cubes: EpisodeCubes, branches: list[Branch], similarity: str) -> Tensor:
        """Fused scores (E, Q, N, L), or (E, Q, N, 1) where the similarity is of whole videos."""
        shares = [branch.share for branch in branches]
        fusion, scale = self.config.fusion, self.config.scale
        if similarity == "per_position":
            directions = [prototype_direction(cubes, branch) for branch in branches]
            if fusion == "logit_sum":
                # One product with the cubes for all branches: the weighted sum of cosines is linear in the directions.
                joined = fuse(directions, shares, fusion)
                return scale * position_cosine(cubes.queries, joined)
            return fuse([scale * position_cosine(cubes.queries, each) for each in directions], shares, fusion)
        compare = pooled_cosine if similarity == "pooled" else whole_cube_cosine
        return fuse([scale * compare(cubes, branch)[..., None] for branch in branches], shares, fusion)

    def global_logits(self, cubes: EpisodeCubes, branches: list[Branch], labels: Tensor) -> Tensor:
        """Logits of the global classifier.

        Args:
            cubes: prototypes and queries.
            branches: the branches; the first one decides the attention (cross, else self, else none).
            labels: true classes within the episode, (E, Q); used where the query is attended with its true class.

        Returns:
            (E, Q, Z, L) from the queries, (E, Q, N, Z, L) from the prototypes; L is 1 where positions are averaged.
        """
        if self.classifier is None:
            raise ValueError("this head has no global classifier")
        from_support = self.config.global_input == "support_cross"
        if from_support:
            inputs, weights = cubes.prototypes, branches[0].prototype_weights
        else:
            inputs, weights = cubes.queries, _of_true_class(branches[0].query_weights, labels)
        if self.config.global_pooling == "averaged":
            logits: Tensor = self.classifier(average(inputs, weights))[..., None]
        else:
            # A weight per position commutes with the linear layer, so that it is applied once per video.
            plain = self.classifier.weight @ inputs
            logits = weights[:, :, :, None] * plain[:, :, None] + self.classifier.bias[:, None]
        return logits.transpose(1, 2) if from_support else logits.squeeze(2)

    def _losses(self, batch: EpisodeBatch, cubes: EpisodeCubes, branches: list[Branch]) -> dict[str, Tensor]:
        if batch.query_labels is None:
            return {}
        scores = self.scores(cubes, branches, self.config.train_similarity)
        losses = {"few_shot": position_cross_entropy(scores, batch.query_labels)}
        if not self.training or self.classifier is None or batch.class_global_labels is None:
            return losses
        logits = self.global_logits(cubes, branches, batch.query_labels)
        if self.config.global_input == "support_cross":
            targets = batch.class_global_labels[:, None].expand(logits.shape[:3])
            losses["global"] = position_cross_entropy(logits, targets).mean(dim=-1)
        else:
            targets = batch.class_global_labels.gather(1, batch.query_labels)
            losses["global"] = position_cross_entropy(logits, targets)
        return losses

    def _positions(self, cubes: Tensor) -> Tensor:
        """Cubes (..., C, T, H, W) with their positions in one axis, (..., C, L)."""
        return cubes.mean(dim=-3).flatten(-2) if self.config.average_time else cubes.flatten(-3)

    def _weights(self, relation: Relation) -> Tensor:
        weights = self.gain * relation.attention
        return 1.0 + weights if self.config.residual else weights

    def _maps(self, relations: dict[str, Relation]) -> dict[str, Tensor]:
        maps = {use: _on_grid(relation.attention, self.grid) for use, relation in relations.items()}
        if "cross_support" in maps:
            maps["cross_support"] = maps["cross_support"].transpose(1, 2)
        return maps

    def _update_running_statistics(self, relations: dict[str, Relation]) -> None:
        kernels = {use: relations[use].kernel for use in USES if use in relations}
        if self.cam is not None:
            self.cam.update(list(kernels.values()))
        for cam, name in ((self.cam_self, "self"), (self.cam_cross, "cross")):
            if cam is not None:
                cam.update([kernel for use, kernel in kernels.items() if use.startswith(name)])

    def _make_cam(self, generator: torch.Generator | None) -> MetaLearner | UniformKernel:
        if not self.config.meta_learner:
            return UniformKernel()
        with_norm = self.config.meta_bn != "none"
        return MetaLearner(self.num_positions, self.config.hidden, with_norm=with_norm, generator=generator)


def _on_grid(attention: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return attention.reshape(*attention.shape[:-1], *grid)


def _of_true_class(query_weights: Tensor, labels: Tensor) -> Tensor:
    """The weights (E, Q, 1, L) of each query beside its true class, of (E, Q, N|1, L)."""
    if query_weights.shape[2] == 1:
        return query_weights
    index = labels[:, :, None, None].expand(-1, -1, 1, query_weights.shape[-1])
    return query_weights.gather(2, index)
