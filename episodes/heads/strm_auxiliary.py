"""The query-class similarity of STRM: each query tuple and the nearest tuple of a class.

Paper and code: see `strm.py`.
"""

# E episodes, S supports, Q queries, N classes, K shots; C channels, T time steps; P tuples, D width

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from episodes.heads.tuples import EpisodeFrames, frame_tuples, project_tuples, query_slices
from episodes.initial import make_linear
from episodes.noise import EpisodeNoise
from episodes.shots import ClassShots

# Squared distances below this count as this: the root's slope is infinite at zero.
SMALLEST_SQUARE = 1e-24


class FixedLinear(nn.Module):
    """A linear map that is saved but never trained."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach())
        self.register_buffer("bias", layer.bias.detach())


class NearestTuples(nn.Module):
    """Minus the Euclidean distance from the mapped tuples of a query to the nearest ones of each class, averaged."""

    projection: nn.Linear | FixedLinear
    tuples: Tensor

    def __init__(
        self,
        cube_shape: tuple[int, int, int, int],
        cardinality: int,
        dropout: float,
        is_frozen: bool,
        factored: bool,
        generator: torch.Generator | None,
    ) -> None:
        """Make the map to half the channels; `is_frozen`: it stays as drawn, and its dropout never ends."""
        super().__init__()
        channels, num_steps = cube_shape[:2]
        self.dropout = dropout
        self.is_frozen = is_frozen
        self.factored = factored
        layer = make_linear(cardinality * channels, max(1, channels // 2), None, generator)
        self.projection = FixedLinear(layer) if is_frozen else layer
        self.register_buffer("tuples", frame_tuples(num_steps, cardinality), persistent=False)

    def forward(
        self, frames: EpisodeFrames, shots: ClassShots, support_order: Tensor | None, noise: EpisodeNoise
    ) -> Tensor:
        """Score queries.

        Args:
            frames: vectors of all frames.
            shots: where the supports of each class are.
            support_order: (E, S) int64 or None, the place of each support by video id (`EpisodeBatch.support_order`).
            noise: the episode's dropout.

        Returns:
            Logits (E, Q, N).
        """
        dropped = self._with_dropout(frames, support_order, noise)
        support, query = (
            F.relu(
                project_tuples(values, self.projection.weight, self.projection.bias, self.tuples, self.factored)
            )  # (E, V, P, D)
            for values in (dropped.support, dropped.query)
        )
        with torch.autocast(query.device.type, enabled=False):
            is_present = shots.is_present.repeat_interleave(len(self.tuples), dim=-1)  # (E, N, K P)
            return -_nearest_distances(query, shots.take(support).flatten(2, 3), is_present).mean(dim=-1)

    def _with_dropout(self, frames: EpisodeFrames, support_order: Tensor | None, noise: EpisodeNoise) -> EpisodeFrames:
        if self.training or not self.is_frozen or self.dropout == 0.0:
            support, query = (
                noise.dropout(values, self.dropout, is_on=self.training) for values in (frames.support, frames.query)
            )
            return EpisodeFrames(support, query)
        # Dropout in evaluation: all queries of an episode share one mask and each support has the one of its place by
        # video id, so that neither the other queries nor the order of supports nor padding changes a score.
        own = own_stream(noise)
        query_mask = own.dropout(torch.ones_like(frames.query[:, :1]), self.dropout, is_on=True)
        support_mask = own.dropout(torch.ones_like(frames.support), self.dropout, is_on=True)
        if support_order is not None:
            rank = support_order.argsort(dim=1).argsort(dim=1)[:, :, None, None]
            support_mask = support_mask.gather(1, rank.expand_as(support_mask))
        return EpisodeFrames(frames.support * support_mask, frames.query * query_mask)


def own_stream(noise: EpisodeNoise) -> EpisodeNoise:
    """A new stream for each episode, seeded by the next two numbers of its stream.

    Masks of one cardinality are drawn from it: their number grows with the supports, and taken from the common stream they
    would move those of the next cardinality on, with padding another way than without.
    """
    high, low = (noise.uniform((2,)) * 2.0**24).long().unbind(dim=1)  # 24 bits each, which float32 holds exactly
    return EpisodeNoise((high << 24) + low)


def _nearest_distances(query: Tensor, classes: Tensor, is_present: Tensor) -> Tensor:
    """Euclidean distance to the nearest tuple of each class.

    The nearest one is found by the products |b|^2 - 2ab without gradient; the distance itself is taken from the difference,
    which loses no digits where the two are close.

    Args:
        query: (E, Q, P, D).
        classes: (E, N, K P, D).
        is_present: (E, N, K P) bool.

    Returns:
        (E, Q, N, P).
    """
    (num_episodes, num_queries, num_tuples, width), n_way = query.shape, classes.shape[1]
    energy = classes.detach().square().sum(dim=-1).masked_fill(~is_present, torch.inf)  # (E, N, K P)
    parts = []
    for part in query_slices(num_queries, num_episodes * n_way * num_tuples * max(width, classes.shape[2])):
        vectors = query[:, None, part].flatten(2, 3)  # (E, 1, q P, D)
        products = vectors.detach() @ classes.detach().transpose(-1, -2)  # (E, N, q P, K P)
        nearest = (energy[:, :, None] - 2.0 * products).argmin(dim=-1)
        found = classes.gather(2, nearest[..., None].expand(-1, -1, -1, width))  # (E, N, q P, D)
        distances = (vectors - found).square().sum(dim=-1).clamp_min(SMALLEST_SQUARE).sqrt()
        parts.append(distances.reshape(num_episodes, n_way, -1, num_tuples).transpose(1, 2))
    return torch.cat(parts, dim=1)
