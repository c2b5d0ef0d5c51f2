"""The rows of a comparison: each run, and the mean over the seeds of a recipe above its runs.

N episodes, K classes of an episode, S seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.comparison import Comparison, ScoredRun
from pipeline.console import say
from pipeline.head_cost import HeadCost
from pipeline.run_files import CHANGEABLE, resolved_head_options
from pipeline.scoring import LoadedRun
from pipeline.statistics import (
    Difference,
    Interval,
    SeedMean,
    adjusted_p_values,
    class_interval,
    difference_over_seeds,
    mean_and_interval,
    mean_over_seeds,
    paired_values,
)

SEED_KEYS = ("training.seed", "episodes.seed")
_NO_PART_OF_A_RECIPE = (
    # Weights that a run starts from are one; where videos, cubes and memory are is not.
    (CHANGEABLE - {"training.initial_weights", "backbone.weights"}) | {*SEED_KEYS, "training.episodes_per_forward"}
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    head: str
    runs: tuple[ScoredRun, ...]
    """One run, or those of a recipe."""
    accuracy: float
    interval95: float
    """Half width: of a run over the episodes, of a recipe over seeds and episodes."""
    seeds: SeedMean | None
    """Of a recipe."""
    class_interval: Interval | None
    """Over other classes, within 0 and 1; None where it cannot be had."""
    difference: Difference | None
    """To the first row of its kind; None in the first one itself."""
    adjusted_p_value: float | None
    """After Holm, over all rows of its kind; None where the difference has no p-value."""
    class_difference: Interval | None
    """Of the difference, over other classes."""
    cost: HeadCost
    """Of a recipe: of its first run, with the mean time."""

    @property
    def is_recipe(self) -> bool:
        """Whether it is a mean over seeds."""
        return self.seeds is not None


@dataclass(frozen=True, slots=True)
class _Group:
    """What becomes a row."""

    name: str
    runs: tuple[ScoredRun, ...]

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """(S, N)."""
        return np.array([run.score.per_episode for run in self.runs])


def run_rows(comparison: Comparison) -> list[Row]:
    """One row for each run, in order; differences are to the first run."""
    return _rows([_Group(run.name, (run,)) for run in comparison.runs])


def recipe_rows(comparison: Comparison) -> list[Row]:
    """One row for each recipe, in the order of its first run; empty where no recipe has several seeds.

    A recipe with one run is compared as that run. Differences are to the recipe of the first run.
    """
    found = recipes(comparison.runs)
    if all(len(runs) == 1 for runs in found):
        return []
    short = [_recipe_name(runs) for runs in found]
    names = [
        name if short.count(name) == 1 else f"{name} from {runs[0].name}"
        for name, runs in zip(short, found, strict=True)
    ]
    return _rows([_Group(name, runs) for name, runs in zip(names, found, strict=True)])


def recipes(runs: Sequence[ScoredRun]) -> list[tuple[ScoredRun, ...]]:
    """Runs grouped by recipe: the same config on the same cubes, apart from seeds.

    Runs with the same seeds as well are no further seeds: such a recipe is taken apart, with a note.
    """
    groups: dict[str, list[ScoredRun]] = {}
    for run in runs:
        groups.setdefault(_recipe_key(run.run), []).append(run)
    found: list[tuple[ScoredRun, ...]] = []
    for members in groups.values():
        seeds = [_seeds(run.run) for run in members]
        if len(set(seeds)) < len(seeds):
            say(
                f"note: {', '.join(run.name for run in members)} share recipe and seeds, so there is no mean over seeds; "
                f"train with other {' or '.join(SEED_KEYS)}"
            )
            found += [(run,) for run in members]
        else:
            found.append(tuple(members))
    return found


def _seeds(run: LoadedRun) -> str:
    return f"{run.config.training.seed}, {run.config.episodes.seed}"


def _recipe_key(run: LoadedRun) -> str:
    tables: dict[str, dict[str, Any]] = run.config.model_dump(mode="json")
    kept = {
        f"{table}.{key}": value
        for table, values in tables.items()
        for key, value in values.items()
        if f"{table}.{key}" not in _NO_PART_OF_A_RECIPE and table not in ("store", "head")
    }
    # Cubes are told by their fingerprint; end to end, where every run has its own, the config tells how they are made.
    cubes = run.store_fingerprint if run.config.training.mode == "cached" else ""
    head = [run.config.head.name, run.config.head.array, resolved_head_options(run.config)]
    return json.dumps([cubes, head, kept], sort_keys=True)


def _recipe_name(runs: Sequence[ScoredRun]) -> str:
    return runs[0].name if len(runs) == 1 else f"{runs[0].run.config.head.name}, {len(runs)} seeds"


def _rows(groups: Sequence[_Group]) -> list[Row]:
    first = groups[0]
    differences = [difference_over_seeds(group.scores, first.scores) for group in groups[1:]]
    adjusted = adjusted_p_values([difference.p_value for difference in differences])
    rows = [_row(first, first, None, None)]
    for group, difference, p_value in zip(groups[1:], differences, adjusted, strict=True):
        rows.append(_row(group, first, difference, p_value))
    return rows


def _row(group: _Group, first: _Group, difference: Difference | None, adjusted: float | None) -> Row:
    scores = group.scores
    per_episode = scores.mean(axis=0)
    seeds = mean_over_seeds(scores) if len(scores) > 1 else None
    accuracy, interval95 = mean_and_interval(per_episode)
    outcomes = group.runs[0].score.outcomes
    assert outcomes is not None
    classes = outcomes.episode_classes
    over_classes = class_interval(per_episode, classes)
    costs = [run.cost for run in group.runs]
    return Row(
        name=group.name,
        head=group.runs[0].run.config.head.name,
        runs=group.runs,
        accuracy=accuracy,
        interval95=seeds.interval95 if seeds else interval95,
        seeds=seeds,
        class_interval=over_classes.within(0.0, 1.0) if over_classes else None,
        difference=difference,
        adjusted_p_value=adjusted,
        class_difference=class_interval(paired_values(scores, first.scores), classes) if difference else None,
        cost=HeadCost(
            costs[0].parameters,
            costs[0].trainable_parameters,
            costs[0].flops,
            float(np.mean([cost.milliseconds for cost in costs])),
            costs[0].timed_episodes,
        ),
    )


def class_accuracies(run: ScoredRun) -> Mapping[str, float]:
    """Share of right queries of each class, over all episodes that asked about it."""
    outcomes = run.score.outcomes
    assert outcomes is not None
    place = outcomes.query_classes.reshape(-1)
    asked = np.bincount(place, minlength=len(outcomes.class_names))
    right = np.bincount(place, outcomes.is_right.reshape(-1), minlength=len(outcomes.class_names))
    return {name: float(right[index] / asked[index]) for index, name in enumerate(outcomes.class_names) if asked[index]}
