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
    ClassWorld,
    Coverage,
    cover_classes,
    cover_fixed_universe,
    cover_seeds,
    rejections,
)


def show(setting: str, results: Mapping[str, Coverage]) -> None:
    """One line of the table for each interval."""
    for name, result in results.items():
        print(f"| {setting} | {name} | {100 * result.share:.1f} % | {100 * result.half_width:.2f} |", flush=True)


def main() -> None:
    """Print the table of docs/compare.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replications", type=int, default=2000)
    replications = parser.parse_args().replications
    error = 100 * (0.95 * 0.05 / replications) ** 0.5
    print(f"{replications} replications; a true 95 % shows as 95 ± {2 * error:.1f} %\n")
    print("| world | interval | holds the truth | mean half width, points |\n|---|---|---|---|")
    for num_episodes in (100, 600):
        show(f"fixed videos, {num_episodes} episodes", cover_fixed_universe(replications, num_episodes))
    for kind in CLASS_KINDS:
        for num_classes, n_way, n_query, num_episodes in ((24, 5, 1, 5000), (10, 5, 3, 2000), (10, 5, 3, 200)):
            world = ClassWorld(kind, num_classes, n_way, n_query, num_episodes, gain=0.02)
            setting = f"classes drawn anew ({kind}), {num_classes} classes, {n_way}-way, {num_episodes} episodes"
            show(setting, cover_classes(world, replications))
    for num_seeds in (2, 3, 10):
        show(f"{num_seeds} seeds", cover_seeds(num_seeds, replications))
    for num_episodes in (20, 400):
        share = rejections(replications, num_episodes)
        print(f"\np below 0.05 without a difference, {num_episodes} episodes: {100 * share:.1f} %")


if __name__ == "__main__":
    main()
