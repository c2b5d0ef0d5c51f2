"""Strips of frames, and a page to put them on: the parts of the pictures.

F frames, H W pixels; T time steps, H' W' grid of an attention map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

DOTS_PER_INCH = 150
INK, MUTED, GRID = "#20242c", "#6b7280", "#e4e6ea"
HEAT = "inferno"
_STRIP_GAP = 0.06
"""Between a strip and its heat map, inches."""
_TALLEST_STRIP = 1.6
"""Inches; a strip of few frames does not fill the width."""
_MOST_TICKS = 8
"""Of the bar of colours: more would touch each other."""


class Page:
    """A figure on which things are placed in inches, from the lower left corner."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.width, self.height = (float(each) for each in figure.get_size_inches())

    def text(self, left: float, middle: float, text: str, color: str = INK, **options: Any) -> None:
        """Write, centred on a height; `options` are those of a matplotlib text."""
        self.figure.text(left / self.width, middle / self.height, text, color=color, va="center", **options)

    def axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """Axes that fill a rectangle."""
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def picture(self, left: float, bottom: float, width: float, height: float, pixels: np.ndarray) -> None:
        """Show (H, W, 3) uint8 inside a rectangle, at the left, keeping its proportions."""
        axes = self.axes(left, bottom, width, height)
        axes.imshow(pixels, interpolation="lanczos")
        axes.set_anchor("W")
        axes.set_axis_off()


@dataclass(frozen=True, slots=True)
class StripRow:
    """Strips that belong together, one below the other."""

    title: str
    strips: tuple[np.ndarray, ...]
    """(H, W, 3) uint8 each, all of one size."""


def strip_page(rows: Sequence[StripRow], path: Path, title: str = "", norm: Normalize | None = None) -> Figure:
    """Rows of strips under their titles; with the bar of the colours of `doublings` where `norm` gives their scale."""
    width = 9.6
    strip_heights = [
        min(_TALLEST_STRIP, (width - 0.4) * row.strips[0].shape[0] / row.strips[0].shape[1]) + _STRIP_GAP
        for row in rows
    ]
    top, foot, head = (0.62 if title else 0.12), (0.4 if norm is None else 0.85), 0.32
    height = top + foot + sum(head + len(row.strips) * each for row, each in zip(rows, strip_heights, strict=True))
    page = Page(Figure(figsize=(width, height), dpi=DOTS_PER_INCH))
    if title:
        page.text(0.2, height - 0.32, title, fontsize=13, weight="bold")
    edge = height - top
    for row, strip_height in zip(rows, strip_heights, strict=True):
        page.text(0.2, edge - 0.17, row.title, fontsize=10.5, weight="bold")
        edge -= head
        for strip in row.strips:
            edge -= strip_height
            page.picture(0.2, edge + _STRIP_GAP / 2.0, width - 0.4, strip_height - _STRIP_GAP, strip)
    if norm is not None:
        _heat_bar(page, norm)
    page.text(width - 0.2, foot - 0.28, "time →", fontsize=9, color=MUTED, ha="right")
    return save_figure(page.figure, path)


def _heat_bar(page: Page, norm: Normalize) -> None:
    bar = page.axes(0.4, 0.5, 3.4, 0.14)
    page.figure.colorbar(ScalarMappable(norm, HEAT), cax=bar, orientation="horizontal")
    powers = [power for power in range(-2, 24) if 0.0 <= norm(power) <= 1.0]
    ticks: list[float] = [*powers[:: -(-len(powers) // _MOST_TICKS)]]
    if len(ticks) < 3:  # a flat map: its ends tell how flat
        ticks = [float(norm.inverse(end)) for end in (0.0, 0.5, 1.0)]
    bar.set_xticks(ticks, [f"{2.0**power:.3g}×" for power in ticks])
    bar.tick_params(labelsize=8, colors=MUTED, length=2)
    bar.set_xlabel("attention, as a multiple of an even spread", fontsize=8.5, color=MUTED)


def doublings(attention: np.ndarray) -> np.ndarray:
    """How often attention doubled from an even spread; all below a quarter of it counts as a quarter."""
    mean = float(attention.mean())
    return np.asarray(np.log2(np.maximum(attention / mean, 0.25))) if mean > 0.0 else np.zeros(attention.shape)


def shared_scale(heats: Sequence[np.ndarray]) -> Normalize:
    """One scale of colours for several maps of `doublings`."""
    # A scale that spans at least 10 % keeps the rounding noise of an even map from looking like a pattern.
    lowest = min([-0.07, *(float(each.min()) for each in heats)])
    return Normalize(lowest, max([0.07, *(float(each.max()) for each in heats)]))


def check_frames(name: str, frames: np.ndarray) -> None:
    """Refuse what is not (F, H, W, 3) uint8, by name."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"{name}: frames are {frames.dtype} {frames.shape}, but uint8 (F, H, W, 3) is needed")


def pick_frames(frames: np.ndarray, num_steps: int) -> np.ndarray:
    """Frames at even distances, first and last among them; all where there are no more than asked for."""
    if len(frames) <= num_steps:
        return frames
    return np.asarray(frames[np.rint(np.linspace(0, len(frames) - 1, num_steps)).astype(int)])


def join_frames(frames: np.ndarray) -> np.ndarray:
    """Frames side by side on white: (F, H, W, 3) -> (H, F (W + gap) - gap, 3)."""
    check_frames("a strip", frames)
    gap = max(1, frames.shape[2] // 20)
    padded = np.pad(frames, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    return np.asarray(np.concatenate(list(padded), axis=1)[:, :-gap])


def overlay_heat(frames: np.ndarray, heat: np.ndarray, norm: Normalize) -> np.ndarray:
    """Frames in grey under the colours of the heat: (F, H, W, 3) uint8 and (F, H, W) -> (F, H, W, 3) uint8."""
    grey = (frames @ np.array([0.299, 0.587, 0.114]))[..., None]
    colours = 255.0 * mpl.colormaps[HEAT](norm(heat))[..., :3]
    return np.asarray(np.rint(0.5 * grey + 0.5 * colours).astype(np.uint8))


def save_figure(figure: Figure, path: Path) -> Figure:
    """Write a PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white")
    return figure


def upsample_attention(attention: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Linear interpolation between the centres of cells: (T, H', W') -> (F, H, W), flat beyond the outermost centres."""
    values = np.asarray(attention, dtype=np.float64)
    for axis, length in enumerate(shape):
        cells = values.shape[axis]
        where = np.clip((np.arange(length) + 0.5) * cells / length - 0.5, 0.0, cells - 1.0)
        low = np.minimum(where.astype(int), max(cells - 2, 0))
        high = np.minimum(low + 1, cells - 1)
        part = (where - low).reshape([-1 if other == axis else 1 for other in range(3)])
        values = np.take(values, low, axis) * (1.0 - part) + np.take(values, high, axis) * part
    return values
