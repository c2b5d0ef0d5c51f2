"""`mastaf extract` in its own process: killed, signalled, starved of disk; what was committed stays and the rest is redone."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cache.open import open_store
from contracts.child_processes import children_of, decoders_of, is_running, wait_until
from contracts.world import World, make_world, write_clip
from episodes.datasets import Manifest, write_manifest
from episodes.video import Video
from pipeline.extract_command import extract_to_store

ROOT = Path(__file__).resolve().parents[2]
STUCK = Path(__file__).with_name("stuck_extract.py")
SMALL = [
    "sampling.num_frames=4", "sampling.resize_size=28", "sampling.crop_size=24", "store.shard_rows=4", "extraction.forward_batch=4",
    "backbone.options.width=8", "extraction.decode_workers=0",
]  # fmt: skip
LATE_SECONDS = 60.0
"""A stopped command ends within ten; the stuck one would go on for a hundred."""


def command(world: World, store: Path, *overrides: str, options: Sequence[str] = ()) -> list[str]:
    settings = [
        word for override in (*SMALL, "extraction.decode_workers=2", *overrides) for word in ("--set", override)
    ]
    return [
        "extract", "--manifest", str(world.manifest_path), "--backbone", "small3d", "--weights", "random:1",
        "--device", "cpu", "--store", str(store), *settings, *options,
    ]  # fmt: skip


def start(arguments: Sequence[str], *before: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *(before or (str(ROOT / "cli.py"),)), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def finished(world: World, store: Path, *overrides: str, retry_failed: bool = False) -> dict[str, Any]:
    """The report of a run that succeeds; in this process, which has torch loaded."""
    return extract_to_store(
        world.manifest_path,
        "small3d",
        "random:1",
        str(store),
        None,
        None,
        None,
        "cpu",
        (*SMALL, *overrides),
        retry_failed,
    )


def content_hash(store: Path) -> str:
    with open_store(store) as opened:
        return opened.content_hash()


def outcomes(store: Path) -> dict[str, tuple[str, str | None]]:
    with open_store(store) as opened:
        found = {video_id: opened.outcome(video_id) for video_id in opened.ids()}
    return {name: (outcome.status, outcome.reason) for name, outcome in found.items() if outcome is not None}


def num_committed(store: Path) -> int:
    """Shards in the ledger; whole lines."""
    return sum(log.read_bytes().count(b"\n") for log in store.glob("ledger/*.jsonl"))


@pytest.fixture(scope="module")
def reference(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Content hash of an uninterrupted run."""
    store = tmp_path_factory.mktemp("reference") / "whole.zarr"
    report = finished(world, store)
    assert (report["num_ok"], report["num_clips"], report["num_restarts"]) == (28, 28, 0)
    return content_hash(store)


@pytest.mark.parametrize(
    ("number", "place", "code"),
    [
        pytest.param(signal.SIGTERM, "forward", 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "commit", 130, marks=pytest.mark.slow),
        (signal.SIGUSR1, "decoding", 143),
        pytest.param(signal.SIGINT, "decoding", 130, marks=pytest.mark.slow),
    ],
)
def test_signal_stops_within_seconds_wherever_the_run_is(
    world: World, tmp_path: Path, reference: str, number: signal.Signals, place: str, code: int
) -> None:
    store = tmp_path / "s.zarr"
    if place == "decoding":
        process = start(command(world, store))
        wait_until(lambda: len(decoders_of(process.pid)) == 2)
        workers = decoders_of(process.pid)
        for worker in workers:  # frozen: the run waits for them, for two minutes if need be
            os.kill(worker, signal.SIGSTOP)
    else:
        process = start(command(world, store), str(STUCK), place)
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        workers = children_of(process.pid)
        assert workers
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=LATE_SECONDS)
    assert process.returncode == code
    lines = [line for line in errors.splitlines() if not line.startswith("extract:")]
    assert [line.partition(" ")[0] for line in lines] == ["stopping", "mastaf:"], errors
    assert "run the same command again to go on" in lines[-1]
    assert number.name in lines[-1]
    wait_until(lambda: not any(map(is_running, workers)))
    assert not list(store.glob("ledger/leases/*"))
    finished(world, store)
    assert content_hash(store) == reference


@pytest.mark.slow
def test_second_signal_stops_at_once(world: World, tmp_path: Path, reference: str) -> None:
    store = tmp_path / "s.zarr"
    process = start(command(world, store), str(STUCK), "forward")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGTERM)
    errors = process.stderr
    wait_until(lambda: "stopping" in errors.readline())
    time.sleep(1.0)  # sooner, it would count as the same one
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=LATE_SECONDS)
    assert process.returncode == 143
    assert rest == ""  # it did not come to the line of a run that was late
    finished(world, store)
    assert content_hash(store) == reference


def test_process_ends_even_if_its_last_words_fail() -> None:
    program = (
        "import time\nfrom pipeline.interrupts import PromptStop\n"
        "with PromptStop(lambda: 1 / 0, seconds=0.7):\n    print('ready', flush=True)\n    time.sleep(300)\n    time.sleep(300)"
    )
    process = start([], "-c", program)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LATE_SECONDS)
    assert process.returncode == 143
    assert "SIGTERM; what was saved cannot be said (ZeroDivisionError: division by zero)" in errors


def test_signal_in_the_middle_commits_what_is_finished_and_drops_the_rest(
    world: World, tmp_path: Path, reference: str
) -> None:
    store = tmp_path / "s.zarr"
    process = start(command(world, store))
    wait_until(lambda: num_committed(store) > 0)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LATE_SECONDS)
    assert process.returncode in (143, 0)  # 0: it was faster
    assert "Traceback" not in errors
    assert "resource_tracker" not in errors
    assert not list(store.glob("ledger/leases/*"))
    before = num_committed(store)
    report = finished(world, store)
    assert report["num_clips"] == 28 - 4 * before
    assert content_hash(store) == reference


@pytest.mark.parametrize(
    "endings",
    [
        pytest.param([".zarr", ".h5"], marks=pytest.mark.slow),
        pytest.param([".zarr"] * 20, marks=[pytest.mark.slow, pytest.mark.campaign, pytest.mark.timeout(900)]),
        pytest.param([".h5"] * 20, marks=[pytest.mark.slow, pytest.mark.campaign, pytest.mark.timeout(900)]),
    ],
    ids=["two", "zarr", "hdf5"],
)
def test_killed_at_any_time_a_run_keeps_every_committed_shard(
    world: World, tmp_path: Path, reference: str, endings: list[str]
) -> None:
    """What was committed is never made again, and nothing else is lost than what was not."""
    draws = random.Random(len(endings))
    for trial, ending in enumerate(endings):
        store = tmp_path / f"{trial}{ending}"
        plan = store / "ledger/plan-000000.json"
        process = start(command(world, store))
        wait_until(plan.exists)  # what is before is start-up, the same in each run
        time.sleep(draws.uniform(0.0, 1.0))
        process.kill()
        process.communicate()
        committed = num_committed(store)
        report = finished(world, store)
        assert report["num_clips"] == 28 - 4 * committed
        assert report["num_ok"] == 28
        assert content_hash(store) == reference


@pytest.fixture
def slow_world(tmp_path: Path) -> World:
    """Eight videos of two frames, but the fifth has 64: with `SLOW_SAMPLING`, seconds of work."""
    videos = []
    for number in range(8):
        path = f"videos/{number}.mp4"
        write_clip(tmp_path / path, "right", number, num_frames=64 if number == 4 else 2)
        videos.append(Video(str(number), path, "right", "train"))
    write_manifest(Manifest(tuple(videos), tmp_path), tmp_path / "videos.csv")
    return World(tmp_path, tmp_path / "videos.csv")


SLOW_SAMPLING = ["sampling.num_frames=64", "sampling.resize_size=4096", "extraction.decode_workers=1"]


def assert_only_the_slow_one_is_lost(store: Path, detail: str) -> None:
    found = outcomes(store)
    assert found.pop("4") == ("rejected", "stopped")
    assert set(found.values()) == {("degraded", "short_video")}
    with open_store(store) as opened:
        lost = opened.outcome("4")
    assert lost is not None
    assert detail in str(lost.detail)


@pytest.mark.slow
def test_killed_decode_process_costs_one_video(slow_world: World, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    process = start(command(slow_world, store, *SLOW_SAMPLING, options=["--json"]))
    wait_until(lambda: num_committed(store) == 1)  # the first four; the only process is at the fifth
    (worker,) = children_of(process.pid)
    os.kill(worker, signal.SIGKILL)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    report = json.loads(output)
    assert (report["num_rejected"], report["num_restarts"]) == (1, 1)
    assert_only_the_slow_one_is_lost(store, "signal 9")
    whole, others = tmp_path / "whole.zarr", [str(number) for number in range(8) if number != 4]
    write_clip(slow_world.folder / "videos/4.mp4", "right", 4, num_frames=2)
    finished(slow_world, whole, *SLOW_SAMPLING)
    with open_store(whole) as opened, open_store(store) as robbed:
        assert (opened.read(others, [0] * 7) == robbed.read(others, [0] * 7)).all()
    # Mended, it alone is done again.
    report = finished(slow_world, store, *SLOW_SAMPLING, retry_failed=True)
    assert (report["num_clips"], report["num_skipped"], report["num_degraded"]) == (1, 7, 8)
    assert content_hash(store) == content_hash(whole)


def test_video_that_takes_too_long_is_rejected_alone(slow_world: World, tmp_path: Path) -> None:
    """The others take a tenth of a second: on a busy machine more, but not this much more."""
    store, long = tmp_path / "s.zarr", ["sampling.num_frames=256", "extraction.seconds_per_video=6"]
    write_clip(slow_world.folder / "videos/4.mp4", "right", 4, num_frames=256)
    report = finished(slow_world, store, *SLOW_SAMPLING, *long)
    assert (report["num_rejected"], report["num_restarts"]) == (1, 1)
    assert_only_the_slow_one_is_lost(store, "6 s")


def test_pipe_in_the_manifest_does_not_hang(tmp_path: Path) -> None:
    world = make_world(tmp_path, 1)
    (tmp_path / "videos/up/0.mp4").unlink()
    os.mkfifo(tmp_path / "videos/up/0.mp4")
    report = finished(world, tmp_path / "s.zarr")
    assert (report["num_ok"], report["num_rejected"]) == (6, 1)
    assert outcomes(tmp_path / "s.zarr")["up/0"] == ("rejected", "not_a_file")


@pytest.mark.slow
def test_full_disk_stops_with_one_line_that_names_the_file(world: World, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the shards of cubes do not fit, all else does."""
    large = ["sampling.resize_size=96", "sampling.crop_size=96", "store.shard_rows=28"]
    store, limit = tmp_path / "s.zarr", 64 << 10
    arguments = command(world, store, *large)
    process = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.returncode == 2, process.stderr
    lines = [line for line in process.stderr.splitlines() if not line.startswith("extract:")]
    assert len(lines) == 1, process.stderr
    assert f"{store}/cube/c." in lines[0]
    assert "File too large" in lines[0]
    assert not list(store.glob("ledger/leases/*"))
    assert not list(store.rglob("*.partial"))
    assert finished(world, store, *large)["num_ok"] == 28


def test_folder_that_may_not_be_written_is_named(world: World) -> None:
    store = Path("/proc/no/store.zarr")  # nobody may make a folder there, root included
    process = start(command(world, store))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2, errors
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert str(store) in lines[0]
