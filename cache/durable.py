"""Files that survive a kill or a power cut: written aside, fsynced, renamed; and locks that die with their owner."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from cache.cube import sha256_of
from cache.rows import StoreError

PARTIAL = ".partial"
"""Ending of files that are still being written (zarr uses the same one); left behind only by a kill."""


def fsync_path(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Force everything below a folder to disk, contents before entries."""
    for parent, _, file_names in os.walk(folder, topdown=False):
        for file_name in file_names:
            fsync_path(Path(parent, file_name))
        fsync_path(Path(parent))


def write_durably(path: Path, data: bytes, replace: bool) -> None:
    """Write a whole file so that, at any instant, the path holds the old state or the new one.

    Args:
        replace: whether the path may exist; if not, exactly one of several writers succeeds.

    Raises:
        FileExistsError: the path exists and `replace` is false.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            aside.replace(path)
        else:
            # A hard link refuses an existing name, a rename would overwrite it.
            os.link(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_path(path.parent)


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """A JSON document together with its SHA-256."""
    return {"sha256": sha256_of(document), "document": document}


def unsealed(value: Any, path: Path) -> dict[str, Any]:
    """The document within; raises StoreError, naming the file, when it does not match its hash."""
    if not isinstance(value, dict) or set(value) != {"sha256", "document"} or not isinstance(value["document"], dict):
        raise StoreError(f"{path} is damaged: expected a document with its hash")
    document: dict[str, Any] = value["document"]
    if sha256_of(document) != value["sha256"]:
        raise StoreError(f"{path} is damaged: its content does not match its SHA-256")
    return document


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises StoreError, naming the file, when it is absent or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{path} is missing, the store is damaged; restore it from a copy or extract anew") from None
    except ValueError as error:
        raise StoreError(f"{path} is damaged: not JSON ({error})") from error


def lock(file: IO[bytes], wait: bool) -> Literal["held", "busy", "unsupported"]:
    """Take the exclusive lock on an open file; it is free again when the file is closed or its owner is killed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "busy"
    except OSError as error:
        # Some cluster file systems are mounted without locks. Locks only guard against two writers at once here.
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
            return "unsupported"
        raise
    return "held"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the exclusive lock on a file, made when absent; waits for its owner."""
    with path.open("ab") as file:
        lock(file, wait=True)
        yield
