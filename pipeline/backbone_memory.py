"""Gradient checkpointing of a backbone's blocks: less is kept for the gradient, and computed again when it is due.

"Training Deep Nets with Sublinear Memory Cost", 2016, https://arxiv.org/abs/1604.06174, by `torch.utils.checkpoint`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(backbone: nn.Module) -> None:
    """Let every block of a backbone keep only its input while it learns; numbers, names and evaluation stay as they are.

    Args:
        backbone: its blocks get a `forward` of their own, which a deep copy takes along.

    Raises:
        ValueError: no block is found.
    """
    blocks = blocks_of(backbone)
    if not blocks:
        raise ValueError(
            f"training.gradient_checkpointing = true, but {type(backbone).__name__} has no blocks in a Sequential or ModuleList. "
            "Set it to false; clips_per_forward needs no blocks."
        )
    for block in blocks:
        block.forward = partial(_forward_again_for_gradient, block)


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """The largest parts of a backbone whose insides may be forgotten: residual blocks and transformer layers, which have parts of their
    own and lie in an `nn.Sequential` or `nn.ModuleList`, and stems that are an `nn.Sequential` of single layers."""
    blocks = []
    for child in backbone.children():
        parts = list(child.children())
        is_block = isinstance(backbone, _CONTAINERS) and not isinstance(child, _CONTAINERS) and len(parts) > 0
        is_stem = (
            isinstance(child, nn.Sequential) and len(parts) > 1 and not any(list(part.children()) for part in parts)
        )
        if is_block or is_stem:
            blocks.append(child)
        else:
            blocks += blocks_of(child)
    return blocks


_CONTAINERS = (nn.Sequential, nn.ModuleList)


def _forward_again_for_gradient(block: nn.Module, *inputs: Any, **options: Any) -> Any:
    forward = type(block).forward
    if not (block.training and torch.is_grad_enabled()):
        return forward(block, *inputs, **options)
    return checkpoint(forward, block, *inputs, use_reentrant=False, **options)
