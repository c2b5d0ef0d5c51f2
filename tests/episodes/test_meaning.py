"""What heads can see, on synthetic cubes whose best possible accuracy is known."""

# E episodes, Q queries, N classes; C channels, L positions

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contracts.clutter_episodes import clutter_episodes, peaking_mastaf, planted_attention
from contracts.meaning_episodes import (
    SIGHTS,
    VARIANTS,
    Sight,
    accuracy,
    appearance_episodes,
    build_trained,
    frames_shuffled,
    in_double_precision,
    order_episodes,
)
from episodes.build import HEADS
from episodes.head import HeadOutput
from episodes.heads.mastaf import MastafHead
from episodes.heads.mastaf_scores import average

EVERY_SIGHT = [pytest.param(name, sight, id=name) for name, sight in SIGHTS.items()]
EVERY_SIGHT += [pytest.param(name, sight, id=f"{name}-variant") for name, sight in VARIANTS]
CHANCE = 0.25
# Of 768 queries, hence 5 %: a head that guesses falls outside once in a thousand draws, and the draws are fixed.
DEVIATIONS = 3.3
CLUTTER = (256, 1, 4, 4)


def of_order(*kinds: str) -> list[object]:
    return [each for each in EVERY_SIGHT if isinstance(each.values[1], Sight) and each.values[1].order in kinds]


def test_every_head_says_what_it_sees() -> None:
    assert set(SIGHTS) == set(HEADS)
    assert all(sight.reason for sight in SIGHTS.values())


@pytest.mark.parametrize(("name", "sight"), of_order("solves"))
def test_heads_that_see_order_solve_classes_of_order_alone(name: str, sight: Sight) -> None:
    head = build_trained(name, sight, order_episodes)
    assert accuracy(head, order_episodes, sight.shape, 2).mean > 0.9


@pytest.mark.parametrize(("name", "sight"), of_order("blind"))
def test_heads_blind_to_order_stay_at_chance_after_training(name: str, sight: Sight) -> None:
    head = build_trained(name, sight, order_episodes)
    assert accuracy(head, order_episodes, sight.shape, 6).is_chance(CHANCE, DEVIATIONS)


@pytest.mark.parametrize(("name", "sight"), EVERY_SIGHT)
def test_shuffling_the_frames_changes_the_logits_of_heads_that_see_order_only(name: str, sight: Sight) -> None:
    head = build_trained(name, replace(sight, num_steps=0), order_episodes).double()
    batch = in_double_precision(order_episodes(7, sight.shape))
    with torch.no_grad():
        plain, shuffled = head(batch).logits, head(frames_shuffled(batch, 8)).logits
    assert torch.allclose(shuffled, plain, rtol=1e-9, atol=1e-9) != sight.sees_order


def test_nothing_but_order_tells_the_classes_of_order_apart() -> None:
    sight = SIGHTS["otam"]
    head = build_trained("otam", sight, order_episodes)
    found = accuracy(head, lambda seed, shape: frames_shuffled(order_episodes(seed, shape), seed), sight.shape, 6)
    assert found.is_chance(CHANCE, DEVIATIONS)


@pytest.mark.parametrize(("name", "sight"), EVERY_SIGHT)
def test_every_head_solves_classes_of_appearance(name: str, sight: Sight) -> None:
    head = build_trained(name, sight, appearance_episodes)
    assert accuracy(head, appearance_episodes, sight.shape, 2).mean > 0.9


@pytest.mark.parametrize("name", ["cross_query", "cross_support"])
def test_attention_with_hand_set_weights_peaks_at_the_planted_position(name: str) -> None:
    episodes = clutter_episodes(0, CLUTTER)
    attention = planted_attention(peaking_mastaf(CLUTTER)(episodes.batch, with_maps=True), episodes, name)
    assert attention.share_of_peaks >= 0.95
    assert attention.mass > 0.9


def test_the_planted_region_alone_tells_the_class() -> None:
    episodes = clutter_episodes(0, CLUTTER)
    labels = episodes.batch.query_labels
    assert labels is not None
    support, query = (
        cubes.flatten(3).gather(3, places[..., None, None].expand(*places.shape, CLUTTER[0], 1)).squeeze(3)
        for cubes, places in (
            (episodes.batch.support, episodes.support_position),
            (episodes.batch.query, episodes.query_position),
        )
    )
    nearest = (query @ support.transpose(1, 2)).argmax(dim=2)
    assert torch.equal(episodes.batch.support_labels.gather(1, nearest), labels)


def pooled_changes(head: MastafHead, seed: int) -> tuple[Tensor, Tensor]:
    """By how much attention moves the average of each query with each class, (E, Q, N), and the longest features."""
    cubes = head.cubes(clutter_episodes(seed, CLUTTER).batch)
    branch = head.branches(cubes, head.relations(cubes))[0]
    plain = cubes.queries.mean(dim=-1)[:, :, None]
    change = (average(cubes.queries, branch.query_weights) - plain).norm(dim=-1)
    return change, cubes.queries.norm(dim=2).amax(dim=-1)[..., None]


def test_published_weight_of_attention_moves_an_average_by_one_over_l_at_most() -> None:
    num_positions = math.prod(CLUTTER[1:])
    with torch.no_grad():
        change, longest = pooled_changes(peaking_mastaf(CLUTTER), 0)
    # One position of L, however sharp the attention: reference 1.8. The slack is single precision.
    assert (change <= longest / num_positions * (1.0 + 1e-4)).all()
    # Attention this sharp reaches the bound, up to the lengths of the features.
    assert change.mean() > 0.7 * longest.mean() / num_positions


def test_attention_gain_l_moves_an_average_by_a_whole_feature() -> None:
    with torch.no_grad():
        change, longest = pooled_changes(peaking_mastaf(CLUTTER, attention_gain="L"), 0)
    assert change.mean() > 0.7 * longest.mean()


def test_sharp_attention_helps_with_gain_l_and_hardly_with_the_published_weight() -> None:
    batch = clutter_episodes(0, CLUTTER).batch

    def right(head: MastafHead) -> float:
        output: HeadOutput = head(batch)
        assert batch.query_labels is not None
        return float(output.logits.argmax(dim=-1).eq(batch.query_labels).double().mean())

    published, gained = right(peaking_mastaf(CLUTTER)), right(peaking_mastaf(CLUTTER, attention_gain="L"))
    assert gained > 0.95
    assert gained > published
