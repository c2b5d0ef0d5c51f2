"""Loss of power, simulated: every system call of a real writer is recorded by strace and replayed onto a model of a disk.

Loads neither pytest nor torch.
"""

import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from contracts.attacks import Nursery, Order, Said, Tally, look_and_finish
from contracts.attacks_disk import MANNERS, Disk, Tree, tree_of
from contracts.attacks_strace import EFFECTS, OPENS, Call, points, run_traced, small_order
from contracts.timed import timed

RECORDED = (*EFFECTS, *OPENS, "close", "lseek")
FSYNCS = {
    "file, in put": ("put",),
    "folder, in put": ("fsync_folder", "put"),
    "log, in append": ("append",),
    "folder of a new log": ("fsync_folder", "__init__"),
    "folder of a new folder": ("fsync_folder", "make_folder"),
}
"""The fsyncs without which a store loses rows -> the functions they are called from."""


def _lay_out(tree: Tree, root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, data in tree.items():
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)


@dataclass(frozen=True, slots=True)
class Recording:
    """All calls of one writer, or of one that was killed and one that went on; None stands between the two."""

    order: Order
    calls: tuple[Call | None, ...]
    num_writers: int


def record(nursery: Nursery, order: Order, log: Path, attack: str = "") -> Recording:
    """Run a writer in an empty folder, or one that is killed and then one that goes on, and record them.

    Args:
        attack: strace's expression for where the first writer is killed, or meets an error that it survives.

    Raises:
        RuntimeError: a writer ended otherwise, or the replayed record is not what lies on the disk.
    """
    root = Path(order.path).parent
    _lay_out({}, root)
    is_killed = "signal" in attack
    calls: list[Call | None] = []
    for is_first in (True, False) if is_killed else (True,):
        traced = run_traced(nursery, order, log, RECORDED, attack if is_first else "")
        if traced.status != (-signal.SIGKILL if is_killed and is_first else 0):
            raise RuntimeError(f"a recorded writer ended with {traced.status}: {traced.errors}")
        calls += [*traced.calls, None]
    disk = Disk()
    for call in calls:
        disk.replay(call, root)
    if disk.contents() != tree_of(root):
        raise RuntimeError("the record of system calls does not give what the writer left on the disk")
    return Recording(order, tuple(calls), 1 + is_killed)


@dataclass(frozen=True, slots=True)
class CutState:
    """One state of the disk after the power was cut."""

    cut: int
    """How many calls came before."""
    manner: str
    said: Said
    tree: Tree


def cut_states(recording: Recording, num_states: int, draws: random.Random) -> Iterator[CutState]:
    """States after cuts at random calls, each one different from the others; perhaps fewer than asked for."""
    root = Path(recording.order.path).parent
    seen: set[tuple[Said, frozenset[tuple[str, bytes | None]]]] = set()
    # Forty times through the record, or until there are enough: every time with other cuts.
    for _ in range(40):
        cuts = set(draws.sample(range(len(recording.calls) + 1), min(num_states, len(recording.calls))))
        disk, output = Disk(), ""
        for position, call in enumerate((*recording.calls, None)):
            if position in cuts and len(seen) < num_states:
                manner = draws.choice(MANNERS)
                tree = disk.after_cut(draws, manner)
                if (key := (Said.of(output), frozenset(tree.items()))) not in seen:
                    seen.add(key)
                    yield CutState(position, manner, Said.of(output), tree)
            if call is not None and call.name == "write" and call.path.endswith(".out"):
                output += call.texts[1].decode()
            disk.replay(call, root)


def cut_power(
    nursery: Nursery,
    folder: Path,
    kind: str,
    num_states: int,
    seed: int,
    left_out: tuple[str, ...] = (),
    states_per_recording: int = 30,
) -> Tally:
    """Crash states of a writer that begins, and of one that goes on where another was killed at a random call.

    Args:
        left_out: functions, innermost first, from which fsync does nothing: then there must be bad states.
    """
    draws = random.Random(seed)
    with timed(Tally()) as tally:
        order = replace(small_order(folder / "power" / "S", kind), left_out=left_out)
        whole = record(nursery, order, folder / "trace.txt")
        targets = [call for call in points(whole.calls, order.path) if call.name not in OPENS]
        fsyncs = [call for call in targets if call.name == "fsync"]
        appends = [call for call in fsyncs if call.path.endswith(".jsonl") and call.number > 1]
        recording, num_recordings = whole, 1
        while tally.trials < num_states and not (left_out and tally.bad):
            wanted = min(states_per_recording, num_states - tally.trials)
            for state in cut_states(recording, wanted, draws):
                _lay_out(state.tree, Path(order.path).parent)
                where = f"{kind}, power cut after call {state.cut} of {len(recording.calls)}, {state.manner}"
                look_and_finish(recording.order, state.said, tally, where, recording.num_writers)
            # Every third recording: an early append fails, and the writer begins another log. The others: a kill, most of
            # all before an fsync, since what the killed writer had not forced to the disk, its successor builds upon.
            fails = bool(appends) and num_recordings % 3 == 1
            candidates = appends[:2] if fails else fsyncs if draws.random() < 0.7 else targets
            target = draws.choice(candidates)
            num_recordings += 1
            attack = f"{target.name}:{'error=EIO' if fails else 'signal=KILL'}:when={target.number}"
            recording = record(nursery, replace(order, tries_again=fails), folder / "trace.txt", attack)
    return tally
