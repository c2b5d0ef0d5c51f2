"""A model of a disk that forgets what was not forced to it. It takes in the system calls of a real writer.

It is harsher than today's file systems: when the power is cut, any subset of the changes since the last fsync is on the disk,
in files (whole, torn, or as zeros) and in folders (a name made or removed; fsync of a file does not save its name).
Loads neither pytest nor torch.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from contracts.attacks_strace import OPENS, Call

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
