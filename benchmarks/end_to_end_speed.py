"""How fast the whole method trains, and whether the GPU ever waits for data: all of it in one call.

python benchmarks/end_to_end_speed.py                                    R3D-50, 16 x 224 x 224, bfloat16, 5-way 1-shot, on CUDA
python benchmarks/end_to_end_speed.py --device cpu --backbone small3d --side 56 --frames 8 --steps 6    a trial without a GPU

Writes H.264 videos (320 x 240, 3 s) into a temporary folder and trains on them end to end with the MASTAF head: as it is, with gradient
checkpointing, with micro-batches of one clip, and with all GPUs through torchrun. Every draw of a video is a fresh view, and nothing is
kept in memory, so each step decodes all of its clips. Steps of the warm-up are left out. Printed for each variant: episodes per second,
memory of the GPU, and the share of the time in which a step waited for its inputs. torch's profiler then looks at some steps of the
first variant: the share of the time in which no kernel ran, which includes the waiting, and the kernels that took longest.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType  # torch.autograd has it, unlisted
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

# E402: the path above comes first.
from benchmarks.decode_pool import write_video
from configs.load import load_config, to_toml
from configs.schema import RunConfig
from episodes.datasets import Manifest, write_manifest
from episodes.video import Video
from pipeline.provenance import code_version, hardware, library_versions
from pipeline.training import train

ROOT = Path(__file__).parents[1]
VARIANTS: dict[str, Sequence[str]] = {
    "whole": (),
    "gradient checkpointing": ("training.gradient_checkpointing=true",),
    "one clip at a time": ("training.clips_per_forward=1",),
}


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one variant, without its warm-up."""

    variant: str
    ranks: int
    episodes_per_second: float
    waiting_share: float
    """Of the time of all steps: until inputs were there."""
    slowest_wait_seconds: float
    gpu_memory_bytes: float
    """Largest use of a GPU so far; 0 on the CPU."""


def make_videos(folder: Path, num_classes: int, videos_per_class: int) -> Path:
    """Videos of noise and motion; their manifest."""
    videos = []
    for class_number in range(num_classes):
        for number in range(videos_per_class):
            name = f"class{class_number:02d}/{number}.mp4"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_video(folder / name, seed=1000 * class_number + number)
            videos.append(Video(name.removesuffix(".mp4"), name, f"class{class_number:02d}", "train"))
    write_manifest(Manifest(tuple(videos), folder), folder / "videos.csv")
    return folder / "videos.csv"


def make_config(options: argparse.Namespace, manifest: Path, episodes: int, changes: Sequence[str]) -> RunConfig:
    """The published setting with one query of each class, but for what the options say."""
    dtype = "bfloat16" if options.device.startswith("cuda") else "float32"
    workers = options.decode_workers
    return load_config(
        None,
        [
            f'data.manifest="{manifest}"',
            f"sampling.num_frames={options.frames}",
            f"sampling.resize_size={round(options.side * 8 / 7)}",
            f"sampling.crop_size={options.side}",
            "sampling.policy=reference",
            "sampling.crop=random",
            f"backbone.name={options.backbone}",
            "backbone.weights=random:0",
            f"training.compute_dtype={dtype}",
            "episodes.n_way=5",
            "episodes.k_shot=1",
            "episodes.n_query=1",
            "episodes.train_views=1000000",
            "training.mode=end_to_end",
            f"training.episodes={episodes}",
            f"training.episodes_per_step={options.episodes_per_step}",
            f"training.validate_every={episodes}",
            "training.save_seconds=1e9",
            "training.clip_cache_bytes=0",
            *([f"training.decode_workers={workers}"] if workers is not None else []),
            *changes,
        ],
    )


def read_speed(folder: Path, variant: str, ranks: int, warmup: int) -> Speed:
    """What a run's steps.csv says."""
    with (folder / "steps.csv").open(encoding="utf-8") as file:
        steps = list(csv.DictReader(file))
    episodes = [0, *(int(step["episode"]) for step in steps)]
    kept = steps[warmup:]
    seconds = sum(float(step["seconds_step"]) for step in kept)
    waits = [float(step["seconds_waiting"]) for step in kept]
    memory = max(float(step.get("gpu_memory_bytes") or 0) for step in steps)
    rate = (episodes[-1] - episodes[warmup]) / seconds
    return Speed(variant, ranks, rate, sum(waits) / seconds, max(waits), memory)


def on_all_gpus(config: RunConfig, folder: Path, ranks: int, warmup: int, device: str) -> Speed:
    """The same through torchrun, every rank on a device of its own."""
    recipe = folder / "recipe.toml"
    recipe.write_text(to_toml(config), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(ROOT / "cli.py"), "train", str(recipe), "--out", str(folder / "run"), "--device", device]
    subprocess.run(command, check=True)
    return read_speed(folder / "run", "whole, torchrun", ranks, warmup)


def profiled(config: RunConfig, folder: Path, device: torch.device, first: int, last: int) -> dict[str, Any]:
    """Steps first .. last - 1 under torch's profiler: how long kernels ran, and which."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    profiler = profile(activities=activities)
    times: list[float] = []
    done = 0

    def count(line: Mapping[str, Any]) -> None:
        nonlocal done
        if line["kind"] != "step":
            return
        done += 1
        if done in (first, last):
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        if done == first:
            profiler.start()
        elif done == last:
            profiler.stop()

    train(config, folder, device, report=count)
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if event.device_type == wanted
    )
    wall = 1e6 * (times[1] - times[0])
    names = profiler.key_averages().table(
        sort_by="self_device_time_total" if device.type == "cuda" else "self_cpu_time_total", row_limit=8
    )
    return {
        "idle_share": 1 - min(1.0, _covered(spans) / wall),
        "seconds": wall / 1e6,
        "steps": last - first,
        "longest": names,
    }


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals, sorted by their begin."""
    total, reached = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backbone", default="r3d50")
    parser.add_argument("--side", type=int, default=224, help="of the square crop, in pixels")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60, help="of each variant, a quarter of them warm-up")
    parser.add_argument("--episodes-per-step", type=int, default=4)
    parser.add_argument("--decode-workers", type=int, help="default: as training chooses it")
    parser.add_argument("--videos-per-class", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="*", help="default: 1, 2, 4, ... up to all GPUs")
    parser.add_argument("--out", type=Path, help="JSON with all that was measured")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = parse()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("end_to_end_speed.py: torch sees no CUDA device here; --device cpu tries the script itself.")
    warmup = max(1, options.steps // 4)
    episodes = options.steps * options.episodes_per_step
    speeds = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        manifest = make_videos(folder / "videos", 10, options.videos_per_class)
        for variant, changes in VARIANTS.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            run = folder / variant.replace(" ", "_")
            train(make_config(options, manifest, episodes, changes), run, device)
            speeds.append(read_speed(run, variant, 1, warmup))
        evidence = profiled(
            make_config(options, manifest, episodes, ()),
            folder / "profiled",
            device,
            warmup,
            min(options.steps, warmup + 10),
        )
        all_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        for ranks in options.ranks if options.ranks is not None else [n for n in (2, 4, 8) if n <= all_gpus]:
            # Every rank has as much to do as one alone had.
            changes = [f"training.episodes_per_step={ranks * options.episodes_per_step}"]
            (folder / f"ranks{ranks}").mkdir()
            config = make_config(options, manifest, ranks * episodes, changes)
            speeds.append(on_all_gpus(config, folder / f"ranks{ranks}", ranks, warmup, options.device))
    report(options, speeds, evidence)


def report(options: argparse.Namespace, speeds: Sequence[Speed], evidence: Mapping[str, Any]) -> None:
    """Print the table, and write JSON if asked to."""
    print(
        f"{options.backbone}, {options.frames} x {options.side} x {options.side}, 5-way 1-shot, {hardware()}, code {code_version()}"
    )
    print(f"cores {os.cpu_count()}, steps {options.steps} of {options.episodes_per_step} episodes\n")
    print("| variant | ranks | episodes/s | GPU memory | waits for data | longest wait |\n|---|---|---|---|---|---|")
    for speed in speeds:
        print(
            f"| {speed.variant} | {speed.ranks} | {speed.episodes_per_second:.2f} | {speed.gpu_memory_bytes / 2**30:.1f} GiB "
            f"| {100 * speed.waiting_share:.1f} % | {speed.slowest_wait_seconds:.2f} s |"
        )
    base = statistics.fmean(speed.episodes_per_second for speed in speeds if speed.variant == "whole")
    for speed in speeds:
        print(f"{speed.variant}, {speed.ranks} ranks: {speed.episodes_per_second / base:.2f} x the first row")
    print(
        f"\nprofiler: {evidence['steps']} steps, {evidence['seconds']:.1f} s, device idle {100 * evidence['idle_share']:.1f} %"
    )
    print(evidence["longest"])
    if options.out is not None:
        document = {
            "options": {key: str(value) for key, value in vars(options).items()},
            "speeds": [{name: getattr(speed, name) for name in speed.__slots__} for speed in speeds],
            "profiler": dict(evidence),
            "hardware": hardware(),
            "libraries": library_versions(),
            "code_version": code_version(),
        }
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
