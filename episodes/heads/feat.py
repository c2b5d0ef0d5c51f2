"""FEAT: the prototypes of an episode adapt to each other by self-attention.

Paper: Few-Shot Learning via Embedding Adaptation with Set-to-Set Functions, 2020, https://arxiv.org/abs/1812.03664.
Code consulted: https://github.com/Sha-Lab/FEAT, commit fa66901.
Deviations: images there, videos averaged over time and space here; batched over episodes; classes may have unequal
numbers of supports and queries; dropout draws from the episode's seed. The learning rate of the attention, ten times
that of the backbone there, is up to the training's options.
"""

# E episodes, S supports, Q queries, N classes, M = S + Q videos, A tokens that attend; C channels

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.heads.protonet import squared_distances
from episodes.initial import make_linear
from episodes.losses import query_cross_entropy
from episodes.noise import EpisodeNoise
from episodes.shots import class_means, video_vectors


class FeatOptions(HeadOptions):
    """Knobs of FEAT; defaults are the published command of its ResNet on one shot, the nearest to our cubes."""

    distance: Literal["euclidean", "cosine"] = "euclidean"
    """What compares a query with an adapted prototype: minus the squared distance, or the inner product with the unit
    prototype (the query keeps its length, as in the code: it changes the softmax, never the order of the classes)."""
    temperature: float = Field(default=64.0, gt=0.0)
    """Divides the logits (code: 64 in all published commands)."""
    balance: float = Field(default=0.01, ge=0.0)
    """Weight of the contrastive loss in training (code: 0.01 to 1, 0.01 for ResNet on one shot); 0 leaves it out."""
    temperature2: float = Field(default=64.0, gt=0.0)
    """Divides the logits of the contrastive loss (code: 16 to 64, 64 for ResNet on one shot)."""
    attention_dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the attention that is set to zero in training (code: 0.1)."""
    output_dropout: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Share of what the attention adds that is set to zero in training (code: 0.5)."""

    def without_effect(self) -> dict[str, str]:
        """The temperature of a loss that is not there."""
        return {"temperature2": "balance is 0"} if self.balance == 0.0 else {}


class FeatHead(HeadModule):
    """Scores by the distance to prototypes that have seen each other."""

    def __init__(self, config: FeatOptions, inputs: HeadInputs) -> None:
        super().__init__()
        self.config = config
        self.cube_shape = inputs.cube_shape
        self.attention = SetAttention(
            inputs.cube_shape[0], config.attention_dropout, config.output_dropout, inputs.generator
        )
        self.loss_weights = {"few_shot": 1.0}
        if config.balance > 0.0:
            self.loss_weights["contrast"] = config.balance

    # ARG002: every head takes `with_maps`; this one has nothing to show.
    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:  # noqa: ARG002
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W); in training with seeds, for the dropout.
            with_maps: without effect; there is nothing to see.

        Returns:
            Logits (E, Q, N); "few_shot" losses where the batch has labels; in training also "contrast", one value per
            episode that all its queries repeat (it is the mean over supports and queries).
        """
        self.refuse_other_shape(batch)
        with torch.autocast(batch.query.device.type, enabled=False):
            noise = EpisodeNoise(batch.seeds)
            support, query = video_vectors(batch.support), video_vectors(batch.query)
            prototypes = self.attention(class_means(support, batch), noise)
            logits = self.scores(query, prototypes, self.config.temperature)
            losses = {}
            if batch.query_labels is not None:
                losses["few_shot"] = query_cross_entropy(logits, batch.query_labels)
                if self.training and "contrast" in self.loss_weights:
                    labels = torch.cat([batch.support_labels, batch.query_labels], dim=1)
                    contrast = self.contrast(torch.cat([support, query], dim=1), labels, batch.n_way, noise)
                    losses["contrast"] = contrast[:, None].expand(batch.query_labels.shape)
        return HeadOutput(logits, losses)

    def scores(self, query: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
        """Logits (E, Q, N) of queries (E, Q, C) and prototypes (E, N, C)."""
        if self.config.distance == "cosine":
            return query @ F.normalize(prototypes, dim=-1).transpose(1, 2) / temperature
        return -squared_distances(query, prototypes) / temperature

    def contrast(self, videos: Tensor, labels: Tensor, n_way: int, noise: EpisodeNoise) -> Tensor:
        """How far each video is from the centre of its class, once the videos of a class have adapted to each other.

        Args:
            videos: supports and queries, (E, M, C).
            labels: (E, M) int64; -1 is padding.
            n_way: number of classes N.
            noise: the draws of each episode.

        Returns:
            Mean cross-entropy over the videos of each episode, (E,).
        """
        adapted = self.attention(videos, noise, labels[:, :, None] == labels[:, None, :])
        classes = torch.arange(n_way, device=labels.device)
        members = (labels[:, None] == classes[:, None]).to(videos.dtype)  # (E, N, M)
        centres = members / members.sum(dim=-1, keepdim=True) @ adapted
        logits = self.scores(videos, centres, self.config.temperature2)
        is_real = labels >= 0
        losses = query_cross_entropy(logits, labels.clamp(min=0)).masked_fill(~is_real, 0.0)
        return losses.sum(dim=1) / is_real.sum(dim=1)


class SetAttention(nn.Module):
    """One head of self-attention over a set, added to it and normalised."""

    def __init__(
        self,
        channels: int,
        attention_dropout: float,
        output_dropout: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.attention_dropout = attention_dropout
        self.output_dropout = output_dropout
        # Xavier's normal distribution of a square matrix, which is also what the code gives to the three projections.
        std = math.sqrt(2.0 / (channels + channels))
        self.query = make_linear(channels, channels, std, generator, with_bias=False)
        self.key = make_linear(channels, channels, std, generator, with_bias=False)
        self.value = make_linear(channels, channels, std, generator, with_bias=False)
        self.output = make_linear(channels, channels, std, generator)
        self.norm = nn.LayerNorm(channels)

    def weights(self, tokens: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attention (E, A, A) of each token on the others and itself, over those that `allowed` (E, A, A) bool names."""
        similarity = self.query(tokens) @ self.key(tokens).transpose(1, 2) / math.sqrt(tokens.shape[-1])
        if allowed is not None:
            similarity = similarity.masked_fill(~allowed, -math.inf)
        weights: Tensor = similarity.softmax(dim=-1)
        return weights

    def forward(self, tokens: Tensor, noise: EpisodeNoise, allowed: Tensor | None = None) -> Tensor:
        """Tokens (E, A, C), adapted to each other; `allowed` (E, A, A) says which may see which."""
        weights = noise.dropout(self.weights(tokens, allowed), self.attention_dropout, is_on=self.training)
        added = noise.dropout(self.output(weights @ self.value(tokens)), self.output_dropout, is_on=self.training)
        adapted: Tensor = self.norm(added + tokens)
        return adapted
