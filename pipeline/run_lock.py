"""One process trains into a folder at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.console import say
from pipeline.settings import SetupError

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it when the process ends, however it ends.

    Where the file system has no locks (a parallel one mounted without), a warning says so.

    Raises:
        SetupError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SetupError(
                f"another process is training into {folder}. Wait for it, stop it, or choose another --out."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(
                f"warning: the file system of {folder} has no locks ({error.strerror}): nothing keeps a second process from "
                "training into it"
            )
        yield
    finally:
        os.close(descriptor)
