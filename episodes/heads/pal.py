"""PAL: supports and queries attend to the supports; prototypes are contrasted with the queries.

Paper: Few-Shot Action Recognition with Prototype-centered Attentive Learning, 2021, https://arxiv.org/abs/2101.08085.
Code consulted: https://github.com/tobyperrett/few-shot-action-recognition, commit 0b5b5b8, whose authors note results
about two percent below the paper's.
Deviations: batched over episodes; the contrast is averaged over the classes that have a query, where the code would
take the logarithm of zero for the others, and is part of the loss in training only. The backbone's pre-training by
classification is up to the training.
"""

# E episodes, S supports, Q queries, N classes, A videos that attend; C channels

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.initial import make_linear
from episodes.losses import query_cross_entropy
from episodes.shots import class_means, video_vectors


class PalOptions(HeadOptions):
    """Knobs of PAL; defaults are those of the code consulted."""

    norm_epsilon: float = Field(default=0.01, ge=0.0)
    """Added to the product of the norms in the cosine."""
    contrast_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the prototype-centred contrast beside the cross-entropy; 0 leaves it out."""
    contrast_epsilon: float = Field(default=0.1, ge=0.0)
    """Added to the sum over all queries that the contrast divides by."""

    def without_effect(self) -> dict[str, str]:
        """The constant of a loss that is not there."""
        return {"contrast_epsilon": "contrast_weight is 0"} if self.contrast_weight == 0.0 else {}


class PalHead(HeadModule):
    """Scores by the cosine to prototypes, after one attention on the supports that supports and queries share."""

    def __init__(self, config: PalOptions, inputs: HeadInputs) -> None:
        super().__init__()
        self.config = config
        self.cube_shape = inputs.cube_shape
        self.attention = SupportAttention(inputs.cube_shape[0], inputs.generator)
        self.loss_weights = {"few_shot": 1.0}
        if config.contrast_weight > 0.0:
            self.loss_weights["contrast"] = config.contrast_weight

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W).
            with_maps: whether to hand back the attention of each query on the supports, "support_weights" (E, Q, S).

        Returns:
            Logits (E, Q, N); "few_shot" losses where the batch has labels; in training also "contrast", one value per
            episode that all its queries repeat, so that their mean is the published loss.
        """
        self.refuse_other_shape(batch)
        with torch.autocast(batch.query.device.type, enabled=False):
            support, query = video_vectors(batch.support), video_vectors(batch.query)
            is_real = batch.support_labels >= 0
            support = support + self.attention.read(self.attention.weights(support, support, is_real), support)
            weights = self.attention.weights(query, support, is_real)
            query = query + self.attention.read(weights, support)
            logits = self.scores(query, class_means(support, batch))
            losses = {}
            if batch.query_labels is not None:
                losses["few_shot"] = query_cross_entropy(logits, batch.query_labels)
                if self.training and "contrast" in self.loss_weights:
                    contrast = prototype_contrast(logits, batch.query_labels, self.config.contrast_epsilon)
                    losses["contrast"] = contrast[:, None].expand(batch.query_labels.shape)
        return HeadOutput(logits, losses, {"support_weights": weights} if with_maps else {})

    def scores(self, query: Tensor, prototypes: Tensor) -> Tensor:
        """Cosines (E, Q, N) of queries (E, Q, C) and prototypes (E, N, C), a constant added to the product of norms."""
        query_norms, prototype_norms = (torch.linalg.vector_norm(each, dim=-1) for each in (query, prototypes))
        norms = query_norms[:, :, None] * prototype_norms[:, None]
        cosines: Tensor = query @ prototypes.transpose(1, 2) / (norms + self.config.norm_epsilon)
        return cosines


def prototype_contrast(logits: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Minus the logarithm of the share of a prototype's similarity that its own queries have, averaged over classes.

    Args:
        logits: similarities, (E, Q, N).
        labels: (E, Q) int64.
        epsilon: added to the sum over all queries.

    Returns:
        (E,), the mean over the classes that have a query.
    """
    similarity = logits.sigmoid()
    is_own = labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)  # (E, Q, N)
    has_query = is_own.any(dim=1)
    own = torch.where(is_own, similarity, 0.0).sum(dim=1)
    # One instead of the zero of a class without queries, whose logarithm would make its gradient not a number.
    shares = torch.where(has_query, own, 1.0) / (similarity.sum(dim=1) + epsilon)
    return -torch.where(has_query, shares.log(), 0.0).sum(dim=1) / has_query.sum(dim=1)


class SupportAttention(nn.Module):
    """One head of attention on the supports, as torch's `nn.MultiheadAttention` defines and initialises it."""

    def __init__(self, channels: int, generator: torch.Generator | None) -> None:
        super().__init__()
        # Xavier's uniform distribution of the three projections as one matrix; uniform within 1/sqrt(C) for the output.
        together = math.sqrt(6.0 / (channels + 3 * channels))
        self.query = _projection(channels, together, generator)
        self.key = _projection(channels, together, generator)
        self.value = _projection(channels, together, generator)
        self.output = _projection(channels, 1.0 / math.sqrt(channels), generator)

    def weights(self, videos: Tensor, support: Tensor, is_real: Tensor) -> Tensor:
        """Attention (E, A, S) of videos (E, A, C) on supports (E, S, C); none on padding (`is_real` (E, S) is False)."""
        similarity = self.query(videos) @ self.key(support).transpose(1, 2) / math.sqrt(support.shape[-1])
        weights: Tensor = similarity.masked_fill(~is_real[:, None], -math.inf).softmax(dim=-1)
        return weights

    def read(self, weights: Tensor, support: Tensor) -> Tensor:
        """What the attention (E, A, S) takes from the supports (E, S, C): (E, A, C)."""
        read: Tensor = self.output(weights @ self.value(support))
        return read


def _projection(channels: int, bound: float, generator: torch.Generator | None) -> nn.Linear:
    layer = make_linear(channels, channels, None, generator)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.zero_()
    return layer
