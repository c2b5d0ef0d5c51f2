"""Videos decoded in worker processes, so that a native crash or a hang costs one video.

Each worker is a fresh interpreter on a socket (`extract.pool_worker`), served by a thread of its own here. multiprocessing
would do for the process, but its "spawn" runs the caller's `__main__` again (a training script imports torch anew; a script
read from stdin has no file and fails), and "fork" copies a process that has threads and perhaps CUDA.

Clips come back through the socket: 16 x 224 x 224 x 3 takes 1.4 ms, where a fresh shared memory segment took 3.5 ms on the
same machine and would have to be cleared away after a kill. Decoding 3 s of 320 x 240 took 60 ms there.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import count
from types import TracebackType
from typing import Self

from extract.clips import View
from extract.config import SamplingConfig
from extract.decode import VideoError, VideoSource, VideoTooShortError, ViewClips, read_views
from extract.pool_worker import DecodeProcess, DecodeTask, WorkerLost, WorkerStartError

__all__ = ["DecodePool", "DecodeTask", "Decoded", "WorkerStartError", "decoded_in_order"]

VIDEOS_AHEAD = 16
"""Videos per process that `decoded_in_order` has in flight at most."""


@dataclass(frozen=True, slots=True)
class _Job:
    task: DecodeTask
    future: "Future[ViewClips]" = field(default_factory=Future)


class _Jobs:
    """The jobs that no worker has begun."""

    def __init__(self) -> None:
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self.error: Exception | None = None
        """Why nothing is done any more."""

    def put(self, job: _Job) -> None:
        with self._changed:
            if self.error is not None:
                raise self.error
            self._waiting.append(job)
            self._changed.notify()

    def take(self) -> _Job | None:
        """Wait for a job; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.error is not None)
            return None if self.error is not None else self._waiting.popleft()

    def close(self, error: Exception) -> None:
        """All that wait, and all that are put later, fail with this; the first call counts."""
        with self._changed:
            self.error = self.error or error
            while self._waiting:
                job = self._waiting.popleft()
                if job.future.set_running_or_notify_cancel():
                    job.future.set_exception(self.error)
            self._changed.notify_all()


class _Worker:
    """A thread that takes jobs and has them done by a process, a new one whenever that is lost."""

    def __init__(self, jobs: _Jobs, seconds_per_video: float, memory_bytes: int) -> None:
        self._jobs = jobs
        self._seconds_per_video = seconds_per_video
        self._memory_bytes = memory_bytes
        self._process: DecodeProcess | None = None
        self.num_restarts = 0
        self.started: Future[None] = Future()
        self.thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self.thread.start()

    def interrupt(self) -> None:
        """After the jobs were closed: come to an end now."""
        process = self._process
        if process is not None:
            process.interrupt()

    def _run(self) -> None:
        try:
            self._start_process()
            self.started.set_result(None)
            while (job := self._jobs.take()) is not None:
                self._do(job)
                del job  # with its clips, before the wait for the next one
        except Exception as error:
            if not self.started.done():
                self.started.set_exception(error)
            self._jobs.close(error)
        finally:
            if self._process is not None:
                self._process.end()

    def _start_process(self) -> None:
        # In this order with close(), which sets the error and then interrupts: one of the two sees the other.
        self._process = DecodeProcess(self._memory_bytes)
        if self._jobs.error is not None:
            raise self._jobs.error
        self._process.wait_ready()

    def _do(self, job: _Job) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        assert self._process is not None
        try:
            if self._process.has_died():
                self._process.end()
                self.num_restarts += 1
                self._start_process()
            clips = self._process.ask(job.task, self._seconds_per_video)
        except WorkerLost as lost:
            self._process.end()
            if self._jobs.error is not None:
                job.future.set_exception(self._jobs.error)
                return
            self.num_restarts += 1
            job.future.set_exception(VideoError("stopped", str(lost), is_passing=True))
            self._start_process()
        except (VideoError, VideoTooShortError) as error:
            job.future.set_exception(error)
        except Exception as error:
            job.future.set_exception(error)
            raise
        else:
            job.future.set_result(clips)


class DecodePool:
    """Does `read_views` in other processes; a context manager.

    A video whose process dies, or is not done `seconds_per_video` after it was begun, gets VideoError "stopped". It is not
    tried again, and a new process takes the place of the old one.

    Args:
        num_processes: 0 decodes in the calling process, when the result is asked for, and without limits.
        seconds_per_video: limit in seconds; waiting in the queue does not count.
        memory_bytes: limit of each process's own memory in bytes (VideoError "out_of_memory"); None is no limit.
        ahead_bytes: of clips that `decoded_in_order` has in flight.

    Raises:
        WorkerStartError: from here where no process starts, and from `submit` and `result` where one cannot be replaced.
    """

    def __init__(
        self,
        num_processes: int,
        seconds_per_video: float = 120.0,
        memory_bytes: int | None = 8 << 30,
        ahead_bytes: int = 1 << 30,
    ) -> None:
        if num_processes < 0:
            raise ValueError(f"num_processes {num_processes} is negative; use 0 to decode in the calling process")
        if not 0 < seconds_per_video <= 1e6:
            raise ValueError(f"seconds_per_video {seconds_per_video} is not between 0 and 1e6")
        if memory_bytes is not None and memory_bytes <= 0:
            raise ValueError(f"memory_bytes {memory_bytes} is not positive; None is no limit")
        self.ahead_bytes = ahead_bytes
        self.videos_ahead = max(1, VIDEOS_AHEAD * num_processes)
        self._tickets = count()
        self._asked: dict[int, _Job] = {}
        self._jobs = _Jobs()
        self._workers: list[_Worker] = []
        try:
            for _ in range(num_processes):
                self._workers.append(_Worker(self._jobs, seconds_per_video, memory_bytes or 0))
            for worker in self._workers:
                worker.started.result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def num_restarts(self) -> int:
        """Processes that died or were killed for being late."""
        return sum(worker.num_restarts for worker in self._workers)

    def submit(self, source: VideoSource, sampling: SamplingConfig, views: Sequence[View]) -> int:
        """Have a video decoded; the ticket is for `result`. Videos are begun in the order of submission."""
        # A process keeps the working directory that it was started in.
        source = replace(source, path=source.path.absolute())
        job = _Job(DecodeTask(source, sampling, tuple(views)))
        if self._workers or self._jobs.error is not None:
            self._jobs.put(job)
        ticket = next(self._tickets)
        self._asked[ticket] = job
        return ticket

    def result(self, ticket: int) -> ViewClips:
        """Wait for a video; each ticket is good once. Raises what `read_views` raises, and VideoError "stopped"."""
        job = self._asked.pop(ticket, None)
        if job is None:
            raise ValueError(f"ticket {ticket} was never given out, or its result was asked for before")
        if self._workers:
            return job.future.result()
        if self._jobs.error is not None:
            raise self._jobs.error
        return read_views(job.task.source, job.task.sampling, job.task.views)

    def discard(self, ticket: int) -> None:
        """Give up a ticket; a video that was not begun is not decoded."""
        job = self._asked.pop(ticket, None)
        if job is not None:
            job.future.cancel()

    def close(self) -> None:
        """Kill the processes at once, in the middle of a video too. Results that were not fetched are lost."""
        self._jobs.close(RuntimeError("the decode pool is closed"))
        for worker in self._workers:
            worker.interrupt()
        deadline = time.monotonic() + 1.5
        for worker in self._workers:
            worker.thread.join(max(0.0, deadline - time.monotonic()))


@dataclass(frozen=True, slots=True)
class Decoded:
    """What came of a task."""

    task: DecodeTask
    outcome: ViewClips | VideoError


@dataclass(frozen=True, slots=True)
class _InFlight:
    task: DecodeTask
    ticket: int


def decoded_in_order(pool: DecodePool, tasks: Iterable[DecodeTask]) -> Iterator[Decoded]:
    """Decode ahead, and give the outcomes in the order of the tasks.

    Tasks are pulled as there is room: at most `pool.videos_ahead` videos and `pool.ahead_bytes` bytes of clips are in flight,
    or else a single video.

    Raises:
        VideoTooShortError: a video is too short and its `short_policy` is "fail".
        WorkerStartError: a lost process cannot be replaced.
    """
    upcoming = iter(tasks)
    following = next(upcoming, None)
    in_flight: deque[_InFlight] = deque()
    num_bytes = 0
    try:
        while following is not None or in_flight:
            while following is not None and (
                not in_flight
                or (len(in_flight) < pool.videos_ahead and num_bytes + _clip_bytes(following) <= pool.ahead_bytes)
            ):
                in_flight.append(
                    _InFlight(following, pool.submit(following.source, following.sampling, following.views))
                )
                num_bytes += _clip_bytes(following)
                following = next(upcoming, None)
            first = in_flight.popleft()
            yield Decoded(first.task, _outcome(pool, first.ticket))
            num_bytes -= _clip_bytes(first.task)
    finally:
        for left in in_flight:
            pool.discard(left.ticket)


def _outcome(pool: DecodePool, ticket: int) -> ViewClips | VideoError:
    try:
        return pool.result(ticket)
    except VideoError as error:
        return error


def _clip_bytes(task: DecodeTask) -> int:
    return len(task.views) * task.sampling.num_frames * task.sampling.crop_size**2 * 3
