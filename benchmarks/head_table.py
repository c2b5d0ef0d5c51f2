"""The table of docs/heads.md: what every head sees, its parameters, and its multiply-accumulates on the cubes of two usual backbones.

python benchmarks/head_table.py [--write]    prints the table, or puts it into docs/heads.md; nothing is timed, so that any machine
                                             gives the same one
"""

# E episodes; C channels, T time steps, H W grid

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# E402: the path above comes first, since the benchmarks are no package.
from contracts.meaning_episodes import SIGHTS  # noqa: E402
from episodes.batch import EpisodeBatch  # noqa: E402
from episodes.build import HEADS, build_head  # noqa: E402
from pipeline.compute_cost import count_macs  # noqa: E402

CUBES = {"ResNet-50, 8 frames": (2048, 8, 7, 7), "R3D-50, 16 frames": (2048, 1, 7, 7)}
# Tuples need several time steps; with one, TRX compares whole videos.
BEGIN = "<!-- table: begin (benchmarks/head_table.py --write) -->"
END = "<!-- table: end -->"
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


def changes(name: str, what: str) -> bool:
    """Whether the scores change when each video's grid is shuffled on its own ("space"), or with the episode's seed ("seed")."""
    channels, num_steps = SIGHTS[name].shape[:2]
    shape = (channels, num_steps, 4, 4)
    head = build_head(name, SIGHTS[name].options, shape, None, False, torch.Generator().manual_seed(0)).double().eval()
    batch = episode(shape, k_shot=2)
    batch = replace(batch, support=batch.support.double(), query=batch.query.double())
    if what == "seed":
        other = replace(batch, seeds=torch.ones(1, dtype=torch.int64))
    else:
        source = torch.Generator().manual_seed(1)
        other = replace(batch, support=_shuffled(batch.support, source), query=_shuffled(batch.query, source))
    with torch.no_grad():
        return not torch.allclose(head(batch).logits, head(other).logits, rtol=1e-9, atol=1e-9)


def _shuffled(cubes: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Each video's positions of the grid in another order, the same at every time step."""
    order = torch.rand(*cubes.shape[:2], 16, generator=source).argsort(dim=-1)  # (1, V, HW)
    flat = cubes.flatten(-2)
    return flat.gather(-1, order[:, :, None, None].expand(flat.shape)).reshape(cubes.shape)


def cells(found: tuple[int, int] | None) -> str:
    """Two cells of the table."""
    return "- | -" if found is None else f"{found[0]:,} | {found[1] / 1e6:,.1f} M"


def row(name: str) -> str:
    """One line of the table."""
    order = {"solves": "yes", "weak": "a little", "blind": "no"}[SIGHTS[name].order]
    space = "yes" if changes(name, "space") else "no"
    entry = HEADS[name]
    marks = [
        *(["experimental"] if entry.is_experimental else []),
        *(["draws"] if changes(name, "seed") else []),
        *(["sorts"] if entry.order_reason else []),
        *(["sum"] if entry.query_reduction == "sum" else []),
    ]
    costs = " | ".join(cells(cost(name, shape)) for shape in CUBES.values())
    return f"| `{name}` | {order}: {SIGHTS[name].reason} | {space} | {', '.join(marks)} | {costs} |"


def table() -> str:
    """The whole table."""
    heads = [
        f"| head | order | space | notes | {' | '.join(f'{name}: parameters | MACs' for name in CUBES)} |",
        "|---|---|---|---|" + "---:|" * (2 * len(CUBES)),
    ]
    return "\n".join([*heads, *[row(name) for name in HEADS]])


def main() -> None:
    """Print the table, or put it where it belongs."""
    text = table()
    if "--write" not in sys.argv:
        print(text)
        return
    page = ROOT / "docs" / "heads.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
