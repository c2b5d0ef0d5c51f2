"""Means, intervals and tests over the episodes, over the classes and over the seeds of runs.

Each interval answers its own question. Over episodes: what if other episodes were drawn from these very videos? Over classes:
what if other classes had been put into the split? Over seeds: what if the same recipe were trained again?

N episodes, K classes of an episode, C classes of the split, S seeds, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.student import quantile95, two_sided_p_value

NUM_RESAMPLES = 10_000
ROUNDING_NOISE = 1e-12
"""Accuracies are fractions of small integers: what differs by less than this differs by the order of a sum alone."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % interval that need not be symmetric."""

    low: float
    high: float

    def within(self, lowest: float, highest: float) -> Interval:
        """The part of it that is possible at all."""
        return Interval(max(self.low, lowest), min(self.high, highest))


@dataclass(frozen=True, slots=True)
class Difference:
    """One method minus another on the same episodes."""

    mean: float
    interval95: float
    """Half width of the paired interval."""
    unpaired_interval95: float
    """Half width if the two had met different episodes: wider, wherever episodes are hard or easy for both."""
    p_value: float | None
    """Two-sided, of no difference on these classes and videos; not adjusted for how many methods are compared. 1 where nothing
    differs; None where all differences are one number other than 0, of which a t-test can say nothing."""


@dataclass(frozen=True, slots=True)
class SeedMean:
    """Several runs of one recipe, apart in their seeds only."""

    accuracy: float
    """Mean over seeds and episodes."""
    spread: float
    """Sample standard deviation of the runs' accuracies."""
    seed_interval95: float
    """Half width of Student's interval over the seeds, on exactly these episodes."""
    interval95: float
    """Half width over other seeds and other episodes."""


def mean_and_interval(per_episode: Sequence[float] | Floats) -> tuple[float, float]:
    """Mean and half width of the 95 % interval of per-episode accuracies.

    As published: 1.96 times the population standard deviation over the root of the number of episodes (reference 8.1).
    """
    values = np.asarray(per_episode, dtype=np.float64)
    return float(values.mean()), float(1.96 * values.std() / math.sqrt(len(values)))


def share_interval(hits: int, trials: int) -> Interval:
    """Wilson's 95 % interval of a share, e.g. of the videos that are answered right: honest for a few of them, and for none or all.

    Args:
        hits: 0 to `trials`.
        trials: one or more.
    """
    share, z2 = hits / trials, 1.96**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = 1.96 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # At the ends the root meets the middle but for its rounding.
    return Interval(0.0 if hits == 0 else middle - half, 1.0 if hits == trials else middle + half)


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Scores minus baseline with the paired t-test over the episodes, which both have met.

    Args:
        scores: accuracy of N episodes.
        baseline: of the same episodes in the same order.
    """
    return difference_over_seeds(np.asarray([scores], dtype=np.float64), np.asarray([baseline], dtype=np.float64))


def difference_over_seeds(scores: Floats, baseline: Floats) -> Difference:
    """Mean over seeds of one recipe minus that of another, on the same episodes.

    Args:
        scores: (S, N) accuracies by seed and episode. A recipe of one run is taken as that run, without a variance of seeds.
        baseline: (S', N).
    """
    differences = paired_values(scores, baseline)
    seeds = [*_seed_part(scores), *_seed_part(baseline)]
    paired = _Spread([_mean_part(differences), *seeds])
    unpaired = _Spread([_mean_part(scores.mean(axis=0)), _mean_part(baseline.mean(axis=0)), *seeds])
    mean = float(_without_noise(differences.mean()))
    return Difference(mean, paired.interval95, unpaired.interval95, paired.p_value(mean))


def paired_values(scores: Floats, baseline: Floats) -> Floats:
    """Mean over seeds of one recipe minus that of another, episode by episode, (N,); rounding noise is 0.

    Args:
        scores: (S, N) accuracies by seed and episode.
        baseline: (S', N).
    """
    if scores.shape[1] != baseline.shape[1] or scores.shape[1] < 2:
        raise ValueError(f"{scores.shape[1]} and {baseline.shape[1]} episodes, but a pair needs the same two or more")
    return _without_noise(scores.mean(axis=0) - baseline.mean(axis=0))


def _without_noise(values: npt.ArrayLike) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    return np.where(np.abs(found) < ROUNDING_NOISE, 0.0, found)


def mean_over_seeds(scores: Floats) -> SeedMean:
    """Mean of the runs of one recipe.

    The squared error is that over seeds plus that over episodes, with degrees of freedom after Welch and Satterthwaite. What
    seeds and episodes do together counts in both, so the interval is a little too wide rather than too narrow.

    Args:
        scores: (S, N) accuracies by seed and episode, two seeds or more.
    """
    if len(scores) < 2:
        raise ValueError(f"{len(scores)} seeds, but a spread over seeds needs two or more")
    seeds = _seed_part(scores)
    both = _Spread([*seeds, _mean_part(scores.mean(axis=0))])
    spread = math.sqrt(_variance(scores.mean(axis=1)))
    return SeedMean(float(scores.mean()), spread, _Spread(seeds).interval95, both.interval95)


@dataclass(frozen=True, slots=True)
class _Part:
    """The squared error of a mean, and how well it is known."""

    variance: float
    degrees: int


def _mean_part(values: Floats) -> _Part:
    return _Part(_variance(values) / len(values), len(values) - 1)


def _variance(values: Floats) -> float:
    # Equal values, and equal but for the order of a sum, leave rounding noise in a variance; they have none.
    return 0.0 if np.ptp(values) < ROUNDING_NOISE else float(values.var(ddof=1))


def _seed_part(scores: Floats) -> list[_Part]:
    return [_mean_part(scores.mean(axis=1))] if len(scores) > 1 else []


@dataclass(frozen=True, slots=True)
class _Spread:
    """The sum of independent errors."""

    parts: Sequence[_Part]

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return math.sqrt(sum(part.variance for part in self.parts))

    @property
    def degrees(self) -> float:
        """Degrees of freedom after Welch and Satterthwaite."""
        return self.error**4 / sum(part.variance**2 / part.degrees for part in self.parts)

    @property
    def interval95(self) -> float:
        """Half width of Student's interval."""
        return quantile95(self.degrees) * self.error if self.error else 0.0

    def p_value(self, mean: float) -> float | None:
        """Of no difference; where nothing varies, 1 for a mean of 0 and otherwise undefined."""
        if self.error == 0.0:
            return 1.0 if mean == 0.0 else None
        return two_sided_p_value(mean / self.error, self.degrees)


def adjusted_p_values(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values of several comparisons made at once, after Holm: the chance that even one equal pair looks different.

    One that is undefined stays so and does not count.
    """
    adjusted: list[float | None] = [None] * len(p_values)
    known = sorted((value, index) for index, value in enumerate(p_values) if value is not None)
    highest = 0.0
    for place, (value, index) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - place) * value))
        adjusted[index] = highest
    return adjusted


def class_interval(per_episode: Sequence[float] | Floats, episode_classes: npt.NDArray[np.int64]) -> Interval | None:
    """Bootstrap interval of a mean over episodes, for other classes in the place of those of the split.

    The classes are the units that are drawn anew, with all their videos. A class matters by its own queries and as a rival
    of others, so its weight is that of all episodes that it is in: the leave-one-out value (C - 1) (mean - mean of the
    episodes without it). These C values are resampled B times, always with the same draws. docs/compare.md says what is
    assumed and how well it covers.

    Args:
        per_episode: N accuracies, or differences of accuracies.
        episode_classes: (N, K) numbers of the classes of each episode, from 0 to C - 1.

    Returns:
        The interval; None where no class can be left out (all episodes hold it) or there are fewer than three.
    """
    values = np.asarray(per_episode, dtype=np.float64)
    influences = _class_influences(values, episode_classes)
    if influences is None:
        return None
    num_classes = len(influences)
    low, high = np.quantile(_class_draws(num_classes) @ influences / num_classes, [0.025, 0.975])
    # Percentiles of a few resampled values lie too near; stretched like this, a symmetric sample gets Student's interval.
    stretch = quantile95(num_classes - 1) / quantile95(math.inf) * math.sqrt(num_classes / (num_classes - 1))
    return Interval(float(values.mean() + stretch * low), float(values.mean() + stretch * high))


def _class_influences(values: Floats, episode_classes: npt.NDArray[np.int64]) -> Floats | None:
    """What each class adds to the mean, centred, (C,)."""
    num_without = len(values) - np.bincount(episode_classes.reshape(-1))
    if len(num_without) < 3 or num_without.min() == 0:
        return None
    sums = values.sum() - np.bincount(episode_classes.reshape(-1), np.repeat(values, episode_classes.shape[1]))
    influences = (len(num_without) - 1) * (values.mean() - sums / num_without)
    return np.asarray(influences - influences.mean())


@lru_cache(maxsize=8)
def _class_draws(num_classes: int) -> Floats:
    """How often each class is in each resample, (B, C); the same on every machine."""
    # Only Philox's words come from numpy (see episodes/draws.py); the remainder's bias is below 1e-15.
    words = np.random.Philox(key=[0x6D6173746166, num_classes]).random_raw(NUM_RESAMPLES * num_classes)
    rows = np.arange(NUM_RESAMPLES).repeat(num_classes)
    places = rows * num_classes + (words % np.uint64(num_classes)).astype(np.int64)
    counts = np.bincount(places, minlength=NUM_RESAMPLES * num_classes)
    return counts.reshape(NUM_RESAMPLES, num_classes).astype(np.float64)
