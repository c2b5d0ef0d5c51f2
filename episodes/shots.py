"""The supports of an episode, class by class."""

# E episodes, S supports, N classes, K most shots of any class; C channels, T time steps, H W grid

from dataclasses import dataclass

import torch
from torch import Tensor

from episodes.batch import EpisodeBatch


@dataclass(frozen=True, slots=True)
class ClassShots:
    """Where the supports of each class are; classes may have unequal shots."""

    index: Tensor
    """(E, N, K) int64 place among the supports; of absent shots the first shot of the class."""
    is_present: Tensor
    """(E, N, K) bool."""

    def take(self, values: Tensor) -> Tensor:
        """Values (E, S, ...) of the supports as (E, N, K, ...); absent shots repeat the first shot of their class."""
        flat = self.index.flatten(1)
        index = flat.reshape(*flat.shape, *[1] * (values.ndim - 2)).expand(*flat.shape, *values.shape[2:])
        return values.gather(1, index).reshape(*self.index.shape, *values.shape[2:])

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the shots of each class: (E, N, K, ...) to (E, N, ...)."""
        present = self.is_present.to(values.dtype)
        weights = present / present.sum(dim=-1, keepdim=True)
        return (values * weights.reshape(*weights.shape, *[1] * (values.ndim - 3))).sum(dim=2)


def class_shots(batch: EpisodeBatch) -> ClassShots:
    """Sort the supports by class, each class in the order of the batch; padding belongs to no class."""
    classes = torch.arange(batch.n_way, device=batch.support_labels.device)
    members = batch.support_labels[:, None, :] == classes[:, None]  # (E, N, S)
    counts = members.sum(dim=-1, keepdim=True)
    most = int(counts.max())
    # A stable sort puts the members first, in the order that they came in.
    index = (~members).to(torch.int8).argsort(dim=-1, stable=True)[..., :most]
    is_present = torch.arange(most, device=index.device) < counts
    return ClassShots(torch.where(is_present, index, index[..., :1]), is_present)


def class_means(values: Tensor, batch: EpisodeBatch) -> Tensor:
    """Mean of the values of each class: (E, S, ...) of the supports to (E, N, ...)."""
    classes = torch.arange(batch.n_way, device=values.device)
    members = (batch.support_labels[:, None] == classes[:, None]).to(values.dtype)  # (E, N, S)
    shares = members / members.sum(dim=-1, keepdim=True)
    return (shares @ values.flatten(2)).reshape(*shares.shape[:2], *values.shape[2:])


def frame_vectors(cubes: Tensor) -> Tensor:
    """Average over space: cubes (..., C, T, H, W) to (..., T, C), in float32 or wider."""
    return at_least_float32(cubes).mean(dim=(-2, -1)).transpose(-1, -2)


def video_vectors(cubes: Tensor) -> Tensor:
    """Average over time and space: cubes (..., C, T, H, W) to (..., C), in float32 or wider."""
    return at_least_float32(cubes).mean(dim=(-3, -2, -1))


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision widened to float32; anything else as it is."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
