"""Random numbers of a head: one stream per episode, so that they depend neither on the batch nor on the device."""

# E episodes

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class EpisodeNoise:
    """Draws of one call of a head. Each episode has its own generator, seeded by the batch; each draw moves it on.

    The numbers are drawn on the CPU and moved, so that every device sees the same ones.
    """

    def __init__(self, seeds: Tensor | None) -> None:
        """Start the stream of each episode.

        Args:
            seeds: (E,) int64 on the CPU (`EpisodeBatch.seeds`); None is an error at the first draw.
        """
        self._generators = (
            None if seeds is None else [torch.Generator().manual_seed(int(seed)) for seed in seeds.tolist()]
        )

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Numbers in [0, 1), (E, *shape) float32 on the CPU."""
        return self._draw(lambda generator: torch.rand(tuple(shape), generator=generator, dtype=torch.float32))

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, (E, *shape) float32 on the CPU."""
        return self._draw(lambda generator: torch.randn(tuple(shape), generator=generator, dtype=torch.float32))

    def permutation(self, length: int) -> Tensor:
        """The numbers 0 .. length - 1 in random order, (E, length) int64 on the CPU."""
        return self._draw(lambda generator: torch.randperm(length, generator=generator))

    def dropout(self, values: Tensor, share: float, *, is_on: bool) -> Tensor:
        """Set a share of the elements to zero and scale the others up by 1 / (1 - share).

        Args:
            values: (E, ...).
            share: probability of zero, in [0, 1).
            is_on: whether to do anything; dropout is for training.
        """
        if not is_on or share == 0.0:
            return values
        kept = self.uniform(values.shape[1:]) >= share
        return values * kept.to(values.device, values.dtype) / (1.0 - share)

    def _draw(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        if self._generators is None:
            raise ValueError(
                "this head draws random numbers, and the batch has no seeds for them; give EpisodeBatch.seeds, one per episode"
            )
        return torch.stack([draw(generator) for generator in self._generators])
