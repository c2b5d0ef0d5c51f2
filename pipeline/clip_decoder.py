"""Videos decoded ahead for training: in processes that begin with the first video, with a second try where that may help."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from extract.clips import View
from extract.config import SamplingConfig
from extract.decode import VideoError, VideoSource, ViewClips
from extract.pool import DecodePool
from pipeline.extraction_feed import chosen_workers


class ClipDecoder:
    """Does `read_views` for several threads at once. Until the first video it is nothing but its settings.

    Its processes end with `close`, with this object, and with the process that they belong to, however that ends.

    Args:
        sampling: of all clips.
        num_workers: processes; None: `chosen_workers`. 0 decodes in threads of this process, without the limits.
        seconds_per_video: after which a video is given up.
        memory_bytes: limit of each process.
    """

    def __init__(
        self, sampling: SamplingConfig, num_workers: int | None, seconds_per_video: float, memory_bytes: int
    ) -> None:
        self.sampling = sampling
        self._num_workers = num_workers
        self._seconds_per_video = seconds_per_video
        self._memory_bytes = memory_bytes
        self._lock = Lock()
        self._pool: DecodePool | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._is_closed = False
        self.num_second_tries = 0
        """Videos that were begun again after a fault that may pass: time, memory, the disk, a lost process."""

    @property
    def num_at_once(self) -> int:
        """Videos that are decoded at the same time."""
        return chosen_workers(self._num_workers) or chosen_workers(None)

    @property
    def num_restarts(self) -> int:
        """Decoding processes that died or were late."""
        return 0 if self._pool is None else self._pool.num_restarts

    def submit(self, source: VideoSource, views: Sequence[View]) -> Future[ViewClips]:
        """Have a video decoded; videos are begun in the order of submission, by whichever thread.

        The future raises what `read_views` raises, after two tries where `VideoError.is_passing`.

        Raises:
            WorkerStartError: no decoding process starts.
            RuntimeError: `close` was called.
        """
        with self._lock:
            if self._is_closed:
                raise RuntimeError("these clips are closed; nothing is decoded any more")
            if self._threads is None:
                self._threads = self._start()
            return self._threads.submit(self._decode, source, views)

    def close(self) -> None:
        """End the processes, in the middle of a video too. What was submitted and is not done fails."""
        with self._lock:
            self._is_closed = True
        if self._threads is not None and self._pool is not None:
            _end(self._threads, self._pool)
            self._threads.shutdown(wait=True)

    def _start(self) -> ThreadPoolExecutor:
        num_processes = chosen_workers(self._num_workers)
        pool = DecodePool(num_processes, self._seconds_per_video, self._memory_bytes)
        # A thread waits for each video that a process has; the second one of each holds the next video ready for it.
        threads = ThreadPoolExecutor(2 * num_processes or self.num_at_once, thread_name_prefix="clips")
        self._pool = pool
        weakref.finalize(self, _end, threads, pool)
        return threads

    def _decode(self, source: VideoSource, views: Sequence[View]) -> ViewClips:
        pool = self._pool
        assert pool is not None
        try:
            return pool.result(pool.submit(source, self.sampling, views))
        except VideoError as error:
            if not error.is_passing:
                raise
        with self._lock:
            self.num_second_tries += 1
        return pool.result(pool.submit(source, self.sampling, views))


def _end(threads: ThreadPoolExecutor, pool: DecodePool) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    pool.close()
