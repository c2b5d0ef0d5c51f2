"""A process that reads odd and hostile files one by one, so that a crash or a hang in native code is seen and counted."""

import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import av
from av.container import InputContainer

from extract.config import SamplingConfig
from extract.container import OPEN_OPTIONS
from extract.decode import VideoError, VideoSource, read_views

SAMPLING = SamplingConfig(num_frames=8, resize_size=32, crop_size=32)
"""What the outcomes stated in `contracts.corpus` hold for."""
NOBODY = 65534
START_SECONDS = 120.0
"""For importing the libraries on a busy machine."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """What became of one file."""

    status: str
    """ok, degraded, rejected; crash or hang where the process had to be replaced."""
    reason: str | None = None
    """Key of extract.errors.REASONS where the status is degraded or rejected."""
    num_frames: int = 0
    """Of the whole video."""
    num_lacking: int = 0
    """Frames that the container declares and that were not given, where the status is ok."""
    digest: str = ""
    """Of the pixels."""
    detail: str = ""
    """Of a rejection."""
    seconds: float = 0.0
    """For reading."""
    rss_bytes: int = 0
    """Resident memory of the process afterwards; 0 where the system does not tell."""


def read_one(path: Path) -> Outcome:
    """Read one file as the extraction would."""
    start = time.monotonic()
    try:
        clips = read_views(VideoSource("video", path), SAMPLING, [0])
    except VideoError as error:
        seconds = time.monotonic() - start
        return Outcome("rejected", error.reason, detail=error.detail, seconds=seconds, rss_bytes=_resident_bytes())
    return Outcome(
        clips.status,
        clips.reason,
        clips.num_frames,
        _num_lacking(path, clips.num_frames) if clips.status == "ok" and path.is_file() else 0,
        hashlib.sha256(clips.clips.tobytes()).hexdigest(),
        seconds=time.monotonic() - start,
        rss_bytes=_resident_bytes(),
    )


def _num_lacking(path: Path, num_frames: int) -> int:
    """Frames that the container declares, as it is now, beyond those that were given; asked of FFmpeg, not of `extract`."""
    with (
        os.fdopen(os.open(path, os.O_RDONLY), "rb") as file,  # without its name, which would say "a row of pictures"
        av.open(file, options=OPEN_OPTIONS, metadata_errors="replace") as container,
    ):
        assert isinstance(container, InputContainer)
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.dts is not None]
        if container.format.name == "avi":
            # It counts places of a fixed rate, many of which may hold no frame; the last frame fills those behind it.
            num_places = max((int(packet.dts or 0) + 1 for packet in packets), default=0)
            return int(max(0, stream.frames - num_places) * num_frames // max(num_places, 1))
        num_hidden = sum(packet.is_discard for packet in packets)  # by an edit list
        return int(max(0, stream.frames - num_hidden - num_frames))


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def serve() -> None:
    """The child: a request per line in, an outcome per line out."""
    av.logging.set_level(av.logging.PANIC)
    for line in sys.stdin:
        request = json.loads(line)
        if request["as_nobody"]:
            os.setresuid(NOBODY, NOBODY, 0)
        outcome = read_one(Path(request["path"]))
        if request["as_nobody"]:
            os.setresuid(0, 0, 0)
        print(json.dumps(asdict(outcome)), flush=True)


class Reader:
    """The reading process, started anew after a crash or a hang; a context manager."""

    def __init__(self) -> None:
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self._listener.join()
        self.process.stdout.close()
        with suppress(BrokenPipeError):  # of what the process never read
            self.process.stdin.close()

    def _start(self) -> None:
        code = "from contracts.corpus_reader import serve; serve()"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, args=(self.process, self._answers), daemon=True)
        self._listener.start()
        self._seconds_more = START_SECONDS

    @staticmethod
    def _listen(process: "subprocess.Popen[str]", answers: "queue.Queue[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        answers.put("")

    def read(self, path: Path, seconds: float, as_nobody: bool = False) -> Outcome:
        """What became of the file within a time limit.

        Args:
            path: absolute.
            seconds: allowed.
            as_nobody: read without root's rights, where the process has them.
        """
        assert self.process.stdin is not None
        request = {"path": str(path), "as_nobody": as_nobody and os.geteuid() == 0}
        allowed, self._seconds_more = seconds + self._seconds_more, 0.0
        status = "crash"
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            if answer := self._answers.get(timeout=allowed):
                return Outcome(**json.loads(answer))
        except queue.Empty:
            status = "hang"
        except BrokenPipeError:  # the process died before it could be asked
            pass
        self._stop()
        self._start()
        return Outcome(status, seconds=seconds)
