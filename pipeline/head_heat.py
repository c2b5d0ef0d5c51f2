"""Maps over the positions of videos: attention as heat, and the region that an offset moves.

F frames, H W pixels; T time steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.head_canvas import Film, enlarged, with_region, write_gif
from pipeline.head_view import SHOWN_SUPPORTS, EpisodeView, HeadMap, MapKind, ShownClass, shown_classes
from pipeline.pictures import AttentionRow, attention_over_frames
from pipeline.strips import (
    StripRow,
    doublings,
    join_frames,
    overlay_heat,
    pick_frames,
    shared_scale,
    strip_page,
    upsample_attention,
)

STRIP_FRAMES = 8


def draw_heat(view: EpisodeView, query: int, kind: MapKind, stem: Path, title: str, gif_frames: int) -> list[Path]:
    """Attention over the frames of a query and of the supports of the classes it is shown beside."""
    heat_rows = _heat_rows(view, query, kind)
    rows = [row for class_rows in heat_rows for row in class_rows]
    png = stem.with_suffix(".png")
    attention_over_frames(rows, png, title, STRIP_FRAMES)
    if not gif_frames:
        return [png]
    norm = shared_scale([doublings(row.attention) for row in rows if row.attention is not None])
    films: list[list[Film]] = []
    for class_rows in heat_rows:
        films.append([])
        for row in class_rows:
            assert row.attention is not None
            heat = upsample_attention(doublings(row.attention), row.frames.shape[:3])
            films[-1] += [Film(row.title, row.frames), Film("", overlay_heat(row.frames, heat, norm))]
    return [png, write_gif(films, stem.with_suffix(".gif"), title, gif_frames)]


def _heat_rows(view: EpisodeView, query: int, kind: MapKind) -> list[list[AttentionRow]]:
    """Rows by class that the query is shown beside; the query itself once where its map does not depend on the class."""
    of_query, of_support = kind.get("query", kind.get("")), kind.get("support")
    rows = []
    for number, shown in enumerate(shown_classes(view, query)):
        class_rows = []
        if of_query is not None and ("N" in of_query.axes or number == 0):
            values = _attention(of_query, of_query.at(Q=query, N=shown.label))
            class_rows.append(
                AttentionRow(_query_words(view, query, of_query, shown), view.query_frames(query), values)
            )
        if of_support is not None:
            class_rows += _support_rows(view, query, of_support, shown)
        if class_rows:
            rows.append(class_rows)
    return rows


def _query_words(view: EpisodeView, query: int, of_query: HeadMap, shown: ShownClass) -> str:
    beside = shown.words if "N" in of_query.axes else shown_classes(view, query)[0].words
    return f"{view.query_title(query)}, {beside}"


def _support_rows(view: EpisodeView, query: int, of_support: HeadMap, shown: ShownClass) -> list[AttentionRow]:
    """A row for each support, or one for the class, over the frames of its first support."""
    supports = view.supports_of(shown.label)
    if "S" in of_support.axes:
        return [
            AttentionRow(
                view.support_title(place),
                view.support_frames(place),
                _attention(of_support, of_support.at(Q=query, S=place)),
            )
            for place in supports[:SHOWN_SUPPORTS]
        ]
    first = supports[0]
    joint = f", the map is of all {len(supports)} together" if len(supports) > 1 else ""
    values = _attention(of_support, of_support.at(Q=query, N=shown.label))
    return [AttentionRow(view.support_title(first) + joint, view.support_frames(first), values)]


def _attention(of_what: HeadMap, values: np.ndarray) -> np.ndarray:
    if float(values.min()) < 0.0:
        raise ValueError(f"map {of_what.name!r} has negative values, but attention over positions has none")
    return np.asarray(values, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class _Region:
    """A video with the region that a head looked at."""

    title: str
    frames: np.ndarray
    offsets: np.ndarray
    """(T, 2), of this video."""
    mask: np.ndarray | None
    """(T, H', W'): how much each place counts; None: only the box is drawn."""


def draw_offset(
    view: EpisodeView, query: int, kind: MapKind, masks: MapKind, stem: Path, title: str, gif_frames: int
) -> list[Path]:
    """The moved region as a box with an arrow on the frames of the query, and the opposite one on those of the class.

    Args:
        view: the episode.
        query: which query.
        kind: the offsets.
        masks: masks of query and support of the same head, drawn as heat; empty: frames alone.
        stem: path of the pictures without ending.
        title: over the picture.
        gif_frames: 0: no GIF.
    """
    regions = [
        region for shown in shown_classes(view, query) for region in _regions(view, query, kind[""], masks, shown)
    ]
    heats = [None if region.mask is None else doublings(region.mask) for region in regions]
    known = [heat for heat in heats if heat is not None]
    norm = shared_scale(known) if known else None
    drawn = []
    for region, heat in zip(regions, heats, strict=True):
        frames = region.frames
        if heat is not None and norm is not None:
            frames = overlay_heat(frames, upsample_attention(heat, frames.shape[:3]), norm)
        drawn.append(with_region(enlarged(frames), _offsets_of_frames(region.offsets, len(frames))))
    png = stem.with_suffix(".png")
    strips = [
        StripRow(region.title, (join_frames(pick_frames(frames, STRIP_FRAMES)),))
        for region, frames in zip(regions, drawn, strict=True)
    ]
    strip_page(strips, png, title, norm)
    if not gif_frames:
        return [png]
    films = [Film(region.title, frames) for region, frames in zip(regions, drawn, strict=True)]
    return [png, write_gif([films], stem.with_suffix(".gif"), title, gif_frames)]


def _regions(
    view: EpisodeView, query: int, offset: HeadMap, masks: Mapping[str, HeadMap], shown: ShownClass
) -> list[_Region]:
    offsets = offset.at(Q=query, N=shown.label)
    first = view.supports_of(shown.label)[0]

    def mask_of(role: str) -> np.ndarray | None:
        return _attention(masks[role], masks[role].at(Q=query, N=shown.label)) if role in masks else None

    return [
        _Region(f"{view.query_title(query)}, {shown.words}", view.query_frames(query), offsets, mask_of("query")),
        _Region(
            f"{view.support_title(first)}, moved the opposite way",
            view.support_frames(first),
            -offsets,
            mask_of("support"),
        ),
    ]


def _offsets_of_frames(offsets: np.ndarray, num_frames: int) -> np.ndarray:
    """(T, 2) -> (F, 2), between time steps as the heat is."""
    return np.stack(
        [upsample_attention(offsets[:, axis, None, None], (num_frames, 1, 1))[:, 0, 0] for axis in (0, 1)], axis=1
    )
