"""What a call costs: multiply-accumulates by torch's own counter, and measured milliseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_macs(call: Callable[[], Any]) -> int:
    """Multiply-accumulates of the matrix products, convolutions and attentions in a call (half of the counter's FLOPs).

    Element-wise work, sums, softmax and normalisation are not counted, here as in the field's tables.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call()
    return int(counter.get_total_flops()) // 2


def median_milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median wall clock of a call over `repeats` calls, after one that does not count; a GPU is waited for."""
    seconds = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return 1000.0 * statistics.median(seconds[1:])
