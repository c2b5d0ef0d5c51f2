"""One video in, the clips of all its views out, decoded once.

Letters: V views; F frames; H W pixels (both the crop size); n frames of the video.
"""

import errno
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from av.error import DecoderNotFoundError, FFmpegError
from numpy.typing import NDArray

from extract.clips import (
    ScoringView,
    Seconds,
    VideoTooShortError,
    View,
    numbered,
    refuse_bad_views,
    sample_frames,
    view_generator,
)
from extract.config import SamplingConfig
from extract.container import Decoded, Timeline, VideoFileReader
from extract.errors import REASONS, VideoError, is_disk_trouble
from extract.folder import FrameFolderReader
from extract.transform import MAX_PIXELS, CropPlace, FrameSize, crop_frame, draw_crop, resize_frame, resized_size

__all__ = ["REASONS", "VideoError", "VideoSource", "VideoTooShortError", "ViewClips", "read_views"]


@dataclass(frozen=True, slots=True)
class VideoSource:
    """Where the frames of one video are."""

    video_id: str
    """Name of the video; the draws of its random views depend on it."""
    path: Path
    """A video file, or a folder of jpg or png files."""
    start_seconds: float | None = None
    """Begin of the segment, inclusive, counted from the first frame; None is the begin of the video."""
    end_seconds: float | None = None
    """End of the segment, exclusive; None is the end of the video."""
    root: Path | None = None
    """Where links of a folder of pictures must not lead out of, itself without links; None: they may lead anywhere."""

    def __post_init__(self) -> None:
        if self.start_seconds is not None and self.end_seconds is not None and self.start_seconds >= self.end_seconds:
            raise ValueError(
                f"{self.video_id}: start_seconds {self.start_seconds} is not before end_seconds {self.end_seconds}"
            )


@dataclass(frozen=True, slots=True)
class ViewClips:
    """The clips of V views of one video."""

    clips: NDArray[np.uint8]
    """(V, F, H, W, 3) RGB."""
    status: Literal["ok", "degraded"]
    """degraded: usable, but not what the file promised; see reason."""
    reason: str | None
    """A key of REASONS when degraded."""
    num_frames: int
    """n, frames of the whole video; a segment does not change it. As decoded, or as announced behind a segment's end."""
    frame_indices: NDArray[np.int64]
    """(V, F) frame numbers in the whole video."""
    frame_seconds: NDArray[np.float64]
    """(V, F) presentation times, 0 at the first frame of the video; the frame number for a folder of pictures."""


class FrameReader(Protocol):
    """A file or a folder."""

    def announced(self) -> Timeline:
        """Times of all frames before decoding."""
        ...

    def frames(self, wanted: Collection[int], stop: int | None = None) -> Iterator[Decoded]:
        """Pass over the frames in order, giving those that are wanted; the pass may end after `stop` frames."""
        ...

    def observed(self) -> Timeline:
        """Times of all frames that the last pass met."""
        ...


@dataclass(frozen=True, slots=True)
class _ViewPlan:
    frame_indices: NDArray[np.int64]
    place: CropPlace


def read_views(source: VideoSource, sampling: SamplingConfig, views: Sequence[View]) -> ViewClips:
    """Decode a video and cut the clips of the given views.

    The numbers of a view do not depend on which other views are asked for.

    Args:
        source: the video.
        sampling: which frames, and how each becomes a square.
        views: V numbers from 0 on, or those of `extract.clips.scoring_views`; at least one.

    Raises:
        VideoError: the video cannot be used; the reason is one of REASONS.
        VideoTooShortError: it has fewer than `sampling.num_frames` frames and `short_policy` is "fail".
    """
    refuse_bad_views(views)
    with _one_reason(source):
        return _read(source, sampling, views)


@contextmanager
def _one_reason(source: VideoSource) -> Iterator[None]:
    """Turn whatever one video can cause into a VideoError, so that it costs one video and is counted."""
    try:
        yield
    except (VideoError, VideoTooShortError):
        raise
    except DecoderNotFoundError as error:
        raise VideoError("no_decoder", _detail(error)) from error
    except MemoryError as error:  # PyAV's own is also an FFmpegError
        raise VideoError("out_of_memory", _detail(error), is_passing=True) from error
    except FFmpegError as error:
        raise VideoError("corrupt", _detail(error), is_disk_trouble(error)) from error
    except PermissionError as error:
        raise VideoError("permission", _detail(error)) from error
    # PyAV also raises IndexError, UnicodeDecodeError and others on damaged files.
    except Exception as error:
        raise VideoError("unexpected", f"{source.video_id}: {_detail(error)}", is_disk_trouble(error)) from error


def _detail(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _read(source: VideoSource, sampling: SamplingConfig, views: Sequence[View]) -> ViewClips:
    reader = _open_reader(source.path, source.root)
    timeline = reader.announced()
    problem = timeline.problem
    plans = _plan(source, sampling, views, timeline.seconds) if len(timeline.seconds) else []
    stop = _enough_frames(source, timeline)
    clips = _collect(reader, sampling, plans, stop)
    observed = reader.observed()
    if stop is not None and np.array_equal(observed.seconds, timeline.seconds[:stop]):
        observed = replace(timeline, problem=observed.problem)
    elif stop is not None:  # frames are missing or moved: only the whole video tells their numbers
        clips = _collect(reader, sampling, plans)
        observed = reader.observed()
    problem = problem or observed.problem
    if len(observed.seconds) == 0:
        reason = {None: "no_frames", "damaged": "corrupt"}.get(problem, problem)
        raise VideoError(str(reason), f"{source.path.name}: {len(timeline.seconds)} frames announced, none decoded")
    if len(observed.seconds) != len(timeline.seconds):
        problem = problem or "frame_count_mismatch"
        timeline = observed
        plans = _plan(source, sampling, views, timeline.seconds)
        clips = _collect(reader, sampling, plans)
        if len(reader.observed().seconds) != len(timeline.seconds):
            raise VideoError("corrupt", f"{source.path.name}: two passes gave different numbers of frames")
    if len(_segment(source, timeline.seconds)) < sampling.num_frames:
        problem = problem or "short_video"
    frame_indices = np.stack([plan.frame_indices for plan in plans])
    return ViewClips(
        clips=clips,
        status="degraded" if problem else "ok",
        reason=problem,
        num_frames=len(timeline.seconds),
        frame_indices=frame_indices,
        frame_seconds=timeline.seconds[frame_indices],
    )


def _enough_frames(source: VideoSource, timeline: Timeline) -> int | None:
    """Frames up to the first one behind the segment; None where all must be decoded.

    A whole video is always decoded to its end, since damage shows nowhere else, and so is one without times of its own.
    """
    if source.end_seconds is None or not timeline.is_timed:
        return None
    num_needed = int(np.searchsorted(timeline.seconds, source.end_seconds)) + 1
    return num_needed if num_needed < len(timeline.seconds) else None


def _open_reader(path: Path, root: Path | None) -> FrameReader:
    """Look at what the path is before anything opens it: opening a pipe would wait for ever."""
    path = path.absolute()
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoError("missing", f"{path.name}: {error.strerror}") from error
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        # A name that holds a NUL or is too long, or a loop of links; others, such as EIO, are the disk's trouble.
        if isinstance(error, OSError) and error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        raise VideoError("not_a_file", f"{path.name}: {error}") from error
    if stat.S_ISDIR(status.st_mode):
        return FrameFolderReader(path, root)
    if not stat.S_ISREG(status.st_mode):
        raise VideoError("not_a_file", f"{path.name} is neither a regular file nor a folder")
    if status.st_size == 0:
        raise VideoError("empty_file", f"{path.name} has 0 bytes")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{path.name} may not be read")
    return VideoFileReader(path)


def _segment(source: VideoSource, seconds: Seconds) -> NDArray[np.int64]:
    """Frame numbers between start_seconds (inclusive) and end_seconds (exclusive)."""
    start = -np.inf if source.start_seconds is None else source.start_seconds
    end = np.inf if source.end_seconds is None else source.end_seconds
    return np.flatnonzero((seconds >= start) & (seconds < end)).astype(np.int64)


def _plan(source: VideoSource, sampling: SamplingConfig, views: Sequence[View], seconds: Seconds) -> list[_ViewPlan]:
    segment = _segment(source, seconds)
    if len(segment) == 0:
        raise VideoError(
            "empty_segment", f"[{source.start_seconds}, {source.end_seconds}) s of a video of {seconds[-1]:.3f} s"
        )
    plans = []
    for view in views:
        # Fresh draws each time: planning anew after a wrong frame count repeats the same ones.
        draws = view_generator(sampling.seed, source.video_id, numbered(view))
        place = draw_crop(sampling, numbered(view), draws)
        if isinstance(view, ScoringView):
            place = replace(place, along=view.along)
        try:
            chosen = sample_frames(seconds[segment], sampling, view, draws)
        except VideoTooShortError as error:
            if sampling.short_policy == "drop":
                raise VideoError("short_video", str(error)) from error
            raise VideoTooShortError(
                f"video {source.video_id} has {error}, and short_policy is 'fail'. "
                "Use short_policy pad, loop or drop, or take the video out of the manifest"
            ) from error
        plans.append(_ViewPlan(segment[chosen], place))
    return plans


def _collect(
    reader: FrameReader, sampling: SamplingConfig, plans: Sequence[_ViewPlan], stop: int | None = None
) -> NDArray[np.uint8]:
    """Run over the video once and keep the crops, (V, F, H, W, 3). Frames that never come stay 0; `_read` checks."""
    side = sampling.crop_size
    clips = np.zeros((len(plans), sampling.num_frames, side, side, 3), dtype=np.uint8)
    wanted = {int(index) for plan in plans for index in plan.frame_indices}
    for frame in reader.frames(wanted, stop):
        size = resized_size(FrameSize(frame.pixels.shape[1], frame.pixels.shape[0]), sampling.resize_size)
        if size.width * size.height > MAX_PIXELS:
            raise VideoError(
                "too_large",
                f"a frame would be resized to {size.width} x {size.height} pixels, at most {MAX_PIXELS} are accepted",
            )
        resized = resize_frame(frame.pixels, sampling.resize_size)
        for view, plan in enumerate(plans):
            positions = plan.frame_indices == frame.index
            if positions.any():
                clips[view, positions] = crop_frame(resized, side, plan.place)
    return clips
