"""Which episodes make a step, in one process or in several."""

from __future__ import annotations

from typing import Any

import pytest

from configs.training import TrainingConfig
from pipeline.ranks import Ranks
from pipeline.step_plan import StepPlan


def plan(ranks: Ranks = Ranks(), first_episode: int = 0, **knobs: Any) -> StepPlan:  # noqa: B008  frozen
    return StepPlan(TrainingConfig(**knobs), ranks, first_episode)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("per_forward", [None, 1, 2])
def test_ranks_share_every_step_without_gap_or_repetition(world_size: int, per_forward: int | None) -> None:
    knobs: dict[str, Any] = {"episodes": 37, "episodes_per_step": 5, "episodes_per_forward": per_forward}
    plans = [plan(Ranks(rank, world_size), **knobs) for rank in range(world_size)]
    steps = list(plans[0].steps())
    assert [index for step in steps for index in step] == list(range(37))
    for step in steps:
        parts = [part for each in plans for part in each.parts_of(step)]
        assert [index for part in parts if part.is_counted for index in part.episodes] == list(step)
        assert {part.divisor for part in parts} == {len(step)}
        for each in plans:
            assert [part.is_last for part in each.parts_of(step)] == [False] * (len(each.parts_of(step)) - 1) + [True]


def test_a_rank_without_an_episode_keeps_the_others_company() -> None:
    last = plan(Ranks(0, 4), episodes=6, episodes_per_step=4).parts_of(range(4, 6))
    assert [(part.episodes, part.is_counted) for part in last] == [(range(4, 5), False)]


def test_a_resumed_run_has_the_steps_that_are_left() -> None:
    knobs: dict[str, Any] = {"episodes": 20, "episodes_per_step": 6, "published_first_step": True}
    whole = list(plan(**knobs).steps())
    for place, step in enumerate(whole):
        assert list(plan(first_episode=step.start, **knobs).steps()) == whole[place:]
        assert plan(**knobs).step_index(step) == place


def test_the_published_first_step_is_an_episode_short_and_divided_by_all() -> None:
    published = plan(episodes=12, episodes_per_step=4, published_first_step=True)
    assert list(published.steps()) == [range(3), range(3, 7), range(7, 11), range(11, 12)]
    assert [published.parts_of(step)[0].divisor for step in published.steps()] == [4, 4, 4, 1]


@pytest.mark.parametrize(
    ("knobs", "size"),
    [
        ({"mode": "end_to_end"}, 1),
        ({"mode": "end_to_end", "backbone_batchnorm": "synchronised"}, 8),
        ({"mode": "cached"}, 8),
        ({"mode": "classify"}, 8),
        ({"mode": "classify", "episodes_per_forward": 3, "backbone_batchnorm": "frozen"}, 3),
    ],
)
def test_how_many_episodes_pass_at_a_time_follows_the_mode(knobs: dict[str, Any], size: int) -> None:
    assert len(plan(episodes=16, episodes_per_step=8, **knobs).parts_of(range(8))[0].episodes) == size


def test_more_ranks_than_episodes_in_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="episodes_per_step = 2 cannot be shared by 3 ranks"):
        plan(Ranks(0, 3), episodes=4, episodes_per_step=2)
    synchronised: dict[str, Any] = {"backbone_batchnorm": "synchronised", "mode": "end_to_end", "episodes_per_step": 4}
    with pytest.raises(ValueError, match="makes a step of 1, fewer than 2 ranks"):
        plan(Ranks(0, 2), episodes=5, **synchronised)
    with pytest.raises(ValueError, match="makes a step of 3, fewer than 4 ranks"):
        plan(Ranks(0, 4), episodes=11, published_first_step=True, **synchronised)
    with pytest.raises(ValueError, match="makes a step of 1, fewer than 3 ranks"):
        plan(Ranks(0, 3), episodes=12, published_first_step=True, **synchronised)
    assert plan(Ranks(0, 3), episodes=11, published_first_step=True, **synchronised)
