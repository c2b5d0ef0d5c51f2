"""A comparison as JSON and CSV, and its episodes as arrays.

R runs, N episodes, Q queries, K classes of an episode.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.comparison import Comparison
from pipeline.comparison_rows import Row, class_accuracies
from pipeline.provenance import code_version, hardware, library_versions
from pipeline.statistics import NUM_RESAMPLES, Interval

METHODS = {
    "interval95": "half width over other episodes of these videos: 1.96 population standard deviations over the root of the "
    "number of episodes; of a recipe over other seeds too (Student, Welch-Satterthwaite)",
    "class_interval95": f"over other classes in the place of these: bootstrap over the classes of the split ({NUM_RESAMPLES} resamples)",
    "difference.interval95": "half width of the difference to the first, paired over the episodes (Student)",
    "difference.unpaired_interval95": "half width if the two had been scored on different episodes",
    "difference.p_value": "paired t-test over the episodes, two-sided, not adjusted; null where all differences are one "
    "number other than 0",
    "difference.p_value_holm": "the same, adjusted for the number of rows by Holm's method; the p of the table",
    "flops_per_episode": "head alone, one episode, torch.utils.flop_counter: matrix products and convolutions; MACs are half of it",
    "milliseconds_per_episode": "head alone, median over calls after a warm-up",
}


def to_json(comparison: Comparison, runs: Sequence[Row], recipes: Sequence[Row]) -> dict[str, Any]:
    """Everything but the single episodes, as a JSON object."""
    episodes = comparison.episodes
    return {
        **_what_was_scored(comparison),
        "classes": len(episodes.manifest.classes(episodes.split)),
        "videos": len(episodes.manifest.videos_of(episodes.split)),
        "whole_split_hash": episodes.whole_split_hash,
        "left_out": [{"video_id": name, "reason": reason} for name, reason in sorted(episodes.left_out.items())],
        "device": str(comparison.device),
        "hardware": hardware(),
        "libraries": library_versions(),
        "methods": METHODS,
        "runs": [
            {
                "run": str(row.runs[0].folder),
                **_row_json(row),
                "mode": row.runs[0].run.config.training.mode,
                "training_seed": row.runs[0].run.config.training.seed,
                "episodes_seed": row.runs[0].run.config.episodes.seed,
                "store_fingerprint": row.runs[0].run.store_fingerprint,
                "class_accuracies": class_accuracies(row.runs[0]),
            }
            for row in runs
        ],
        "recipes": [{"runs": [run.name for run in row.runs], **_row_json(row)} for row in recipes],
    }


def _what_was_scored(comparison: Comparison) -> dict[str, Any]:
    episodes = comparison.episodes
    return {
        "split": episodes.split,
        "protocol": episodes.protocol.kind,
        "n_way": episodes.protocol.n_way,
        "k_shot": episodes.protocol.k_shot,
        "n_query": episodes.protocol.n_query,
        "episodes": episodes.num_episodes,
        "seed": episodes.seed,
        "split_hash": episodes.manifest.split_hash,
        "episode_hash": comparison.runs[0].score.episode_hash,
        "code_version": code_version(),
    }


def _row_json(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": row.name,
        "head": row.head,
        "accuracy": row.accuracy,
        "interval95": row.interval95,
        "class_interval95": _ends(row.class_interval),
        "difference": None,
        "parameters": row.cost.parameters,
        "trainable_parameters": row.cost.trainable_parameters,
        "flops_per_episode": row.cost.flops,
        "macs_per_episode": row.cost.flops // 2,
        "milliseconds_per_episode": row.cost.milliseconds,
        "episodes_per_timed_call": row.cost.timed_episodes,
    }
    if row.seeds:
        found |= {"seed_spread": row.seeds.spread, "seed_interval95": row.seeds.seed_interval95}
    if row.difference:
        found["difference"] = {
            "mean": row.difference.mean,
            "interval95": row.difference.interval95,
            "unpaired_interval95": row.difference.unpaired_interval95,
            "p_value": row.difference.p_value,
            "p_value_holm": row.adjusted_p_value,
            "class_interval95": _ends(row.class_difference),
        }
    return found


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def to_csv(comparison: Comparison, runs: Sequence[Row], recipes: Sequence[Row]) -> str:
    """One line for each run and each recipe, with what made the numbers in every line."""
    shared = _what_was_scored(comparison)
    lines = []
    for kind, rows in (("run", runs), ("recipe", recipes)):
        for row in rows:
            flat: dict[str, Any] = {"kind": kind, "num_runs": len(row.runs)}
            for key, value in _row_json(row).items():
                flat |= _cells(key, value)
            flat["store_fingerprint"] = " ".join(sorted({run.run.store_fingerprint for run in row.runs}))
            lines.append({**flat, "device": str(comparison.device), **shared})
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _cells(key: str, value: Any) -> dict[str, Any]:
    """The columns of one value: parts of a nested one, and the two ends of an interval."""
    if isinstance(value, dict):
        return {name: cell for part, inner in value.items() for name, cell in _cells(f"{key}_{part}", inner).items()}
    if key.endswith("class_interval95"):
        low, high = value or (None, None)
        return {f"{key}_low": low, f"{key}_high": high}
    # An absent difference leaves its cells empty.
    return {} if key == "difference" else {key: value}


def episode_arrays(comparison: Comparison) -> dict[str, np.ndarray]:
    """What became of every query, for further statistics.

    Returns:
        `runs` (R,) names; `accuracy` (R, N) float64; `is_right` (R, N, Q) bool; `query_classes` (N, Q) and `episode_classes`
        (N, K) int64, places in `class_names`.
    """
    outcomes = [run.score.outcomes for run in comparison.runs]
    first = outcomes[0]
    assert first is not None
    return {
        "runs": np.array([run.name for run in comparison.runs]),
        "accuracy": np.array([run.score.per_episode for run in comparison.runs]),
        "is_right": np.array([each.is_right for each in outcomes if each is not None]),
        "query_classes": first.query_classes,
        "episode_classes": first.episode_classes,
        "class_names": np.array(first.class_names),
    }
