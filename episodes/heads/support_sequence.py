"""The supports of an episode as a sequence, for heads that read them one after another."""

# E episodes, S supports

from dataclasses import dataclass

import torch
from torch import Tensor

from episodes.batch import EpisodeBatch


@dataclass(frozen=True, slots=True)
class SupportSequence:
    """Where each member of the sequence is in the batch; padding stands at the end."""

    index: Tensor
    """(E, S) int64 place in the batch of each member of the sequence."""
    is_real: Tensor
    """(E, S) bool, whether the member is a video; False is padding."""

    def sort(self, values: Tensor) -> Tensor:
        """Values (E, S, ...) in the order of the batch, brought into the order of the sequence."""
        return _gathered(values, self.index)

    def unsort(self, values: Tensor) -> Tensor:
        """Values (E, S, ...) in the order of the sequence, brought back into the order of the batch."""
        return _gathered(values, self.index.argsort(dim=1))


def support_sequence(batch: EpisodeBatch) -> SupportSequence:
    """Sort the supports by video id, all padding behind them; as they come where the batch has no order."""
    order = batch.support_order
    if order is None:
        order = torch.arange(batch.support.shape[1], device=batch.support.device).expand_as(batch.support_labels)
    is_padding = batch.support_labels < 0
    by_id = order.argsort(dim=1, stable=True)
    # A second stable sort moves the padding back and keeps the order of the videos.
    index = by_id.gather(1, is_padding.gather(1, by_id).to(torch.int8).argsort(dim=1, stable=True))
    return SupportSequence(index, ~is_padding.gather(1, index))


def _gathered(values: Tensor, index: Tensor) -> Tensor:
    each = index.reshape(*index.shape, *[1] * (values.ndim - 2))
    return values.gather(1, each.expand(*index.shape, *values.shape[2:]))
