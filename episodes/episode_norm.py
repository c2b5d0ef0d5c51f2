"""Batch normalisation whose batch is one episode, and running statistics that can wait for their turn."""

# E episodes, M samples of an episode (videos, maps, pairs), U channels

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class RunningStatistics:
    """Part of a batch normalisation: its running statistics, which are added in the order of the episodes, at once or later.

    Moments are (E, uses, 2, U): of each episode and each use of the module within it the mean and the unbiased variance.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    """Share of each new value; None: the average of all of them, as in torch."""
    waiting: list[Tensor] | None = None
    """Moments that were noted and not added, in their order; None: they are added at once."""
    is_shared: bool = False
    """Whether every rank's moments are already those of all ranks."""

    def note_moments(self, moments: Tensor) -> None:
        """Take the moments (E, uses, 2, U) of a call, to add them now or when the time has come."""
        if self.waiting is None:
            self.apply_moments(moments)
        else:
            self.waiting.append(moments)

    @torch.no_grad()
    def apply_moments(self, moments: Tensor) -> None:
        """Add moments (E, uses, 2, U), of any float type and on any device: episode by episode, the uses of each in their order."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        for mean, variance in moments.to(self.running_mean).flatten(0, 1):
            self.num_batches_tracked += 1
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance, share)


@dataclass(frozen=True, slots=True)
class BatchMoments:
    """Statistics of one use of the batch normalisation, per episode."""

    mean: Tensor
    """(E, U)."""
    variance: Tensor
    """(E, U), unbiased."""


class EpisodeBatchNorm(RunningStatistics, nn.Module):
    """Batch normalisation whose batch is one episode, and whose running update waits until `update` is called.

    `nn.BatchNorm1d` and its sisters would mix the episodes of a call, and would update between the uses of one episode; here E
    episodes in one call give what E calls give. The state dict is theirs.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def normalize(
        self, values: Tensor, hint: str = "", is_counted: Tensor | None = None
    ) -> tuple[Tensor, BatchMoments | None]:
        """Normalise the channels of each episode over its samples and whatever axes follow the channels.

        Args:
            values: (E, M, U, ...).
            hint: what to do, for the error of an episode with a single value per channel.
            is_counted: (E, M) bool, the samples that batch statistics are made of (not padding); None: all.

        Returns:
            The normalised values, and the statistics they were normalised with when training.

        Raises:
            ValueError: one value per channel has no variance to train with.
        """
        shape = (1, 1, -1, *[1] * (values.ndim - 3))
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            return (values - self.running_mean.reshape(shape)) * scale.reshape(shape) + self.bias.reshape(shape), None
        axes = [1, *range(3, values.ndim)]
        num_values = values.shape[1] * values[0, 0, 0].numel()
        if num_values < 2:
            raise ValueError(
                f"batch normalisation in training needs two or more samples per episode, got {num_values}"
                + (f"; {hint}" if hint else "")
            )
        each = (values.shape[0], *shape[1:])
        if is_counted is None:
            variance, mean = torch.var_mean(values, dim=axes, correction=0)  # (E, U)
            correction: float | Tensor = num_values / (num_values - 1)
        else:
            counted = is_counted.to(values.dtype)
            counted = counted.reshape(*counted.shape, *[1] * (values.ndim - 2))
            counts = counted.flatten(1).sum(dim=1, keepdim=True) * (num_values / values.shape[1])  # (E, 1)
            mean = (values * counted).sum(dim=axes) / counts
            variance = ((values - mean.reshape(each)).square() * counted).sum(dim=axes) / counts
            correction = counts / (counts - 1.0)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        normalized = (values - mean.reshape(each)) * scale.reshape(each) + self.bias.reshape(shape)
        return normalized, BatchMoments(mean.detach(), variance.detach() * correction)

    def update(self, uses: Sequence[BatchMoments | None]) -> None:
        """Add the statistics of one call to the running ones (or let them wait): episode by episode, the uses of each in their order.

        Args:
            uses: one entry per use, each over the same E episodes; None (evaluation) counts for nothing.
        """
        taken = [torch.stack([use.mean, use.variance], dim=1) for use in uses if use is not None]
        if taken:
            self.note_moments(torch.stack(taken, dim=1))  # (E, uses, 2, U)
