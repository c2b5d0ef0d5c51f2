"""Which frames of a video make a clip: the published index formulas, driven by an explicit generator.

Formulas: reference section 7.2. Letters: F frames of the clip, n frames of the video.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from extract.config import Axis, SamplingConfig, ShortPolicy
from extract.draws import ViewDraws

Indices = NDArray[np.int64]
Seconds = NDArray[np.float64]

LARGEST_JITTER = 5
"""Frames by which either end of the window may move in training; from the published code."""


class Draws(Protocol):
    """The one method of extract.draws.ViewDraws that the formulas use; `high` is exclusive."""

    def integers(self, low: int, high: int) -> int:
        """An integer of [low, high)."""
        ...


class VideoTooShortError(Exception):
    """A video has fewer frames than the clip, and the short-video policy is "drop" or "fail"."""


@dataclass(frozen=True, slots=True)
class Window:
    """First and last frame number that a clip may use, both inclusive."""

    start: int
    """First frame number."""
    end: int
    """Last frame number."""


@dataclass(frozen=True, slots=True)
class Range:
    """Inclusive range of a draw."""

    low: int
    """Smallest value."""
    high: int
    """Largest value."""

    def draw(self, draws: Draws) -> int:
        """One integer of the range."""
        return draws.integers(self.low, self.high + 1)


@dataclass(frozen=True, slots=True)
class JitterRanges:
    """What the training formula may draw for the two ends of the window."""

    start: Range
    """Of the first frame."""
    end: Range
    """Of the last frame."""


@dataclass(frozen=True, slots=True)
class ScoringView:
    """One of the clips and crops of a video whose scores are averaged; nothing about it is drawn anew.

    A clip's frames are those that the view-0 formula gives for `num_clips` times as many frames, dealt out in turns: clip j has
    every `num_clips`-th of them from the j-th on. So each clip spreads over the whole video, as a sparsely sampled clip does, and
    the clips lie at even offsets from each other within the step between two frames, which is how VideoMAE (Tong et al. 2022,
    https://arxiv.org/abs/2203.12602) scores such clips. The three crops along the longer side are those of Non-local networks
    (Wang et al. 2018, https://arxiv.org/abs/1711.07971) and SlowFast (Feichtenhofer et al. 2019,
    https://arxiv.org/abs/1812.03982). One clip with the centre crop is view 0. A video with fewer frames than a clip gives the same
    clip each time, as the short-video policy says.
    """

    clip_index: int
    """j, in [0, num_clips)."""
    num_clips: int
    """Of the video; at least 1."""
    along: float | None
    """Where the crop sits along the longer side: 0.0 and 1.0 are its ends, None is the centre."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_index < self.num_clips:
            raise ValueError(f"clip_index {self.clip_index} is not one of num_clips {self.num_clips}, counted from 0")


View = int | ScoringView
"""What is cut from a video: a numbered view (0 to evaluate, others to train), or one of several to score."""

_ALONG: dict[int, tuple[float | None, ...]] = {1: (None,), 3: (0.0, None, 1.0)}


def scoring_views(num_clips: int, num_crops: int) -> tuple[ScoringView, ...]:
    """The (num_clips * num_crops,) views of a video to score, all crops of the first clip first.

    Args:
        num_clips: spread over the video, at least 1.
        num_crops: 1 is the centre; 3 are the begin, the centre and the end of the longer side.
    """
    if num_clips < 1 or num_crops not in _ALONG:
        raise ValueError(f"num_clips {num_clips} and num_crops {num_crops}; give at least 1 clip, and 1 or 3 crops")
    return tuple(
        ScoringView(clip_index, num_clips, along) for clip_index in range(num_clips) for along in _ALONG[num_crops]
    )


def refuse_bad_views(views: Sequence[View]) -> None:
    """Raise ValueError for no views at all, or a negative number."""
    if not views or any(isinstance(view, int) and view < 0 for view in views):
        raise ValueError(f"views must be numbers from 0 on, at least one, not {list(views)}")


def numbered(view: View) -> int:
    """The number of the view whose draws this one has."""
    return 0 if isinstance(view, ScoringView) else view


def view_generator(seed: int, video_id: str, view: int) -> ViewDraws:
    """Draws of one view of one video; they depend on the three arguments alone."""
    return ViewDraws(seed, video_id, view)


def spread(window: Window, num_frames: int) -> Indices:
    """Evenly spread frame numbers (F,), truncated as int() does; a last one of several is exactly the window's end."""
    return np.linspace(window.start, window.end, num_frames, dtype=np.float64).astype(np.int64)


def jitter_ranges(num_available: int, num_frames: int) -> JitterRanges | None:
    """Ranges of the common training jitter; None where the video leaves no room for it."""
    pad = int(min(LARGEST_JITTER, (num_available - num_frames) / 2))
    if pad < 1:
        return None
    last = num_available - 1
    return JitterRanges(Range(0, pad), Range(last - pad, last))


def jitter_window(num_available: int, num_frames: int, draws: Draws) -> Window:
    """Training window of all four published codes; start is drawn before end."""
    ranges = jitter_ranges(num_available, num_frames)
    if ranges is None:
        return Window(0, num_available - 1)
    start = ranges.start.draw(draws)
    return Window(start, ranges.end.draw(draws))


def guarded_window(window: Window, num_available: int, num_frames: int) -> Window:
    """TRX: a window that is shorter than the clip becomes the whole video."""
    return Window(0, num_available - 1) if window.end - window.start < num_frames else window


def even(num_available: int, num_frames: int, view: int, draws: Draws) -> Indices:
    """The whole video, the same in every view."""
    del view, draws
    return spread(Window(0, num_available - 1), num_frames)


def reference(num_available: int, num_frames: int, view: int, draws: Draws) -> Indices:
    """View 0: the whole video. Other views: the published training jitter."""
    if view == 0:
        return even(num_available, num_frames, view, draws)
    return reference_test_jitter(num_available, num_frames, view, draws)


def reference_test_jitter(num_available: int, num_frames: int, view: int, draws: Draws) -> Indices:
    """MASTAF as released: jitter in every view, so in evaluation too."""
    del view
    return spread(jitter_window(num_available, num_frames, draws), num_frames)


def trx(num_available: int, num_frames: int, view: int, draws: Draws) -> Indices:
    """TRX and STRM: view 0 leaves out the first and last frame, others jitter; a video of F frames is taken whole."""
    if num_available == num_frames:
        return np.arange(num_frames, dtype=np.int64)
    return ta2n(num_available, num_frames, view, draws)


def ta2n(num_available: int, num_frames: int, view: int, draws: Draws) -> Indices:
    """TA2N: as TRX without the shortcut for videos of exactly F frames."""
    window = Window(1, num_available - 2) if view == 0 else jitter_window(num_available, num_frames, draws)
    window = guarded_window(window, num_available, num_frames)
    if num_frames == 1:
        return np.array([_single_frame(window, view, draws)], dtype=np.int64)
    return spread(window, num_frames)


def _single_frame(window: Window, view: int, draws: Draws) -> int:
    """The published code draws one frame at random in test too; our view 0 is fixed, so it takes the middle."""
    last = max(window.start, window.end - 1)
    return (window.start + last) // 2 if view == 0 else Range(window.start, last).draw(draws)


IndexPolicy = Callable[[int, int, int, Draws], Indices]

POLICIES: dict[str, IndexPolicy] = {
    "even": even,
    "reference": reference,
    "reference_test_jitter": reference_test_jitter,
    "trx": trx,
    "ta2n": ta2n,
}


def short_indices(num_available: int, num_frames: int, policy: ShortPolicy) -> Indices:
    """Frame numbers (F,) of a video with fewer than F frames: all, then the last one again, or from the start again."""
    if policy in ("drop", "fail"):
        raise VideoTooShortError(f"{num_available} frames, fewer than num_frames = {num_frames}")
    positions = np.arange(num_frames, dtype=np.int64)
    return np.minimum(positions, num_available - 1) if policy == "pad" else positions % num_available


def on_axis(positions: Indices, seconds: Seconds, axis: Axis) -> Indices:
    """Frame numbers for positions of an index formula.

    Args:
        positions: of the formula, (F,) int64 in [0, n).
        seconds: presentation time of each frame, (n,) float64 ascending.
        axis: "index" gives the positions themselves; "time" takes position i as the moment
            first + i (last - first) / (n - 1) and gives the frame shown nearest to it, the earlier one of two.

    Returns:
        Frame numbers, (F,) int64. On a constant frame rate both axes agree.
    """
    if axis == "index" or len(seconds) < 2:
        return positions
    moments = seconds[0] + positions * ((seconds[-1] - seconds[0]) / (len(seconds) - 1))
    after = np.clip(np.searchsorted(seconds, moments), 1, len(seconds) - 1)
    # Containers store times in ticks; less than a nanosecond of difference is rounding, hence a tie.
    is_earlier = moments - seconds[after - 1] <= seconds[after] - moments + 1e-9
    nearest = np.where(is_earlier, after - 1, after)
    frame_indices: Indices = np.searchsorted(seconds, seconds[nearest]).astype(np.int64)  # of equal times the first
    return frame_indices


def sample_frames(seconds: Seconds, sampling: SamplingConfig, view: View, draws: Draws) -> Indices:
    """Frame numbers (F,) of one view of a video whose n >= 1 frames are shown at `seconds` (n,)."""
    num_available = len(seconds)
    if num_available < sampling.num_frames:
        return short_indices(num_available, sampling.num_frames, sampling.short_policy)
    first, step = (view.clip_index, view.num_clips) if isinstance(view, ScoringView) else (0, 1)
    positions = POLICIES[sampling.policy](num_available, sampling.num_frames * step, numbered(view), draws)
    return on_axis(positions[first::step], seconds, sampling.axis)
