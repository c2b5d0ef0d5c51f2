"""Maps over the time of videos: alignments of frames, and warps.

F frames, H W pixels; T time steps of a query, U of a support.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import Stroke

from pipeline.head_canvas import Film, enlarged, text_inches, write_gif
from pipeline.head_view import (
    SHOWN_SUPPORTS,
    EpisodeView,
    HeadMap,
    MapKind,
    frame_steps,
    shown_classes,
    spread_places,
    step_frames,
)
from pipeline.strips import DOTS_PER_INCH, GRID, HEAT, MUTED, Page, save_figure

_WIDTH = 9.6
"""Of a page, inches; one alignment alone may need less."""
_BAR_LEGEND = "how well two frames go together; ringed: the best of each query frame"
_MATRIX, _LARGEST_CELL, _SMALLEST_PICTURE, _SIDE = 3.5, 0.5, 0.3, 0.62
"""Of an alignment, inches: the longer side, a cell, a frame beside the cells, and the room for frames."""
_WARP_FRAMES, _WARP_PICTURE, _WARP_GAP = 8, 0.72, 0.5
"""Frames of a warp; inches of one, and between the original and the sampled ones."""


@dataclass(frozen=True, slots=True)
class _Match:
    """A query beside a support."""

    title: str
    words: str
    """What its class is to the query."""
    values: np.ndarray
    """(T, U)."""
    query_frames: np.ndarray
    support_frames: np.ndarray

    @property
    def width(self) -> float:
        """Of its place on a page, inches."""
        cells = _SIDE + self.values.shape[1] * _cell(self)
        return float(max(cells, text_inches(self.title, 9.0, "bold"), text_inches(self.words, 9.0)))

    @property
    def has_best(self) -> np.ndarray:
        """(T,) bool, whether a frame of the query goes with one of the support more than with the others."""
        return np.asarray(np.ptp(self.values, axis=1) > 1e-6 * np.abs(self.values).max())


def draw_alignment(view: EpisodeView, query: int, kind: MapKind, stem: Path, title: str, gif_frames: int) -> list[Path]:
    """Which frames of the query go with which of a support: cells, the largest of each row ringed."""
    matches = _matches(view, query, kind[""])
    highest = max(float(match.values.max()) for match in matches)
    lowest = min(0.0, *(float(match.values.min()) for match in matches))
    norm = Normalize(lowest, highest if highest > lowest else lowest + 1.0)
    columns = min(2, len(matches))
    num_rows = -(-len(matches) // columns)
    num_steps = matches[0].values.shape[0]
    panel_height = _SIDE + num_steps * _cell(matches[0]) + 0.7
    subtitle = f"rows: {view.query_title(query)}; columns: a support"
    texts = (text_inches(title, 13.0, "bold"), text_inches(subtitle, 10.0), 0.2 + text_inches(_BAR_LEGEND, 8.5))
    width = _WIDTH if columns > 1 else min(_WIDTH, max(*texts, matches[0].width) + 0.4)
    page = Page(Figure(figsize=(width, num_rows * panel_height + 1.75), dpi=DOTS_PER_INCH))
    page.text(0.2, page.height - 0.3, title, fontsize=13, weight="bold")
    page.text(0.2, page.height - 0.62, subtitle, fontsize=10)
    for place, match in enumerate(matches):
        left = 0.2 + (_WIDTH / 2.0) * (place % columns)
        _draw_match(page, left, page.height - 0.85 - panel_height * (place // columns), match, norm)
    bar = page.axes(0.4, 0.5, 3.4, 0.14)
    page.figure.colorbar(ScalarMappable(norm, HEAT), cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=8, colors=MUTED, length=2)
    bar.set_xlabel(_BAR_LEGEND, fontsize=8.5, color=MUTED, loc="left")
    save_figure(page.figure, stem.with_suffix(".png"))
    if not gif_frames:
        return [stem.with_suffix(".png")]
    films = [
        [Film(view.query_title(query), match.query_frames), Film(f"best frame of {match.title}", _best_frames(match))]
        for match in matches
    ]
    return [stem.with_suffix(".png"), write_gif(films, stem.with_suffix(".gif"), title, gif_frames)]


def _matches(view: EpisodeView, query: int, alignment: HeadMap) -> list[_Match]:
    matches = []
    for shown in shown_classes(view, query):
        supports = view.supports_of(shown.label)
        for place in supports[: SHOWN_SUPPORTS if "S" in alignment.axes else 1]:
            values = alignment.at(Q=query, S=place, N=shown.label)
            name = view.class_title(shown.label)
            words = shown.words if name in shown.words else f"{name}, {shown.words}"
            matches.append(
                _Match(
                    view.support_title(place, with_class=False),
                    words,
                    np.asarray(values, float),
                    view.query_frames(query),
                    view.support_frames(place),
                )
            )
    return matches


def _draw_match(page: Page, left: float, top: float, match: _Match, norm: Normalize) -> None:
    """Title, frames along both sides, and the cells, from an upper left corner."""
    num_rows, num_columns = match.values.shape
    cell = _cell(match)
    page.text(left, top - 0.12, match.title, fontsize=9, weight="bold")
    page.text(left, top - 0.3, match.words, fontsize=9)
    corner_left, corner_top = left + _SIDE, top - 0.42 - _SIDE
    _frames_along(page, match.support_frames, num_columns, cell, (corner_left, corner_top), is_row=True)
    _frames_along(page, match.query_frames, num_rows, cell, (corner_left, corner_top), is_row=False)
    axes = page.axes(corner_left, corner_top - num_rows * cell, num_columns * cell, num_rows * cell)
    axes.imshow(match.values, cmap=HEAT, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(GRID)
    rows = np.flatnonzero(match.has_best)
    rings = axes.scatter(
        match.values.argmax(axis=1)[rows],
        rows,
        s=(cell * 30.0) ** 2,
        facecolors="none",
        edgecolors="white",
        linewidths=1.2,
    )
    rings.set_path_effects([Stroke(linewidth=2.6, foreground="black"), Stroke(linewidth=1.2, foreground="white")])


def _cell(match: _Match) -> float:
    """Side of a cell, inches."""
    return min(_LARGEST_CELL, _MATRIX / float(max(match.values.shape)))


def _frames_along(
    page: Page, frames: np.ndarray, num_steps: int, cell: float, corner: tuple[float, float], *, is_row: bool
) -> None:
    """Frames above or beside the cells; every second or third one where cells are small."""
    stride = min(num_steps, int(np.ceil(_SMALLEST_PICTURE / cell)))
    steps = np.arange(stride // 2, num_steps, stride)
    size = min(_SIDE - 0.06, stride * cell * 0.96)
    shown = enlarged(frames[step_frames(len(frames), num_steps)[steps]])
    for step, frame in zip(steps, shown, strict=True):
        middle = (step + 0.5) * cell
        if is_row:
            page.picture(corner[0] + middle - size / 2.0, corner[1] + 0.04, size, size, frame)
        else:
            page.picture(corner[0] - size - 0.04, corner[1] - middle - size / 2.0, size, size, frame)


def _best_frames(match: _Match) -> np.ndarray:
    """The support frame that goes best with each frame of the query; black where none does."""
    steps = frame_steps(len(match.query_frames), match.values.shape[0])
    best = step_frames(len(match.support_frames), match.values.shape[1])[match.values.argmax(axis=1)]
    is_shown = match.has_best[steps][:, None, None, None]
    return np.asarray(match.support_frames[best[steps]] * is_shown.astype(np.uint8))


@dataclass(frozen=True, slots=True)
class _Warp:
    title: str
    frames: np.ndarray
    scale: float
    shift: float

    def source(self, times: np.ndarray) -> np.ndarray:
        """Where the frames at some times, in [-1, 1], are taken from."""
        return self.scale * times + self.shift

    def sampled(self, times: np.ndarray) -> np.ndarray:
        """The frames at some times, mixed of the two next to the source; black outside the video."""
        source = self.source(times)
        is_inside = np.abs(source) <= 1.0 + 1e-6
        place = np.clip((source + 1.0) / 2.0, 0.0, 1.0) * (len(self.frames) - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, len(self.frames) - 1)
        part = (place - low)[:, None, None, None]
        mixed = (1.0 - part) * self.frames[low] + part * self.frames[high]
        return np.asarray(np.rint(mixed * is_inside[:, None, None, None]).astype(np.uint8))


def draw_warp(view: EpisodeView, query: int, kind: MapKind, stem: Path, title: str, gif_frames: int) -> list[Path]:
    """Videos above, the frames that a head makes of them below, each joined with its place in the original."""
    warps = _warps(view, query, kind)
    row_height = 2.0 * _WARP_PICTURE + _WARP_GAP + 0.5
    page = Page(Figure(figsize=(_WIDTH, len(warps) * row_height + 0.75), dpi=DOTS_PER_INCH))
    page.text(0.2, page.height - 0.3, title, fontsize=13, weight="bold")
    widest = max(abs(warp.scale) + abs(warp.shift) for warp in warps)
    for place, warp in enumerate(warps):
        _draw_warp_row(page, page.height - 0.55 - place * row_height, warp, max(1.0, widest))
    page.text(_WIDTH - 0.2, 0.14, "time →", fontsize=9, color=MUTED, ha="right")
    save_figure(page.figure, stem.with_suffix(".png"))
    if not gif_frames:
        return [stem.with_suffix(".png")]
    films = [
        [Film(warp.title, warp.frames), Film("as sampled", warp.sampled(_times(len(warp.frames))))] for warp in warps
    ]
    return [stem.with_suffix(".png"), write_gif(films, stem.with_suffix(".gif"), title, gif_frames)]


def _warps(view: EpisodeView, query: int, kind: MapKind) -> list[_Warp]:
    warps = []
    if "query" in kind:
        scale, shift = (float(value) for value in kind["query"].at(Q=query))
        warps.append(_Warp(view.query_title(query), view.query_frames(query), scale, shift))
    if "support" in kind:
        for shown in shown_classes(view, query):
            for place in view.supports_of(shown.label)[:SHOWN_SUPPORTS]:
                scale, shift = (float(value) for value in kind["support"].at(S=place))
                warps.append(_Warp(view.support_title(place), view.support_frames(place), scale, shift))
    return warps


def _times(count: int) -> np.ndarray:
    return np.linspace(-1.0, 1.0, count) if count > 1 else np.zeros(1)


def _draw_warp_row(page: Page, top: float, warp: _Warp, widest: float) -> None:
    page.text(
        0.2, top - 0.1, f"{warp.title}: source time = {warp.scale:.2f} t {warp.shift:+.2f}", fontsize=10, weight="bold"
    )
    left, width = 1.05, _WIDTH - 1.25
    height = 2.0 * _WARP_PICTURE + _WARP_GAP
    axes = page.axes(left, top - 0.25 - height, width, height)
    shown = spread_places(len(warp.frames), _WARP_FRAMES)
    times = _times(len(shown))
    # In inches, so that frames keep their proportions: half a frame beyond the outermost times.
    room = width / 2.0 - _WARP_PICTURE / 2.0
    size = min(_WARP_PICTURE, 0.95 * 2.0 * room / widest / max(1, len(shown) - 1))
    axes.set_xlim(-width / 2.0, width / 2.0)
    axes.set_ylim(0.0, height)
    axes.set_axis_off()
    upper, lower = height - _WARP_PICTURE / 2.0, _WARP_PICTURE / 2.0
    source = warp.source(times)
    for time, from_time, original, sampled in zip(
        times, source, enlarged(warp.frames[shown]), enlarged(warp.sampled(times)), strict=True
    ):
        _place(axes, time * room / widest, upper, size, original)
        _place(axes, time * room / widest, lower, size, sampled)
        is_inside = abs(from_time) <= 1.0 + 1e-6
        axes.plot(
            [time * room / widest, from_time * room / widest],
            [lower + size / 2.0, upper - size / 2.0],
            color=MUTED, linewidth=1.2, linestyle="-" if is_inside else ":", marker="o", markersize=2.5,
        )  # fmt: skip
        if not is_inside:
            axes.text(time * room / widest, lower, "outside", color="white", fontsize=6.5, ha="center", va="center")
    page.text(0.2, top - 0.25 - _WARP_PICTURE / 2.0, "video", fontsize=9, color=MUTED)
    page.text(0.2, top - 0.25 - height + _WARP_PICTURE / 2.0, "as sampled", fontsize=9, color=MUTED)


def _place(axes: Axes, middle: float, height: float, size: float, frame: np.ndarray) -> None:
    half = size / 2.0
    extent = (middle - half, middle + half, height - half, height + half)
    axes.imshow(frame, extent=extent, aspect="auto", interpolation="lanczos")
