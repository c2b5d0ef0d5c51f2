"""Clips per second of decoding on threads in one process, and in worker processes.

python benchmarks/decode_pool.py [--num-videos 60]

Writes videos of 3 s (H.264, 320 x 240, moving noise) into a temporary folder, decodes all of them in each way, several times
in turns, and prints the medians. Every way has to give the same clips.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream

from extract.config import SamplingConfig
from extract.decode import VideoSource, ViewClips, read_views
from extract.pool import DecodePool, DecodeTask, decoded_in_order

FRAMES_PER_SECOND = 25
NUM_FRAMES = 75
SAMPLING = SamplingConfig()


def write_video(path: Path, seed: int) -> VideoSource:
    """A picture of noise, smooth over 8 pixels, that moves by three pixels a frame."""
    noise = np.random.default_rng(seed).integers(0, 256, (30, 80, 3), dtype=np.uint8)
    picture = noise.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for index in range(NUM_FRAMES):
            pixels = np.ascontiguousarray(picture[:, 3 * index : 3 * index + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return VideoSource(path.stem, path)


def digest(all_clips: Iterable[ViewClips]) -> str:
    """Of the pixels, which makes sure that they have arrived."""
    total = hashlib.sha256()
    for found in all_clips:
        total.update(found.clips[:, :, ::16, ::16].tobytes())
    return total.hexdigest()


def on_threads(videos: list[VideoSource], num_threads: int) -> str:
    """As a thread pool over read_views."""
    with ThreadPoolExecutor(num_threads) as executor:
        return digest(executor.map(lambda video: read_views(video, SAMPLING, [0]), videos))


def in_processes(videos: list[VideoSource], pool: DecodePool) -> str:
    """Through decoded_in_order, with a pool that has started."""
    clips: list[ViewClips] = []
    for decoded in decoded_in_order(pool, [DecodeTask(video, SAMPLING, [0]) for video in videos]):
        if not isinstance(decoded.outcome, ViewClips):
            raise decoded.outcome
        clips.append(decoded.outcome)
    return digest(clips)


def measure(ways: dict[str, Callable[[], str]], num_rounds: int) -> dict[str, float]:
    """Median seconds of each way, taken in turns; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    digests = set()
    for _ in range(num_rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            digests.add(way())
            seconds[name].append(time.perf_counter() - begin)
    if len(digests) != 1:
        raise RuntimeError(f"the ways gave {len(digests)} different sets of clips")
    return {name: statistics.median(measured[1:]) for name, measured in seconds.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-videos", type=int, default=60)
    parser.add_argument("--num-rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        videos = [write_video(Path(folder) / f"{index}.mp4", index) for index in range(arguments.num_videos)]
        begin = time.perf_counter()
        with DecodePool(1) as one, DecodePool(2) as two:
            print(f"three processes started one pool after the other in {time.perf_counter() - begin:.2f} s")
            found = measure(
                {
                    "2 threads": partial(on_threads, videos, 2),
                    "1 process": partial(in_processes, videos, one),
                    "2 processes": partial(in_processes, videos, two),
                },
                arguments.num_rounds,
            )
    for name, seconds in found.items():
        rate, ratio = len(videos) / seconds, found["2 threads"] / seconds
        print(f"{name:12} {rate:7.1f} clips/s   {ratio:5.2f} x the threads")


if __name__ == "__main__":
    main()
