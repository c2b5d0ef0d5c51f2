"""A real Ray on this machine: the same content as one process, whatever happens to its actors, and never a silent hang."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.open import open_disk_store
from cache.store import RowOutcome, Shard
from contracts.world import World, make_world, write_clip
from extract.build import build_backbone
from pipeline.extraction import build_spec, plan_videos, video_sources
from pipeline.ray_stages import ActorSettings, DecodedShard, ShardActor

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


def descendants(pid: int) -> set[tuple[int, str]]:
    """Process ids with their start times, of all that are below a process now."""
    found: set[tuple[int, str]] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == pid:
            child = int(stat.parent.name)
            found |= {(child, fields[19])} | descendants(child)
    return found


def is_alive(process: tuple[int, str]) -> bool:
    try:
        fields = Path(f"/proc/{process[0]}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return False
    return fields[19] == process[1] and fields[0] != "Z"


def seen_until_the_end(process: subprocess.Popen[str]) -> set[tuple[int, str]]:
    """All processes that were below one while it ran on."""
    seen: set[tuple[int, str]] = set()
    while process.poll() is None:
        seen |= descendants(process.pid)
        time.sleep(0.02)
    return seen


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
@pytest.mark.campaign
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
    process.send_signal(signal.SIGTERM)
    seen = seen_until_the_end(process)
    _, errors = finish(process, code=143)
    assert "stopped by SIGTERM" in errors
    assert writers(store)[0] in [pid for pid, _ in seen]
    assert not [one for one in seen if is_alive(one)]


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize("num_processes", [1, 4])
def test_signal_while_ray_starts_leaves_nothing_behind(mixed: World, tmp_path: Path, num_processes: int) -> None:
    """With one process there is Ray's own first one; with four, its agents are starting."""
    process = start(CLI, *extraction(mixed, tmp_path / "s.zarr", "--engine", "ray"))
    deadline = time.monotonic() + 100
    while len(descendants(process.pid)) < num_processes:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    seen = seen_until_the_end(process)
    _, errors = finish(process, code=143)
    assert "stopped by SIGTERM" in errors
    assert len(seen) >= num_processes
    assert not [one for one in seen if is_alive(one)]


def test_actor_forgets_a_shard_that_failed_half_way(mixed: World, tmp_path: Path) -> None:
    config = mixed.config()
    videos = [source for name, source in video_sources(mixed.manifest).items() if name.startswith("down")]
    inputs: list[torch.Tensor] = []

    def recorded() -> torch.nn.Module:
        backbone = build_backbone(config.backbone, config.sampling)
        backbone.register_forward_pre_hook(lambda module, given: inputs.append(given[0].clone()))
        return backbone

    spec = build_spec(config, build_backbone(config.backbone, config.sampling), torch.device("cpu"))
    path = tmp_path / "s.zarr"
    with open_disk_store(path, "zarr", spec, "a", shard_rows=2) as store:
        plan_videos(store, videos, [0])
        shards = store.pending()
    actor = ShardActor(ActorSettings(str(path), "zarr", recorded, config, "cpu", 1))
    clips = np.full((2, 4, 24, 24, 3), 255, dtype=np.uint8)

    def row(shard: Shard, has_clip: list[bool], clips: np.ndarray) -> dict[str, object]:
        outcomes = [RowOutcome("ok") if has else RowOutcome("rejected", "missing") for has in has_clip]
        decoded = DecodedShard(shard, outcomes, has_clip, 0, 0.0)
        return {"decoded": pickle.dumps(decoded), "clips": clips, "failure": b""}

    assert actor(row(shards[0], [True, True], clips[:1]))["failure"], "its second clip is not there"
    assert not actor(row(shards[1], [False, True], clips))["failure"]
    batch = inputs[-1]
    assert torch.equal(batch[0], batch[2]), "zeros stand in for a row without a clip, as behind the last row"
    assert not torch.equal(batch[0], batch[1])


@pytest.mark.slow
@pytest.mark.campaign
def test_error_within_an_actor_is_one_line(mixed: World, tmp_path: Path) -> None:
    words = extraction(mixed, tmp_path / "s.zarr", "--engine", "ray", "--set", "sampling.short_policy=fail")
    _, errors = finish(start(CLI, *words), code=2)
    assert len([line for line in errors.splitlines() if line.startswith("mastaf: ")]) == 1
    assert "down/1" in errors


GAPS = {
    "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_COUNT": "2",
    "SLURM_ARRAY_TASK_STEP": "1",
}  # fmt: skip


@pytest.mark.parametrize("environment", [{}, pytest.param(GAPS, marks=pytest.mark.slow)])
def test_missing_ray_is_one_line_with_the_command(mixed: World, tmp_path: Path, environment: dict[str, str]) -> None:
    """An array with gaps does not matter where the share is told."""
    (tmp_path / "ray.py").write_text("raise ImportError('no ray here')\n")
    words = extraction(mixed, tmp_path / "s.zarr", "--engine", "ray", "--shard", "0/1")
    _, errors = finish(start(CLI, *words, PYTHONPATH=str(tmp_path), **environment), code=2)
    assert errors.count("\n") == 1
    assert "pip install -e '.[ray]'" in errors
