"""Memory and open files of stage 1 over many short videos and over one long one.

python benchmarks/memory_extraction.py [--num-videos 2000] [--long-minutes 60]

Tiny videos, a tiny backbone and a store on disk; what grows with the number of videos shows as a slope. The resident memory of
this process and of its decoding processes together is read at every progress report. The first fifth (imports, pools,
allocators) does not count for the slope.
"""

import argparse
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.video.stream import VideoStream

from cache.open import open_store
from configs.load import load_config
from extract.build import build_backbone
from extract.decode import VideoSource
from pipeline.extraction import build_spec, extract_videos

OVERRIDES = [
    "sampling.num_frames=8", "sampling.resize_size=32", "sampling.crop_size=32", "backbone.name=small3d",
    "backbone.weights=random:0", "backbone.options.width=4", "extraction.decode_workers=2", "store.shard_rows=64",
]  # fmt: skip
NUM_FILES = 50
"""Different files; the many videos are segments and names of these."""


@dataclass(frozen=True, slots=True)
class Reading:
    """At one moment."""

    num_done: int
    own_bytes: int
    children_bytes: int
    num_descriptors: int


def resident_bytes(pid: int) -> int:
    """Of one process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def children() -> list[int]:
    """Processes that threads of this one started."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += [int(pid) for pid in (task / "children").read_text().split()]
        except FileNotFoundError:
            continue
    return found


def take_reading(num_done: int) -> Reading:
    """Now."""
    return Reading(
        num_done,
        resident_bytes(os.getpid()),
        sum(resident_bytes(pid) for pid in children()),
        len(list(Path("/proc/self/fd").iterdir())),
    )


def write_video(path: Path, num_frames: int, seed: int, size: int = 32) -> None:
    """Grey noise that changes from frame to frame."""
    generator = np.random.default_rng(seed)
    pictures = generator.integers(0, 256, (16, size, size, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for index in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pictures[index % 16], format="rgb24")))
        container.mux(stream.encode(None))


def extract(folder: Path, videos: list[VideoSource]) -> list[Reading]:
    """Run stage 1 and read the memory on the way."""
    config = load_config(None, OVERRIDES)
    backbone, cpu = build_backbone(config.backbone, config.sampling), torch.device("cpu")
    readings: list[Reading] = []
    done = threading.Event()
    num_done = 0

    def read_on() -> None:
        while not done.wait(0.5):
            readings.append(take_reading(num_done))

    def note(rows: int, _total: int) -> None:
        nonlocal num_done
        num_done = rows

    reader = threading.Thread(target=read_on, daemon=True)
    begin = time.perf_counter()
    with open_store(folder / "s.zarr", spec=build_spec(config, backbone, cpu), mode="a", shard_rows=64) as store:
        reader.start()
        report = extract_videos(store, videos, backbone, config, cpu, on_progress=note)
        done.set()
        reader.join()
    print(
        f"  {report.num_ok} ok, {report.num_rejected} rejected in {time.perf_counter() - begin:.1f} s "
        f"({report.clips_per_second:.0f} clips/s, bound by {report.bound_by}), restarts {report.num_restarts}"
    )
    return readings


def show(readings: list[Reading]) -> None:
    """Peak, and slope over the last four fifths."""
    tail = readings[len(readings) // 5 :]
    if len({reading.num_done for reading in tail}) < 20:
        print("  too short for a slope")
    else:
        counts = np.array([reading.num_done for reading in tail])
        for name in ("own_bytes", "children_bytes"):
            slope = np.polyfit(counts, [getattr(reading, name) for reading in tail], 1)[0]
            print(f"  {name:<15} {slope * 1000 / 2**20:+.2f} MiB per 1,000 videos")
        print(f"  descriptors     {tail[0].num_descriptors} at first, {tail[-1].num_descriptors} at last")
    peak, parts = max(reading.own_bytes for reading in readings), max(reading.children_bytes for reading in readings)
    print(f"  peak            {peak / 2**20:.0f} MiB here, {parts / 2**20:.0f} MiB in the decoding processes")


def main() -> None:
    """Many short ones, then one long one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--num-videos", type=int, default=2000)
    parser.add_argument("--long-minutes", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(NUM_FILES):
            write_video(folder / f"{index}.mp4", 10, index)
        print(f"{options.num_videos} videos of 10 frames:")
        videos = [
            VideoSource(f"v{index:06d}", folder / f"{index % NUM_FILES}.mp4") for index in range(options.num_videos)
        ]
        show(extract(folder, videos))
    if options.long_minutes > 0:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_video(folder / "long.mp4", round(options.long_minutes * 60 * 25), 0, size=64)
            print(f"one video of {options.long_minutes:g} minutes, and seven of 10 frames:")
            for index in range(7):
                write_video(folder / f"{index}.mp4", 10, index)
            names = ["0", "1", "2", "long", "3", "4", "5", "6"]
            show(extract(folder, [VideoSource(name, folder / f"{name}.mp4") for name in names]))


if __name__ == "__main__":
    main()
