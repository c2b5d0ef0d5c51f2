"""The processes that a process has started (Linux)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def state_and_parent(pid: int) -> list[str]:
    """Of a process; nothing where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_running(pid: int) -> bool:
    return state_and_parent(pid)[:1] not in ([], ["Z"])


def children_of(parent: int) -> set[int]:
    """Processes that run, of this parent."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return {pid for pid in pids if state_and_parent(pid)[1:] == [str(parent)] and is_running(pid)}


def decoders_of(parent: int) -> set[int]:
    """Its decoding processes that have come up: one that is frozen while it begins still holds what its parent writes to."""
    return {pid for pid in children_of(parent) if _is_silent(pid)}


def _is_silent(pid: int) -> bool:
    try:
        return str(Path(f"/proc/{pid}/fd/2").readlink()) == "/dev/null"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    """The suite's own time limit ends a wait that is in vain."""
    while not condition():
        time.sleep(0.01)
