"""The hybrid relation module of HyRSM: frames see the other frames of their video, videos see the other videos.

Paper: Hybrid Relation Guided Set Matching for Few-shot Action Recognition (CVPR 2022), https://arxiv.org/abs/2204.13423.
Code consulted: https://github.com/alibaba-mmai-research/HyRSM, commit 3d88d37. As there, each query forms a group with the
supports and with nothing else, so that the module is inductive. Deviations: any number of supports, padding masked; the
layer on [frame, relation] is applied to its two halves (the same numbers); with one head the output projection stays; a
width that the heads do not divide is rounded down per head, as there.
"""

# E episodes, Q queries, V videos of a kind, M members of a group beside the query (supports or prototypes)
# C channels, T time steps; G tokens, A attention heads, D channels of a head

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.initial import make_linear
from episodes.noise import EpisodeNoise


@dataclass(frozen=True, slots=True)
class RelationRates:
    """Shares of elements set to zero in training."""

    position: float
    """Of frames with their position."""
    intra: float
    """Of what frames gain from their video."""
    attention: float
    """Of the attention between videos."""
    inter: float
    """Of what videos gain from their group."""


class HybridRelation(nn.Module):
    """Intra-relation of frames, inter-relation of videos, and the layer that joins both."""

    table: Tensor

    def __init__(
        self,
        channels: int,
        num_steps: int,
        heads: int,
        position: tuple[float, float],
        rates: RelationRates,
        generator: torch.Generator | None,
    ) -> None:
        """Build the module.

        Args:
            channels: width C of frames, at least `heads`.
            num_steps: time steps T of a video.
            heads: attention heads of both relations.
            position: A and B of frame sqrt(C / A) + B position.
            rates: dropout.
            generator: randomness of the first weights.
        """
        super().__init__()
        scale, weight = position
        self.frame_scale = math.sqrt(channels / scale)
        # In double precision until the module is cast, for float64 heads.
        self.register_buffer("table", weight * _position_table(num_steps, channels), persistent=False)
        self.rates = rates
        self.intra = IntraRelation(channels, heads, generator)
        self.inter = InterRelation(channels, heads, generator)
        self.join = make_linear(2 * channels, channels, None, generator)

    def within(self, frames: Tensor, noise: EpisodeNoise) -> Tensor:
        """Frames that have seen the others of their video: (E, V, T, C) to the same, zero or more."""
        placed = frames * self.frame_scale + self.table.to(frames.dtype)
        placed = noise.dropout(placed, self.rates.position, is_on=self.training)
        gained = noise.dropout(self.intra(placed), self.rates.intra, is_on=self.training)
        return F.relu(gained + placed)

    def between(self, query: Tensor, members: Tensor, is_present: Tensor, noise: EpisodeNoise) -> tuple[Tensor, Tensor]:
        """Frames that know what their group is about; a query's group is itself and the members.

        Args:
            query: frames, (E, Q, T, C).
            members: frames of supports or prototypes, (E, M, T, C).
            is_present: (E, M) bool, False for padding.
            noise: draws of dropout.

        Returns:
            Queries (E, Q, T, C) and the members as each query sees them, (E, Q, M, T, C).
        """
        relations = self.inter(
            query.mean(dim=2), members.mean(dim=2), is_present, self.rates, noise
        )  # (E, Q, M + 1, C)
        of_frame, of_relation = self.join.weight.chunk(2, dim=1)
        gained = F.linear(relations, of_relation, self.join.bias)
        new_query = F.linear(query, of_frame) + gained[:, :, -1, None]
        new_members = F.linear(members, of_frame)[:, None] + gained[:, :, :-1, None]
        return new_query, new_members


class IntraRelation(nn.Module):
    """Attention between the frames of a video, normalised before."""

    def __init__(self, channels: int, heads: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * (channels // heads)
        self.norm = nn.LayerNorm(channels)
        self.to_all = make_linear(channels, 3 * inner, None, generator, with_bias=False)
        self.to_out = make_linear(inner, channels, None, generator)

    def forward(self, frames: Tensor) -> Tensor:
        """What each frame gains: (..., T, C) to the same."""
        query, key, value = (_split(part, self.heads) for part in self.to_all(self.norm(frames)).chunk(3, dim=-1))
        gained: Tensor = self.to_out(_join(_attention(query, key) @ value))
        return gained


class InterRelation(nn.Module):
    """Attention between the videos of a group, normalised after."""

    def __init__(self, channels: int, heads: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.heads = heads
        size = channels // heads
        std = math.sqrt(2.0 / (channels + size))
        self.to_query, self.to_key, self.to_value = (
            make_linear(channels, heads * size, std, generator, with_bias=False) for _ in range(3)
        )
        self.to_out = make_linear(heads * size, channels, math.sqrt(2.0 / (heads * size + channels)), generator)
        self.norm = nn.LayerNorm(channels)

    def forward(
        self, query: Tensor, members: Tensor, is_present: Tensor, rates: RelationRates, noise: EpisodeNoise
    ) -> Tensor:
        """What each group is about, seen from each of its videos.

        Args:
            query: vectors, (E, Q, C).
            members: vectors, (E, M, C).
            is_present: (E, M) bool.
            rates: dropout.
            noise: draws of dropout.

        Returns:
            (E, Q, M + 1, C), zero or more; the query is the last of its group.
        """
        # The layers are applied once per video, not once per group.
        keys, values, queries = (
            _split(_groups(layer(query), layer(members)), self.heads)
            for layer in (self.to_key, self.to_value, self.to_query)
        )
        is_seen = F.pad(is_present, (0, 1), value=True)[:, None, None, None]
        attention = _attention(queries, keys, is_seen)  # (E, Q, A, M + 1, M + 1)
        attention = noise.dropout(attention, rates.attention, is_on=self.training)
        gained = noise.dropout(self.to_out(_join(attention @ values)), rates.inter, is_on=self.training)
        return F.relu(self.norm(gained + _groups(query, members)))


def _groups(query: Tensor, members: Tensor) -> Tensor:
    """Each query behind the members: (E, Q, C) and (E, M, C) to (E, Q, M + 1, C)."""
    return torch.cat([members[:, None].expand(-1, query.shape[1], -1, -1), query[:, :, None]], dim=2)


def _attention(query: Tensor, key: Tensor, is_seen: Tensor | None = None) -> Tensor:
    """Softmax of scaled products: (..., A, G, D) twice to (..., A, G, G)."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if is_seen is not None:
        scores = scores.masked_fill(~is_seen, -torch.inf)
    return scores.softmax(dim=-1)


def _split(tokens: Tensor, heads: int) -> Tensor:
    return tokens.reshape(*tokens.shape[:-1], heads, -1).transpose(-2, -3)  # (..., A, G, D)


def _join(tokens: Tensor) -> Tensor:
    return tokens.transpose(-2, -3).flatten(-2)  # (..., G, A D)


def _position_table(num_steps: int, channels: int) -> Tensor:
    """Position code (T, C) float64: sine in even, cosine in odd channels j, of t / 10000^(2 j / C) (the code's exponent,
    twice that of the Transformer)."""
    channel = torch.arange(channels, dtype=torch.float64)
    angles = torch.arange(num_steps, dtype=torch.float64)[:, None] / 10000.0 ** (2.0 * channel / channels)
    return torch.where(channel % 2 == 0, angles.sin(), angles.cos())
