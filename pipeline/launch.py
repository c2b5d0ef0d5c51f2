"""Which part of a job this process is: told by options, or by what torchrun and Slurm leave in the environment."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from pipeline.shares import Share

WORKER = "MASTAF_WORKER"
"""Set by `--workers` for its processes: `i/n`, the number of the process among those of its machine."""
PARENT_GONE_SECONDS = 15.0
"""After the parent is gone, a process of `--workers` may take so long to commit what it has."""


class LaunchError(ValueError):
    """The options and the environment do not say one thing; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands in a job of several."""

    share: Share = field(default_factory=Share)
    local_index: int = 0
    """Its number among the processes of the job on this machine; chooses the GPU."""
    num_local: int = 1
    """How many they are; they share the cores."""


def find_place(shard: str | None, environment: Mapping[str, str]) -> Place:
    """The first that is there: `--shard`; the rank that torchrun gives, or the number within a `srun` step; nothing.

    A Slurm array around torchrun or srun splits the work once more. Shares are static, but for the processes of `--workers`,
    which help each other.

    Args:
        shard: as in "3/16", or None.
        environment: the variables of the process.

    Raises:
        LaunchError: a malformed share, or variables that contradict each other.
    """
    ranks = find_ranks(environment)
    if shard is not None:
        share = parse_share(shard)
        _refuse_same_share(share, ranks.share, environment)
        place = Place(share, ranks.local_index, ranks.num_local)
    else:
        place = Place(_within(_array(environment), ranks.share), ranks.local_index, ranks.num_local)
    worker = environment.get(WORKER)
    return place if worker is None else _as_worker(place, parse_share(worker))


def find_ranks(environment: Mapping[str, str]) -> Place:
    """The place among the processes that torchrun or `srun` has started; that of a single process outside of both.

    Raises:
        LaunchError: variables that contradict each other.
    """
    return _torchrun(environment) or _srun(environment) or Place()


def serve_parent() -> None:
    """In a process of `--workers`: when the parent is gone, stop as by SIGTERM, and without mercy a little later."""
    if WORKER in os.environ:
        threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()


def _wait_for_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PARENT_GONE_SECONDS)
    os._exit(128 + signal.SIGTERM)


def refuse_nested_workers(environment: Mapping[str, str]) -> None:
    """Raise LaunchError where `--workers` would start processes within the processes of another launcher."""
    for find, launcher, instead in (
        (_torchrun, "torchrun", "--nproc-per-node"),
        (_srun, "srun", "--ntasks"),
    ):
        ranks = find(environment)
        if ranks is not None and ranks.share.count > 1:
            raise LaunchError(
                f"--workers inside process {ranks.share.index} of {ranks.share.count} of {launcher}: both start processes. "
                f"Use one of them: {instead} of {launcher}, or --workers without {launcher}."
            )


def parse_share(text: str) -> Share:
    """A share as in "3/16".

    Raises:
        LaunchError: it is not of that form, or not a share.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise LaunchError(f"--shard {text!r}: give INDEX/COUNT, counted from 0, as in 0/4 to 3/4.")
    return Share(int(match[1]), int(match[2]))


def device_name(asked: str, place: Place, num_devices: int) -> str:
    """The device of one process: each has a GPU of its own, as far as there are enough.

    Args:
        asked: the value of `--device`; all but "auto" stays.
        num_devices: CUDA devices that torch sees.
    """
    if asked != "auto" or num_devices == 0:
        return asked
    return f"cuda:{place.local_index % num_devices}"


def num_cores(environment: Mapping[str, str] = os.environ) -> int:
    """CPU cores for this process: its part of those that Slurm or a container leaves to the job's processes on this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Not by `find_place`: how many processes there are here does not depend on which share of the work this one has.
    num_local = parse_share(environment[WORKER]).count if WORKER in environment else find_ranks(environment).num_local
    if "SLURM_STEP_ID" in environment and "SLURM_CPUS_ON_NODE" in environment:
        # srun may have bound this process to its own cores already.
        return max(1, min(usable, _number(environment, "SLURM_CPUS_ON_NODE") // num_local))
    return max(1, usable // num_local)


def options_again(context: click.Context) -> dict[str, list[str]]:
    """The options of the running command as they would be typed, by the names of their parameters; paths are made absolute."""
    typed: dict[str, list[str]] = {}
    for option in context.command.params:
        name, value = option.name or "", context.params.get(option.name or "")
        if value is None or value is False or value == ():
            continue
        if isinstance(option, click.Option) and option.is_flag:
            typed[name] = [option.opts[0]]
        else:
            values = value if option.multiple else [value]
            typed[name] = [word for one in values for word in (option.opts[0], _absolute(name, one))]
    return typed


def _absolute(name: str, value: Any) -> str:
    # A recipe is a file, or the name of one that ships.
    is_path = isinstance(value, Path) or (name == "recipe" and Path(value).is_file())
    return str(Path(value).absolute()) if is_path else str(value)


def _as_worker(place: Place, worker: Share) -> Place:
    share = _within(place.share, worker)
    return Place(Share(share.index, share.count, helps=True, group=worker.count), worker.index, worker.count)


def _refuse_same_share(share: Share, ranks: Share, environment: Mapping[str, str]) -> None:
    """Raise LaunchError where all ranks would do the share that was given to one of them."""
    is_of_rank = share.count % ranks.count == 0 and share.index % ranks.count == ranks.index
    # Each task of an array has ranks of its own, so there are more shares than ranks.
    if share == ranks or ranks.count == 1 or ("SLURM_ARRAY_TASK_ID" in environment and is_of_rank):
        return
    launcher = "torchrun" if _torchrun(environment) else "srun"
    raise LaunchError(
        f"--shard {share.index}/{share.count} in rank {ranks.index} of {ranks.count} of {launcher}: all ranks would do the same "
        "share. Leave --shard out; the rank is the share."
    )


def _within(outer: Share, inner: Share) -> Share:
    return Share(outer.index * inner.count + inner.index, outer.count * inner.count)


def _torchrun(environment: Mapping[str, str]) -> Place | None:
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    rank, count = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if not 0 <= rank < count:
        raise LaunchError(f"RANK={rank} with WORLD_SIZE={count} is no rank. Unset both, or start with torchrun.")
    # Launchers other than torchrun give ranks, but not always the places on the machine.
    local = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else rank
    num_local = _number(environment, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else count
    return Place(Share(rank, count), local, num_local)


def _srun(environment: Mapping[str, str]) -> Place | None:
    # sbatch and salloc set SLURM_NTASKS for the one shell that they start, too.
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return None
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    if name not in environment:
        return None
    index, count = _number(environment, "SLURM_PROCID"), _number(environment, name)
    if not 0 <= index < count:
        raise LaunchError(f"SLURM_PROCID={index} with {name}={count} is no task. Give --shard INDEX/COUNT.")
    local = _number(environment, "SLURM_LOCALID") if "SLURM_LOCALID" in environment else 0
    return Place(Share(index, count), local, _tasks_here(environment, count))


def _tasks_here(environment: Mapping[str, str], count: int) -> int:
    """Tasks of the step on this node, of a text such as "4(x2),3"; all tasks where it does not tell."""
    listed = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", listed)
    by_node = [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]
    node = int(environment.get("SLURM_NODEID", "0"))
    return by_node[node] if node < len(by_node) else count


def _array(environment: Mapping[str, str]) -> Share:
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return Share()
    task = _number(environment, "SLURM_ARRAY_TASK_ID")
    count = _number(environment, "SLURM_ARRAY_TASK_COUNT")
    first = _number(environment, "SLURM_ARRAY_TASK_MIN")
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environment else 1
    last = _number(environment, "SLURM_ARRAY_TASK_MAX") if "SLURM_ARRAY_TASK_MAX" in environment else None
    is_even = step > 0 and (task - first) % step == 0 and 0 <= (task - first) // step < count
    if not is_even or (last is not None and last != first + step * (count - 1)):
        raise LaunchError(
            f"the Slurm array of {count} tasks from {first} with step {step} has gaps, so task {task} cannot tell its share. "
            'Give it: --shard "$SLURM_ARRAY_TASK_ID/N", where N counts all tasks that there ever were.'
        )
    return Share((task - first) // step, count)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not re.fullmatch(r"\d+", text):
        was = "is not set" if text is None else f"is {text!r}"
        raise LaunchError(
            f"the environment says that this process is one of several, but {name} {was}; it must be a number. "
            "Give --shard INDEX/COUNT."
        )
    return int(text)
