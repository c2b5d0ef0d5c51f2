"""The table of docs/heads.md: parameters and multiply-accumulates of every head on the cubes of two usual backbones.

python benchmarks/head_table.py [--write]    prints the table, or puts it into docs/heads.md; nothing is timed, so that any machine
                                             gives the same one
"""

# C channels, T time steps, H W grid

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

# E402: the path above comes first, since the benchmarks are no package.
from episodes.batch import EpisodeBatch  # noqa: E402
from episodes.build import HEADS, build_head  # noqa: E402
from pipeline.compute_cost import count_macs  # noqa: E402

CUBES = {"ResNet-50, 8 frames": (2048, 8, 7, 7), "R3D-50, 16 frames": (2048, 1, 7, 7)}
# Tuples need several time steps; with one, TRX compares whole videos.
SINGLE_STEP = {"trx": {"cardinalities": [1]}, "strm": {"cardinalities": [1]}}


def episode(shape: tuple[int, int, int, int], k_shot: int = 1) -> EpisodeBatch:
    """A random 5-way episode with one query."""
    source = torch.Generator().manual_seed(0)
    return EpisodeBatch(
        support=torch.rand(1, 5 * k_shot, *shape, generator=source),
        support_labels=torch.arange(5 * k_shot)[None] % 5,
        query=torch.rand(1, 1, *shape, generator=source),
        query_labels=None,
        n_way=5,
        seeds=torch.zeros(1, dtype=torch.int64),
    )


def cost(name: str, shape: tuple[int, int, int, int]) -> tuple[int, int] | None:
    """Trainable parameters and MACs of one 5-way 1-shot episode with one query; None where the cubes do not suit the head."""
    options = SINGLE_STEP.get(name, {}) if shape[1] == 1 else {}
    try:
        head = build_head(name, options, shape, None, False, torch.Generator().manual_seed(0)).eval()
    except ValueError:
        return None
    parameters = sum(parameter.numel() for parameter in head.parameters())
    batch = episode(shape)
    return parameters, count_macs(lambda: head(batch))


def cells(found: tuple[int, int] | None) -> str:
    """Two cells of the table."""
    return "- | -" if found is None else f"{found[0]:,} | {found[1] / 1e6:,.1f} M"


def row(name: str) -> str:
    """One line of the table."""
    return f"| `{name}` | {' | '.join(cells(cost(name, shape)) for shape in CUBES.values())} |"


def main() -> None:
    """Print the table."""
    print(f"| head | {' | '.join(f'{name}: parameters | MACs' for name in CUBES)} |")
    print("|---|" + "---:|" * (2 * len(CUBES)))
    for name in HEADS:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
