"""How often each interval of `mastaf compare` holds the true value, in simulated worlds where it is known exactly.

python benchmarks/interval_coverage.py [--replications 2000]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

# E402: the path above comes first.
from contracts.simulated_episodes import (  # noqa: E402
    CLASS_KINDS,
    NEAR_DUPLICATES,
    ClassWorld,
    Coverage,
    cover_classes,
    cover_fixed_universe,
    cover_seeds,
    rejections,
)

SPLITS = ((24, 5, 1, 5000), (10, 5, 3, 2000), (10, 5, 3, 200), (6, 5, 3, 2000))
"""Classes, classes of an episode, queries of a class, episodes."""
FEW_CLASSES = ((8, 5, 3, 2000), (7, 5, 3, 2000))
"""As well, of near-duplicates: where the interval begins to hold less than it says."""


def heading(first: str, *others: str) -> None:
    """The head of a table."""
    print(f"\n| {first} | {' | '.join(others)} |\n|{'---|' * (1 + len(others))}")


def show(setting: str, results: Mapping[str, Coverage]) -> None:
    """One line: the share that held the truth, and the mean half width in points, of each interval."""
    cells = [f"{100 * result.share:.1f} % (± {100 * result.half_width:.2f})" for result in results.values()]
    print(f"| {setting} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the tables of docs/compare.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replications", type=int, default=2000)
    replications = parser.parse_args().replications
    error = 100 * (0.95 * 0.05 / replications) ** 0.5
    print(f"{replications} replications; a true 95 % shows as 95 ± {2 * error:.1f} %")
    heading("fixed videos", "accuracy", "paired difference", "difference, not paired")
    for num_episodes in (100, 600):
        show(f"{num_episodes} episodes", cover_fixed_universe(replications, num_episodes))
    heading(
        "classes drawn anew",
        "over episodes",
        "over classes",
        "paired difference over episodes",
        "paired difference over classes",
    )
    for kind in (*CLASS_KINDS, NEAR_DUPLICATES):
        splits = (*SPLITS, *FEW_CLASSES) if kind == NEAR_DUPLICATES else SPLITS
        for num_classes, n_way, n_query, num_episodes in splits:
            world = ClassWorld(kind, num_classes, n_way, n_query, num_episodes, gain=0.02)
            show(f"{kind}, {num_classes} classes, {num_episodes} episodes", cover_classes(world, replications))
    heading("a recipe trained again", "over seeds and episodes", "over episodes")
    for num_seeds in (2, 3, 10):
        show(f"{num_seeds} seeds", cover_seeds(num_seeds, replications))
    heading("two equal methods", "p below 0.05")
    for num_episodes in (20, 400):
        print(f"| {num_episodes} episodes | {100 * rejections(replications, num_episodes):.1f} % |")


if __name__ == "__main__":
    main()
