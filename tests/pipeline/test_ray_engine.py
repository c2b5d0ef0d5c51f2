"""A real Ray on this machine: the same content as one process, whatever happens to its actors, and never a silent hang."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache.open import open_disk_store
from contracts.world import World, make_world, write_clip

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "sampling.num_frames=4", "sampling.resize_size=28", "sampling.crop_size=24", "backbone.options.width=4",
    "store.shard_rows=4", "extraction.forward_batch=4", "extraction.decode_workers=1",
]  # fmt: skip
LAUNCHERS = re.compile(r"SLURM_.*|RANK|WORLD_SIZE|LOCAL_.*|MASTAF_.*|RAY_.*")
ALONE = {name: value for name, value in os.environ.items() if not LAUNCHERS.fullmatch(name)}

STALLED = """
import time
import pipeline.ray_engine

def main():
    class NeverEnds:
        def __call__(self, row):
            time.sleep(1000)
    pipeline.ray_engine.ShardDecoder = NeverEnds
    import cli
    cli.main()

main()
"""


def extraction(world: World, store: Path, *options: object) -> list[str]:
    overrides = [word for override in SMALL for word in ("--set", override)]
    return [
        "extract", "--manifest", str(world.manifest_path), "--backbone", "small3d", "--weights", "random:1",
        "--device", "cpu", "--store", str(store), *overrides, *map(str, options),
    ]  # fmt: skip


def start(program: list[str], *words: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, *program, *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**ALONE, **environment}, cwd="/"
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=200)
    assert process.returncode == code, (process.returncode, errors)
    assert "Traceback" not in errors
    return output, errors


CLI = [str(ROOT / "cli.py")]


def content(path: Path) -> tuple[str, dict[str, tuple[str, str | None]]]:
    """Content hash, and video -> status and reason."""
    with open_disk_store(path, "zarr") as store:
        assert store.pending() == []
        outcomes = {video_id: store.outcome(video_id) for video_id in store.ids()}
        return store.content_hash(), {name: (one.status, one.reason) for name, one in outcomes.items() if one}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> World:
    """28 videos: one too short, one no video, one missing."""
    world = make_world(tmp_path_factory.mktemp("mixed"), 4)
    write_clip(world.folder / "videos/down/1.mp4", "down", 1, num_frames=3)
    (world.folder / "videos/left/1.mp4").write_text("this is no video")
    (world.folder / "videos/up/2.mp4").unlink()
    return world


def writers(path: Path) -> list[int]:
    return [int(log.stem.rsplit("-", 2)[1]) for log in (path / "ledger").glob("*.jsonl")]


def wait_for_writer(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not writers(path):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_ray_makes_what_one_process_makes_though_an_actor_is_killed(mixed: World, tmp_path: Path) -> None:
    alone, store = tmp_path / "alone.zarr", tmp_path / "s.zarr"
    finish(start(CLI, *extraction(mixed, alone)))
    process = start(CLI, *extraction(mixed, store, "--engine", "ray", "--json"))
    wait_for_writer(store, process)
    os.kill(writers(store)[0], signal.SIGKILL)
    output, errors = finish(process)
    assert content(store) == content(alone)
    assert len(writers(store)) >= 2, "the actor was replaced by another process"
    report = json.loads(output)
    assert (report["num_ok"], report["num_degraded"], report["num_rejected"], report["num_pending"]) == (25, 1, 2, 0)
    ours = re.compile(r"extract: |rejected: |degraded: |28 videos: ")
    strange = [line for line in errors.splitlines() if not ours.match(line) and "(raylet)" not in line]
    assert not strange, "Ray says that an actor died, and nothing else"


@pytest.mark.slow
def test_stalled_ray_is_stopped_with_what_to_do_and_nothing_is_lost(mixed: World, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    finish(start(CLI, *extraction(mixed, store, "--shard", "0/2")))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    words = extraction(mixed, store, "--engine", "ray", "--ray-timeout", 5)
    _, errors = finish(start(["-c", STALLED], *words, PYTHONPATH=path), code=2)
    assert "no shard for 5 s" in errors
    assert "--ray-timeout" in errors
    assert "--workers" in errors
    output, _ = finish(start(CLI, *extraction(mixed, store, "--json")))
    report = json.loads(output)
    assert 0 < report["num_skipped"] < report["num_videos"] == 28
    assert report["num_pending"] == 0


@pytest.mark.slow
@pytest.mark.campaign
def test_signal_ends_ray_and_all_its_processes(mixed: World, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    process = start(CLI, *extraction(mixed, store, "--engine", "ray"))
    wait_for_writer(store, process)
    actor = writers(store)[0]
    process.send_signal(signal.SIGTERM)
    _, errors = finish(process, code=143)
    assert "stopped by SIGTERM" in errors
    assert not Path(f"/proc/{actor}").exists()


@pytest.mark.slow
@pytest.mark.campaign
def test_error_within_an_actor_is_one_line(mixed: World, tmp_path: Path) -> None:
    words = extraction(mixed, tmp_path / "s.zarr", "--engine", "ray", "--set", "sampling.short_policy=fail")
    _, errors = finish(start(CLI, *words), code=2)
    assert len([line for line in errors.splitlines() if line.startswith("mastaf: ")]) == 1
    assert "down/1" in errors


def test_missing_ray_is_one_line_with_the_command(mixed: World, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('no ray here')\n")
    words = extraction(mixed, tmp_path / "s.zarr", "--engine", "ray")
    _, errors = finish(start(CLI, *words, PYTHONPATH=str(tmp_path)), code=2)
    assert errors.count("\n") == 1
    assert "pip install -e '.[ray]'" in errors
