"""`mastaf extract --slurm`: the extraction as a Slurm array, one share of the shards per task."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.launch import LaunchError

SECONDS_TO_SAVE = 60
"""Between the warning and the end of a task. Committing a shard takes seconds."""
MAX_RESTARTS = 100
"""Requeues of one task after time limits, so that a task that never commits anything does not go on for ever."""
OURS = {"array", "ntasks", "requeue"}
"""Options of sbatch that the script needs as they are."""

_BODY = """\
set -u
cd {folder} || exit 2
warned=
extraction=
# Slurm signals this shell; the extraction commits what it has, and ends with 143.
stop() {{
  [ "$1" = USR1 ] && warned=yes
  [ -n "$extraction" ] && kill -s "$1" "$extraction" 2>/dev/null
}}
trap 'stop USR1' USR1
trap 'stop TERM' TERM
{command} &
extraction=$!
# A trapped signal ends `wait`, though the extraction still runs.
while :; do
  wait "$extraction"
  kill -0 "$extraction" 2>/dev/null || break
done
wait "$extraction"
code=$?
# The time limit was near: go on in another allocation. What was committed is skipped there.
if [ "$code" -eq 143 ] && [ -n "$warned" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_restarts} ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}" && exit 0
fi
exit "$code"
"""


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """An extraction as an array of tasks."""

    command: Sequence[str]
    """The words of `mastaf extract ...`, without the options about Slurm; a share is added."""
    num_tasks: int
    log: Path
    """Absolute; task i of job j appends to `LOG.slurm-j_i.log`."""
    folder: Path
    """Working directory, to which relative paths refer."""
    options: Mapping[str, str | None]
    """Options of sbatch by their long names; None for one without a value."""

    def script(self) -> str:
        """The batch script."""
        if not self.log.parent.is_dir():
            raise LaunchError(
                f"{self.log.parent} does not exist, and Slurm drops tasks whose log cannot be written. Make the folder first."
            )
        options: dict[str, str | None] = {
            "job-name": "mastaf-extract",
            # A percent sign in a path would be read as a pattern.
            "output": f"{str(self.log).replace('%', '%%')}.slurm-%A_%a.log",
            "open-mode": "append",
            "signal": f"B:USR1@{SECONDS_TO_SAVE}",
            **self.options,
            "requeue": None,
            "ntasks": "1",
            "array": f"0-{self.num_tasks - 1}",
        }
        head = [
            f"#SBATCH --{name}" + ("" if value is None else f"={_quoted(value)}") for name, value in options.items()
        ]
        body = _BODY.format(
            folder=shlex.quote(str(self.folder)),
            # Told, not left to the environment: a few tasks of the array may be submitted anew under their numbers.
            command=f'{shlex.join(self.command)} --shard "$SLURM_ARRAY_TASK_ID/{self.num_tasks}"',
            max_restarts=MAX_RESTARTS,
        )
        return "\n".join(["#!/bin/bash", *head, body])


def parse_options(texts: Sequence[str]) -> dict[str, str | None]:
    """Options of sbatch, as in "partition=gpu", "gpus-per-task=1" or "exclusive".

    Raises:
        LaunchError: one is not of this form, or is needed as it is.
    """
    options: dict[str, str | None] = {}
    for text in texts:
        name, equals, value = text.strip().removeprefix("--").partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or "\n" in value:
            raise LaunchError(
                f"--slurm-option {text!r}: give one long option of sbatch, such as partition=gpu or exclusive."
            )
        if name in OURS:
            raise LaunchError(
                f"--slurm-option {text!r}: the script needs its own {name}; the number of tasks is --slurm-tasks."
            )
        options[name] = value if equals else None
    return options


def submit(script: str) -> str:
    """Hand a script to `sbatch`; what it says.

    Raises:
        LaunchError: there is no `sbatch`, or it refuses the script.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise LaunchError(
            "there is no `sbatch` here. Run this on a login node of the cluster, or take --slurm print and submit the file there."
        )
    done = subprocess.run([sbatch], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"sbatch refused the script (exit code {done.returncode}): {done.stderr.strip()}")
    return done.stdout.strip()


def _quoted(value: str) -> str:
    """A value as sbatch reads it from a script."""
    return (
        value
        if re.fullmatch(r"[\w.,:/@%+=\[\]-]*", value)
        else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    )
