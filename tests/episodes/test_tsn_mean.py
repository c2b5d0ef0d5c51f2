"""TSN++ beside plain loops."""

# E episodes, Q queries, N classes; C channels

import pytest
import torch
from torch import Tensor

from contracts.head_cases import HeadCase, make_head
from contracts.uneven_episodes import plain_episode, uneven_batch


def similarity_of(query: Tensor, support: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return torch.cosine_similarity(query, support, dim=0)
    return -(query - support).square().sum()


@pytest.mark.parametrize("kind", ["cosine", "euclidean"])
def test_scores_are_the_mean_similarity_to_the_shots_of_a_class(kind: str) -> None:
    batch = uneven_batch()
    output = make_head(HeadCase("tsn_mean", {"similarity": kind, "scale": 2.0})).eval()(batch)
    for index in range(2):
        episode = plain_episode(batch, index)
        for query, scores in zip(episode.query, output.logits[index], strict=True):
            for label, score in enumerate(scores):
                shots = episode.support[episode.labels == label]
                expected = torch.stack([similarity_of(query, shot, kind) for shot in shots]).mean()
                torch.testing.assert_close(score, 2.0 * expected)


def test_it_is_not_the_similarity_to_the_mean_of_the_shots() -> None:
    batch = uneven_batch()
    prototypes = make_head(HeadCase("protonet", {"distance": "cosine", "scale": 1.0})).eval()(batch)
    shots = make_head(HeadCase("tsn_mean")).eval()(batch)
    # Episode 1 has one shot of class 0, where both are the same, and three of class 1.
    torch.testing.assert_close(shots.logits[1, :, 0], prototypes.logits[1, :, 0])
    assert (shots.logits[1, :, 1] - prototypes.logits[1, :, 1]).abs().max() > 1e-4
