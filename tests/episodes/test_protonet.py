"""The prototypical head beside plain loops, and its options."""

# E episodes, Q queries, N classes; C channels

import pytest
import torch

from contracts.head_cases import CUBE_SHAPE, HeadCase, make_batch, make_head
from contracts.uneven_episodes import plain_episode, uneven_batch
from episodes.build import build_head, head_config


def test_euclidean_scores_are_minus_squared_distances_to_class_means() -> None:
    batch = uneven_batch()
    output = make_head(HeadCase("protonet", {"temperature": 4.0})).eval()(batch)
    for index in range(2):
        episode = plain_episode(batch, index)
        for query, scores in zip(episode.query, output.logits[index], strict=True):
            for label, score in enumerate(scores):
                prototype = episode.support[episode.labels == label].mean(dim=0)
                torch.testing.assert_close(score, -(query - prototype).square().sum() / 4.0)


def test_cosine_scores_are_scaled_cosines_to_class_means() -> None:
    batch = uneven_batch()
    output = make_head(HeadCase("protonet", {"distance": "cosine", "scale": 3.0})).eval()(batch)
    for index in range(2):
        episode = plain_episode(batch, index)
        prototypes = torch.stack([episode.support[episode.labels == label].mean(dim=0) for label in range(3)])
        expected = torch.cosine_similarity(episode.query[:, None], prototypes[None], dim=-1)
        torch.testing.assert_close(output.logits[index], 3.0 * expected)


def test_whole_cubes_are_compared_number_by_number() -> None:
    batch = make_batch(k_shot=1, num_episodes=1)
    output = make_head(HeadCase("protonet", {"average": False})).eval()(batch)
    for query, scores in zip(batch.query[0], output.logits[0], strict=True):
        for label, score in enumerate(scores):
            prototype = batch.support[0][batch.support_labels[0] == label][0]
            torch.testing.assert_close(score, -(query - prototype).square().sum())


def test_distances_of_long_close_vectors_are_exact_in_single_precision() -> None:
    batch = make_batch(k_shot=1, num_episodes=1, dtype=torch.float32)
    far = 1000.0
    moved = make_head(HeadCase("protonet"), dtype=torch.float32)
    shifted = type(batch)(batch.support + far, batch.support_labels, batch.query + far, batch.query_labels, 3)
    # Averages near 1000 carry about 1e-4 in float32; a product of norms of 1e7 would carry whole numbers.
    torch.testing.assert_close(moved(shifted).logits, moved(batch).logits, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "unused"), [({"scale": 2.0}, "scale"), ({"distance": "cosine", "temperature": 2.0}, "temperature")]
)
def test_factor_of_the_other_distance_is_refused(options: dict[str, object], unused: str) -> None:
    with pytest.raises(ValueError, match=rf"{unused} = 2\.0 has no effect"):
        head_config("protonet", options)


def test_it_has_no_parameters() -> None:
    assert not build_head("protonet", {}, CUBE_SHAPE, None, True).state_dict()
