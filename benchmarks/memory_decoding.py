"""Peak memory of reading a long video against a short one, and what many short videos leave behind.

    python benchmarks/memory_decoding.py --seconds 3600 --cycles 10000     (Linux only)

Each video is read in a process of its own, since a peak cannot be taken back.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from contracts.corpus_writers import Clip, write_clip  # noqa: E402  found by the line above
from extract.config import SamplingConfig  # noqa: E402
from extract.decode import VideoSource, read_views  # noqa: E402

FRAMES_PER_SECOND = 25
SAMPLING = SamplingConfig(num_frames=16, resize_size=64, crop_size=56)

OTHER = Clip(codec="mpeg4")


@dataclass(frozen=True)
class Reading:
    """One video read in a fresh process."""

    num_frames: int
    seconds: float
    resident_bytes_before: int
    """With all libraries loaded and one other video read."""
    peak_bytes: int
    """While reading."""


def write_long(path: Path, seconds: int) -> Path:
    """A video of slowly moving grey, 64 x 48 pixels; every frame is encoded, from eight pictures in turns."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FRAMES_PER_SECOND)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"g": "250"}
        frames = []
        for grey in range(0, 240, 30):
            picture = np.full((48, 64, 3), grey, dtype=np.uint8)
            frames.append(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p"))
        for index in range(seconds * FRAMES_PER_SECOND):
            frame = frames[index // 25 % len(frames)]
            frame.pts, frame.time_base = index, Fraction(1, FRAMES_PER_SECOND)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def peak_bytes() -> int:
    """Largest resident memory since `forget_peak`."""
    found = re.search(r"VmHWM:\s+([0-9]+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Start the peak anew; importing torch reaches far higher than reading does."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def read_here(path: Path, end_seconds: float | None) -> Reading:
    """Read in this process."""
    with tempfile.TemporaryDirectory() as folder:
        read_views(VideoSource("other", write_clip(Path(folder) / f"other{path.suffix}", OTHER)), SAMPLING, [0])
    before = resident_bytes()
    forget_peak()
    start = time.monotonic()
    clips = read_views(VideoSource("video", path, end_seconds=end_seconds), SAMPLING, [0])
    return Reading(clips.num_frames, time.monotonic() - start, before, peak_bytes())


def read_alone(path: Path, end_seconds: float | None = None) -> Reading:
    """Read in a process of its own."""
    command = [sys.executable, __file__, "--read", str(path), "--end-seconds", str(end_seconds or 0)]
    return Reading(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def cycles(folder: Path, num_cycles: int) -> None:
    """Read four short videos over and over, and print how memory and open files went."""
    paths = [
        write_clip(folder / "a.mp4"),
        write_clip(folder / "a.mkv", Clip(options={"preset": "veryfast", "bf": "2"})),
        write_clip(folder / "a.avi", Clip(codec="mpeg4")),
        write_clip(folder / "a.webm", Clip(codec="libvpx", options={"cpu-used": "8"})),
    ]
    memory, descriptors = [], []
    start = time.monotonic()
    for cycle in range(num_cycles):
        read_views(VideoSource("video", paths[cycle % len(paths)]), SAMPLING, [0])
        if cycle % 50 == 49:
            memory.append(resident_bytes() / 2**20)
            descriptors.append(len(list(Path("/proc/self/fd").iterdir())))
    seconds = time.monotonic() - start
    kept = memory[len(memory) // 10 :]  # the first ones fill the caches of the libraries
    slope = np.polyfit(np.arange(len(kept)) * 50, kept, 1)[0] * 1000
    print(f"{num_cycles} videos of 24 frames in {seconds:.0f} s")
    print(
        f"memory {memory[0]:.1f} -> {memory[-1]:.1f} MiB, slope {slope:+.3f} MiB per 1,000 videos behind the first tenth"
    )
    print(f"open descriptors {min(descriptors)} to {max(descriptors)}")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--end-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cycles < 200:
        parser.error(f"--cycles {arguments.cycles} is too few to fit a slope to; give 200 or more")
    if arguments.read is not None:
        print(json.dumps(asdict(read_here(arguments.read, arguments.end_seconds or None))))
        return
    with tempfile.TemporaryDirectory() as folder:
        for ending in ("mp4", "mkv", "avi"):
            short, long = (write_long(Path(folder) / f"{n}.{ending}", n) for n in (10, arguments.seconds))
            readings = {
                "short": read_alone(short),
                "long": read_alone(long),
                "first 10 s of long": read_alone(long, 10.0),
            }
            for name, reading in readings.items():
                grown = (reading.peak_bytes - reading.resident_bytes_before) / 2**20
                print(
                    f"{ending}, {name}: {reading.num_frames} frames in {reading.seconds:.2f} s, "
                    f"peak {reading.peak_bytes / 2**20:.1f} MiB, of which {grown:.1f} MiB by reading"
                )
        cycles(Path(folder), arguments.cycles)


if __name__ == "__main__":
    main()
