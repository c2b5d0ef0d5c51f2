"""Cross-entropy at positions, and how the terms of a head become one number per episode."""

# E episodes, Q queries; K classes to choose from, L positions

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

QueryReduction = Literal["mean", "sum"]


def position_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at each position, averaged over the positions.

    Args:
        logits: (..., K, L); logarithms of probabilities serve as well, since they sum to one already.
        labels: the true class, (...) int64.

    Returns:
        (...) losses.
    """
    num_classes, num_positions = logits.shape[-2:]
    targets = labels.reshape(-1, 1).expand(-1, num_positions)
    per_position = F.cross_entropy(logits.reshape(-1, num_classes, num_positions), targets, reduction="none")
    return per_position.mean(dim=-1).reshape(labels.shape)


def query_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each query: logits (E, Q, N) and labels (E, Q) int64 to losses (E, Q)."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").reshape(labels.shape)


def combine(losses: Mapping[str, Tensor], weights: Mapping[str, float], query_reduction: QueryReduction) -> Tensor:
    """Weighted sum of the terms, reduced over the queries of each episode.

    Args:
        losses: terms by name, (E, Q) each.
        weights: weight of each term by name; a weight without a term is not an error (a head may leave a term out).
        query_reduction: "mean" or "sum" over queries. The published codes differ, and with the same learning rate the
            sum is a Q times larger step.

    Returns:
        One total per episode, (E,).
    """
    if query_reduction not in ("mean", "sum"):
        raise ValueError(f"query_reduction is {query_reduction!r}, but 'mean' or 'sum' is allowed")
    if not losses:
        raise ValueError("there is no loss term to combine: the head was called without query labels")
    unknown = sorted(set(losses) - set(weights))
    if unknown:
        raise ValueError(f"loss {unknown[0]!r} has no weight; weights are given for {sorted(weights)}")
    total = torch.stack([weights[name] * term for name, term in losses.items()]).sum(dim=0)
    return total.mean(dim=1) if query_reduction == "mean" else total.sum(dim=1)
