"""Draws of libraries that know no generator but torch's global one, from a generator of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWING: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.bernoulli,
        torch.multinomial,
        torch.normal,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch._sample_dirichlet,
        torch.Tensor.bernoulli_,
        torch.Tensor.exponential_,
        torch.Tensor.normal_,
        torch.Tensor.random_,
        torch.Tensor.uniform_,
    }
)


class OwnDraws(TorchFunctionMode):
    """Within this context, what is drawn on the CPU depends on the seed alone, and nothing else in the process is touched.

    The global generator belongs to all threads of the process: to set it and put it back (`torch.random.fork_rng`) would change
    what another thread draws meanwhile, or be changed by it. A function mode belongs to the thread that entered it.
    """

    def __init__(self, seed: int) -> None:
        """Begin at a seed, in [0, 2**63)."""
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, with the generator if it draws."""
        own = {"generator": self._generator} if func in _DRAWING else {}
        return func(*args, **{**own, **(kwargs or {})})
