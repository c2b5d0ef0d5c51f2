"""What a head costs: parameters, FLOPs of one episode, measured milliseconds. Scoring is not touched by it.

E episodes, S supports, Q queries.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from episodes.batch import EpisodeBatch
from episodes.head import HeadModule
from pipeline.call_size import LargestTensor, parts_of
from pipeline.compute_cost import count_macs


@dataclass(frozen=True, slots=True)
class HeadCost:
    """The cost of one head; of the head alone, without backbone and reading."""

    parameters: int
    """All of them; those that only training uses (a classifier over the training classes) count too."""
    trainable_parameters: int
    """Those that training changes."""
    flops: int
    """Of one episode: two for each multiplication with its addition, in matrix products and convolutions."""
    milliseconds: float
    """Of one episode: the median over several calls, divided by the episodes of a call."""
    timed_episodes: int
    """Episodes of one timed call."""


def measure_heads(heads: Sequence[HeadModule], batches: Iterable[EpisodeBatch], device: torch.device) -> list[HeadCost]:
    """Cost of heads that score the same batches, in the order of the heads.

    Args:
        heads: on the device, in evaluation mode.
        batches: two or more of equal size, cubes in any number type; the first one only warms up.
        device: where the heads are.
    """
    milliseconds: list[list[float]] = [[] for _ in heads]
    flops: list[int] = []
    sizes: list[int] = []
    with torch.no_grad():
        for number, batch in enumerate(batches):
            question = _question(batch).to(device)
            if number == 0:
                flops = [count_flops(head, question) for head in heads]
                sizes = [_call_size(head, question) for head in heads]
            # In turns, so that whatever else the machine does meets all heads alike.
            for head, size, taken in zip(heads, sizes, milliseconds, strict=True):
                seconds = _seconds(head, parts_of(question, size)[0], device)
                taken += [1000.0 * seconds / size] if number else []
    return [
        HeadCost(
            parameters=sum(parameter.numel() for parameter in head.parameters()),
            trainable_parameters=sum(parameter.numel() for parameter in head.parameters() if parameter.requires_grad),
            flops=counted,
            milliseconds=float(np.median(taken)),
            timed_episodes=size,
        )
        for head, counted, taken, size in zip(heads, flops, milliseconds, sizes, strict=True)
    ]


def _call_size(head: HeadModule, batch: EpisodeBatch) -> int:
    """All episodes of a batch, or fewer where the head needs much memory for each."""
    with LargestTensor() as largest:
        head(parts_of(batch, 1)[0])
    size: int = min(batch.num_episodes, largest.episodes_per_call)
    return size


def count_flops(head: HeadModule, batch: EpisodeBatch) -> int:
    """FLOPs of the first episode of a batch, by torch's own counter; half of them are the multiply-accumulates (MACs).

    What is done element by element (softmax, differences, square roots) is not in it.
    """
    # Some fused kernels are closed to the counter: those of recurrent layers, which exist in float32 only, and a fast path.
    counted_head = copy.deepcopy(head).to("cpu", torch.float64)
    first = _question(parts_of(batch.to("cpu"), 1)[0], torch.float64)
    with _no_fast_path():
        return 2 * count_macs(lambda: counted_head(first))


@contextmanager
def _no_fast_path() -> Iterator[None]:
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def _question(batch: EpisodeBatch, dtype: torch.dtype = torch.float32) -> EpisodeBatch:
    """What is asked when predicting: no labels of queries, so that no loss is computed."""
    return replace(
        batch,
        support=batch.support.to(dtype),
        query=batch.query.to(dtype),
        query_labels=None,
        class_global_labels=None,
    )


def _seconds(head: HeadModule, batch: EpisodeBatch, device: torch.device) -> float:
    _wait_for(device)
    started = time.perf_counter()
    head(batch)
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
