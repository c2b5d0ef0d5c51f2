"""Clips decoded from the video files while the model works: the source of end-to-end training and of classification.

V videos, K clips and crops of a video; F frames, H W pixels.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import RunConfig
from extract.clips import VideoTooShortError, View, scoring_views
from extract.config import SamplingConfig
from extract.decode import VideoError, VideoSource, ViewClips
from pipeline.clip_decoder import ClipDecoder
from pipeline.console import shortened

Row = tuple[str, View]
Clip = NDArray[np.uint8]

BAD_VIDEO = (VideoError, VideoTooShortError)

WAY_OUT = (
    "An episode never avoids a video silently. Repair the file: a run that has begun goes on with --resume. Or write a manifest "
    "without it by `mastaf extract` followed by `mastaf dataset exclude MANIFEST --from-store STORE --out NEW.csv`: other videos are "
    "other episodes, so that is for a new run (another --out, from this one's weights with training.initial_weights), or for "
    "`mastaf evaluate RUN --manifest NEW.csv`."
)

LOOK_SECONDS = 0.2
"""Between two looks at whether to go on waiting for what a decoding process may never answer."""

Result = TypeVar("Result")


def nothing() -> None:
    """What is done while waiting where nobody asks for more."""


def awaited(future: Future[Result], while_waiting: Callable[[], None] = nothing) -> Result:
    """The result of a future; `while_waiting` is called every `LOOK_SECONDS` until it is there, and may raise to leave."""
    while True:
        try:
            return future.result(LOOK_SECONDS)
        except TimeoutError:
            if future.done():  # in this moment, or with such an error of its own
                return future.result()
        while_waiting()


class SourceError(ValueError):
    """A video that an episode needs cannot be had; the message names it and the way out."""


@dataclass(frozen=True, slots=True)
class _Underway:
    """A video that is being decoded, for all who wait for one of its views."""

    views: tuple[View, ...]
    future: Future[ViewClips]

    def clip(self, view: View, while_waiting: Callable[[], None]) -> Clip:
        clip: Clip = awaited(self.future, while_waiting).clips[self.views.index(view)]
        return clip


class LiveClips:
    """Clips decoded from the video files by processes of their own; the latest stay in memory. A context manager.

    Any number of threads may read at once: they share the processes and the memory, and what one of them has being decoded is
    not decoded again for another. Neither the order nor a pixel depends on the number of processes. They start with the first
    read and end with `close`, or with this object.

    Args:
        videos: by id.
        sampling: of all clips.
        decode_workers: processes; None: one less than this process's cores, at most 16. 0: threads of this process, no limits.
        cache_bytes: of clips that stay in memory.
        seconds_per_video: after which a video is given up.
        decode_memory_bytes: limit of each process.
        pin_memory: give tensors whose way to a CUDA device is short and is not waited for.
    """

    def __init__(
        self,
        videos: Mapping[str, VideoSource],
        sampling: SamplingConfig,
        decode_workers: int | None = 0,
        cache_bytes: int = 1 << 30,
        seconds_per_video: float = 120.0,
        decode_memory_bytes: int = 8 << 30,
        pin_memory: bool = False,
    ) -> None:
        self.videos = videos
        self.sampling = sampling
        self.cache_bytes = cache_bytes
        self.pin_memory = pin_memory
        self.degraded: dict[str, str] = {}
        """Reason by video id, of every video that was read so far and is not quite whole."""
        self.failed: dict[str, str] = {}
        """Reason and detail by video id, of every video that could not be decoded so far."""
        self._decoder = ClipDecoder(sampling, decode_workers, seconds_per_video, decode_memory_bytes)
        self._clips: OrderedDict[Row, Clip] = OrderedDict()
        self._held_bytes = 0
        self._underway: dict[Row, _Underway] = {}
        # A future that is done already calls back at once, in the thread that holds it.
        self._lock = RLock()

    @classmethod
    def of(cls, config: RunConfig, videos: Mapping[str, VideoSource], device: torch.device | None = None) -> Self:
        """With the settings of a config, for a model on this device."""
        return cls(
            videos,
            config.sampling,
            config.training.decode_workers,
            config.training.clip_cache_bytes,
            config.extraction.seconds_per_video,
            config.extraction.decode_memory_bytes,
            pin_memory=device is not None and device.type == "cuda",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the decoding processes at once; reads that wait for them fail."""
        self._decoder.close()

    @property
    def num_second_tries(self) -> int:
        """Videos that were decoded anew after a fault that may pass (time, memory, the disk, a lost process)."""
        return self._decoder.num_second_tries

    def check(self, video_ids: Sequence[str], views: Sequence[int]) -> None:  # noqa: ARG002  any view can be made of a file
        """Refuse videos that have no file in this source; whether they decode, `try_all` tells."""
        unknown = [video_id for video_id in video_ids if video_id not in self.videos]
        if unknown:
            raise SourceError(f"{len(unknown)} videos have no file: {shortened(unknown)}")

    def try_all(
        self, video_ids: Sequence[str], on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Decode every video once, keeping nothing; afterwards `failed` and `degraded` are complete for them.

        Args:
            video_ids: each once.
            on_progress: called with (videos done, videos in all), also while a video lets wait for itself; may raise to leave.

        Raises:
            SourceError: counts the videos that cannot be decoded and names the first of them.
        """
        upcoming = iter(video_ids)
        waiting: deque[tuple[str, Future[ViewClips]]] = deque()
        try:
            for done in range(len(video_ids)):
                while len(waiting) < 4 * self._decoder.num_at_once:
                    video_id = next(upcoming, None)
                    if video_id is None:
                        break
                    waiting.append((video_id, self._decoder.submit(self.videos[video_id], [0])))
                video_id, future = waiting.popleft()
                self._note(video_id, future, partial(on_progress, done, len(video_ids)))
                on_progress(done + 1, len(video_ids))
        finally:
            for _, future in waiting:
                future.cancel()
        self.refuse_failed(video_ids)

    def refuse_failed(self, video_ids: Sequence[str]) -> None:
        """Raise SourceError where some of these videos are among those that could not be decoded so far."""
        bad = [f"{video_id} ({self.failed[video_id]})" for video_id in video_ids if video_id in self.failed]
        if bad:
            raise SourceError(f"{len(bad)} of {len(video_ids)} videos cannot be decoded: {shortened(bad)}. {WAY_OUT}")

    def read(self, video_ids: Sequence[str], views: Sequence[View]) -> Tensor:
        """Clips (V, F, H, W, 3) uint8, in the order asked for.

        Raises:
            SourceError: a video cannot be decoded; it is named with the reason.
        """
        return self.begin_read(video_ids, views)()

    def read_scoring(
        self,
        video_ids: Sequence[str],
        num_clips: int,
        num_crops: int,
        while_waiting: Callable[[], None] = nothing,
    ) -> Tensor:
        """The clips of `extract.clips.scoring_views`, all crops of a clip side by side: (V, K, F, H, W, 3) uint8.

        Args:
            video_ids: V videos.
            num_clips: spread over each video.
            num_crops: of each clip; K = num_clips * num_crops.
            while_waiting: as `begin_read`.

        Raises:
            SourceError: as `read`.
        """
        views = scoring_views(num_clips, num_crops)
        ids = [video_id for video_id in video_ids for _ in views]
        clips = self.begin_read(ids, [*views] * len(video_ids), while_waiting)()
        return clips.reshape(len(video_ids), len(views), *clips.shape[1:])

    def begin_read(
        self, video_ids: Sequence[str], views: Sequence[View], while_waiting: Callable[[], None] = nothing
    ) -> Callable[[], Tensor]:
        """Have clips decoded, and return at once: what is returned waits for them and gives what `read` gives.

        Args:
            video_ids: of the clips.
            views: of each.
            while_waiting: called every `LOOK_SECONDS` of the wait; may raise to leave.
        """
        rows = list(zip(video_ids, views, strict=True))
        held: dict[Row, Clip] = {}
        underway: dict[Row, _Underway] = {}
        wanted: dict[str, list[View]] = {}
        with self._lock:
            for row in dict.fromkeys(rows):
                if row in self._clips:
                    held[row] = self._clips[row]
                    self._clips.move_to_end(row)
                elif row in self._underway:
                    underway[row] = self._underway[row]
                else:
                    wanted.setdefault(row[0], []).append(row[1])
            for video_id, missing in wanted.items():
                task = _Underway(tuple(missing), self._decoder.submit(self.videos[video_id], tuple(missing)))
                new = {(video_id, view): task for view in missing}
                self._underway |= new
                underway |= new
                # Without the task, which holds the future: a cycle would keep the clips in memory until Python looks for such.
                task.future.add_done_callback(partial(self._finish, video_id, task.views))
        return partial(self._gather, rows, held, underway, while_waiting)

    def _gather(
        self,
        rows: list[Row],
        held: dict[Row, Clip],
        underway: dict[Row, _Underway],
        while_waiting: Callable[[], None],
    ) -> Tensor:
        side = self.sampling.crop_size
        shape = (len(rows), self.sampling.num_frames, side, side, 3)
        clips = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pin_memory)
        places = clips.numpy()
        for index, row in enumerate(rows):
            try:
                places[index] = held[row] if row in held else underway[row].clip(row[1], while_waiting)
            except VideoTooShortError as error:
                raise SourceError(f"{error}.") from error
            except VideoError as error:
                again = ", at a second try neither" if error.is_passing else ""
                raise SourceError(f"video {row[0]} cannot be used{again}: {error}. {WAY_OUT}") from error
        return clips

    def _finish(self, video_id: str, views: tuple[View, ...], future: Future[ViewClips]) -> None:
        """Called by whoever has decoded the video."""
        with self._lock:
            for view in views:
                self._underway.pop((video_id, view), None)
            if future.cancelled() or not isinstance(future.exception(), (*BAD_VIDEO, type(None))):
                return  # closed, or no process can be had: whoever waits for the video hears of it
            found = self._note(video_id, future)
            for view, clip in zip(views, () if found is None else found.clips, strict=False):
                # A part of an array would keep all of it in memory.
                self._keep((video_id, view), clip if len(views) == 1 else clip.copy())

    def _note(
        self, video_id: str, future: Future[ViewClips], while_waiting: Callable[[], None] = nothing
    ) -> ViewClips | None:
        """Wait for a video and write down what is wrong with it; None where it cannot be decoded."""
        try:
            found = awaited(future, while_waiting)
        except BAD_VIDEO as error:
            self.failed[video_id] = str(error)
            return None
        if found.status != "ok":
            self.degraded[video_id] = str(found.reason)
        self.failed.pop(video_id, None)
        return found

    def _keep(self, row: Row, clip: Clip) -> None:
        if row in self._clips or clip.nbytes > self.cache_bytes:
            return
        self._clips[row] = clip
        self._held_bytes += clip.nbytes
        while self._held_bytes > self.cache_bytes:
            _, oldest = self._clips.popitem(last=False)
            self._held_bytes -= oldest.nbytes
