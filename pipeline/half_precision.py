"""What is wrong with half precision on a CPU, and the way around it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def keep_convolutions_whole(backbone: nn.Module) -> None:
    """Let the convolutions of a backbone that learns on a CPU under autocast compute in float32.

    torch 2.15's bfloat16 convolutions on a CPU (oneDNN, AVX-512) get the weight gradient wrong, to infinity or with a damaged heap,
    where an axis is shorter than what the kernel reaches beyond it: two or three time steps, a grid of one. Their results are right,
    so evaluation is left alone and stays equal to the store's cubes; other devices are left alone too.

    Args:
        backbone: its convolutions get a `forward` of their own, which a deep copy takes along.
    """
    for module in backbone.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            module.forward = partial(_in_float32_on_cpu, module)


def _in_float32_on_cpu(convolution: nn.Module, inputs: Tensor) -> Tensor:
    forward = type(convolution).forward
    if inputs.device.type != "cpu" or not torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
        return forward(convolution, inputs)  # type: ignore[no-any-return]  # torch leaves the result open
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        output: Tensor = forward(convolution, inputs.float())
    return output.to(dtype)
