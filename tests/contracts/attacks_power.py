"""Loss of power, simulated: every system call of a real writer is recorded by strace and replayed onto a model of a disk that
forgets what was not forced to it. Loads neither pytest nor torch.

The model is harsher than today's file systems: at the cut, any subset of the changes since the last fsync is on the disk, in
files (whole, torn, or as zeros) and in folders (a name made or removed; fsync of a file does not save its name).
"""

import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from contracts.attacks import Nursery, Order, Said, Tally, look_and_finish
from contracts.attacks_processes import timed
from contracts.attacks_strace import EFFECTS, OPENS, Call, points, run_traced, small_order

RECORDED = (*EFFECTS, *OPENS, "close", "lseek")
FSYNCS = {
    "file, in put": ("put",),
    "folder, in put": ("fsync_folder", "put"),
    "log, in append": ("append",),
    "folder of a new log": ("fsync_folder", "__init__"),
    "folder of a new folder": ("fsync_folder", "make_folder"),
}
"""The fsyncs without which a store loses rows -> the functions they are called from."""
Tree = dict[str, bytes | None]
"""Path below the folder around the store -> bytes of a file, None for a folder."""
MANNERS = ("nothing", "everything", "names", "data", "some", "some", "some")
"""What reaches the disk of what was not forced there; drawn for each state."""


@dataclass(slots=True, eq=False)
class File:
    """A file of the model."""

    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    """(offset, bytes) of each write since the last fsync; offset -1 - n cuts the file to n bytes."""

    def now(self) -> bytes:
        """What the running system sees."""
        return _written(self.durable, self.pending)

    def after_cut(self, draws: random.Random, manner: str) -> bytes:
        """What a disk may hold after the cut."""
        if manner in ("nothing", "names"):
            return self.durable
        if manner in ("everything", "data"):
            return self.now()
        kept = [_maybe_torn(write, draws) for write in self.pending if draws.random() < 0.6]
        return _written(self.durable, kept)


@dataclass(slots=True, eq=False)
class Folder:
    """A folder of the model."""

    durable: dict[str, "File | Folder"] = field(default_factory=dict)
    pending: list[tuple[str, "File | Folder | None"]] = field(default_factory=list)
    """(name, what it names from here on) since the last fsync; None when the name is removed."""

    def now(self) -> dict[str, "File | Folder"]:
        """What the running system sees."""
        return _named(self.durable, self.pending)

    def after_cut(self, draws: random.Random, manner: str) -> dict[str, "File | Folder"]:
        """What a disk may hold after the cut."""
        if manner in ("nothing", "data"):
            return self.durable
        if manner in ("everything", "names"):
            return self.now()
        return _named(self.durable, [change for change in self.pending if draws.random() < 0.6])


def _written(data: bytes, writes: Sequence[tuple[int, bytes]]) -> bytes:
    for offset, new in writes:
        data = (
            data[: -1 - offset] if offset < 0 else data[:offset].ljust(offset, b"\0") + new + data[offset + len(new) :]
        )
    return data


def _maybe_torn(write: tuple[int, bytes], draws: random.Random) -> tuple[int, bytes]:
    offset, data = write
    keep = draws.choice((len(data), draws.randint(0, len(data))))
    # The length of a file can be saved before its bytes: the rest reads as zeros.
    return offset, data[:keep] + draws.choice((b"", bytes(len(data) - keep)))


def _named(
    entries: dict[str, File | Folder], changes: Sequence[tuple[str, File | Folder | None]]
) -> dict[str, File | Folder]:
    entries = dict(entries)
    for name, node in changes:
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node
    return entries


class Disk:
    """Replays system calls onto files and folders of the model."""

    def __init__(self) -> None:
        self._root = ""
        self._top = Folder()
        """The folder around the store."""
        self._open: dict[str, tuple[File | Folder, int]] = {}

    def _find(self, path: str) -> tuple[Folder, str]:
        """The folder that holds a path, and the name in it."""
        *parents, name = path.removeprefix(self._root).strip("/").split("/")
        folder = self._top
        for parent in parents:
            inner = folder.now()[parent]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, name

    def _node(self, path: str) -> File | Folder | None:
        folder, name = self._find(path)
        return folder.now().get(name) if name else folder

    def replay(self, call: Call | None, root: Path) -> None:
        """Take in one call; one that failed, or is about nothing in `root`, changes nothing. None: the writer ended."""
        if call is None:
            self._open.clear()
            return
        self._root = str(root)
        descriptor = call.arguments[0].split("<")[0]
        if call.name == "close":
            self._open.pop(descriptor, None)
        if call.result < 0 or not f"{call.path}/".startswith(f"{root}/"):
            return
        if call.name in OPENS:
            self._open_file(call)
        elif call.name == "lseek":
            node, _ = self._open[descriptor]
            self._open[descriptor] = node, call.result
        elif call.name == "write":
            node, offset = self._open[descriptor]
            assert isinstance(node, File)
            node.pending.append((offset, call.texts[1][: call.result]))
            self._open[descriptor] = node, offset + call.result
        elif call.name == "ftruncate":
            node, _ = self._open[descriptor]
            assert isinstance(node, File)
            node.pending.append((-1 - int(call.arguments[1]), b""))
        elif call.name in ("fsync", "fdatasync"):
            node, _ = self._open[descriptor]
            self._force(node)
        elif call.name == "mkdir":
            folder, name = self._find(call.path)
            folder.pending.append((name, Folder()))
        elif call.name == "unlink":
            folder, name = self._find(call.path)
            folder.pending.append((name, None))
        elif call.name in ("rename", "link"):
            self._move(call)
        elif call.name != "close":
            raise RuntimeError(f"the model does not know {call.name}: teach it")

    def _open_file(self, call: Call) -> None:
        flags = call.arguments[2] if call.name == "openat" else ""
        node = self._node(call.path)
        if node is None:
            folder, name = self._find(call.path)
            node = File()
            folder.pending.append((name, node))
        if "O_TRUNC" in flags and isinstance(node, File):
            node.pending.append((-1, b""))
        offset = len(node.now()) if "O_APPEND" in flags else 0
        self._open[str(call.result)] = node, offset

    def _move(self, call: Call) -> None:
        source, target = (text.decode() for text in call.texts)
        node = self._node(source)
        assert node is not None
        folder, name = self._find(target)
        folder.pending.append((name, node))
        if call.name == "rename":
            folder, name = self._find(source)
            folder.pending.append((name, None))

    @staticmethod
    def _force(node: File | Folder) -> None:
        if isinstance(node, File):
            node.durable = node.now()
        else:
            node.durable = dict(node.now())
        node.pending.clear()

    def contents(self) -> Tree:
        """What the running system sees."""
        return dict(_walk("", self._top, Folder.now, File.now))

    def after_cut(self, draws: random.Random, manner: str) -> Tree:
        """One of the states that the disk may be in when the power comes back."""
        return dict(_walk("", self._top, lambda f: f.after_cut(draws, manner), lambda f: f.after_cut(draws, manner)))


def _walk(
    prefix: str,
    folder: Folder,
    entries_of: Callable[[Folder], dict[str, File | Folder]],
    bytes_of: Callable[[File], bytes],
) -> Iterator[tuple[str, bytes | None]]:
    for name, node in sorted(entries_of(folder).items()):
        if isinstance(node, File):
            yield prefix + name, bytes_of(node)
        else:
            yield prefix + name, None
            yield from _walk(f"{prefix}{name}/", node, entries_of, bytes_of)


def tree_of(root: Path) -> Tree:
    """What lies in a real folder."""
    entries = sorted(root.rglob("*"))
    return {entry.relative_to(root).as_posix(): None if entry.is_dir() else entry.read_bytes() for entry in entries}


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


def record(nursery: Nursery, order: Order, log: Path, kill: str = "") -> Recording:
    """Run writers in an empty folder and record them.

    Args:
        kill: strace's expression for where the first writer is killed; without it there is one writer.

    Raises:
        RuntimeError: a writer failed, or the replayed record is not what lies on the disk.
    """
    root = Path(order.path).parent
    _lay_out({}, root)
    calls: list[Call | None] = []
    for attack in (kill, "") if kill else ("",):
        traced = run_traced(nursery, order, log, RECORDED, attack)
        if traced.status != (-signal.SIGKILL if attack else 0):
            raise RuntimeError(f"a recorded writer ended with {traced.status}: {traced.errors}")
        calls += [*traced.calls, None]
    disk = Disk()
    for call in calls:
        disk.replay(call, root)
    if disk.contents() != tree_of(root):
        raise RuntimeError("the record of system calls does not give what the writer left on the disk")
    return Recording(order, tuple(calls), 2 if kill else 1)


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
    seen: set[tuple[str, frozenset[tuple[str, bytes | None]]]] = set()
    # Forty times through the record, or until there are enough: every time with other cuts.
    for _ in range(40):
        cuts = set(draws.sample(range(len(recording.calls) + 1), min(num_states, len(recording.calls))))
        disk, output = Disk(), ""
        for position, call in enumerate((*recording.calls, None)):
            if position in cuts and len(seen) < num_states:
                manner = draws.choice(MANNERS)
                tree = disk.after_cut(draws, manner)
                if (key := (output, frozenset(tree.items()))) not in seen:
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
        recording = whole
        while tally.trials < num_states:
            wanted = min(states_per_recording, num_states - tally.trials)
            for state in cut_states(recording, wanted, draws):
                _lay_out(state.tree, Path(order.path).parent)
                where = f"{kind}, power cut after call {state.cut} of {len(recording.calls)}, {state.manner}"
                look_and_finish(order, state.said, tally, where, recording.num_writers)
            # Most of all before an fsync: what the killed writer had not forced to the disk, its successor builds upon.
            target = draws.choice(fsyncs if draws.random() < 0.7 else targets)
            recording = record(nursery, order, folder / "trace.txt", f"{target.name}:signal=KILL:when={target.number}")
    return tally
