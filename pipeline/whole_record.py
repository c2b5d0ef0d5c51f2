"""What a pipeline did: pipeline.json holds for each stage what went in, what came out, and how long every call took."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint import write_file
from pipeline.console import say
from pipeline.settings import SetupError

FILE = "pipeline.json"
FORMAT = 1
SET_ASIDE = "set_aside"
"""Folder for outputs that are made again."""


def settings_hash(settings: Any) -> str:
    """SHA-256 over what JSON makes of it."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@dataclass(slots=True)
class Record:
    """One stage, begun or finished."""

    stated: dict[str, Any]
    """What decides its output and is the user's: settings, and hashes of the manifest and of weights files."""
    made: dict[str, str]
    """What it read of earlier stages, as "stage.part", with its hash."""
    output: dict[str, str] | None = None
    """Hashes of the parts of its output; None: it has not finished."""
    made_with: list[dict[str, Any]] = field(default_factory=list)
    """Code version, libraries and hardware of the calls that worked on it, each once."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the output."""
        return settings_hash([self.stated, self.made])


@dataclass(slots=True)
class Call:
    """One stretch of work; heads share theirs."""

    stages: list[str]
    began: float
    """Seconds since 1970."""
    seconds: float | None = None
    """None: still at work, or killed."""


@dataclass(slots=True)
class Records:
    """The content of pipeline.json."""

    folder: Path
    stages: dict[str, Record] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    """Stages that `--redo` named and that no call has come to yet."""
    permitted: dict[str, str] = field(default_factory=dict)
    """Stages that `--redo` allows to be made again and that are not done yet, each with the hash of the settings of that call."""

    @classmethod
    def read(cls, folder: Path) -> Records:
        """The records in a folder; none where there is no file.

        Raises:
            SetupError: the file is not what this version writes.
        """
        path = folder / FILE
        if not path.is_file():
            return cls(folder)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, not {FORMAT}")
            stages = {name: Record(**record) for name, record in content["stages"].items()}
            calls = [Call(**call) for call in content["calls"]]
            return cls(folder, stages, calls, list(content.get("asked", [])), dict(content.get("permitted", {})))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SetupError(
                f"{path} cannot be read ({type(error).__name__}: {error}). Restore it from a copy, or choose another --out."
            ) from error

    def write(self) -> None:
        """Replace pipeline.json, whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "stages": {name: asdict(record) for name, record in self.stages.items()},
            "calls": [asdict(call) for call in self.calls],
            "asked": self.asked,
            "permitted": self.permitted,
        }
        write_file(self.folder / FILE, (json.dumps(content, indent=2) + "\n").encode())

    def seconds(self, stages: Sequence[str]) -> float:
        """Wall clock of all calls that worked on one of these stages."""
        return sum(call.seconds or 0.0 for call in self.calls if set(call.stages) & set(stages))

    def close_killed_calls(self, outputs: Mapping[str, Path]) -> None:
        """Give calls that were killed the time until the last file that they wrote.

        Args:
            outputs: folder by stage.
        """
        for call in self.calls:
            if call.seconds is None:
                written = [_last_write(outputs[name]) for name in call.stages if name in outputs]
                call.seconds = max(0.0, max(written, default=0.0) - call.began)

    @contextmanager
    def working(self, stages: Sequence[str]) -> Iterator[None]:
        """Note a call with its time, however it ends short of a kill."""
        call = Call(list(stages), time.time())
        self.calls.append(call)
        self.write()
        started = time.monotonic()
        try:
            yield
        finally:
            call.seconds = time.monotonic() - started
            self.write()

    def set_aside(self, stage: str, output: Path) -> None:
        """Move an output out of the way and forget that it was made; nothing is deleted."""
        if is_filled(output):
            place = self.folder / SET_ASIDE
            place.mkdir(exist_ok=True)
            names = (f"{stage.replace('/', '_')}_{number}{output.suffix}" for number in itertools.count(1))
            target = next(place / name for name in names if not (place / name).exists())
            output.rename(target)
            say(f"    {stage}: {output.name} is set aside as {target}; remove it when you do not need it")
        self.stages.pop(stage, None)
        for call in self.calls:
            call.stages = [name for name in call.stages if name != stage]
        self.calls = [call for call in self.calls if call.stages]
        self.write()


def is_filled(output: Path) -> bool:
    """Whether there is anything in a folder besides hidden files, which locks are; a file in its place is something too."""
    if not output.is_dir():
        return output.exists()
    return any(not path.name.startswith(".") for path in output.iterdir())


def _last_write(output: Path) -> float:
    """When a file below a folder was last written; 0 where there is none."""
    return max((path.stat().st_mtime for path in output.rglob("*") if path.is_file()), default=0.0)
