"""What every log of a run can do, and how they call what they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

FILES = {"step": "steps", "validation": "validations"}
"""What each kind of line is called in CSV and TensorBoard."""


@dataclass(frozen=True, slots=True)
class Position:
    """Up to where a checkpoint vouches for lines."""

    episode: int
    """Training episodes done."""
    validated_episode: int
    """At which of them the latest validation was; -1 before the first."""

    def reached(self, kind: str) -> int:
        """The last episode of this kind of line."""
        return self.episode if kind == "step" else self.validated_episode


class Logger(Protocol):
    """One of `training.loggers`. A line has "kind", "episode" and values by name."""

    def begin(self) -> None:
        """Start afresh; what another run left is removed."""
        ...

    def resume(self, kept: Sequence[Mapping[str, Any]], position: Position) -> None:
        """Go on; `kept` are the lines of metrics.jsonl that the checkpoint vouches for."""
        ...

    def write(self, line: Mapping[str, Any], measured: Mapping[str, float]) -> None:
        """Add one line."""
        ...

    def sync(self) -> None:
        """See that what was written outlives the machine, where the log is a file of ours."""
        ...

    def close(self, failed: bool) -> None:
        """Write what waits, and let go of files and threads."""
        ...


def names_of(line: Mapping[str, Any], measured: Mapping[str, float]) -> dict[str, Any]:
    """The values of a line by the names that TensorBoard and Weights & Biases group them by."""
    names = {_name(line["kind"], key): value for key, value in line.items() if key not in ("kind", "episode")}
    return names | {_name_of_measured(key): value for key, value in measured.items()}


def _name(kind: str, key: str) -> str:
    """`train/loss`, `val/accuracy`, `test/accuracy_not_for_selection`."""
    if kind == "step":
        return f"train/{key}"
    split, _, rest = key.partition("_")
    return f"{split}/{rest}" if split in ("val", "test") and rest else f"val/{key}"


def _name_of_measured(key: str) -> str:
    """`speed/clips_per_second`, `memory/gpu_memory_bytes`."""
    return f"memory/{key}" if key.endswith("_bytes") else f"speed/{key}"
