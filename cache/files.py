"""The file layer under a store: whole files that are durable when a call returns, logs that only grow, one lock.

Everything a store writes goes through `Files`, so that one commit protocol serves a folder (here) and an object store
(`cache/object_files.py`), and a test can stand a layer in its place that loses what was not synced.
Names are relative to the store and use "/", such as `ledger/spec.json`.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, Protocol

from cache.errors import StoreError

PARTIAL = ".partial"
"""Ending of files that are still being written; left behind only by a kill."""
LEASE_SECONDS = 120.0
"""A writer that has shown no sign of life for so long is taken for dead, where no lock tells."""


class Log(Protocol):
    """A file that its owner alone appends to. While it is open, the owner counts as alive."""

    name: str

    def append(self, data: bytes) -> None:
        """Add bytes; durable when this returns. After an error nothing of them counts, and the log must be closed."""

    def beat(self) -> None:
        """Show that the owner is alive."""

    def close(self) -> None:
        """The owner is gone."""


class Files(Protocol):
    """Where the files of one store are kept."""

    url: str
    """Path or address of the store, for messages."""

    def path_of(self, name: str) -> str:
        """Path or address of one file, for messages."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Names of the files directly in a folder -> bytes; empty where there is no such folder."""

    def read(self, name: str, start: int = 0) -> bytes:
        """The bytes of a file from `start` on; raises FileNotFoundError."""

    def put(self, name: str, data: bytes, replace: bool = True) -> None:
        """Write a whole file, durably; at any instant it is the old one or the new one.

        Raises:
            FileExistsError: it exists and `replace` is false: exactly one of several writers succeeds.
        """

    def delete(self, name: str) -> None:
        """Remove a file; none is no error."""

    def remove_litter(self) -> None:
        """Remove what killed writers left half-written, and force to disk what they left whole.

        Call it while no other writer is alive.
        """

    def new_log(self, folder: str) -> Log:
        """A log under a name of its own, `FOLDER/HOST-PID-RANDOM.jsonl`."""

    def is_alive(self, log_name: str) -> bool:
        """Whether the owner of a log is alive, for all that can be known here."""

    def cut_log(self, name: str, num_bytes: int) -> None:
        """Cut the torn last line off a dead owner's log."""

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """One holder at a time, among all processes that use the store; waits."""

    def total_bytes(self) -> int:
        """What the whole store takes."""


def host_name() -> str:
    """This machine's name, in characters that a file name may hold."""
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname()) or "host"


def owner_of(log_name: str) -> str:
    """The owner of a log as a person would say it."""
    host, pid, _ = log_name.rsplit("/", 1)[-1].rsplit("-", 2)
    return f"process {pid} on {host}"


def log_of(name: str) -> str:
    """The log that a file of lines belongs to: on an object store, `X.jsonl` goes on in `X.0001.jsonl`."""
    return re.sub(r"\.\d{4,}\.jsonl$", ".jsonl", name)


def fsync_folder(folder: str | Path) -> None:
    """Force a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and the folders above it, each one durable.

    One that is there is forced to disk as well: its maker may have been killed before it did so.
    """
    was_there = folder.is_dir()
    if not was_there:
        make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
    # A folder that we may write in can lie in one that we may not even list.
    if not was_there or os.access(folder.parent, os.R_OK):
        fsync_folder(folder.parent)


class LocalFiles:
    """A folder of a POSIX file system."""

    def __init__(self, root: Path, lease_seconds: float = LEASE_SECONDS) -> None:
        self.root = root
        self.url = str(root)
        self._lease_seconds = lease_seconds
        self._durable: set[Path] = set()
        """Folders that are known to be on the disk."""

    def path_of(self, name: str) -> str:
        """As in the `Files` protocol."""
        return str(self.root / name)

    def sizes(self, folder: str) -> dict[str, int]:
        """As in the `Files` protocol."""
        found: dict[str, int] = {}
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    # A file may go between being listed and being looked at.
                    with contextlib.suppress(FileNotFoundError):
                        if entry.is_file(follow_symlinks=False):
                            found[f"{folder}/{entry.name}" if folder else entry.name] = entry.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return found

    def read(self, name: str, start: int = 0) -> bytes:
        """As in the `Files` protocol."""
        with (self.root / name).open("rb") as file:
            file.seek(start)
            return file.read()

    def put(self, name: str, data: bytes, replace: bool = True) -> None:
        """As in the `Files` protocol."""
        path = self.root / name
        aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        with _told_by_name(path):
            self._make_folder(path.parent)
            try:
                with aside.open("xb", buffering=0) as file:
                    _write_all(file, data)
                    os.fsync(file.fileno())
                if replace:
                    aside.replace(path)
                else:
                    # A hard link refuses an existing name, a rename would overwrite it.
                    os.link(aside, path)
            finally:
                aside.unlink(missing_ok=True)
            fsync_folder(path.parent)

    def _make_folder(self, folder: Path) -> None:
        if folder not in self._durable:
            if folder != self.root:
                self._make_folder(folder.parent)
            make_folder(folder)
            self._durable.add(folder)

    def delete(self, name: str) -> None:
        """As in the `Files` protocol."""
        path = self.root / name
        with _told_by_name(path), contextlib.suppress(FileNotFoundError):
            path.unlink()
            fsync_folder(path.parent)

    def remove_litter(self) -> None:
        """As in the `Files` protocol."""
        for path in self.root.rglob(f"*{PARTIAL}"):
            with _told_by_name(path):
                path.unlink(missing_ok=True)
        # What they left whole, we build upon: a name, or a line of the ledger, may not be on the disk yet.
        for name in self.sizes("ledger"):
            with _told_by_name(self.root / name), (self.root / name).open("rb") as file:
                os.fsync(file.fileno())
        for parent, _, _ in os.walk(self.root):
            with _told_by_name(Path(parent)):
                fsync_folder(parent)

    def new_log(self, folder: str) -> Log:
        """As in the `Files` protocol."""
        with _told_by_name(self.root / folder):
            self._make_folder(self.root / folder)
        return _LocalLog(self.root, f"{folder}/{host_name()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl")

    def is_alive(self, log_name: str) -> bool:
        """As in the `Files` protocol."""
        try:
            with (self.root / log_name).open("rb") as file:
                state = _try_lock(file, fcntl.LOCK_SH)
                if state == "busy":
                    return True
                if state == "held" and log_name.rsplit("/", 1)[-1].startswith(f"{host_name()}-"):
                    return False
                # Another machine's locks may not reach us: its clock, as the file system sees it, decides.
                last_beat = os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return False
        return self._now() - last_beat < self._lease_seconds

    def _now(self) -> float:
        """The clock of the file system, which may be another machine's."""
        path = self.root / "ledger" / "lock"
        try:
            os.utime(path)
            return path.stat().st_mtime
        except OSError:
            return time.time()

    def cut_log(self, name: str, num_bytes: int) -> None:
        """As in the `Files` protocol."""
        with _told_by_name(self.root / name), (self.root / name).open("rb+") as file:
            if _try_lock(file, fcntl.LOCK_EX) == "held":
                file.truncate(num_bytes)
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """As in the `Files` protocol. Freed by the system when its holder dies."""
        path = self.root / "ledger" / "lock"
        with _told_by_name(path):
            self._make_folder(path.parent)
            file = path.open("ab")
        with file:
            with _told_by_name(path):
                _try_lock(file, fcntl.LOCK_EX, wait=True)
            yield

    def total_bytes(self) -> int:
        """As in the `Files` protocol."""
        total = 0
        for parent, _, names in os.walk(self.root):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += Path(parent, name).lstat().st_size
        return total


class _LocalLog:
    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self._path = root / name
        self._num_bytes = 0
        with _told_by_name(self._path):
            self._file: IO[bytes] = self._path.open("xb", buffering=0)
            _try_lock(self._file, fcntl.LOCK_EX, wait=True)
            fsync_folder(self._path.parent)

    def append(self, data: bytes) -> None:
        with _told_by_name(self._path):
            try:
                _write_all(self._file, data)
                os.fsync(self._file.fileno())
            except BaseException:
                # A torn line may only ever be the last one of its file, and an unsynced one must not look durable.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file.fileno(), self._num_bytes)
                raise
        self._num_bytes += len(data)

    def beat(self) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def close(self) -> None:
        # For those whom locks do not reach: a writer that ended is not waited for.
        with contextlib.suppress(OSError):
            os.utime(self._path, (0, 0))
        self._file.close()


@contextlib.contextmanager
def _told_by_name(path: Path) -> Iterator[None]:
    """Make an error of the system one line that names the file and says what is kept."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path} could not be written: {error.strerror or error}. What was committed before is kept; "
            "mend the cause and run the same command again"
        ) from error


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        num_written = file.write(view)
        if not num_written:
            raise OSError(errno.ENOSPC, "no byte could be written")
        view = view[num_written:]


def _try_lock(file: IO[bytes], kind: int, wait: bool = False) -> Literal["held", "busy", "unsupported"]:
    """Lock an open file; it is free again when the file is closed or its owner is killed."""
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return "busy"
    except OSError as error:
        # Some cluster file systems are mounted without locks; leases and exclusive names guard there.
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
            return "unsupported"
        raise
    return "held"
