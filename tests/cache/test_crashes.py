"""Writers that are killed: at random moments, and at the calls that change the disk. The long forms are in benchmarks/."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.open import FORMATS, open_store
from contracts.attacks import ROOT, Nursery, Order, Said, Tally, look_and_finish
from contracts.attacks_processes import kill_many, stopped_in_a_shard
from contracts.attacks_strace import attack_calls, points, run_traced, small_order


@pytest.fixture(params=FORMATS)
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def folder(scratch: Path) -> Iterator[Path]:
    """An empty folder of one test."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        yield Path(folder)


def test_writer_that_is_killed_at_random_loses_nothing_it_reported(nursery: Nursery, folder: Path, kind: str) -> None:
    tally = kill_many(nursery, folder, kind, 12, seed=3)
    assert (tally.lost_rows, tally.wrong_rows, tally.bad) == (0, 0, [])
    assert tally.acknowledged_rows > 100  # else the kills came too early to tell


def test_process_of_its_own_that_is_killed_while_it_writes_resumes(tmp_path: Path, kind: str) -> None:
    order = Order(str(tmp_path / "S"), kind)
    command = [sys.executable, str(ROOT / "tests" / "cache" / "crash_writer.py"), order.path, kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(7)]
        writer.kill()
        said = Said.of("".join(lines + writer.stdout.readlines()))
    assert len(said.done) >= 2
    tally = Tally()
    look_and_finish(order, said, tally, "own process")
    assert tally.bad == []


def test_shard_of_a_killed_writer_is_taken_over(nursery: Nursery, folder: Path, kind: str) -> None:
    assert stopped_in_a_shard(nursery, folder, kind, is_killed=True) == []


def test_stopped_writer_counts_as_alive_and_goes_on(nursery: Nursery, folder: Path, kind: str) -> None:
    assert stopped_in_a_shard(nursery, folder, kind, is_killed=False) == []


@pytest.mark.parametrize("is_resuming", [False, True])
def test_kill_at_a_call_that_changes_the_disk_loses_nothing(
    nursery: Nursery, folder: Path, kind: str, is_resuming: bool
) -> None:
    tally = attack_calls(nursery, folder, kind, (), every=23 if kind == "zarr" else 13, seed=1, is_resuming=is_resuming)
    assert (tally.lost_rows, tally.wrong_rows, tally.bad) == (0, 0, [])
    assert tally.trials >= 4


def test_every_step_of_a_commit_is_among_the_points_of_attack(nursery: Nursery, folder: Path, kind: str) -> None:
    order = small_order(folder / "S", kind)
    traced = run_traced(nursery, order, folder / "trace.txt", ("openat", "write", "fsync", "rename", "link", "unlink"))
    calls = points(traced.calls, order.path)
    data = "parts/000001.h5" if kind == "hdf5" else "cube/c.1.0.0.0.0"
    steps = (
        ("link", "ledger/leases/shard-00000001.json"),
        ("openat", f"{data}.*.partial"),
        ("write", f"{data}.*.partial"),
        ("fsync", f"{data}.*.partial"),
        ("rename", data),
        ("fsync", data.split("/")[0]),
        ("write", "ledger/*.jsonl"),
        ("fsync", "ledger/*.jsonl"),
        ("unlink", "ledger/leases/shard-00000001.json"),
    )
    position = 0
    for name, pattern in steps:
        following = enumerate(calls[position:], position)
        found = [i for i, call in following if call.name == name and Path(call.path).match(f"{order.path}/{pattern}")]
        assert found, f"no {name} of {pattern} after call {position}"
        position = found[0]


def test_lost_and_wrong_rows_are_noticed(nursery: Nursery, folder: Path, kind: str) -> None:
    """The attacks could not fail if this did not find what they look for."""
    order = small_order(folder / "S", kind)
    said = Said.of(nursery.run(order).output)
    (log,) = Path(order.path, "ledger").glob("*.jsonl")
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[1:]))
    tally = Tally()
    look_and_finish(order, said, tally, "a line is gone")
    assert tally.lost_rows == 4
    assert any("was acknowledged and is not ready" in line for line in tally.bad)
    tally = Tally()
    with open_store(order.path, kind) as store:
        names = store._format.file_names(0)  # type: ignore[attr-defined]
    for name in names:
        Path(order.path, name).write_bytes(
            Path(order.path, name.replace("c.0", "c.1").replace("0.h5", "1.h5")).read_bytes()
        )
    look_and_finish(order, said, tally, "another shard's values")
    assert tally.wrong_rows + tally.lost_rows > 0
    assert tally.bad
