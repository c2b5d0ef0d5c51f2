"""BatchNorm of a backbone that learns: over which clips its statistics go, and when the running ones move.

Batch normalisation: ICML 2015, https://arxiv.org/abs/1502.03167. Over several processes the statistics and both sums of the gradient
go over all clips of all ranks, as torch's `nn.SyncBatchNorm` does; that one refuses tensors on the CPU.
"""

# V clips that pass together, U channels, R ranks; ... time and grid; E episodes

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from configs.training import TrainingConfig
from episodes.build import HEADS
from episodes.episode_norm import RunningStatistics

BatchStatistics = Literal["frozen", "episode", "supports_then_queries", "synchronised"]
"""Over what a learning backbone's BatchNorm takes its statistics: nothing (the running ones are used), the clips of one episode, its
supports and then its queries, or all clips of a step on all ranks."""

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_statistics(training: TrainingConfig, head: str) -> BatchStatistics:
    """What ``training.backbone_batchnorm`` amounts to.

    Args:
        training: None means frozen, and synchronised in a classification whose backbone learns.
        head: a key of `episodes.build.HEADS`; its line says how the released code calls its backbone.
    """
    policy = training.backbone_batchnorm
    if policy is None:
        learns = training.backbone_learning_rate != 0
        return "synchronised" if training.mode == "classify" and learns else "frozen"
    if policy == "published":
        return "supports_then_queries" if HEADS[head].is_backbone_called_twice else "episode"
    return policy


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a module is torch's batch normalisation or made of it."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def running_statistics(model: nn.Module) -> list[RunningStatistics]:
    """The modules of a model (head and backbone) with running statistics of ours, in the order in which they are registered."""
    return [module for module in model.modules() if isinstance(module, RunningStatistics)]


class BackboneBatchNorm(RunningStatistics, nn.modules.batchnorm._BatchNorm):
    """torch's batch normalisation, but its running statistics move only by what is noted within `noted_moments`.

    So gradient checkpointing, which runs a block twice, does not count it twice. Evaluation is torch's own, to the bit.
    """

    _uses: list[Tensor] | None = None
    """Moments (2, U) of each use since `noted_moments` began; None outside."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (V, U, ...); in training by the statistics of these clips, or of those of all ranks where they are shared.

        Raises:
            ValueError: one value per channel has no variance to train with.
        """
        if not self.training:
            return super().forward(input)
        normalized: Tensor
        if self.is_shared and _are_several_ranks():
            weight = input.new_ones(self.num_features) if self.weight is None else self.weight
            bias = input.new_zeros(self.num_features) if self.bias is None else self.bias
            normalized, mean, variance = _NormalizeOverRanks.apply(input, weight, bias, self.eps)
        else:
            if input.numel() < 2 * self.num_features:
                raise ValueError(
                    f"the backbone's BatchNorm got {tuple(input.shape)}, one value per channel, which has no variance. Use "
                    'training.backbone_batchnorm = "frozen", or more clips at a time.'
                )
            assert self.running_mean is not None
            # With momentum 1 torch writes the moments of this batch, and nothing else, into what it takes for the running ones.
            mean, variance = torch.zeros_like(self.running_mean), torch.ones_like(self.running_mean)
            normalized = F.batch_norm(input, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        if self._uses is not None:
            self._uses.append(torch.stack([mean, variance]))
        return normalized

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch normalisation takes (clips, channels, ...), got {tuple(input.shape)}")


def convert_batchnorm(backbone: nn.Module, *, is_shared: bool) -> None:
    """Replace every BatchNorm within a backbone by a `BackboneBatchNorm` with the same parameters, buffers and names.

    Args:
        backbone: changed in place.
        is_shared: whether statistics go over all ranks.

    Raises:
        ValueError: a BatchNorm that is more than torch's, or without running statistics.
    """
    replaced: dict[nn.Module, BackboneBatchNorm] = {}
    # A module that has two names keeps them both.
    for name, module in list(backbone.named_modules(remove_duplicate=False)):
        if isinstance(module, BackboneBatchNorm):
            module.is_shared = is_shared
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module not in replaced:
                replaced[module] = _converted(module, is_shared)
            backbone.set_submodule(name, replaced[module])


def _converted(module: nn.modules.batchnorm._BatchNorm, is_shared: bool) -> BackboneBatchNorm:
    if type(module) not in _PLAIN or module.running_mean is None:
        what = type(module).__name__ + (" without running statistics" if module.running_mean is None else "")
        raise ValueError(
            f'the backbone has a {what}, whose statistics cannot be followed. Use training.backbone_batchnorm = "frozen".'
        )
    norm = BackboneBatchNorm(module.num_features, module.eps, module.momentum, module.affine)
    norm.weight, norm.bias = module.weight, module.bias
    norm.running_mean, norm.running_var = module.running_mean, module.running_var
    norm.num_batches_tracked = module.num_batches_tracked
    norm.is_shared = is_shared
    return norm.train(module.training)


@contextmanager
def noted_moments(backbone: nn.Module) -> Iterator[None]:
    """Around the forward passes of one episode (or of all that share statistics): their moments move the running statistics at the
    end, or wait; where the passes fail, nothing does."""
    norms = [module for module in backbone.modules() if isinstance(module, BackboneBatchNorm)]
    for norm in norms:
        norm._uses = []
    try:
        yield
        noted = [(norm, norm._uses) for norm in norms if norm._uses]
    finally:
        for norm in norms:
            norm._uses = None
    for norm, uses in noted:
        norm.note_moments(torch.stack(uses)[None])  # (1, uses, 2, U)


def _are_several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _NormalizeOverRanks(torch.autograd.Function):
    """Batch normalisation over the clips of all ranks, which may have unequal numbers of them.

    Parameters get the gradient of this rank's clips alone, which DistributedDataParallel then adds up.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised values (V, U, ...), and mean and unbiased variance (U,) over all ranks."""
        wide = _at_least_float32(values)
        variances, means = torch.var_mean(wide, dim=_axes(values), correction=0)
        count = wide.new_full((1,), values.numel() // values.shape[1])
        own = torch.cat([count, means, variances]).double()
        rows = own.new_zeros((dist.get_world_size(), len(own)))
        rows[dist.get_rank()] = own
        dist.all_reduce(rows)
        counts, means, variances = rows.tensor_split([1, 1 + len(means)], dim=1)  # (R, 1), (R, U), (R, U)
        total = counts.sum()
        mean = (counts * means).sum(dim=0) / total
        variance = (counts * (variances + (means - mean).square())).sum(dim=0) / total
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(values, weight, mean.to(wide.dtype), scale.to(wide.dtype), total)
        factor = weight * scale
        shift = bias - mean * factor
        normalized = torch.addcmul(_along(shift.to(wide.dtype), wide), wide, _along(factor.to(wide.dtype), wide))
        unbiased = (variance * total / (total - 1)).to(weight.dtype)
        moments = mean.to(weight.dtype), unbiased
        ctx.mark_non_differentiable(*moments)
        return normalized.to(values.dtype), *moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of the values, of weight and of bias."""
        values, weight, mean, scale, total = ctx.saved_tensors
        wide, gradient = _at_least_float32(values), _at_least_float32(gradient)
        normalized = (wide - _along(mean, wide)) * _along(scale, wide)
        own = torch.stack([gradient.sum(dim=_axes(values)), (gradient * normalized).sum(dim=_axes(values))])
        sums = own.to(torch.float64, copy=True)
        dist.all_reduce(sums)
        means = (sums / total).to(wide.dtype)
        centred = gradient - _along(means[0], wide) - normalized * _along(means[1], wide)
        inputs = centred * _along(weight.to(wide.dtype) * scale, wide)
        return inputs.to(values.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _axes(values: Tensor) -> tuple[int, ...]:
    return 0, *range(2, values.ndim)


def _along(per_channel: Tensor, values: Tensor) -> Tensor:
    """(U,) with axes of size 1 beside it, to go with (V, U, ...)."""
    return per_channel.reshape(1, -1, *[1] * (values.ndim - 2))
