"""What the pipeline of stage 1 makes of its parts: clips per second of decoding, of the backbone, and of both together.

python benchmarks/extraction_efficiency.py [--num-videos 96] [--decode-workers N] [--backbone small3d --backbone r3d18] [--device cpu]

Writes videos of 3 s (H.264, 320 x 240) into a temporary folder. All three run in turns in one process, several times; medians
are printed. `efficiency` is the full run over the slower part: 1 where decoding and backbone have hardware of their own. Where
they share the cores, no schedule can do better than 1 / (1/decode + 1/forward), with both at full load; it stands beside.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

# E402: the path above comes first.
from benchmarks.decode_pool import write_video
from cache.open import open_store
from configs.load import load_config
from configs.schema import RunConfig
from extract.build import build_backbone
from extract.decode import VideoSource, ViewClips
from extract.pool import DecodePool, DecodeTask, decoded_in_order
from pipeline.extraction import build_spec, extract_videos
from pipeline.extraction_feed import num_decode_workers
from pipeline.model import forward_in_full_batches


@dataclass(slots=True)
class Rates:
    """Clips per second of each turn."""

    decode: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    full: list[float] = field(default_factory=list)


@contextmanager
def timed(rates: list[float], num_clips: int) -> Iterator[None]:
    """Note the rate of the block."""
    begin = time.perf_counter()
    yield
    rates.append(num_clips / (time.perf_counter() - begin))


def decode_all(config: RunConfig, videos: list[VideoSource]) -> Iterator[np.ndarray]:
    """(F, H, W, 3) uint8 of each video, as the pipeline decodes them."""
    extraction = config.extraction
    tasks = (DecodeTask(video, config.sampling, [0]) for video in videos)
    with DecodePool(num_decode_workers(extraction, len(videos))) as pool:
        for decoded in decoded_in_order(pool, tasks):
            assert isinstance(decoded.outcome, ViewClips)
            yield decoded.outcome.clips[0]


def measure(config: RunConfig, videos: list[VideoSource], device: torch.device, num_turns: int) -> Rates:
    """Each part alone, then the whole, in turns."""
    backbone = build_backbone(config.backbone, config.sampling).to(device)
    spec = build_spec(config, backbone, device)
    batch_size = config.extraction.forward_batch
    clips = torch.from_numpy(np.stack(list(decode_all(config, videos[:batch_size]))))
    rates = Rates()
    for _ in range(num_turns):
        with timed(rates.decode, len(videos)):
            for _ in decode_all(config, videos):
                pass
        with timed(rates.forward, len(videos)), torch.no_grad():
            for _ in range(0, len(videos), batch_size):
                cubes = forward_in_full_batches(backbone, clips.to(device), config.sampling, batch_size)
                for cube in cubes.values():
                    cube.cpu()
        with tempfile.TemporaryDirectory() as folder:
            with (
                open_store(Path(folder) / "s.zarr", spec=spec, mode="a", shard_rows=config.store.shard_rows) as store,
                timed(rates.full, len(videos)),
            ):
                report = extract_videos(store, videos, backbone, config, device)
            assert report.num_ok == len(videos)
    print(
        f"  last full run bound by {report.bound_by}: decoding {report.decoding_seconds:.1f} s, backbone "
        f"{report.backbone_seconds:.1f} s, writing {report.writing_seconds:.1f} s of {report.seconds:.1f} s"
    )
    return rates


def main() -> None:
    """Measure each backbone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--num-videos", type=int, default=96)
    parser.add_argument("--num-turns", type=int, default=3)
    parser.add_argument("--decode-workers", type=int)
    parser.add_argument("--backbone", action="append")
    parser.add_argument("--crop-size", type=int, default=112)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    overrides = [f"sampling.crop_size={options.crop_size}", f"sampling.resize_size={options.crop_size * 8 // 7}"]
    overrides += ["store.shard_rows=16"]
    if options.decode_workers is not None:
        overrides.append(f"extraction.decode_workers={options.decode_workers}")
    with tempfile.TemporaryDirectory() as folder:
        videos = [write_video(Path(folder) / f"{index}.mp4", index) for index in range(options.num_videos)]
        for name in options.backbone or ["small3d", "r3d18"]:
            config = load_config(None, [f"backbone.name={name}", "backbone.weights=random:0", *overrides])
            workers = num_decode_workers(config.extraction, len(videos))
            print(f"{name}, {options.device}, {workers} decoding processes, {options.crop_size} pixels:")
            rates = measure(config, videos, torch.device(options.device), options.num_turns)
            decode, forward, full = map(statistics.median, (rates.decode, rates.forward, rates.full))
            shared = 1 / (1 / decode + 1 / forward)
            print(
                f"  decode {decode:.1f}, forward {forward:.1f}, full {full:.1f} clips/s; efficiency "
                f"{full / min(decode, forward):.2f} of the slower part; where cores are shared: {full / shared:.2f} of "
                f"1/(1/d + 1/f) = {shared:.1f}"
            )


if __name__ == "__main__":
    main()
