"""One episode as pictures of a head's maps show it, and its maps by kind, held against their axes.

S supports, Q queries, N classes; F frames, H W pixels; T U time steps of the cubes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from episodes.maps import AXES, axes_of
from pipeline.strips import check_frames

ID_LETTERS, CLASS_LETTERS = 26, 22
"""Of a video's id and of a class name in a title; with more, a title would leave its page."""
SHOWN_SUPPORTS = 2
"""Of a class, where each support has something of its own to show: with all of them a picture could not be read."""


@dataclass(frozen=True, slots=True)
class ShownVideo:
    """A support or a query."""

    video_id: str
    label: int
    """Class within the episode; -1: not known (a query), or padding (a support)."""


@dataclass(frozen=True, slots=True)
class EpisodeView:
    """The videos of one episode, what a head made of them, and their frames."""

    class_names: tuple[str, ...]
    """(N,)."""
    supports: tuple[ShownVideo, ...]
    """In the order of the batch."""
    queries: tuple[ShownVideo, ...]
    """In the order of the batch."""
    scores: np.ndarray
    """(Q, N); the largest predicts."""
    frames: Mapping[str, np.ndarray]
    """(F, H, W, 3) uint8 by video id, of every support and of the queries that are drawn; all of one shape."""
    num_steps: int
    """Time steps T of a cube: what the members of a tuple count."""

    def __post_init__(self) -> None:
        if self.scores.shape != (len(self.queries), len(self.class_names)):
            raise ValueError(
                f"scores are {self.scores.shape}, but the episode has {len(self.queries)} queries and {len(self.class_names)} classes"
            )
        for video_id, frames in self.frames.items():
            check_frames(video_id, frames)
        if len({frames.shape for frames in self.frames.values()}) > 1:
            raise ValueError("the clips of an episode must have one shape")

    def predicted(self, query: int) -> int:
        """The class that a query was taken for."""
        return int(self.scores[query].argmax())

    def supports_of(self, label: int) -> list[int]:
        """Places of the supports of a class."""
        return [place for place, video in enumerate(self.supports) if video.label == label]

    def query_frames(self, query: int) -> np.ndarray:
        """(F, H, W, 3) uint8."""
        return self.frames[self.queries[query].video_id]

    def support_frames(self, support: int) -> np.ndarray:
        """(F, H, W, 3) uint8."""
        return self.frames[self.supports[support].video_id]

    def class_title(self, label: int) -> str:
        """The name of a class, shortened."""
        return shortened_text(self.class_names[label], CLASS_LETTERS) if label >= 0 else "class not known"

    def query_title(self, query: int) -> str:
        """Which video it is, and of which class."""
        video = self.queries[query]
        return f"query {shortened_text(video.video_id, ID_LETTERS)} ({self.class_title(video.label)})"

    def support_title(self, support: int, with_class: bool = True) -> str:
        """Which video it is, and which of how many of its class."""
        video = self.supports[support]
        shots = self.supports_of(video.label)
        place = f" {shots.index(support) + 1} of {len(shots)}" if len(shots) > 1 else ""
        end = f" ({self.class_title(video.label)})" if with_class else ""
        return f"support{place}: {shortened_text(video.video_id, ID_LETTERS)}{end}"


@dataclass(frozen=True, slots=True)
class ShownClass:
    """A class that a picture shows a query beside."""

    label: int
    words: str
    """What it is to the query."""


def shown_classes(view: EpisodeView, query: int) -> list[ShownClass]:
    """The class that a query was taken for, and its own where that is another."""
    predicted, label = view.predicted(query), view.queries[query].label
    if label < 0:
        return [ShownClass(predicted, f"taken for {view.class_title(predicted)}")]
    if predicted == label:
        return [ShownClass(predicted, "rightly recognised")]
    return [
        ShownClass(predicted, f"wrongly taken for {view.class_title(predicted)}"),
        ShownClass(label, f"beside its own class {view.class_title(label)}"),
    ]


@dataclass(frozen=True, slots=True)
class HeadMap:
    """One map of an episode."""

    name: str
    axes: tuple[str, ...]
    """Letters of `episodes.maps`, without E."""
    values: np.ndarray

    def at(self, **places: int) -> np.ndarray:
        """The values at the places of some axes, by letter; letters that the map does not have are passed over.

        Only leading axes can be fixed: ``at(Q=0, N=2)`` of axes Q N T H W gives T H W.
        """
        values = self.values
        for letter in self.axes:
            if letter not in places:
                break
            values = values[places[letter]]
        return values


MapKind = dict[str, HeadMap]
"""The maps that make one picture together, by what they are of: "query", "support", "video", or "" for the pair."""


def kinds_of(view: EpisodeView, maps: Mapping[str, np.ndarray]) -> dict[str, MapKind]:
    """Maps by kind ("cross" of cross_query and cross_support, "cross_2" of cross_query_2), checked.

    Args:
        view: the episode.
        maps: arrays by name with the axes of `episodes.maps`, but without E.

    Raises:
        ValueError: a name that is not in `episodes.maps`, other axes than it has there, or values that are not finite.
    """
    kinds: dict[str, MapKind] = {}
    for name, values in maps.items():
        base, _, number = name.rpartition("_")
        base, number = (base, f"_{number}") if number.isdigit() else (name, "")
        kind, _, role = base.rpartition("_")
        if role not in ("query", "support", "video"):
            kind, role = base, ""
        kinds.setdefault(kind + number, {})[role] = _checked(view, name, np.asarray(values))
    return kinds


def _checked(view: EpisodeView, name: str, values: np.ndarray) -> HeadMap:
    try:
        axes = tuple(axes_of(name).split()[1:])
    except KeyError as error:
        raise ValueError(f"no map is called {name!r}; known are {', '.join(AXES)} (episodes/maps.py)") from error
    sizes = {"S": len(view.supports), "Q": len(view.queries), "N": len(view.class_names), "2": 2}
    fits = values.ndim == len(axes) and all(
        size == sizes.get(letter, size) for letter, size in zip(axes, values.shape, strict=True)
    )
    if not fits or values.size == 0:
        known = ", ".join(f"{letter} = {sizes[letter]}" for letter in axes if letter in sizes)
        raise ValueError(f"map {name!r} is {values.shape}, but its axes are {' '.join(axes)} with {known}")
    if not np.isfinite(values).all():
        raise ValueError(f"map {name!r} has values that are not finite")
    return HeadMap(name, axes, values)


def step_frames(num_frames: int, num_steps: int) -> np.ndarray:
    """The frame in the middle of each time step, (T,) int64; a step stands for an even share of the clip."""
    return np.asarray(((np.arange(num_steps) + 0.5) * num_frames / num_steps).astype(np.int64))


def frame_steps(num_frames: int, num_steps: int) -> np.ndarray:
    """The time step that each frame lies in, (F,) int64."""
    return np.arange(num_frames) * num_steps // num_frames


def spread_places(count: int, most: int, wanted: Sequence[int] = ()) -> list[int]:
    """At most `most` of 0 .. count - 1 at even distances, first and last among them; and all that are wanted."""
    even = np.rint(np.linspace(0, count - 1, min(count, most))).astype(int)
    return sorted({*(int(place) for place in even), *wanted})


def shortened_text(text: str, most: int) -> str:
    """A text that is too long without its middle."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[: most - 1 - half]}…{text[len(text) - half :]}"
