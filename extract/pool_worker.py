"""A process that decodes videos for extract.pool, one task in, one answer out: `main` inside it, `DecodeProcess` outside.

Nothing here imports torch, so that a process starts in a quarter of a second and takes some 60 MB.
"""

import ctypes
import os
import pickle
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from extract.clips import View, refuse_bad_views
from extract.config import SamplingConfig
from extract.decode import VideoError, VideoSource, VideoTooShortError, ViewClips, read_views

READY = "ready"
"""First message of a worker, before it takes tasks."""
_PR_SET_PDEATHSIG = 1
START_SECONDS = 120.0
"""Allowed for the imports of a worker: a quarter of a second from a local disk, but a network disk may be slow."""
TRANSFER_SECONDS = 30.0
"""Allowed for each part of a message, once it has begun to come."""
# The caller's sys.path makes the worker find the very same packages, wherever either was started.
_BOOT = "import sys; sys.path[:] = sys.argv[4:]; from extract.pool_worker import main; main(*map(int, sys.argv[1:4]))"


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """The arguments of `read_views`."""

    source: VideoSource
    sampling: SamplingConfig
    views: Sequence[View]
    """At least one."""

    def __post_init__(self) -> None:
        refuse_bad_views(self.views)


Answer = ViewClips | VideoError | VideoTooShortError


def send(connection: socket.socket, message: object) -> None:
    """Write a message; arrays go out from where they lie, without a copy in this process."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(body), *(buffer.raw() for buffer in buffers)]
    connection.sendall(struct.pack(f"<{len(parts) + 1}Q", len(parts), *(part.nbytes for part in parts)))
    for part in parts:
        connection.sendall(part)


def receive(connection: socket.socket) -> object:
    """Read a message; its arrays are writable and belong to the reader. EOFError where the other end is gone."""
    (num_parts,) = struct.unpack("<Q", _read(connection, 8))
    lengths = struct.unpack(f"<{num_parts}Q", _read(connection, 8 * num_parts))
    body, *buffers = [_read(connection, length) for length in lengths]
    return pickle.loads(body, buffers=buffers)


def _read(connection: socket.socket, num_bytes: int) -> memoryview:
    view = np.empty(num_bytes, dtype=np.uint8).data  # a bytearray would be filled with zeros first
    num_read = 0
    while num_read < num_bytes:
        num_new = connection.recv_into(view[num_read:])
        if num_new == 0:
            raise EOFError("the other end is gone")
        num_read += num_new
    return view


def main(descriptor: int, parent: int, memory_bytes: int) -> None:
    """Serve the socket with this descriptor; `memory_bytes` 0 is no limit."""
    _set_signals()
    _die_with(parent)
    _limit(resource.RLIMIT_CORE, 0)
    if memory_bytes:
        # Not RLIMIT_AS: there every thread of FFmpeg counts with 72 MB of address space that is never touched.
        _limit(resource.RLIMIT_DATA, memory_bytes)
    connection = socket.socket(fileno=descriptor)
    _silence()
    try:
        send(connection, READY)
        while True:
            task = receive(connection)
            assert isinstance(task, DecodeTask)
            send(connection, _answer(task))
    except (EOFError, ConnectionError):  # the pool is gone
        return


def _answer(task: DecodeTask) -> Answer:
    try:
        return read_views(task.source, task.sampling, task.views)
    except (VideoError, VideoTooShortError) as error:
        return error


def _set_signals() -> None:
    """What the parent ignores or blocks would be so here too.

    A scheduler signals every process of a job. Whether to stop is the parent's to decide: a worker that died of it would make its
    video look broken. The parent ends its workers by SIGKILL, and by its own end.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _die_with(parent: int) -> None:
    """Be killed with the parent, also while FFmpeg works. Elsewhere than on Linux, the end of the socket is found after it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _silence() -> None:
    """PyAV keeps FFmpeg's log quiet, but not the libraries that FFmpeg calls: nothing reaches the terminal from here on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


class WorkerStartError(RuntimeError):
    """No decoding process can be started: trouble with the installation or the machine, not with a video."""


class WorkerLost(Exception):
    """The process died or was late."""


class DecodeProcess:
    """A decoding process and the socket to it.

    Only the thread that makes it uses it: on Linux, the process is killed when that thread ends.
    """

    def __init__(self, memory_bytes: int) -> None:
        root = str(Path(__file__).resolve().parents[1])
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]  # noqa: PTH100 (resolves no links)
        try:
            self._connection, theirs = socket.socketpair()
        except OSError as error:
            raise _not_started(str(error)) from error
        self._connection.settimeout(TRANSFER_SECONDS)
        numbers = [str(number) for number in (theirs.fileno(), os.getpid(), memory_bytes)]
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-c", _BOOT, *numbers, *path, *([] if root in path else [root])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                # NumPy would start a thread per core that never has work.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                # Ctrl-C goes to the group: a worker that has not yet come to ignore it would look like a failed start.
                process_group=0,
            )
        except OSError as error:
            self._connection.close()
            raise _not_started(str(error)) from error
        finally:
            theirs.close()

    def wait_ready(self) -> None:
        """Raise WorkerStartError, with the last line that the process wrote, unless it comes up."""
        assert self._popen.stderr is not None
        try:
            is_up = self._is_readable(START_SECONDS) and receive(self._connection) == READY
            problem = f"no sign of life within {START_SECONDS:g} s"
        except (EOFError, OSError):
            is_up, problem = False, f"it {self._death()}"
        if not is_up:
            self._popen.kill()
            lines = self._popen.stderr.read().decode(errors="replace").strip().splitlines()
            raise _not_started(lines[-1] if lines else problem)
        self._popen.stderr.close()

    def ask(self, task: DecodeTask, seconds: float) -> ViewClips:
        """Have one video decoded. Raises what `read_views` raises, and WorkerLost."""
        late = f"took longer than {seconds:g} s; allow more time per video, or repair or leave out this one"
        try:
            send(self._connection, task)
            if not self._is_readable(seconds):
                raise WorkerLost(late)
            answer = receive(self._connection)
        except TimeoutError as error:
            raise WorkerLost(late) from error
        except (EOFError, OSError) as error:
            raise WorkerLost(f"the decoding process {self._death()}") from error
        if isinstance(answer, VideoError | VideoTooShortError):
            raise answer
        assert isinstance(answer, ViewClips)
        return answer

    def has_died(self) -> bool:
        """While it had nothing to do."""
        return self._popen.poll() is not None

    def interrupt(self) -> None:
        """The one call for other threads: end the process, and the waiting of the thread that owns it."""
        self._popen.kill()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Kill and reap, in whatever state."""
        self._connection.close()
        self._popen.kill()
        # A process that waits for a dead network disk cannot even be killed; it is left to die when the disk answers.
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout=2)
        if self._popen.stderr is not None:
            self._popen.stderr.close()

    def _is_readable(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        # Asked again at the end: while this process was stopped (Ctrl-Z), the worker may have answered in time.
        return bool(poll.poll(1000 * seconds) or poll.poll(0))

    def _death(self) -> str:
        try:
            status = self._popen.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"died (signal {-status})" if status < 0 else f"died (exit status {status})"


def _not_started(reason: str) -> WorkerStartError:
    return WorkerStartError(
        f"a decoding process could not start: {reason}. "
        "Try `python -c 'import extract.pool_worker'`, or decode in this process with 0 decoding processes."
    )
