"""The way of the videos into stage 1: claim shards, decode their videos ahead, hand over the rows in order.

F frames, H W pixels (both the crop size).
"""

from __future__ import annotations

import queue
import stat
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.store import FeatureStore, RowKey, RowOutcome, Shard, StoreError
from configs.schema import ExtractionConfig
from extract.config import SamplingConfig
from extract.decode import VideoError, VideoSource
from extract.pool import Decoded, DecodePool, DecodeTask, decoded_in_order
from pipeline.launch import num_cores

TASK_BYTES = 256 << 20
"""Clips of one video that are decoded together at most; a video with more views is decoded several times."""
POLL_SECONDS = 0.1
"""How long a stop, or an error of the writer, may go unnoticed while waiting."""
_UNKNOWN_SIZE = "bytes=None"
DEAD = RowOutcome("rejected", "missing", "removed or planned anew before it was extracted")
MAX_AUTOMATIC_WORKERS = 16


@dataclass(frozen=True, slots=True)
class FedRow:
    """One row of a claimed shard, on its way to the backbone."""

    shard: Shard
    position: int
    """Within the shard."""
    clip: NDArray[np.uint8] | None
    """(F, H, W, 3) RGB; None where there is none."""
    outcome: RowOutcome


@dataclass(frozen=True, slots=True)
class _Place:
    shard: Shard
    position: int
    key: RowKey | None
    """None where the row was removed or planned anew."""

    @property
    def video_id(self) -> str | None:
        return None if self.key is None else self.key.video_id


@dataclass(frozen=True, slots=True)
class _Sent:
    """Rows that one task fills, or, without a task, rows that need none."""

    task: DecodeTask | None
    places: list[_Place]


def num_decode_workers(config: ExtractionConfig, num_rows: int) -> int:
    """How many decoding processes to start; no more than there are rows."""
    return min(chosen_workers(config.decode_workers), num_rows)


def chosen_workers(wanted: int | None) -> int:
    """A number of decoding processes as a config gives it; None: one less than this process's cores, 1 to 16.

    The processes of a job on one machine (torchrun's, for one) share its cores.
    """
    return max(1, min(num_cores() - 1, MAX_AUTOMATIC_WORKERS)) if wanted is None else wanted


class ShardFeed:
    """Claims shards one after the other and has their videos decoded ahead; a context manager.

    A thread of its own does this, so that the caller's thread never waits on anything but `next_rows`. A shard is claimed when
    its first video is about to be decoded. Every row of a claimed shard comes out, in order.
    """

    def __init__(
        self,
        store: FeatureStore,
        shards: Sequence[Shard],
        videos: Mapping[str, VideoSource],
        sampling: SamplingConfig,
        config: ExtractionConfig,
    ) -> None:
        self._store, self._shards, self._videos, self._sampling = store, shards, videos, sampling
        self._config = config
        self._sent: deque[_Sent] = deque()
        self._ready: queue.Queue[list[FedRow] | BaseException | None] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._pool: DecodePool | None = None
        self._claimed: dict[int, Shard] = {}
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self.holders: Counter[str] = Counter()
        """Who was making a shard when it was its turn here -> how many shards."""
        self.num_rows_passed_over = 0
        """In shards that others were making, or had made, when it was their turn here."""

    def __enter__(self) -> ShardFeed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End decoding and give back the claimed shards that were not committed."""
        self._closed.set()
        if self._pool is not None:
            self._pool.close()
        self._thread.join(timeout=2.0)
        self.give_back()

    def give_back(self) -> None:
        """Release the claimed shards."""
        for shard in list(self._claimed.values()):
            # What cannot be released now no longer counts when this process has ended.
            with suppress(OSError, StoreError):
                self._store.release(shard)

    def committed(self, shard: Shard) -> None:
        """Told by the writer: the shard is no longer claimed."""
        self._claimed.pop(shard.index, None)

    @property
    def num_restarts(self) -> int:
        """Decoding processes that died or were late."""
        return 0 if self._pool is None else self._pool.num_restarts

    def next_rows(self, check: Callable[[], None]) -> list[FedRow] | None:
        """Wait for the next rows; None after the last one.

        Args:
            check: called again and again while waiting; what it raises ends the wait.

        Raises:
            VideoTooShortError, WorkerStartError, StoreError: nothing more will come.
        """
        while True:
            check()
            try:
                item = self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    def _hand_over(self, item: list[FedRow] | BaseException | None) -> None:
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._ready.put(item, timeout=POLL_SECONDS)
                return

    def _run(self) -> None:
        try:
            self._feed()
        except BaseException as error:  # whatever it is, it belongs to the caller
            self._hand_over(error)

    def _feed(self) -> None:
        config = self._config
        num_workers = num_decode_workers(config, sum(len(shard.rows) for shard in self._shards))
        with DecodePool(num_workers, config.seconds_per_video, config.decode_memory_bytes) as pool:
            self._pool = pool
            for decoded in decoded_in_order(pool, self._tasks()):
                self._hand_over(self._rows(decoded))
                if self._closed.is_set():
                    return
        if self._sent:
            self._hand_over([row for sent in self._sent for row in _without_clips(sent.places, DEAD)])
        self._hand_over(None)

    def _tasks(self) -> Iterator[DecodeTask]:
        """Rows of one video that follow each other are decoded together, in two shards too."""
        sampling = self._sampling
        most = max(1, TASK_BYTES // (sampling.num_frames * sampling.crop_size**2 * 3))
        places: list[_Place] = []
        for place in self._claimed_places():
            if places and (len(places) == most or place.video_id != places[0].video_id):
                yield from self._send(places)
                places = []
            places.append(place)
        if places:
            yield from self._send(places)

    def _send(self, places: list[_Place]) -> Iterator[DecodeTask]:
        video_id = places[0].video_id
        if video_id is None:
            self._sent.append(_Sent(None, places))
            return
        views = [place.key.view for place in places if place.key is not None]
        task = DecodeTask(self._videos[video_id], self._sampling, views)
        self._sent.append(_Sent(task, places))
        yield task

    def _claimed_places(self) -> Iterator[_Place]:
        for shard in self._shards:
            if self._closed.is_set():
                return
            claim = self._store.claim(shard)
            if claim.state != "ours":
                self.num_rows_passed_over += len(shard.rows)
                if claim.holder is not None:
                    self.holders[claim.holder.split(", since ")[0]] += 1
                continue
            self._claimed[shard.index] = shard
            wanted = self._store.wanted(shard)
            for position, (key, is_wanted) in enumerate(zip(shard.rows, wanted, strict=True)):
                yield _Place(shard, position, key if is_wanted else None)

    def _rows(self, decoded: Decoded) -> list[FedRow]:
        rows: list[FedRow] = []
        sent = self._sent.popleft()
        while sent.task is not decoded.task:
            rows += _without_clips(sent.places, DEAD)
            sent = self._sent.popleft()
        source = source_text(decoded.task.source)
        found = decoded.outcome
        if isinstance(found, VideoError):
            return rows + _without_clips(sent.places, RowOutcome("rejected", found.reason, found.detail, source))
        outcome = RowOutcome(found.status, found.reason, None, source)
        return rows + [
            FedRow(place.shard, place.position, clip, outcome)
            for place, clip in zip(sent.places, found.clips, strict=True)
        ]


def _without_clips(places: Sequence[_Place], outcome: RowOutcome) -> list[FedRow]:
    return [FedRow(place.shard, place.position, None, outcome) for place in places]


def source_text(video: VideoSource) -> str:
    """What tells whether a row was made from this input: the stretch, and the file's size (moving a file changes nothing)."""
    try:
        found = video.path.stat()
        size = found.st_size if stat.S_ISREG(found.st_mode) else None
    except (OSError, ValueError):  # gone, not to be reached, or a name that no file can have
        size = None
    return f"bytes={size} start={video.start_seconds} end={video.end_seconds}"


def has_file(source: str) -> bool:
    """Whether there was a file to measure when `source_text` gave this text."""
    return not source.startswith(_UNKNOWN_SIZE)


def is_other_input(stored: str, now: str) -> bool:
    """Whether two texts of `source_text` tell of different inputs. A file that cannot be reached now is no other file."""
    stored_size, _, stored_stretch = stored.partition(" ")
    size, _, stretch = now.partition(" ")
    return stretch != stored_stretch or (size != stored_size and has_file(now) and has_file(stored))
