"""Running statistics of a step, added in the order of its episodes, whichever rank had them."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from pipeline.batchnorm import running_statistics
from pipeline.ranks import Ranks

# E episodes (of a step, on one rank), U channels


class EpisodeOrder:
    """Holds back the running statistics of a model until `gather` and `settle`; a context manager.

    Within a step no number depends on them, so waiting changes nothing; but ranks must not each have statistics of their own.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._modules = running_statistics(model)
        self._ranks = ranks
        self._gathered: dict[int, Tensor] = {}
        """What waits on all ranks, by place in `_modules`: (E, uses, 2, U)."""

    def __enter__(self) -> EpisodeOrder:
        for module in self._modules:
            module.waiting = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self._modules:
            module.waiting = None

    def forget(self) -> None:
        """Drop what waits: it was of a pass that does not count, or of a step that is not taken."""
        self._gathered = {}
        for module in self._modules:
            module.waiting = []

    def gather(self) -> None:
        """Have what waits on all ranks here, in the order of the episodes."""
        own: dict[int, Tensor] = {}
        for place, module in enumerate(self._modules):
            if module.waiting:
                own[place] = torch.cat(module.waiting)  # (E, uses, 2, U)
        shared = {place for place in own if self._modules[place].is_shared}
        self._gathered = own if not (self._ranks.are_several and self._modules) else own | self._of_all(own, shared)

    def is_finite(self) -> bool:
        """Whether what was gathered is numbers; the same on every rank."""
        return all(bool(moments.isfinite().all()) for moments in self._gathered.values())

    def settle(self) -> None:
        """Add what was gathered to the running statistics."""
        for place, moments in self._gathered.items():
            self._modules[place].apply_moments(moments)
        self.forget()

    def _of_all(self, own: dict[int, Tensor], shared: set[int]) -> dict[int, Tensor]:
        """What all ranks have, one rank after another; `own` may be empty on a rank that had no episode."""
        shapes = [(place, tuple(moments.shape[1:])) for place, moments in own.items() if place not in shared]
        known = [each for each in self._ranks.gather(shapes) if each]
        if not known:
            return {}
        layout = list(known[0])  # type: ignore[call-overload]  # what another rank's `shapes` is
        sizes = [int(torch.Size(shape).numel()) for _, shape in layout]
        # On the CPU in float64: exact, and the same way for models on any device.
        rows = [own[place].flatten(1).double().cpu() for place, _ in layout] if shapes else []
        together = torch.cat(rows, dim=1) if rows else torch.zeros((0, sum(sizes)), dtype=torch.float64)
        parts = torch.split(self._ranks.gather_rows(together), sizes, dim=1)
        return {place: part.reshape(-1, *shape) for (place, shape), part in zip(layout, parts, strict=True)}
