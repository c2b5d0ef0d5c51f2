"""Episodes whose classes have unequal shots, beside each other in one batch with padding."""

# E episodes, S supports, N classes, K shots; C channels, T time steps, H W grid

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from contracts.head_cases import make_batch
from episodes.batch import EpisodeBatch

PADDING = 1e3


def uneven_batch(**options: Any) -> EpisodeBatch:
    """Two episodes of three classes: 3, 2 and 1 shots beside 1, 3 and 3, padded with large numbers."""
    batch = make_batch(num_episodes=2, n_way=3, k_shot=3, **options)
    labels, support = batch.support_labels.clone(), batch.support.clone()
    for episode, shots in enumerate(([3, 2, 1], [1, 3, 3])):
        for label, count in enumerate(shots):
            dropped = (batch.support_labels[episode] == label).nonzero()[count:, 0]
            labels[episode, dropped] = -1
            support[episode, dropped] = PADDING
    return replace(batch, support=support, support_labels=labels)


@dataclass(frozen=True, slots=True)
class PlainEpisode:
    """One episode as averages, without padding, its supports sorted by video id: what a reference loop reads."""

    support: Tensor
    """(S, C)."""
    labels: Tensor
    """(S,) int64."""
    query: Tensor
    """(Q, C)."""
    query_labels: Tensor
    """(Q,) int64."""


def plain_episode(batch: EpisodeBatch, index: int) -> PlainEpisode:
    """One episode of a batch."""
    assert batch.support_order is not None
    assert batch.query_labels is not None
    order = batch.support_order[index].argsort()
    order = order[batch.support_labels[index, order] >= 0]
    support, query = (cubes[index].mean(dim=(-3, -2, -1)) for cubes in (batch.support, batch.query))
    return PlainEpisode(support[order], batch.support_labels[index, order], query, batch.query_labels[index])
