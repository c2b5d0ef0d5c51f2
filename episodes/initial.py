"""Layers whose first weights come from a generator of ours, never from torch's global one."""

import math

import torch
from torch import nn


def make_linear(inputs: int, outputs: int, std: float | None, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer drawn from `generator` (None: torch's global one).

    Args:
        inputs: input width.
        outputs: output width.
        std: standard deviation of normal weights; None: uniform within 1/sqrt(inputs), torch's default.
        generator: source of randomness.
    """
    # By way of the meta device, so that the constructor draws nothing from the global generator.
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    bound = 1.0 / math.sqrt(inputs)
    with torch.no_grad():
        if std is None:
            layer.weight.uniform_(-bound, bound, generator=generator)
        else:
            layer.weight.normal_(0.0, std, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
