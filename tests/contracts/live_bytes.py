"""Counts the bytes that new tensors hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its classes' making untyped
    """Within this context, the bytes of all tensors that operations made and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._storages: dict[StorageWeakRef, int] = {}
        self.peak = 0
        """The largest number after any operation."""

    @property
    def now(self) -> int:
        """Of what is alive."""
        self._storages = {storage: size for storage, size in self._storages.items() if not _is_gone(storage)}
        return sum(self._storages.values())

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call an operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        # A view is no new memory: most of all not one of a weight.
        self._storages.update((storage, size) for storage, size in _storages(result).items() if storage not in given)
        self.peak = max(self.peak, self.now)
        return result


def _storages(values: Any) -> dict[StorageWeakRef, int]:
    storages = [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return {_weak(storage): storage.nbytes() for storage in storages}


def _weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # as above


def _is_gone(storage: StorageWeakRef) -> bool:
    return bool(storage.expired())  # type: ignore[no-untyped-call]  # as above
