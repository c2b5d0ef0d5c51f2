"""Several processes that train or evaluate one run, as torchrun starts them; or this process alone.

Every rank prepares the same run and draws its own slice of the one list of episodes. What ranks tell each other besides gradients
are small numbers, on the CPU (gloo); gradients go where the model is (nccl on GPUs).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.console import silence
from pipeline.settings import SetupError

Items = TypeVar("Items", range, list[str], list[range])

# A rank that dies closes its connections, which the others see at once; this is for one that hangs.
PATIENCE = timedelta(hours=1)


class RankLost(RuntimeError):
    """Another rank has ended or cannot be reached; what was saved last is kept."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of one job, numbered; by default this one alone."""

    rank: int = 0
    """Of this process."""
    world_size: int = 1
    """Of them all."""
    is_launched: bool = False
    """Whether torchrun started them, which passes signals on and ends them all where one fails."""

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        """Whether there is anybody to talk to."""
        return self.world_size > 1

    def slice_of(self, items: Items) -> Items:
        """This rank's share, without gaps: the shares of the ranks one after another are the whole."""
        first = self.rank * len(items) // self.world_size
        last = (self.rank + 1) * len(items) // self.world_size
        return items[first:last]

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, in float64; every rank gives as many."""
        if not self.are_several:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        with watched():
            dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def gather(self, value: object) -> list[object]:
        """The value of every rank, in their order."""
        if not self.are_several:
            return [value]
        values: list[object] = [None] * self.world_size
        with watched():
            dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows (n, ...) of every rank, one rank after another; n may differ between ranks, the rest may not."""
        if not self.are_several:
            return rows
        counts = [int(str(count)) for count in self.gather(len(rows))]
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        with watched():
            dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.are_several:
            with watched():
                dist.barrier()


ALONE = Ranks()
"""No job: this process does everything."""


@contextmanager
def watched() -> Iterator[None]:
    """Say in words that another rank is gone, where a talk between ranks fails."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not _is_of_connection(error):
            raise
        raise lost(error) from error


def _is_of_connection(error: RuntimeError) -> bool:
    """Whether an error is of the talk between ranks, and not of what a rank computes."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "Connection", "NCCL", "Timed out")
    )


def lost(error: BaseException) -> RankLost:
    """What to say when the ranks cannot talk."""
    text = " ".join(re.sub(r"\[[^]]*:\d+\] ", "", str(error)).split())  # without torch's own file and line
    reason = text.split(". ")[0][:160] or type(error).__name__
    return RankLost(
        f"another rank of this job has ended or cannot be reached ({reason}). Its own message, if it had time for one, says why; "
        "start the same command again. What was trained is saved: a training goes on with --resume."
    )


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the job that torchrun (or another launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) started this process in.

    Alone without one.

    Yields:
        The ranks, and this rank's device: the GPU of its own number where `device` is CUDA.

    Raises:
        SetupError: torchrun's variables contradict each other, or there are more ranks than GPUs.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ
    # Other launchers set the same variables; without an address the ranks cannot find each other.
    are_told = is_launched or {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not are_told or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(is_launched=is_launched), device
        return
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), is_launched)
    if device.type == "cuda":
        device = _own_gpu(device)
    if not ranks.is_first:
        silence()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with watched():
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield ranks, device
    finally:
        dist.destroy_process_group()


def _own_gpu(device: torch.device) -> torch.device:
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    if device.index is not None:
        raise SetupError(f"--device {device} would put every rank on one GPU; use --device cuda under torchrun.")
    if local >= torch.cuda.device_count():
        raise SetupError(
            f"rank {local} of this machine has no GPU: there are {torch.cuda.device_count()}. "
            f"Use torchrun --nproc-per-node {torch.cuda.device_count()}."
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
