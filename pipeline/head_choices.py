"""What a head chose: tuples of frames, and the weight of each support.

F frames, H W pixels; T time steps; K members of a tuple.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.head_canvas import (
    MARK,
    OTHER_COLOUR,
    OWN_COLOUR,
    PREDICTED_COLOUR,
    Film,
    enlarged,
    framed,
    text_inches,
    write_gif,
)
from pipeline.head_view import (
    EpisodeView,
    MapKind,
    ShownClass,
    frame_steps,
    shortened_text,
    shown_classes,
    spread_places,
    step_frames,
)
from pipeline.strips import DOTS_PER_INCH, GRID, INK, MUTED, Page, join_frames, save_figure

_WIDTH, _LARGEST_PICTURE, _JOIN = 9.6, 1.05, 0.6
"""Of a page, inches: the widest, one frame of a tuple, and between query and support."""
_MOST_STEPS = 12
"""Time steps of a strip, beside the chosen ones."""
_MOST_BARS = 30
"""Supports in a picture of their weights."""
_BAR_ROW = 0.46
"""Inches."""


@dataclass(frozen=True, slots=True)
class _Strip:
    """A video with the time steps that were chosen."""

    title: str
    frames: np.ndarray
    num_steps: int
    chosen: tuple[int, ...]

    @property
    def shown(self) -> list[int]:
        """Time steps in the picture."""
        return spread_places(self.num_steps, _MOST_STEPS, self.chosen)

    @property
    def width(self) -> float:
        """Of all frames that are shown, inches, where the page has room for them."""
        return len(self.shown) * _LARGEST_PICTURE * 1.05

    def pictures(self) -> np.ndarray:
        """One frame for each time step that is shown, the chosen ones framed."""
        frames = enlarged(self.frames[step_frames(len(self.frames), self.num_steps)[self.shown]])
        return framed(frames, [step in self.chosen for step in self.shown])

    def film(self) -> Film:
        """All frames, framed while a chosen time step lasts."""
        steps = frame_steps(len(self.frames), self.num_steps)
        return Film(self.title, framed(enlarged(self.frames), np.isin(steps, self.chosen)))


def draw_tuples(view: EpisodeView, query: int, kind: MapKind, stem: Path, title: str, gif_frames: int) -> list[Path]:
    """The tuple of the query that fits a class best, framed and joined with the one of a support that it attends to most."""
    pairs = [_strips(view, query, kind, shown) for shown in shown_classes(view, query)]
    row_height = 2.0 * (_LARGEST_PICTURE + 0.5) + _JOIN + 0.3
    strips = [strip for pair in pairs for strip in pair]
    widths = [text_inches(title, 13.0, "bold")]
    widths += [max(strip.width, text_inches(strip.title, 10.0, "bold")) for strip in strips]
    width = min(_WIDTH, max(widths) + 0.4)
    page = Page(Figure(figsize=(width, 0.6 + row_height * len(pairs)), dpi=DOTS_PER_INCH))
    page.text(0.2, page.height - 0.3, title, fontsize=13, weight="bold")
    for place, pair in enumerate(pairs):
        top = page.height - 0.6 - place * row_height
        ends = []
        for number, strip in enumerate(pair):
            ends.append(_draw_strip(page, top - number * (_LARGEST_PICTURE + 0.5 + _JOIN), strip, is_lower=number == 1))
        if len(ends) == 2:
            for start, end in zip(ends[0], ends[1], strict=True):
                horizontal, vertical = zip(start, end, strict=True)
                line = Line2D(
                    [each / page.width for each in horizontal], [each / page.height for each in vertical],
                    color=MARK, linewidth=2.0, marker="o", markersize=4.0,
                )  # fmt: skip
                page.figure.add_artist(line)
    save_figure(page.figure, stem.with_suffix(".png"))
    if not gif_frames:
        return [stem.with_suffix(".png")]
    films = [[strip.film() for strip in pair] for pair in pairs]
    return [stem.with_suffix(".png"), write_gif(films, stem.with_suffix(".gif"), title, gif_frames)]


def _strips(view: EpisodeView, query: int, kind: MapKind, shown: ShownClass) -> list[_Strip]:
    """The query where its tuple is given, and the support where its tuple or its place is."""

    def members(role: str) -> tuple[int, ...]:
        if role not in kind:
            return ()
        steps = tuple(int(step) for step in kind[role].at(Q=query, N=shown.label))
        if min(steps) < 0 or max(steps) >= view.num_steps:
            raise ValueError(f"map {kind[role].name!r} names time steps {steps}, but a cube has {view.num_steps}")
        return steps

    strips = []
    if "query" in kind:
        words = f"{view.query_title(query)}, {shown.words}"
        strips.append(_Strip(words, view.query_frames(query), view.num_steps, members("query")))
    if "support" in kind or "video" in kind:
        place = view.supports_of(shown.label)[0]
        if "video" in kind:
            place = int(kind["video"].at(Q=query, N=shown.label))
            if not 0 <= place < len(view.supports):
                raise ValueError(f"map {kind['video'].name!r} names support {place} of {len(view.supports)}")
        strips.append(_Strip(view.support_title(place), view.support_frames(place), view.num_steps, members("support")))
    return strips


def _draw_strip(page: Page, top: float, strip: _Strip, *, is_lower: bool) -> list[tuple[float, float]]:
    """Title, frames and their time steps; where the chosen frames meet the other strip, in inches."""
    pictures = strip.pictures()
    joined = join_frames(pictures)
    scale = min(_LARGEST_PICTURE / pictures.shape[2], (_WIDTH - 0.4) / joined.shape[1])
    width, height = joined.shape[1] * scale, joined.shape[0] * scale
    gap = (joined.shape[1] - len(pictures) * pictures.shape[2]) / max(1, len(pictures) - 1)
    # The numbers stand on the side that no line leads to.
    bottom = top - 0.05 - height if is_lower else top - 0.5 - height
    page.picture(0.2, bottom, width, height, joined)
    page.text(0.2, top - 0.14 if not is_lower else bottom - 0.36, strip.title, fontsize=10, weight="bold")
    ends = {}
    for place, step in enumerate(strip.shown):
        middle = 0.2 + (place * (pictures.shape[2] + gap) + pictures.shape[2] / 2.0) * scale
        is_chosen = step in strip.chosen
        page.text(
            middle, bottom - 0.12 if is_lower else bottom + height + 0.12, str(step), fontsize=8, ha="center",
            color=INK if is_chosen else MUTED, weight="bold" if is_chosen else "normal",
        )  # fmt: skip
        ends[step] = (middle, bottom + height if is_lower else bottom)
    return [ends[step] for step in strip.chosen]


def draw_weights(view: EpisodeView, query: int, kind: MapKind, stem: Path, title: str) -> list[Path]:
    """A bar for each support beside its frames, by class; the largest ones where they are many."""
    weights = kind[""].at(Q=query)
    places = [place for place, video in enumerate(view.supports) if video.label >= 0]
    shown = sorted(places, key=lambda place: -abs(float(weights[place])))[:_MOST_BARS]
    shown.sort(key=lambda place: (view.supports[place].label, places.index(place)))
    page = Page(Figure(figsize=(_WIDTH, len(shown) * _BAR_ROW + 1.45), dpi=DOTS_PER_INCH))
    page.text(0.2, page.height - 0.3, title, fontsize=13, weight="bold")
    page.text(0.2, page.height - 0.6, f"{view.query_title(query)}, {shown_classes(view, query)[0].words}", fontsize=10)
    top = page.height - 0.85
    colours = {view.queries[query].label: OWN_COLOUR, view.predicted(query): PREDICTED_COLOUR}
    for row, place in enumerate(shown):
        video, middle = view.supports[place], top - (row + 0.5) * _BAR_ROW
        frames = view.support_frames(place)
        strip = join_frames(enlarged(frames[spread_places(len(frames), 3)]))
        page.picture(0.2, middle - 0.21, 1.4, 0.42, strip)
        page.text(1.7, middle + 0.09, shortened_text(view.class_names[video.label], 26), fontsize=9, weight="bold")
        page.text(1.7, middle - 0.09, shortened_text(video.video_id, 34), fontsize=8, color=MUTED)
    axes = page.axes(4.2, top - len(shown) * _BAR_ROW, _WIDTH - 5.1, len(shown) * _BAR_ROW)
    values = [float(weights[place]) for place in shown]
    bar_colours = [colours.get(view.supports[place].label, OTHER_COLOUR) for place in shown]
    axes.barh(range(len(shown)), values, 0.62, color=bar_colours)
    for row, value in enumerate(values):
        axes.annotate(
            f"{value:.3g}", (max(value, 0.0), row), (4, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=8, colors=MUTED, length=2)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(GRID)
    left_out = len(places) - len(shown)
    note = f"; {left_out} supports with smaller weights are not shown" if left_out else ""
    page.text(
        0.2, 0.2, f"blue: the class it was taken for; orange: its own, where another{note}", fontsize=8.5, color=MUTED
    )
    save_figure(page.figure, stem.with_suffix(".png"))
    return [stem.with_suffix(".png")]
