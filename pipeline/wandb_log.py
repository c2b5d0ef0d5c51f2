"""A run in Weights & Biases: an optional extra, online or offline as the user's environment says."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoint import write_file
from pipeline.logger import Position, names_of
from pipeline.settings import SetupError


class WandbLog:
    """The run's id is kept in the folder, so that a resumed run goes on there."""

    def __init__(self, folder: Path, config: Mapping[str, Any], run_name: str) -> None:
        self._folder = folder
        self._id_path = folder / "wandb" / "run_id"
        self._config = dict(config)
        self._name = run_name
        self._run: Any = None

    def begin(self) -> None:
        self._id_path.unlink(missing_ok=True)
        self._start()

    def resume(self, kept: Sequence[Mapping[str, Any]], position: Position) -> None:  # noqa: ARG002  it keeps its own history
        self._start()

    def _start(self) -> None:
        import wandb

        if not self._id_path.is_file():
            self._id_path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._id_path, uuid.uuid4().hex[:12].encode())
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "mastaf"),
                dir=str(self._folder),
                id=self._id_path.read_text(encoding="ascii"),
                name=self._name,
                resume="allow",
                config=self._config,
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )
        except wandb.errors.Error as error:
            raise SetupError(
                f"Weights & Biases cannot start: {str(error).rstrip('.')}. Log in by `wandb login`, set WANDB_MODE=offline, "
                "or take wandb out of training.loggers."
            ) from error

    def write(self, line: Mapping[str, Any], measured: Mapping[str, float]) -> None:
        # What it has already (of after the checkpoint) is the same now, and cannot be written twice.
        if line["episode"] >= self._run.step:
            self._run.log(names_of(line, measured), step=line["episode"])

    def sync(self) -> None:
        pass

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
