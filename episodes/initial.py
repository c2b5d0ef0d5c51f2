"""Layers whose first weights come from a generator of ours, never from torch's global one."""

import math

import torch
from torch import nn


def make_linear(
    inputs: int, outputs: int, std: float | None, generator: torch.Generator | None, *, with_bias: bool = True
) -> nn.Linear:
    """A linear layer drawn from `generator` (None: torch's global one).

    Args:
        inputs: input width.
        outputs: output width.
        std: standard deviation of normal weights; None: uniform within 1/sqrt(inputs), torch's default.
        generator: source of randomness.
        with_bias: whether the layer adds a bias, uniform within 1/sqrt(inputs).
    """
    # By way of the meta device, so that the constructor draws nothing from the global generator.
    layer = nn.Linear(inputs, outputs, bias=with_bias, device="meta").to_empty(device="cpu")
    bound = 1.0 / math.sqrt(inputs)
    with torch.no_grad():
        if std is None:
            layer.weight.uniform_(-bound, bound, generator=generator)
        else:
            layer.weight.normal_(0.0, std, generator=generator)
        if with_bias:
            layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def make_conv3d(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Conv3d:
    """A 3x3x3 convolution that keeps the size, weights and bias uniform within 1/sqrt(27 inputs), torch's default.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        generator: source of randomness; None: torch's global one.
    """
    layer = nn.Conv3d(inputs, outputs, 3, padding=1, device="meta").to_empty(device="cpu")
    bound = 1.0 / math.sqrt(27 * inputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
