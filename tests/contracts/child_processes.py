"""The processes that a process has started (Linux)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def stat_of(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on (state, parent, ...); none where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_running(pid: int) -> bool:
    return stat_of(pid)[:1] not in ([], ["Z"])


def children_of(parent: int) -> set[int]:
    """Processes that run, of this parent."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return {pid for pid in pids if stat_of(pid)[1:2] == [str(parent)] and is_running(pid)}


def decoders_of(parent: int) -> set[int]:
    """Its decoding processes that have come up; other tests may have left it other children.

    One that is frozen while it begins still holds what its parent writes to.
    """
    return {pid for pid in children_of(parent) if _is_decoder(pid)}


def _is_decoder(pid: int) -> bool:
    try:
        is_up = str(Path(f"/proc/{pid}/fd/2").readlink()) == "/dev/null"
        return is_up and b"extract.pool_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    """The suite's own time limit ends a wait that is in vain."""
    while not condition():
        time.sleep(0.01)
