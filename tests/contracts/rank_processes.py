"""Several ranks as real processes that talk over gloo, without torchrun's start-up for each."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from pipeline.ranks import Ranks, joined_ranks

# A server that has imported torch once forks the ranks; it has no threads of its own that a fork could break.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "pipeline.training", "contracts.rank_processes"])


def run_ranks(world_size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``job(ranks, *arguments)`` returns on each rank; a failed rank's traceback is the error."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    started = []
    for rank in range(world_size):
        ours, theirs = _SERVER.Pipe(duplex=False)
        process = _SERVER.Process(target=_be_rank, args=(theirs, rank, world_size, port, job, arguments))
        process.start()
        theirs.close()
        started.append((process, ours))
    results = []
    for process, ours in started:
        try:
            is_good, value = ours.recv()
        except EOFError:
            is_good, value = False, f"a rank ended without a word (exit code {process.exitcode})"
        process.join()
        ours.close()
        results.append((is_good, value))
    failed = [value for is_good, value in results if not is_good]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [value for _, value in results]


def _be_rank(
    pipe: Connection, rank: int, world_size: int, port: int, job: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        with joined_ranks(torch.device("cpu")) as (ranks, _):
            value = job(ranks, *arguments)
        pipe.send((True, value))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def gather_things(ranks: Ranks) -> list[Any]:
    """Every way of talking, once."""
    ranks.wait()
    rows = torch.full((ranks.rank, 2), float(ranks.rank))
    return [
        ranks.total([1.0, float(ranks.rank)]),
        ranks.gather(f"rank {ranks.rank}"),
        ranks.gather_rows(rows).tolist(),
        ranks.slice_of(range(10)),
    ]
