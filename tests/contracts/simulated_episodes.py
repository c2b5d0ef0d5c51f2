"""Worlds with a known accuracy, to count how often an interval covers it.

N episodes, K classes of an episode, C classes of a split, Q queries of a class, R replications, S seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from episodes.datasets import Manifest
from episodes.sampler import Episode, EpisodeProtocol, EpisodeSampler
from episodes.video import Video
from pipeline.statistics import class_interval, difference_over_seeds, mean_and_interval, mean_over_seeds

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How an interval did over many replications."""

    share: float
    """Of replications whose interval held the truth."""
    half_width: float
    """Mean over replications."""


class CoverageCount:
    """Counts, replication by replication."""

    def __init__(self, truth: float) -> None:
        self.truth = truth
        self.hits: list[bool] = []
        self.half_widths: list[float] = []

    def add(self, low: float, high: float) -> None:
        self.hits.append(low <= self.truth <= high)
        self.half_widths.append((high - low) / 2.0)

    def around(self, middle: float, half_width: float) -> None:
        self.add(middle - half_width, middle + half_width)

    @property
    def result(self) -> Coverage:
        return Coverage(float(np.mean(self.hits)), float(np.mean(self.half_widths)))


NUM_CLASSES, VIDEOS_PER_CLASS = 5, 3
_FIXED = EpisodeProtocol("per_class", 2, 1, 1)


class FixedUniverse:
    """Fifteen videos and two methods that answer by the nearest support, each on a number of its own per video.

    The numbers of the two methods agree in part, so that the same episodes are hard for both.
    """

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        ids = [(c, v) for c in range(NUM_CLASSES) for v in range(VIDEOS_PER_CLASS)]
        shared = {key: key[0] + generator.normal() for key in ids}
        self.manifest = Manifest(tuple(Video(f"{c}/{v}", "x.mp4", f"class {c}", "test") for c, v in ids), Path())
        self.numbers = [
            {f"{c}/{v}": shared[c, v] + spread * generator.normal() for c, v in ids} for spread in (0.3, 0.5)
        ]

    def scores(self, seed: int, num_episodes: int) -> Floats:
        """(2, N) accuracies of both methods on the first episodes of a seed."""
        sampler = EpisodeSampler(self.manifest, "test", _FIXED, seed)
        episodes = [sampler.episode(index) for index in range(num_episodes)]
        return np.array([[_accuracy(episode, numbers) for episode in episodes] for numbers in self.numbers])

    def truth(self) -> Floats:
        """(2,) the exact mean over all episodes that can be drawn, each as likely as the others."""
        accuracies = []
        for classes in itertools.combinations(range(NUM_CLASSES), 2):
            pairs = [list(itertools.permutations(range(VIDEOS_PER_CLASS), 2)) for _ in classes]
            for drawn in itertools.product(*pairs):
                support_ids = tuple(f"{c}/{pair[0]}" for c, pair in zip(classes, drawn, strict=True))
                query_ids = tuple(f"{c}/{pair[1]}" for c, pair in zip(classes, drawn, strict=True))
                names = tuple(str(c) for c in classes)
                episode = Episode(0, names, support_ids, (0, 1), query_ids, (0, 1))
                accuracies.append([_accuracy(episode, numbers) for numbers in self.numbers])
        return np.asarray(np.mean(accuracies, axis=0))


def _accuracy(episode: Episode, numbers: dict[str, float]) -> float:
    right = 0
    for video_id, label in zip(episode.query_ids, episode.query_labels, strict=True):
        distances = [abs(numbers[video_id] - numbers[support]) for support in episode.support_ids]
        right += episode.support_labels[int(np.argmin(distances))] == label
    return right / len(episode.query_ids)


def cover_fixed_universe(num_replications: int, num_episodes: int) -> dict[str, Coverage]:
    """Coverage of the interval over episodes, and of the paired and the unpaired difference, in `FixedUniverse`."""
    universe = FixedUniverse()
    truth = universe.truth()
    single = CoverageCount(float(truth[0]))
    paired = CoverageCount(float(truth[1] - truth[0]))
    unpaired = CoverageCount(float(truth[1] - truth[0]))
    for seed in range(num_replications):
        first, second = universe.scores(seed, num_episodes)
        single.around(*mean_and_interval(first))
        found = difference_over_seeds(second[None], first[None])
        paired.around(found.mean, found.interval95)
        unpaired.around(found.mean, found.unpaired_interval95)
    return {"episodes": single.result, "paired": paired.result, "unpaired": unpaired.result}


POPULATION_ACCURACY = 0.6
CLASS_KINDS = ("independent", "distinct", "skewed")
NEAR_DUPLICATES = "near-duplicates"
NUM_GROUPS = 8


@dataclass(frozen=True, slots=True)
class ClassWorld:
    """Test splits drawn from a population of classes whose mean accuracy is `POPULATION_ACCURACY` exactly.

    Each class is easy or hard by itself, a weak or strong rival of others, and similar to some: the chance of a right query
    is 0.6 + own effect - mean effect of the rivals + mean effect of the pairs + the luck of the episode, all with mean 0.
    Of near-duplicates each class belongs to one of `NUM_GROUPS` groups, and classes of a group cannot be told apart: with d of
    its group among the rivals, the chance is divided by 1 + d.
    """

    kind: str = "independent"
    """Own and rival effect of a class: "independent", "distinct" (an easy class is a weak rival too) or "skewed"; or "near-duplicates"."""
    num_classes: int = 12
    n_way: int = 5
    n_query: int = 3
    num_episodes: int = 3000
    gain: float = 0.0
    """Of a second method over the first on the population; it has half of the first one's class effects."""

    def draw(self, generator: np.random.Generator) -> tuple[Floats, npt.NDArray[np.int64]]:
        """(2, N) accuracies of the two methods, and the classes (N, K) of the episodes, on one new split."""
        chances, classes = (
            self._near_duplicates(generator) if self.kind == NEAR_DUPLICATES else self._effects(generator)
        )
        # Both methods meet the same queries: a query's chance number is one for both.
        drawn = generator.random((self.num_episodes, self.n_way, self.n_query))
        return (drawn < chances[..., None]).mean(axis=(2, 3)), classes

    def _draw_classes(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        shape = (self.num_episodes, self.num_classes)
        return np.argsort(generator.random(shape), axis=1)[:, : self.n_way]

    def _near_duplicates(self, generator: np.random.Generator) -> tuple[Floats, npt.NDArray[np.int64]]:
        """(2, N, K) chances of a right query, and the classes; the second method loses half as much by a duplicate."""
        own = 0.05 * generator.uniform(-1.0, 1.0, self.num_classes)
        groups = generator.integers(NUM_GROUPS, size=self.num_classes)
        classes = self._draw_classes(generator)
        of_episode = groups[classes]
        kept = 1.0 / (of_episode[:, :, None] == of_episode[:, None, :]).sum(axis=2)
        # The mean of 1 / (1 + d), d binomial: each rival is of the query's group with a chance of 1 / groups.
        mean_kept = (1.0 - (1.0 - 1.0 / NUM_GROUPS) ** self.n_way) * NUM_GROUPS / self.n_way
        luck = generator.choice([-0.1, 0.1], (self.num_episodes, 1))
        first = (POPULATION_ACCURACY / mean_kept + own[classes] + luck) * kept
        half = (1.0 + kept) / 2.0
        second = ((POPULATION_ACCURACY + self.gain) / ((1.0 + mean_kept) / 2.0) + own[classes] / 2.0 + luck) * half
        return np.stack([first, second]), classes

    def _effects(self, generator: np.random.Generator) -> tuple[Floats, npt.NDArray[np.int64]]:
        """(2, N, K) chances of a right query, and the classes."""
        effects = self._class_effects(generator)  # (C, 2)
        pairs = 0.05 * generator.uniform(-1.0, 1.0, (self.num_classes, self.num_classes))
        classes = self._draw_classes(generator)
        own, rival = effects[classes, 0], effects[classes, 1]
        others = self.n_way - 1
        together = pairs[classes[:, :, None], classes[:, None, :]]  # (N, K, K)
        together[:, range(self.n_way), range(self.n_way)] = 0.0
        effect = own - (rival.sum(axis=1, keepdims=True) - rival) / others + together.sum(axis=2) / others
        luck = generator.choice([-0.1, 0.1], (self.num_episodes, 1))
        first = POPULATION_ACCURACY + effect + luck
        second = POPULATION_ACCURACY + self.gain + effect / 2.0 + luck
        return np.stack([first, second]), classes

    def _class_effects(self, generator: np.random.Generator) -> Floats:
        shape = (self.num_classes, 2)
        if self.kind == "skewed":
            # A few classes far below the others: 1/5 at -0.2, 4/5 at +0.05.
            return np.where(generator.random(shape) < 0.2, -0.2, 0.05)
        effects = 0.13 * generator.uniform(-1.0, 1.0, shape)
        return np.stack([effects[:, 0], -effects[:, 0]], axis=1) if self.kind == "distinct" else effects


def cover_classes(world: ClassWorld, num_replications: int, seed: int = 0) -> dict[str, Coverage]:
    """Coverage of the population's accuracy by the intervals over episodes and over classes, and of the gain likewise."""
    generator = np.random.default_rng(seed)
    counts = {name: CoverageCount(POPULATION_ACCURACY) for name in ("episodes", "classes")}
    counts |= {name: CoverageCount(world.gain) for name in ("paired episodes", "paired classes")}
    for _ in range(num_replications):
        (first, second), classes = world.draw(generator)
        for name, values in (("", first), ("paired ", second - first)):
            counts[f"{name}episodes"].around(*mean_and_interval(values))
            interval = class_interval(values, classes)
            assert interval is not None
            counts[f"{name}classes"].add(interval.low, interval.high)
    return {name: count.result for name, count in counts.items()}


def cover_seeds(num_seeds: int, num_replications: int, seed: int = 0) -> dict[str, Coverage]:
    """Coverage of a recipe's accuracy (over seeds and episodes) by the mean over seeds, and by that over the episodes alone."""
    generator = np.random.default_rng(seed)
    both, episodes_only = CoverageCount(POPULATION_ACCURACY), CoverageCount(POPULATION_ACCURACY)
    for _ in range(num_replications):
        of_seeds = generator.normal(0.0, 0.01, (num_seeds, 1))
        of_episodes = generator.normal(0.0, 0.15, (1, 400))
        scores = POPULATION_ACCURACY + of_seeds + of_episodes + generator.normal(0.0, 0.1, (num_seeds, 400))
        found = mean_over_seeds(scores)
        both.around(found.accuracy, found.interval95)
        episodes_only.around(*mean_and_interval(scores.mean(axis=0)))
    return {"seeds": both.result, "episodes": episodes_only.result}


def rejections(num_replications: int, num_episodes: int, values: Sequence[float] = (-0.2, 0.0, 0.0, 0.2)) -> float:
    """How often two methods without a difference get a p-value below 0.05."""
    generator = np.random.default_rng(0)
    rejected = 0
    for _ in range(num_replications):
        first = generator.random((1, num_episodes))
        second = first + generator.choice(np.asarray(values), (1, num_episodes))
        p_value = difference_over_seeds(second, first).p_value
        rejected += p_value is not None and p_value < 0.05
    return rejected / num_replications
