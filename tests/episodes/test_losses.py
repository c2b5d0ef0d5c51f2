"""Losses at positions, and their combination per episode."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from episodes.losses import combine, position_cross_entropy


def test_position_cross_entropy_is_the_mean_over_positions() -> None:
    logits = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([[0, 4, 2], [1, 1, 3]])
    found = position_cross_entropy(logits, labels)
    for episode in range(2):
        for query in range(3):
            terms = [F.cross_entropy(logits[episode, query, :, i], labels[episode, query]) for i in range(4)]
            torch.testing.assert_close(found[episode, query], torch.stack(terms).mean())


def test_log_probabilities_serve_as_logits() -> None:
    probabilities = torch.tensor([[[0.2], [0.5], [0.3]]])
    found = position_cross_entropy(probabilities.log(), torch.tensor([1]))
    torch.testing.assert_close(found, -torch.tensor([0.5]).log())


def test_combination_weighs_terms_and_reduces_queries_per_episode() -> None:
    losses = {"few_shot": torch.tensor([[1.0, 3.0], [5.0, 7.0]]), "global": torch.tensor([[2.0, 4.0], [0.0, 2.0]])}
    weights = {"few_shot": 0.5, "global": 2.0}
    assert combine(losses, weights, "mean").tolist() == [7.0, 5.0]
    assert combine(losses, weights, "sum").tolist() == [14.0, 10.0]


def test_a_weight_without_its_term_is_left_out() -> None:
    assert combine({"few_shot": torch.ones(1, 2)}, {"few_shot": 1.0, "global": 2.0}, "mean").tolist() == [1.0]


@pytest.mark.parametrize(
    ("losses", "reduction", "message"),
    [
        ({"other": torch.ones(1, 2)}, "mean", "'other' has no weight"),
        ({}, "mean", "without query labels"),
        ({"few_shot": torch.ones(1, 2)}, "max", "query_reduction is 'max'"),
    ],
)
def test_what_cannot_be_combined_is_refused(losses: dict[str, torch.Tensor], reduction: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(losses, {"few_shot": 1.0}, reduction)
