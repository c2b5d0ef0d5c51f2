"""The pictures of what a head sees: every map of an episode drawn over the frames, to PNG and GIF.

How a map is drawn follows from its axes in `episodes.maps`; a new name there needs nothing here as long as its axes are
like those of another.

S supports, Q queries, N classes; F frames, H W pixels; T time steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.head_choices import draw_tuples, draw_weights
from pipeline.head_heat import draw_heat, draw_offset
from pipeline.head_time import draw_alignment, draw_warp
from pipeline.head_view import EpisodeView, MapKind, ShownVideo, kinds_of

__all__ = ["EpisodeView", "ShownVideo", "draw_maps"]

TITLES = {
    "self": "Self attention",
    "cross": "Cross attention",
    "patch": "Attention over patches",
    "mask": "Region that counts",
    "alignment": "Alignment of frames",
    "class_alignment": "Alignment of frames with a class",
    "tuple": "Best tuples of frames",
    "warp": "Warp of time",
    "offset": "Shift of the region",
    "support_weights": "Weight of each support",
}
"""Heading by kind; another kind is headed by its name."""


def draw_maps(
    view: EpisodeView,
    maps: Mapping[str, np.ndarray],
    folder: Path,
    queries: Sequence[int] | None = None,
    gif_frames: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Draw every map for every query; one PNG for each kind, and one GIF where something moves.

    A query is shown beside the class that it was taken for and, where that is another, its own class.

    Args:
        view: the episode, with the frames of its supports and of the queries to draw.
        maps: arrays by name, with the axes of `episodes.maps` without the episode; query and support maps of one kind share a
            picture.
        folder: where the files go, named query<number>_<kind>.png and .gif.
        queries: places of the queries to draw; None: all.
        gif_frames: frames of each GIF; 0: no GIFs.
        on_progress: called with (pictures done, pictures in all).

    Returns:
        The files written, by query.

    Raises:
        ValueError: a map that is not in `episodes.maps` or does not fit the episode.
    """
    kinds = kinds_of(view, maps)
    chosen = range(len(view.queries)) if queries is None else queries
    written: list[Path] = []
    for number, query in enumerate(chosen):
        for place, (name, kind) in enumerate(kinds.items()):
            written += _draw_kind(view, query, name, kinds, kind, folder / f"query{query}_{name}", gif_frames)
            on_progress(number * len(kinds) + place + 1, len(chosen) * len(kinds))
    return written


def _draw_kind(
    view: EpisodeView, query: int, name: str, kinds: Mapping[str, MapKind], kind: MapKind, stem: Path, gif_frames: int
) -> list[Path]:
    title = _title(name, query)
    axes = next(iter(kind.values())).axes
    if axes[-3:] == ("T", "H", "W"):
        return draw_heat(view, query, kind, stem, title, gif_frames)
    if axes[-2:] == ("T", "U"):
        return draw_alignment(view, query, kind, stem, title, gif_frames)
    if axes[-2:] == ("T", "2"):
        masks = kinds.get(name.replace("offset", "mask"), {})
        return draw_offset(view, query, kind, masks, stem, title, gif_frames)
    if axes[-1] == "2":
        return draw_warp(view, query, kind, stem, title, gif_frames)
    if axes[-1] == "K" or "video" in kind:
        return draw_tuples(view, query, kind, stem, title, gif_frames)
    if axes == ("Q", "S"):
        return draw_weights(view, query, kind, stem, title)
    raise ValueError(f"maps with axes {' '.join(axes)} cannot be drawn yet; add it to pipeline/head_pictures.py")


def _title(name: str, query: int) -> str:
    base, _, number = name.rpartition("_")
    heading = f"{TITLES.get(base, base)} ({number})" if number.isdigit() else TITLES.get(name, name)
    return f"{heading}, query {query}"
