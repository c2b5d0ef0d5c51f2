"""Many processes fill one store: however they are launched and whatever kills them, the rows and the content are those of one."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cache.open import open_disk_store
from contracts.world import World, make_world, write_clip
from pipeline.job import Job
from pipeline.shares import Share
from pipeline.workers import run_workers

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "sampling.num_frames=4", "sampling.resize_size=28", "sampling.crop_size=24", "backbone.options.width=4",
    "store.shard_rows=4", "extraction.forward_batch=4", "extraction.decode_workers=1",
]  # fmt: skip
SET_SMALL = [word for override in SMALL for word in ("--set", override)]
LAUNCHERS = re.compile(r"SLURM_.*|RANK|WORLD_SIZE|LOCAL_.*|MASTAF_.*|RAY_ADDRESS")
ALONE = {name: value for name, value in os.environ.items() if not LAUNCHERS.fullmatch(name)}


def extraction(world: World, store: Path, *options: object) -> list[str]:
    """Words of the command that every test runs in its own way."""
    return [
        "extract", "--manifest", str(world.manifest_path), "--backbone", "small3d", "--weights", "random:1",
        "--device", "cpu", "--store", str(store), *SET_SMALL, *map(str, options),
    ]  # fmt: skip


def start(*words: object, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment or ALONE, cwd="/"
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=200)
    assert process.returncode == code, (process.returncode, errors)
    assert "Traceback" not in errors
    return output, errors


@dataclass(frozen=True)
class Content:
    """All that must not depend on how a store was filled."""

    content_hash: str
    rows: Mapping[tuple[str, int], tuple[str, str | None]]
    """(video, view) -> status and reason."""


def content(path: Path) -> Content:
    with open_disk_store(path, "zarr") as store:
        assert store.pending() == []
        assert store.holders() == {}
        rows = {}
        for row in store.rows():
            outcome = store.outcome(row.video_id, row.view)
            assert outcome is not None
            rows[row.video_id, row.view] = (outcome.status, outcome.reason)
        return Content(store.content_hash(), rows)


def num_done(path: Path) -> int:
    """Rows committed; 0 while there is no store."""
    if not (path / "ledger" / "spec.json").is_file():
        return 0
    with open_disk_store(path, "zarr") as store:
        counts = store.counts()
        return sum(counts.values()) - counts["pending"]


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def writers(path: Path) -> list[int]:
    """Process ids of all that ever wrote, from the names of their logs."""
    return [int(log.stem.rsplit("-", 2)[1]) for log in (path / "ledger").glob("*.jsonl")]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> World:
    """35 videos: one too short, one no video, one missing."""
    world = make_world(tmp_path_factory.mktemp("mixed"), 5)
    write_clip(world.folder / "videos/down/1.mp4", "down", 1, num_frames=3)
    (world.folder / "videos/left/1.mp4").write_text("this is no video")
    (world.folder / "videos/up/2.mp4").unlink()
    return world


@pytest.fixture(scope="module")
def expected(mixed: World, tmp_path_factory: pytest.TempPathFactory) -> Content:
    """What one process makes."""
    store = tmp_path_factory.mktemp("alone") / "s.zarr"
    finish(start(*extraction(mixed, store)))
    found = content(store)
    assert len(found.rows) == 35
    assert set(found.rows.values()) >= {("ok", None), ("degraded", "short_video")}
    return found


@pytest.mark.parametrize("count", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_workers_make_what_one_process_makes_and_report_it_once(
    mixed: World, expected: Content, tmp_path: Path, count: int
) -> None:
    store = tmp_path / "s.zarr"
    output, errors = finish(start(*extraction(mixed, store, "--workers", count, "--json", "--strict")), code=3)
    assert content(store) == expected
    report = json.loads(output)
    assert (report["num_videos"], report["num_ok"], report["num_degraded"], report["num_rejected"]) == (35, 32, 1, 2)
    assert (report["num_skipped"], report["num_clips"], report["num_pending"]) == (0, 35, 0)
    assert errors.count("35 videos:") == 1, "one report for all"


@pytest.mark.slow
@pytest.mark.campaign
def test_second_run_with_workers_skips_what_is_stored(mixed: World, expected: Content, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    finish(start(*extraction(mixed, store)))
    output, _ = finish(start(*extraction(mixed, store, "--workers", 2, "--json")))
    assert (json.loads(output)["num_skipped"], json.loads(output)["num_clips"]) == (35, 0)
    assert content(store) == expected


def test_ranks_of_torchrun_make_what_one_process_makes(mixed: World, expected: Content, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = [*launcher, str(ROOT / "cli.py"), *extraction(mixed, store)]
    done = subprocess.run(command, env=ALONE, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert content(store) == expected
    assert len(writers(store)) == 2


@pytest.mark.slow
def test_killed_worker_is_named_and_its_shards_are_taken_over(mixed: World, expected: Content, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    process = start(*extraction(mixed, store, "--workers", 2, "--json"))
    wait_until(lambda: bool(writers(store)), process)
    victim = writers(store)[0]
    os.kill(victim, signal.SIGKILL)
    output, errors = finish(process)
    assert re.search(rf"process \d \(pid {victim}\) was killed by SIGKILL", errors)
    assert content(store) == expected
    assert json.loads(output)["num_pending"] == 0


@pytest.mark.slow
def test_when_all_workers_are_killed_the_exit_code_and_the_words_say_so(mixed: World, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    process = start(*extraction(mixed, store, "--workers", 2))
    wait_until(lambda: bool(writers(store)), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    for pid in children:
        os.kill(int(pid), signal.SIGKILL)
    _, errors = finish(process, code=2)
    assert "all 2 processes died" in errors
    assert "fewer --workers" in errors


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_signal_to_the_parent_stops_all_and_the_same_command_goes_on(
    mixed: World, expected: Content, tmp_path: Path, number: int, code: int
) -> None:
    store = tmp_path / "s.zarr"
    process = start(*extraction(mixed, store, "--workers", 2))
    wait_until(lambda: bool(writers(store)), process)
    process.send_signal(number)
    _, errors = finish(process, code)
    assert f"stopped by {signal.Signals(number).name}" in errors
    assert not any(is_running(pid) for pid in writers(store))
    finish(start(*extraction(mixed, store, "--workers", 2)))
    assert content(store) == expected


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(mixed: World, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    process = start(*extraction(mixed, store, "--workers", 2))
    wait_until(lambda: bool(writers(store)), process)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(children) == 2


@pytest.mark.slow
@pytest.mark.campaign
def test_error_of_the_user_is_said_once(mixed: World, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    finish(start(*extraction(mixed, store, "--set", "sampling.num_frames=2", "--shard", "0/1000")))
    _, errors = finish(start(*extraction(mixed, store, "--workers", 2)), code=2)
    assert errors.count("another spec") == 1
    assert "sampling.num_frames" in errors


@pytest.mark.slow
def test_retry_with_workers_does_each_rejected_video_once(mixed: World, expected: Content, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    finish(start(*extraction(mixed, store)))
    output, _ = finish(start(*extraction(mixed, store, "--workers", 2, "--retry-failed", "--json")))
    assert (json.loads(output)["num_clips"], json.loads(output)["num_skipped"]) == (2, 33)
    assert content(store) == expected
    _, errors = finish(start(*extraction(mixed, store, "--shard", "0/2", "--retry-failed")), code=2)
    assert "Run it once" in errors


FIRST_RETRY_IS_KILLED = """
import os, pathlib, runpy, signal, sys
marker, program, *words = sys.argv[1:]
if "--retry-failed" in words and not pathlib.Path(marker).exists():
    pathlib.Path(marker).touch()
    os.kill(os.getpid(), signal.SIGKILL)
sys.argv = [program, *words]
runpy.run_path(program, run_name="__main__")
"""


@pytest.mark.slow
def test_retry_is_planned_again_when_its_process_died_before_it_planned(
    mixed: World, expected: Content, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s.zarr"
    finish(start(*extraction(mixed, store)))
    (tmp_path / "killed.py").write_text(FIRST_RETRY_IS_KILLED)
    words = [sys.executable, tmp_path / "killed.py", tmp_path / "marker", ROOT / "cli.py"]
    command = [*map(str, words), *extraction(mixed, store, "--json")]
    job = Job(str(store), None, [video.video_id for video in mixed.manifest.videos], [0], Share(0, 2, True, 2))
    report = run_workers(command, 2, job, lambda done, total: None, ["--retry-failed"], ALONE)
    assert (report.num_clips, report.num_skipped, report.num_rejected) == (2, 33, 2)
    assert "not planned anew yet; 1 begin once more" in capsys.readouterr().err
    assert content(store) == expected


def array_environment(task: int, count: int, restarts: int) -> dict[str, str]:
    return {
        **ALONE, "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(count),
        "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": str(count - 1), "SLURM_ARRAY_TASK_STEP": "1",
        "SLURM_RESTART_COUNT": str(restarts), "SLURM_JOB_ID": str(100 + task), "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
    }  # fmt: skip


def preempt(process: subprocess.Popen[bytes], chance: random.Random) -> None:
    """As Slurm does it: the shell alone is warned or asked to end, or everything is killed."""
    number = chance.choice([signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL])
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def num_lines(store: Path) -> int:
    return sum(log.read_bytes().count(b"\n") for log in store.glob("ledger/*.jsonl"))


def preempted_task(script: str, store: Path, task: int, seed: float, path: str) -> int:
    """Run one task of an array to its end, interrupting it up to four times; how often it was."""
    chance = random.Random(seed)
    num_restarts = num_preempted = 0
    while True:
        environment = {**array_environment(task, 2, num_restarts), "PATH": path}
        process = subprocess.Popen(
            ["bash", "-c", script], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
        )
        num_before = num_lines(store)
        if num_restarts % 2 == 0:
            time.sleep(chance.uniform(0.1, 1.0))  # while it starts
        else:
            while num_restarts < 4 and process.poll() is None and num_lines(store) == num_before:
                time.sleep(0.005)  # until it works
        if num_restarts == 4 or process.poll() is not None:
            assert process.wait(timeout=120) == 0
            return num_preempted
        preempt(process, chance)
        process.wait(timeout=60)
        num_restarts += 1
        num_preempted += 1


@pytest.mark.slow
def test_printed_slurm_script_fills_the_store(mixed: World, expected: Content, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    script, _ = finish(start(*extraction(mixed, store, "--slurm", "print", "--slurm-tasks", 2)))
    assert not store.exists(), "printing makes nothing"
    for task in range(2):
        environment = array_environment(task, 2, 0)
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert content(store) == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.campaign), 1])
def test_slurm_array_with_random_preemption_ends_in_the_same_content(
    mixed: World, expected: Content, tmp_path: Path, seed: int
) -> None:
    store, chance = tmp_path / "s.zarr", random.Random(seed)
    script, _ = finish(start(*extraction(mixed, store, "--slurm", "print", "--slurm-tasks", 2)))
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text('#!/bin/bash\n[ "$1" = requeue ]\n')
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}:{ALONE['PATH']}"
    with ThreadPoolExecutor(2) as pool:
        seeds = [chance.random() for _ in range(2)]
        preempted = sum(pool.map(lambda task: preempted_task(script, store, task, seeds[task], path), range(2)))
    # A task may end between the look and the signal, but it is always interrupted while it starts.
    assert preempted >= 2
    assert content(store) == expected


@pytest.mark.slow
def test_submit_hands_the_script_to_sbatch_or_says_that_there_is_none(mixed: World, tmp_path: Path) -> None:
    words = extraction(mixed, tmp_path / "s.zarr", "--slurm", "submit", "--slurm-tasks", 3)
    environment = {**ALONE, "PATH": str(tmp_path)}
    _, errors = finish(start(*words, environment=environment), code=2)
    assert "no `sbatch` here" in errors
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/bash\nPATH=/usr/bin:/bin\ncat > "{tmp_path}/script"\necho "Submitted batch job 7"\n')
    sbatch.chmod(0o755)
    output, _ = finish(start(*words, environment=environment))
    assert output == "Submitted batch job 7\n"
    assert "#SBATCH --array=0-2\n" in (tmp_path / "script").read_text()


@pytest.mark.slow
def test_watch_follows_other_writers_to_the_end(mixed: World, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    finish(start(*extraction(mixed, store, "--shard", "0/2")))
    watcher = start("store", "info", store, "--watch", "--interval", 0.1, "--json")
    finish(start(*extraction(mixed, store, "--shard", "1/2")))
    output, _ = finish(watcher)
    looks: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    assert 0 < looks[0]["num_done"] < 35
    assert looks[-1]["num_done"] == looks[-1]["num_rows"] == 35
    assert any(look["writers"] for look in looks)


@pytest.mark.slow
def test_watch_ends_on_ctrl_c(mixed: World, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    finish(start(*extraction(mixed, store, "--shard", "0/2")))
    watcher = start("store", "info", store, "--watch", "--interval", 0.1)
    assert watcher.stdout is not None
    assert "nobody is writing" in watcher.stdout.readline()
    watcher.send_signal(signal.SIGINT)
    finish(watcher, code=130)
