"""TensorBoard's event files of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.logger import FILES, Position, names_of

EVENTS_AHEAD = 1000
"""Lines that wait for TensorBoard's thread before a step would wait for it."""
FLUSH_SECONDS = 30
"""TensorBoard sees a line after so long."""


class TensorBoardLog:
    """Event files, steps and validations apart: a checkpoint may lie between a step and its validation, so that each is taken up
    from its own position. All numbers of a line are one event, which is written by TensorBoard's own thread."""

    def __init__(self, folder: Path) -> None:
        self._folders = {kind: folder / name for kind, name in FILES.items()}
        self._writers: dict[str, Any] = {}
        self._purge_steps: dict[str, int] = {}

    def begin(self) -> None:
        for folder in self._folders.values():
            for path in folder.glob("*tfevents*"):
                path.unlink()

    def resume(self, kept: Sequence[Mapping[str, Any]], position: Position) -> None:
        for kind, folder in self._folders.items():
            if _number_event_files(folder):
                self._purge_steps[kind] = position.reached(kind) + 1
                continue
            for line in kept:
                if line["kind"] == kind:
                    self.write(line, {})

    def write(self, line: Mapping[str, Any], measured: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in names_of(line, measured).items()
            if _is_number(value)
        ]
        self._writer(line["kind"]).file_writer.add_summary(Summary(value=values), line["episode"])

    def _writer(self, kind: str) -> Any:
        if kind not in self._writers:
            # Imported here: a tenth of a second that other commands need not wait for.
            from torch.utils.tensorboard import SummaryWriter

            self._writers[kind] = SummaryWriter(
                str(self._folders[kind]),
                purge_step=self._purge_steps.get(kind),
                max_queue=EVENTS_AHEAD,
                flush_secs=FLUSH_SECONDS,
            )
        return self._writers[kind]

    def sync(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self, failed: bool) -> None:  # noqa: ARG002  as for CSV
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def _number_event_files(folder: Path) -> bool:
    """Put numbers before the event files there are, so that they are read before the next one whatever the clocks say."""
    numbered = sorted(folder.glob("[0-9]*.events.*tfevents*"))
    fresh = sorted(folder.glob("events.*tfevents*"))
    for number, path in enumerate(fresh, start=len(numbered)):
        path.rename(path.with_name(f"{number:04d}.{path.name}"))
    return bool(numbered or fresh)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
