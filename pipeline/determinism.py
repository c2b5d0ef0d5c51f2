"""Deterministic algorithms for the length of a run, where torch has a choice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(is_wanted: bool) -> Iterator[None]:
    """Ask torch for algorithms that give the same bits each time; it raises where it has none. Nothing changes if not wanted.

    On a CPU training is deterministic as it is. On a GPU gradients of convolutions and pooling are sums in any order without it.
    """
    if not is_wanted:
        yield
        return
    # cuBLAS reads it when it is first used in the process; this or ":16:8" is what it asks for.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
