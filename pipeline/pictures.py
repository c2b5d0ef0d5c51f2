"""The pictures of a report: classes at a glance, attention over frames, accuracies with intervals.

Every function draws on a Figure of its own (no pyplot, no global state), writes a PNG and returns the figure.

F frames, H W pixels; T time steps, H' W' grid of an attention map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipeline.strips import (
    DOTS_PER_INCH,
    GRID,
    INK,
    MUTED,
    Page,
    StripRow,
    check_frames,
    doublings,
    join_frames,
    overlay_heat,
    pick_frames,
    save_figure,
    shared_scale,
    strip_page,
    upsample_attention,
)

SHOT_COLOURS = ("#9cc0e7", "#1d5c9f", "#0b2f57", "#7a7f87")
"""From few shots to many: the darker, the more."""
GROUP_COLOURS = ("#1d5c9f", "#b7791f", "#b4432f", "#4b7f52")
CHANCE_COLOUR = "#b4432f"
_COLUMN_WIDTH, _ROW_HEIGHT, _NAME_WIDTH = 7.6, 0.69, 2.35
"""Of the contact sheet, inches."""


@dataclass(frozen=True, slots=True)
class AttentionRow:
    """One clip and the attention that it received."""

    title: str
    """What the clip is, for instance "query: spiral_in"."""
    frames: np.ndarray
    """(F, H, W, 3) uint8."""
    attention: np.ndarray | None
    """(T, H', W') non-negative, summing to one; None: the frames are shown alone."""

    def __post_init__(self) -> None:
        check_frames(self.title, self.frames)
        if self.attention is not None and (self.attention.ndim != 3 or float(self.attention.min()) < 0):
            raise ValueError(f"{self.title}: attention {self.attention.shape} must be (T, H', W') and not negative")


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """One bar."""

    name: str
    """The method; its bars of different shots stand together."""
    shots: int
    """Labelled videos per class."""
    accuracy: float
    """Mean over episodes, in [0, 1]."""
    interval95: float
    """Half width of the 95 % interval, in [0, 1]."""

    def __post_init__(self) -> None:
        if not (0.0 <= self.accuracy <= 1.0 and 0.0 <= self.interval95 <= 1.0):
            raise ValueError(
                f"{self.name}: accuracy {self.accuracy} ± {self.interval95} must be fractions between 0 and 1"
            )


def contact_sheet(
    frames_by_class: Mapping[str, np.ndarray],
    path: Path,
    groups: Mapping[str, str] | None = None,
    captions: Mapping[str, str] | None = None,
    title: str = "",
    num_columns: int = 2,
    num_steps: int = 8,
) -> Figure:
    """One strip of frames for each class, time from left to right.

    Args:
        frames_by_class: class name -> (F, H, W, 3) uint8 of one of its videos.
        path: the PNG to write.
        groups: class name -> group, for instance its split; classes of a group stand together under a heading.
        captions: class name -> a few words under the name.
        title: over the whole sheet.
        num_columns: strips side by side.
        num_steps: frames of each strip.
    """
    if not frames_by_class:
        raise ValueError("the contact sheet needs one class or more")
    groups, captions = groups or {}, captions or {}
    lines = _sheet_lines(list(frames_by_class), groups)
    num_rows = _rows_per_column(lines, num_columns)
    top = 0.55 if title else 0.1
    figure = Figure(figsize=(_COLUMN_WIDTH * num_columns, _ROW_HEIGHT * num_rows + top + 0.1), dpi=DOTS_PER_INCH)
    page = Page(figure)
    if title:
        page.text(0.15, page.height - 0.32, title, fontsize=15, weight="bold")
    colours = dict(zip(dict.fromkeys(groups.values()), GROUP_COLOURS * len(lines), strict=False))
    for index, line in enumerate(lines):
        left = _COLUMN_WIDTH * (index // num_rows) + 0.15
        middle = page.height - top - _ROW_HEIGHT * (index % num_rows + 0.5)
        if line.is_heading:
            page.text(left, middle - 0.1, line.text, fontsize=13, weight="bold", color=colours[line.text])
            continue
        caption = captions.get(line.text, "")
        page.text(left, middle + (0.1 if caption else 0.0), line.text, fontsize=9.5, weight="bold")
        page.text(left, middle - 0.1, caption, fontsize=8, color=MUTED)
        strip = join_frames(pick_frames(frames_by_class[line.text], num_steps))
        page.picture(
            left + _NAME_WIDTH, middle - _ROW_HEIGHT / 2, _COLUMN_WIDTH - _NAME_WIDTH - 0.3, _ROW_HEIGHT - 0.05, strip
        )
    return save_figure(figure, path)


@dataclass(frozen=True, slots=True)
class _SheetLine:
    text: str
    is_heading: bool


def _sheet_lines(class_names: list[str], groups: Mapping[str, str]) -> list[_SheetLine]:
    """Headings and classes in the order of the sheet."""
    by_group: dict[str, list[str]] = {}
    for name in class_names:
        by_group.setdefault(groups.get(name, ""), []).append(name)
    lines = []
    for group, members in by_group.items():
        lines += [_SheetLine(group, True)] if group else []
        lines += [_SheetLine(name, False) for name in members]
    return lines


def _rows_per_column(lines: list[_SheetLine], num_columns: int) -> int:
    """Rows of the sheet: as few as possible, or a few more where all columns then begin with a heading."""
    fewest = -(-len(lines) // num_columns)
    for num_rows in range(fewest, fewest + 4):
        if all(line.is_heading for line in lines[::num_rows]):
            return num_rows
    return fewest


def attention_over_frames(rows: Sequence[AttentionRow], path: Path, title: str = "", num_steps: int = 8) -> Figure:
    """Clips with their attention below: a strip of frames, then the same frames dimmed under a heat map.

    The colours tell how many times the even attention (one divided by the number of positions) a place received, each
    doubling an equal step; all rows share one scale, so that a flat map looks flat.

    Args:
        rows: from top to bottom.
        path: the PNG to write.
        title: over the picture.
        num_steps: frames of each strip.
    """
    if not rows:
        raise ValueError("the attention picture needs one row or more")
    heats = [None if row.attention is None else doublings(row.attention) for row in rows]
    norm = shared_scale([each for each in heats if each is not None])
    strips = [
        StripRow(row.title, _strips_of(row.frames, heat, norm, num_steps))
        for row, heat in zip(rows, heats, strict=True)
    ]
    return strip_page(strips, path, title, norm)


def _strips_of(frames: np.ndarray, heat: np.ndarray | None, norm: Normalize, num_steps: int) -> tuple[np.ndarray, ...]:
    shown = pick_frames(frames, num_steps)
    if heat is None:
        return (join_frames(shown),)
    over_frames = pick_frames(upsample_attention(heat, frames.shape[:3]), num_steps)
    return (join_frames(shown), join_frames(overlay_heat(shown, over_frames, norm)))


def accuracy_bars(rows: Sequence[AccuracyRow], path: Path, chance: float | None = None, title: str = "") -> Figure:
    """Bars of accuracy with 95 % intervals, one group for each method.

    Args:
        rows: methods from top to bottom in the order of their first row.
        path: the PNG to write.
        chance: accuracy of guessing, drawn as a line.
        title: over the picture.
    """
    if not rows:
        raise ValueError("the accuracy picture needs one row or more")
    names = list(dict.fromkeys(row.name for row in rows))
    shots = sorted({row.shots for row in rows})
    height = 0.62 * len(names) * max(len(shots), 2) / 2.0 + 1.5
    figure = Figure(figsize=(8.4, height), dpi=DOTS_PER_INCH, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    axes = figure.add_subplot()
    thickness = 0.8 / len(shots)
    for index, k_shot in enumerate(shots):
        shift = (index - (len(shots) - 1) / 2.0) * thickness
        chosen = {names.index(row.name) + shift: row for row in rows if row.shots == k_shot}
        _draw_bars(axes, chosen, thickness * 0.9, SHOT_COLOURS[index % len(SHOT_COLOURS)], f"{k_shot}-shot")
    if chance is not None:
        label = f"chance, {100.0 * chance:.0f} %"
        axes.axvline(100.0 * chance, color=CHANCE_COLOUR, linewidth=1.3, linestyle=(0, (4, 3)), zorder=2.5, label=label)
    axes.set_yticks(range(len(names)), names, fontsize=10.5, color=INK)
    axes.invert_yaxis()
    highest = max(100.0 * (row.accuracy + row.interval95) for row in rows)
    axes.set_xlim(0.0, highest + 19.0)  # room for the numbers beside the longest bar
    axes.set_xticks([tick for tick in range(0, 101, 20) if tick <= highest + 15.0])
    axes.set_xlabel("accuracy on unseen classes, %", fontsize=10, color=MUTED)
    axes.tick_params(axis="x", labelsize=9, colors=MUTED, length=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    axes.spines[:].set_visible(False)
    if title:
        figure.suptitle(title, x=0.015, ha="left", fontsize=13, weight="bold", color=INK)
    figure.legend(loc="outside lower center", ncols=len(shots) + 1, frameon=False, fontsize=9.5, labelcolor=INK)
    return save_figure(figure, path)


def _draw_bars(axes: Axes, rows: Mapping[float, AccuracyRow], thickness: float, colour: str, label: str) -> None:
    """Bars of one number of shots, by their place, with intervals and numbers."""
    values = [100.0 * row.accuracy for row in rows.values()]
    errors = [100.0 * row.interval95 for row in rows.values()]
    axes.barh(list(rows), values, thickness, color=colour, label=label, zorder=2)
    axes.errorbar(values, list(rows), xerr=errors, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3, zorder=3)
    halo = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for place, value, error in zip(rows, values, errors, strict=True):
        text = f"{value:.1f} ± {error:.1f} %"
        axes.text(value + error + 1.2, place, text, va="center", fontsize=9, color=INK, zorder=4, bbox=halo)
