"""Hold `mastaf store plan` against what the extraction then takes, for three backbones; exit 1 beyond 10 %.

python benchmarks/plan_against_actual.py [--videos 480] [--kind zarr]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# E402: the path above comes first.
from contracts.world import CLASSES, write_clip  # noqa: E402
from episodes.datasets import Manifest, write_manifest  # noqa: E402
from episodes.video import Video  # noqa: E402

BACKBONES = {
    "small3d": ["sampling.num_frames=16", "sampling.resize_size=128", "sampling.crop_size=112"],
    "tv_r3d_18": ["sampling.num_frames=8", "sampling.resize_size=80", "sampling.crop_size=64"],
    "tsn_resnet50": ["sampling.num_frames=4", "sampling.resize_size=128", "sampling.crop_size=112"],
}


def make_videos(folder: Path, num_videos: int) -> Path:
    """Real files, 24 frames of 160 x 160 pixels."""
    videos = []
    for number in range(num_videos):
        class_name = list(CLASSES)[number % len(CLASSES)]
        path = f"videos/{class_name}/{number}.mp4"
        write_clip(folder / path, class_name, number, num_frames=24, size=160)
        videos.append(Video(f"{class_name}/{number}", path, class_name, CLASSES[class_name]))
    manifest = folder / "videos.csv"
    write_manifest(Manifest(tuple(videos), folder), manifest)
    return manifest


def mastaf(*arguments: str) -> Any:
    """The JSON that a command prints."""
    command = [sys.executable, str(ROOT / "cli.py"), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def compare(name: str, manifest: Path, folder: Path, kind: str) -> bool:
    """Plan, extract, compare; whether everything is within 10 %."""
    store = folder / f"{name}.{kind}"
    options = ["--manifest", str(manifest), "--backbone", name, "--weights", "random:0", "--device", "cpu"]
    for override in (*BACKBONES[name], "store.shard_rows=32"):
        options += ["--set", override]
    plan = mastaf("store", "plan", str(store), *options)
    started = time.perf_counter()
    report = mastaf("extract", "--store", str(store), *options)
    wall = time.perf_counter() - started
    files = [file for file in store.rglob("*") if file.is_file()]
    actual = {
        "num_bytes": sum(file.stat().st_size for file in files),
        "num_files": len(files),
        "seconds": report["seconds"],
    }
    ratios = {key: plan[key] / value for key, value in actual.items()}
    print(
        f"{name:<14} {kind}: bytes {plan['num_bytes']:,} / {actual['num_bytes']:,} = {ratios['num_bytes']:.3f}; files "
        f"{plan['num_files']} / {actual['num_files']} = {ratios['num_files']:.3f}; seconds {plan['seconds']:.1f} / "
        f"{actual['seconds']:.1f} = {ratios['seconds']:.3f} (whole command {wall:.1f} s)",
        flush=True,
    )
    return all(abs(ratio - 1) <= 0.1 for ratio in ratios.values())


def main() -> None:
    """Print one line for each backbone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=480)
    parser.add_argument("--kind", choices=["zarr", "h5"], default="zarr")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        manifest = make_videos(Path(name), arguments.videos)
        results = [compare(backbone, manifest, Path(name), arguments.kind) for backbone in BACKBONES]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
