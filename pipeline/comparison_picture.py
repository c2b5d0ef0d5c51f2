"""The picture of a comparison: accuracy with its interval against what the head costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pipeline.strips import DOTS_PER_INCH, GRID, INK, MUTED, Page, save_figure

FRONT_COLOUR, OTHER_COLOUR, CHANCE_COLOUR = "#0b2f57", "#86aede", "#b4432f"
_PLOT_WIDTH, _FONT_SIZE = 4.3, 9.0
_LEGEND = "nothing cheaper is as accurate; bars are 95 % intervals; differences are paired: see the table"
_LINE_HEIGHT = 0.2
"""Of one label, inches."""


@dataclass(frozen=True, slots=True)
class CostPoint:
    """One method."""

    name: str
    accuracy: float
    """In [0, 1]."""
    interval95: float
    """Half width, in [0, 1]."""
    flops: int
    """Of one episode; 0 where nothing was counted."""
    milliseconds: float
    """Of one episode, above 0."""


def accuracy_against_cost(
    points: Sequence[CostPoint], path: Path, title: str = "", chance: float | None = None, device: str = "cpu"
) -> Figure:
    """Accuracy over FLOPs, and over measured time, both axes of cost in powers of ten.

    Args:
        points: the methods.
        path: the PNG to write.
        title: over the picture.
        chance: accuracy of guessing, drawn where it is in reach.
        device: where the time was measured.
    """
    if not points:
        raise ValueError("the picture of accuracy and cost needs one method or more")
    plot_height = max(3.4, _LINE_HEIGHT * (len(points) + 1))
    label_width = 0.45 + 0.075 * max(len(point.name) for point in points)
    left, foot = 0.75, 0.95
    panel = _PLOT_WIDTH + label_width
    figure = Figure(figsize=(2 * panel + left + 0.75, plot_height + foot + 0.75), dpi=DOTS_PER_INCH)
    page = Page(figure)
    # A count of 0 has no place on such an axis: it stands left of all others.
    counted = [point.flops for point in points if point.flops] or [1]
    flops = [point.flops or min(counted) / 10.0 for point in points]
    names = [point.name if point.flops else f"{point.name} (0)" for point in points]
    first = page.axes(left, foot, _PLOT_WIDTH, plot_height)
    _draw(first, points, flops, names, plot_height, chance)
    first.set_xlabel("FLOPs of one episode, head alone", fontsize=9.5, color=MUTED)
    first.set_ylabel("accuracy, %", fontsize=9.5, color=MUTED)
    first.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _with_letter(value)))
    second = page.axes(left + panel + 0.6, foot, _PLOT_WIDTH, plot_height)
    _draw(second, points, [p.milliseconds for p in points], [p.name for p in points], plot_height, chance)
    second.set_xlabel(f"milliseconds of one episode, head alone, {device}", fontsize=9.5, color=MUTED)
    second.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    page.text(0.2, page.height - 0.3, title, fontsize=12.5, weight="bold")
    page.text(left, 0.2, "● ", fontsize=10, color=FRONT_COLOUR)
    page.text(left + 0.2, 0.2, _LEGEND, fontsize=9, color=MUTED)
    return save_figure(figure, path)


def _draw(
    axes: Axes,
    points: Sequence[CostPoint],
    costs: Sequence[float],
    names: Sequence[str],
    plot_height: float,
    chance: float | None,
) -> None:
    low = 100.0 * min(point.accuracy - point.interval95 for point in points)
    high = 100.0 * max(point.accuracy + point.interval95 for point in points)
    margin = max(0.06 * (high - low), 0.5)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xscale("log")
    axes.set_xlim(10.0 ** math.floor(math.log10(min(costs)) - 0.1), 10.0 ** math.ceil(math.log10(max(costs)) + 0.1))
    axes.xaxis.set_major_locator(LogLocator(numticks=8))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if chance is not None and low - margin < 100.0 * chance < high + margin:
        axes.axhline(100.0 * chance, color=CHANCE_COLOUR, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1.5)
        # Beside the left edge, where no label of a method is.
        axes.text(
            0.01,
            100.0 * chance,
            "chance",
            transform=axes.get_yaxis_transform(),
            fontsize=8,
            color=CHANCE_COLOUR,
            va="bottom",
        )
    for point, cost in zip(points, costs, strict=True):
        # Sorted by cost, then by falling accuracy: nothing that comes before is as accurate.
        is_front = not any(
            other.accuracy >= point.accuracy and (rival, -other.accuracy) < (cost, -point.accuracy)
            for other, rival in zip(points, costs, strict=True)
        )
        axes.errorbar(
            [cost],
            [100.0 * point.accuracy],
            yerr=[100.0 * point.interval95],
            fmt="o",
            markersize=6,
            color=FRONT_COLOUR if is_front else OTHER_COLOUR,
            elinewidth=1.4,
            capsize=3,
            zorder=3,
        )
    _label(axes, [100.0 * point.accuracy for point in points], costs, names, plot_height)
    axes.grid(color=GRID, linewidth=0.8, zorder=0)
    axes.tick_params(which="both", labelsize=8.5, colors=MUTED, length=0)
    axes.spines[:].set_visible(False)


def _label(
    axes: Axes, accuracies: Sequence[float], costs: Sequence[float], names: Sequence[str], plot_height: float
) -> None:
    """Names in a column at the right, each joined to its point by a line."""
    bottom, top = axes.get_ylim()
    wanted = [(accuracy - bottom) / (top - bottom) for accuracy in accuracies]
    places = spread_apart(wanted, _LINE_HEIGHT / plot_height)
    for name, cost, accuracy, place in zip(names, costs, accuracies, places, strict=True):
        axes.annotate(
            name,
            xy=(cost, accuracy),
            xytext=(1.03, place),
            textcoords="axes fraction",
            fontsize=_FONT_SIZE,
            color=INK,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.4, "shrinkB": 4.0, "relpos": (0.0, 0.5)},
        )


def spread_apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1] at least `gap` apart, in the order of those wanted and as near to them as possible (least squares).

    Without the gaps that lie below it, a place may not fall below its neighbour's: pooling neighbours that do gives the best
    ones (isotonic regression).
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([wanted[index] - rank * gap])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    lowest, highest = gap / 2.0, max(gap / 2.0, 1.0 - gap * (len(wanted) - 0.5))
    levels = [min(max(_mean(pool), lowest), highest) for pool in pools for _ in pool]
    places = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        places[index] = levels[rank] + rank * gap
    return places


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _with_letter(value: float) -> str:
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g} {letter}"
    return f"{value:g}"
