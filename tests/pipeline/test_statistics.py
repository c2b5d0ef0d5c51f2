"""Intervals hold the truth as often as they say, and small cases come out as worked by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from contracts.simulated_episodes import (
    CLASS_KINDS,
    NEAR_DUPLICATES,
    ClassWorld,
    cover_classes,
    cover_fixed_universe,
    cover_seeds,
    rejections,
)
from pipeline.statistics import (
    Interval,
    adjusted_p_values,
    class_interval,
    difference_over_seeds,
    mean_over_seeds,
    paired_difference,
    paired_values,
    share_interval,
)
from pipeline.student import quantile95, two_sided_p_value

REPLICATIONS = 300
# Three standard errors of a share of 95 % among the replications: 1 in 400 seeds would fall outside, and ours is fixed.
MARGIN = 3 * (0.95 * 0.05 / REPLICATIONS) ** 0.5


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (1, 1), (0, 6), (1, 6), (3, 6), (6, 6), (49, 60), (999, 1000)])
def test_share_interval_ends_where_the_share_is_a_normal_quantile_away(hits: int, trials: int) -> None:
    found = share_interval(hits, trials)
    share = hits / trials
    assert 0 <= found.low <= share <= found.high <= 1
    for end, is_closed in ((found.low, hits == 0), (found.high, hits == trials)):
        if is_closed:
            assert end == share
        else:
            assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / trials))


def test_share_interval_of_a_few_holds_the_truth_where_the_normal_one_is_of_no_width() -> None:
    assert share_interval(0, 6).high == pytest.approx(0.390, abs=5e-4)
    trials, truths = 12, np.linspace(0.01, 0.99, 99)
    ends = [share_interval(hits, trials) for hits in range(trials + 1)]
    covered = [
        sum(
            math.comb(trials, hits) * p**hits * (1 - p) ** (trials - hits)
            for hits, end in enumerate(ends)
            if end.low <= p <= end.high
        )
        for p in truths
    ]
    assert float(np.mean(covered)) == pytest.approx(0.95, abs=0.01)
    assert min(covered) > 0.83


def integrated_p_value(t: float, degrees: float) -> float:
    """The two tails of Student's density by the midpoint rule, in the angle whose tangent is t over the root of the degrees."""
    angles = (np.arange(200_000) + 0.5) / 200_000 * (math.pi / 2)
    # With x = sqrt(degrees) tan(angle), the density times dx is proportional to cos(angle) ** (degrees - 1).
    weights = np.cos(angles) ** (degrees - 1)
    return float(weights[angles > math.atan(t / math.sqrt(degrees))].sum() / weights.sum())


@pytest.mark.parametrize("degrees", [1, 2, 2.5, 9, 37.3, 1999])
def test_p_values_are_the_tails_of_students_density(degrees: float) -> None:
    for t in (0.0, 0.3, 1.0, 1.96, 3.5, 8.0):
        # The midpoint rule is off by at most one cell at the boundary.
        assert two_sided_p_value(t, degrees) == pytest.approx(integrated_p_value(t, degrees), abs=2e-4)
        assert two_sided_p_value(-t, degrees) == two_sided_p_value(t, degrees)


def test_quantiles_are_those_of_the_tables() -> None:
    # Any table of Student's distribution, two-sided 5 %.
    for degrees, value in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (math.inf, 1.960)):
        assert quantile95(degrees) == pytest.approx(value, abs=5e-4)
        assert two_sided_p_value(quantile95(degrees), degrees) == pytest.approx(0.05, rel=1e-9)


def test_p_values_stay_above_zero_far_out_and_degrees_must_be_positive() -> None:
    # With one degree of freedom the tail is 1 - 2/pi atan(t), near 2 / (pi t).
    assert two_sided_p_value(1e8, 1) == pytest.approx(2 / (math.pi * 1e8), rel=1e-9)
    assert 0.0 < two_sided_p_value(30.0, 10_000) < 1e-180
    assert two_sided_p_value(math.inf, 3) == 0.0
    with pytest.raises(ValueError, match="degrees of freedom"):
        two_sided_p_value(1.0, 0)


def test_paired_difference_is_the_paired_t_test() -> None:
    # Differences 0.2, 0, 0.2, 0.4: mean 0.2, sample variance 0.08 / 3, t = 0.2 / sqrt(0.08 / 12) with 3 degrees.
    found = paired_difference([0.4, 0.8, 0.6, 1.0], [0.2, 0.8, 0.4, 0.6])
    assert found.p_value is not None
    error = (0.08 / 12) ** 0.5
    assert found.mean == pytest.approx(0.2)
    assert found.interval95 == pytest.approx(quantile95(3) * error)
    assert found.p_value == pytest.approx(two_sided_p_value(0.2 / error, 3))
    # The unpaired error is that of two means, variances 0.2 / 3 (of 0.4, 0.8, 0.6, 1.0) and 0.2 / 3, each over 4.
    assert found.unpaired_interval95 == pytest.approx(quantile95(6) * (2 * 0.2 / 12) ** 0.5)
    assert found.interval95 < found.unpaired_interval95
    back = paired_difference([0.2, 0.8, 0.4, 0.6], [0.4, 0.8, 0.6, 1.0])
    assert (back.mean, back.interval95, back.p_value) == (-found.mean, found.interval95, found.p_value)


def test_equal_scores_differ_by_exactly_nothing() -> None:
    scores = [0.1, 0.7, 1 / 3, 0.9]
    found = paired_difference(scores, scores)
    assert (found.mean, found.interval95, found.p_value) == (0.0, 0.0, 1.0)
    assert found.unpaired_interval95 > 0.0


@pytest.mark.parametrize("num_runs", [1, 3, 5, 7])
@pytest.mark.parametrize("num_episodes", [2, 3, 600])
def test_mean_of_equal_runs_differs_by_nothing_whatever_is_rounded(num_runs: int, num_episodes: int) -> None:
    scores = np.random.default_rng(0).integers(0, 16, (1, num_episodes)) / 15
    found = difference_over_seeds(np.repeat(scores, num_runs, axis=0), scores)
    assert (found.mean, found.interval95, found.p_value) == (0.0, 0.0, 1.0)
    assert not paired_values(np.repeat(scores, num_runs, axis=0), scores).any()
    if num_runs > 1:
        assert mean_over_seeds(np.repeat(scores, num_runs, axis=0)).spread == 0.0


# Differences of the second pair are 0.2 but for their last digit.
@pytest.mark.parametrize(("first", "second"), [([0.5, 0.75, 1.0], [0.25, 0.5, 0.75]), ([0.6, 0.8], [0.4, 0.6])])
def test_difference_that_never_varies_has_no_p_value(first: list[float], second: list[float]) -> None:
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(first[0] - second[0])
    assert (found.interval95, found.p_value) == (0.0, None)


def test_interval_excludes_zero_exactly_where_p_is_below_five_percent() -> None:
    generator = np.random.default_rng(1)
    for _ in range(200):
        first, second = generator.random((2, 6))
        found = paired_difference(first.tolist(), (first - 0.3 * second).tolist())
        assert found.p_value is not None
        assert (abs(found.mean) > found.interval95) == (found.p_value < 0.05)


@pytest.mark.parametrize(("first", "second"), [([0.5, 0.5], [0.5]), ([0.5], [0.5])])
def test_pairs_need_the_same_two_episodes_or_more(first: list[float], second: list[float]) -> None:
    with pytest.raises(ValueError, match="episodes"):
        paired_difference(first, second)


def test_mean_over_seeds_has_students_interval_over_the_seeds() -> None:
    # Accuracies of the runs 0.5, 0.6, 0.7; their episodes' means over seeds are all 0.6.
    scores = np.array([[0.5, 0.5], [0.6, 0.6], [0.7, 0.7]])
    found = mean_over_seeds(scores)
    assert [found.accuracy, found.spread] == pytest.approx([0.6, 0.1])
    assert found.seed_interval95 == pytest.approx(quantile95(2) * 0.1 / 3**0.5)
    assert found.interval95 == pytest.approx(found.seed_interval95)
    harder = mean_over_seeds(scores + np.array([-0.3, 0.3]))
    assert harder.seed_interval95 == pytest.approx(found.seed_interval95)
    assert harder.interval95 > found.interval95
    with pytest.raises(ValueError, match="two or more"):
        mean_over_seeds(scores[:1])


def test_difference_of_recipes_counts_the_seeds_of_those_that_have_several() -> None:
    generator = np.random.default_rng(0)
    episodes = generator.random(50)
    several = episodes + np.array([[0.0], [0.1], [0.2]])
    one = episodes[None] - 0.1
    found = difference_over_seeds(several, one)
    assert found.mean == pytest.approx(0.2)
    # The episodes of both agree, so that only the seeds vary: standard deviation 0.1 over three.
    assert found.interval95 == pytest.approx(quantile95(2) * 0.1 / 3**0.5, rel=1e-6)


def test_adjusted_p_values_are_those_of_holm() -> None:
    # By hand: sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, never falling.
    assert adjusted_p_values([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted_p_values([0.9, 0.6]) == [1.0, 1.0]
    assert adjusted_p_values([]) == []
    assert adjusted_p_values([0.01, None, 0.03]) == [0.02, None, 0.03], "one that is undefined does not count"


def all_class_sets(num_classes: int, n_way: int) -> np.ndarray:
    return np.array(list(itertools.combinations(range(num_classes), n_way)))


@pytest.mark.parametrize("n_way", [2, 5])
def test_class_interval_of_additive_classes_is_students(n_way: int) -> None:
    """Where an episode's accuracy is the mean of its classes' values, the classes are a plain sample of these."""
    values = np.linspace(0.2, 0.9, 12)
    sets = all_class_sets(12, n_way)
    interval = class_interval(values[sets].mean(axis=1), sets)
    assert interval is not None
    half = quantile95(11) * values.std(ddof=1) / 12**0.5
    # 10,000 resamples leave the percentiles uncertain by about a hundredth, and twelve even steps are not quite normal.
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_class_interval_is_wider_on_the_side_of_the_outlier() -> None:
    values = np.array([0.8] * 11 + [0.1])
    sets = all_class_sets(12, 3)
    interval = class_interval(values[sets].mean(axis=1), sets)
    assert interval is not None
    assert values.mean() - interval.low > 1.2 * (interval.high - values.mean())


def test_class_interval_is_the_same_every_time_and_shifts_with_the_scores() -> None:
    sets = all_class_sets(8, 3)
    scores = np.random.default_rng(0).random(len(sets))
    first, again = class_interval(scores, sets), class_interval(scores, sets)
    shifted = class_interval(scores + 0.25, sets)
    assert first is not None
    assert shifted is not None
    assert first == again
    assert [shifted.low, shifted.high] == pytest.approx([first.low + 0.25, first.high + 0.25])


def test_class_interval_of_equal_scores_has_no_width() -> None:
    interval = class_interval(np.full(56, 0.75), all_class_sets(8, 3))
    assert interval is not None
    assert (interval.low, interval.high) == (0.75, 0.75)


def test_interval_of_accuracies_ends_where_accuracies_do() -> None:
    assert Interval(-0.2, 1.3).within(0.0, 1.0) == Interval(0.0, 1.0)
    assert Interval(0.2, 0.3).within(0.0, 1.0) == Interval(0.2, 0.3)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_no_class_interval_where_every_episode_holds_a_class(num_classes: int) -> None:
    sets = np.tile(np.arange(num_classes), (20, 1))
    assert class_interval(np.linspace(0.0, 1.0, 20), sets) is None


def test_intervals_over_episodes_hold_the_accuracy_of_the_fixed_videos() -> None:
    found = cover_fixed_universe(REPLICATIONS, 150)
    assert abs(found["episodes"].share - 0.95) < MARGIN
    assert abs(found["paired"].share - 0.95) < MARGIN
    assert found["unpaired"].share > 0.98, "too wide, since both methods met the same episodes"
    assert found["paired"].half_width < 0.7 * found["unpaired"].half_width


@pytest.mark.parametrize("kind", CLASS_KINDS)
def test_intervals_over_classes_hold_the_accuracy_of_the_population(kind: str) -> None:
    found = cover_classes(ClassWorld(kind, gain=0.02), REPLICATIONS)
    assert abs(found["classes"].share - 0.95) < MARGIN
    assert abs(found["paired classes"].share - 0.95) < MARGIN
    assert found["episodes"].share < 0.4, "episodes of one split tell little about other classes"
    assert found["paired episodes"].share < 0.4


def test_interval_over_classes_is_too_wide_rather_than_too_narrow_with_few_episodes() -> None:
    found = cover_classes(ClassWorld(num_classes=10, num_episodes=150), REPLICATIONS)
    assert found["classes"].share > 0.95 - MARGIN


def test_interval_over_seven_classes_holds_the_accuracy_where_some_are_near_duplicates() -> None:
    # With six it does not: docs/compare.md says how often.
    found = cover_classes(ClassWorld(NEAR_DUPLICATES, 7, num_episodes=1000, gain=0.02), REPLICATIONS)
    assert found["classes"].share > 0.95 - MARGIN
    assert found["paired classes"].share > 0.95 - MARGIN


@pytest.mark.parametrize("num_seeds", [2, 4])
def test_intervals_over_seeds_hold_the_accuracy_of_the_recipe(num_seeds: int) -> None:
    found = cover_seeds(num_seeds, 2 * REPLICATIONS)
    assert found["seeds"].share > 0.95 - MARGIN
    assert found["episodes"].share < 0.95 - MARGIN


@pytest.mark.slow
def test_p_values_reject_equal_methods_once_in_twenty() -> None:
    assert abs(rejections(4 * REPLICATIONS, 60) - 0.05) < MARGIN / 2
