"""Loss of power, on a model of a disk that forgets what was not forced to it. The long form is in benchmarks/."""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.open import FORMATS
from contracts.attacks import Nursery
from contracts.attacks_disk import Disk, tree_of
from contracts.attacks_power import FSYNCS, cut_power, cut_states, record
from contracts.attacks_strace import Call, small_order


@pytest.fixture(params=FORMATS)
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def folder(scratch: Path) -> Iterator[Path]:
    """An empty folder of one test."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        yield Path(folder)


def test_power_cut_loses_nothing_that_was_reported(nursery: Nursery, folder: Path, kind: str) -> None:
    tally = cut_power(nursery, folder, kind, 40, seed=4, states_per_recording=20)
    assert (tally.lost_rows, tally.wrong_rows, tally.bad) == (0, 0, [])
    assert tally.trials == 40
    assert tally.acknowledged_rows > 60


@pytest.mark.parametrize(
    "place",
    # A store is begun in each of many recordings to catch these.
    [pytest.param(place, marks=pytest.mark.slow) if place.startswith("folder of a new") else place for place in FSYNCS],
)
def test_each_fsync_is_needed(nursery: Nursery, folder: Path, kind: str, place: str) -> None:
    tally = cut_power(nursery, folder, kind, 300, seed=5, left_out=FSYNCS[place], states_per_recording=15)
    assert tally.bad, f"without the fsync of the {place} all of {tally.trials} states were good"


def test_record_of_calls_gives_exactly_what_lies_on_the_disk(nursery: Nursery, folder: Path, kind: str) -> None:
    """So the writer writes nowhere that the model does not see."""
    order = small_order(folder / "power" / "S", kind)
    recording = record(nursery, order, folder / "trace.txt")
    names = {name for name, data in tree_of(folder / "power").items() if data}
    assert {"S/ledger/spec.json", "S/ledger/plan-000001.copy.json"} < names
    # A record with a hole is refused.
    disk = Disk()
    writes = [call for call in recording.calls if call is not None and call.name == "write" and "/S/" in call.path]
    for call in recording.calls:
        if call is not writes[0]:
            disk.replay(call, folder / "power")
    assert disk.contents() != tree_of(folder / "power")


def call(name: str, *texts: str, arguments: tuple[str, ...] = ("",), result: int = 0) -> Call:
    return Call(1, name, 1, tuple(text.encode() for text in texts), arguments, result)


def test_model_forgets_what_was_not_forced_to_the_disk() -> None:
    disk, root = Disk(), Path("/r")

    def outcomes() -> set[tuple[tuple[str, bytes | None], ...]]:
        draws = random.Random(0)
        return {tuple(disk.after_cut(draws, "some").items()) for _ in range(400)}

    disk.replay(call("openat", "/r/a", arguments=("AT_FDCWD", "a", "O_WRONLY|O_CREAT"), result=3), root)
    disk.replay(call("write", "/r/a", "xy", arguments=("3</r/a>",), result=2), root)
    assert disk.contents() == {"a": b"xy"}
    assert outcomes() == {(), *((("a", data),) for data in (b"", b"x", b"xy", b"x\0", b"\0\0"))}
    disk.replay(call("fsync", "/r/a", arguments=("3</r/a>",)), root)
    assert outcomes() == {(), (("a", b"xy"),)}
    disk.replay(call("openat", "/r", arguments=("AT_FDCWD", "r", "O_DIRECTORY"), result=4), root)
    disk.replay(call("fsync", "/r", arguments=("4</r>",)), root)
    assert outcomes() == {(("a", b"xy"),)}
    disk.replay(call("rename", "/r/a", "/r/b"), root)
    assert outcomes() == {(("a", b"xy"),), (("b", b"xy"),), (("a", b"xy"), ("b", b"xy")), ()}


def test_states_differ_from_each_other(nursery: Nursery, folder: Path) -> None:
    recording = record(nursery, small_order(folder / "power" / "S", "hdf5"), folder / "trace.txt")
    states = list(cut_states(recording, 50, random.Random(0)))
    keys = {(state.said, frozenset(state.tree.items())) for state in states}
    assert len(states) == len(keys) == 50
