"""A comparison as a table for the terminal, with what made it below."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.comparison import Comparison
from pipeline.comparison_rows import SEED_KEYS, Row
from pipeline.provenance import code_version, hardware
from pipeline.statistics import Interval

_PAGE_WIDTH = 300
"""More than any table needs: nothing is cut, on a narrow terminal lines wrap."""
_ACCURACY = ("accuracy\n%", "on other\nclasses")
_DIFFERENCE = ("difference\nto the first", "if not\npaired", "p,\nHolm", "on other\nclasses")
_COST = ("para-\nmeters", "FLOPs", "milli-\nseconds")


def to_text(comparison: Comparison, runs: Sequence[Row], recipes: Sequence[Row]) -> str:
    """The table between what was scored and what the numbers mean; plain text, as wide as it needs to be."""
    episodes, protocol = comparison.episodes, comparison.episodes.protocol
    asked = "of every class" if protocol.kind == "per_class" else "of one class"
    title = (
        f"{episodes.num_episodes} episodes of {episodes.split}, {protocol.n_way}-way {protocol.k_shot}-shot, "
        f"{protocol.n_query} queries {asked}; {len(episodes.manifest.classes(episodes.split))} classes, "
        f"{counted(len(episodes.manifest.videos_of(episodes.split)), 'video')}"
    )
    page = io.StringIO()
    Console(file=page, width=_PAGE_WIDTH, color_system=None).print(_table(runs, recipes))
    table = [line.rstrip() for line in page.getvalue().splitlines()]
    return "\n".join([title, "", *table, "", *_notes(comparison, runs, recipes)])


def counted(count: int, noun: str) -> str:
    """A number with its noun: "1 run", "2 runs"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _table(runs: Sequence[Row], recipes: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("run", no_wrap=True)
    has_differences = len(runs) > 1
    for title in (*_ACCURACY, *(_DIFFERENCE if has_differences else ()), *_COST):
        table.add_column(title, justify="right", no_wrap=True)
    for row in recipes or runs:
        table.add_row(*_table_cells(row, "", has_differences))
        if row.is_recipe:
            members = {run.name for run in row.runs}
            for member in runs:
                if member.name in members:
                    table.add_row(*_table_cells(member, "  ", has_differences))
    return table


def _table_cells(row: Row, indent: str, has_differences: bool) -> list[Text]:
    cost = row.cost
    cells = [
        f"{indent}{row.name}",
        f"{100 * row.accuracy:.2f} ± {100 * row.interval95:.2f}",
        _percent(row.class_interval, ".1f"),
        *(_difference_cells(row) if has_differences else ()),
        _short(cost.parameters),
        _short(cost.flops),
        f"{cost.milliseconds:.3g}",
    ]
    return [Text(cell) for cell in cells]


def _difference_cells(row: Row) -> list[str]:
    difference = row.difference
    if difference is None:
        return [""] * len(_DIFFERENCE)
    return [
        f"{100 * difference.mean:+.2f} ± {100 * difference.interval95:.2f}",
        f"± {100 * difference.unpaired_interval95:.2f}",
        _p_value(row.adjusted_p_value),
        _percent(row.class_difference, "+.1f"),
    ]


def _percent(interval: Interval | None, form: str) -> str:
    return "-" if interval is None else f"{100 * interval.low:{form}} to {100 * interval.high:{form}}"


def _p_value(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _short(count: int) -> str:
    """A count with three digits."""
    for factor, letter in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= factor:
            return f"{count / factor:.3g}{letter}"
    return str(count)


def _notes(comparison: Comparison, runs: Sequence[Row], recipes: Sequence[Row]) -> list[str]:
    episodes = comparison.episodes
    stores = dict.fromkeys(run.run.store_fingerprint[:12] for run in comparison.runs)
    lines = [
        "±: 95 % over other episodes of these classes"
        + (" (recipes: and other seeds)" if recipes else "")
        + "; on other classes: 95 % for other classes in their place (bootstrap).",
    ]
    if len(runs) > 1:
        first = f"{recipes[0].name} (runs: to {runs[0].name})" if recipes else runs[0].name
        lines.append(
            f"difference: to {first}, in points, paired over the episodes; if not paired: its ± on different "
            "episodes; p: paired t-test, adjusted for the number of rows after Holm."
        )
    for row in recipes:
        if row.seeds:
            lines.append(
                f"{row.name}: spread of the runs {100 * row.seeds.spread:.2f}, ± {100 * row.seeds.seed_interval95:.2f} over "
                f"the seeds alone ({' and '.join(SEED_KEYS)})."
            )
    facts = hardware()
    threads = counted(int(str(facts["threads"])), "thread")
    machine = facts.get("gpu") if comparison.device.type == "cuda" else f"{facts['machine']}, {threads}"
    lines.append(
        f"Cost of the head alone, for one episode: FLOPs of matrix products and convolutions (MACs are half of it); "
        f"milliseconds on {comparison.device} ({machine})."
    )
    if episodes.left_out:
        lines.append(
            f"{counted(len(episodes.left_out), 'video')} of {episodes.split} {'is' if len(episodes.left_out) == 1 else 'are'} "
            "not in all stores and left out: split "
            f"{episodes.whole_split_hash[:12]} -> {episodes.manifest.split_hash[:12]}."
        )
    lines.append(
        f"split {episodes.manifest.split_hash[:12]}, episodes {comparison.runs[0].score.episode_hash[:12]} (seed {episodes.seed}), "
        f"store {', '.join(stores)}, code {code_version()}"
    )
    return lines
