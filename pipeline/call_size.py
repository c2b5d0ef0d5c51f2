"""How many episodes a head may score in one call, so that its intermediate tensors stay small.

Cubes say little about it: a head that draws a picture of every pair of videos needs a thousand times their bytes. Episodes
are independent, so the size of a call changes no number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from episodes.batch import EpisodeBatch

CALL_BYTES = 256 << 20
"""Of the largest tensor of a call; a few of that size live at the same time."""


# torch ships no types for this class and its constructor.
class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches the calls inside its block, of one episode each, for the largest tensor that they make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 1

    @property
    def episodes_per_call(self) -> int:
        """How many times as large a tensor may become."""
        return max(1, CALL_BYTES // self.num_bytes)

    def __torch_dispatch__(
        self,
        operator: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Carry out one operation, and look at what it gives."""
        result = operator(*arguments, **(options or {}))
        # A view of an input (a transposed weight, say) takes no memory.
        given = {_address(each) for each in tree_leaves((arguments, options)) if isinstance(each, Tensor)}
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and _address(each) not in given:
                self.num_bytes = max(self.num_bytes, each.untyped_storage().nbytes())
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def parts_of(batch: EpisodeBatch, size: int) -> list[EpisodeBatch]:
    """The episodes of a batch, `size` in each part or fewer in the last."""
    if size >= batch.num_episodes:
        return [batch]
    return [_part(batch, slice(start, start + size)) for start in range(0, batch.num_episodes, size)]


def _part(batch: EpisodeBatch, episodes: slice) -> EpisodeBatch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    parts: dict[str, Any] = {name: value[episodes] for name, value in values.items() if isinstance(value, Tensor)}
    return replace(batch, **parts)
