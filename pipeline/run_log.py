"""What a run writes down while it trains: metrics.jsonl always, and the logs of `training.loggers` beside it.

metrics.jsonl holds what the episodes alone decide, so that of an interrupted and resumed run is, to the byte, that of an
uninterrupted one. What differs from call to call (speed, memory) is in the other logs only.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pipeline.checkpoint import write_file
from pipeline.csv_log import CsvLog
from pipeline.logger import Logger, Position
from pipeline.settings import SetupError
from pipeline.tensorboard_log import TensorBoardLog
from pipeline.wandb_log import WandbLog


class RunLog:
    """The logs of one run: `begin` or `resume_at`, then `write`, then `close`; or a `with` block.

    Args:
        folder: of the run.
        loggers: of `training.loggers`.
        config: the resolved config as nested tables, for Weights & Biases.
        run_name: of the run, there.

    Raises:
        SetupError: a logger's package is not installed.
    """

    def __init__(self, folder: Path, loggers: Sequence[str], config: Mapping[str, Any], run_name: str) -> None:
        refuse_absent_loggers(loggers)
        self._path = folder / "metrics.jsonl"
        self._file: IO[str] | None = None
        self._is_open = False
        self._logs: list[Logger] = []
        if "csv" in loggers:
            self._logs.append(CsvLog(folder))
        if "tensorboard" in loggers:
            self._logs.append(TensorBoardLog(folder / "tensorboard"))
        if "wandb" in loggers:
            self._logs.append(WandbLog(folder, config, run_name))

    def begin(self) -> None:
        """Start the logs of a new run; what one that never did a step left in the folder is removed.

        Raises:
            SetupError: Weights & Biases cannot start.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        for log in self._logs:
            log.begin()
        self._is_open = True

    def resume_at(self, episode: int, validated_episode: int) -> None:
        """Drop every line from after a checkpoint and go on there; the resumed run writes them again.

        A log that has no file yet (the run is of an older version, or its loggers were others) gets the earlier lines from
        metrics.jsonl, without what was measured. A checkpoint of nothing is a new run: `begin`.

        Args:
            episode: training episodes of the checkpoint.
            validated_episode: at which of them its latest validation was; -1: none.

        Raises:
            SetupError: Weights & Biases cannot start.
        """
        if episode <= 0 and validated_episode < 0:
            self.begin()
            return
        position = Position(episode, validated_episode)
        kept = _kept_lines(self._path, position)
        if self._path.exists():
            write_file(self._path, "".join(f"{line}\n" for line in kept).encode())
        records = [json.loads(line) for line in kept]
        for log in self._logs:
            log.resume(records, position)
        self._is_open = True

    def write(self, line: Mapping[str, Any], measured: Mapping[str, float] | None = None) -> None:
        """Note one step or one validation; in the files when this returns.

        Args:
            line: "kind" ("step" or "validation"), "episode" (training episodes done), and what the episodes alone decide.
            measured: what differs from call to call, such as `clips_per_second`; not in metrics.jsonl.
        """
        if not self._is_open:
            self.begin()
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n")
        self._file.flush()
        for log in self._logs:
            log.write(line, measured or {})

    def sync(self) -> None:
        """Have the files on the disk itself: before a checkpoint that vouches for their lines."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        for log in self._logs:
            log.sync()

    def close(self, failed: bool = False) -> None:
        """Write what waits, and let go of files and threads.

        Args:
            failed: the run did not come to its end, for a reason that is told: a file that cannot be written is not told again.
        """
        file, self._file = self._file, None
        closing: list[Callable[[], None]] = [] if file is None else [file.close]
        if self._is_open:
            closing += [partial(log.close, failed) for log in self._logs]
        self._is_open = False
        for close in closing:
            with suppress(OSError) if failed else nullcontext():
                close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


def refuse_absent_loggers(loggers: Sequence[str]) -> None:
    """Refuse, before any work, a logger whose package is not installed.

    Raises:
        SetupError: with the command that installs it.
    """
    if "wandb" not in loggers:
        return
    try:
        version("wandb")
    except PackageNotFoundError as error:
        raise SetupError(
            "training.loggers names wandb, but the package wandb is not installed. Install it by `pip install 'mastaf[wandb]'`, "
            "or take wandb out of training.loggers."
        ) from error


def _kept_lines(path: Path, position: Position) -> list[str]:
    """The lines of metrics.jsonl up to a position."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
            if record["episode"] <= position.reached(record["kind"]):
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            break  # the line that the kill tore; nothing after it can be from before the checkpoint
    return kept


def _finite(value: Any) -> Any:
    """JSON has no infinity: a gradient norm that overflowed is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
