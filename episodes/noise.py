"""Random numbers of a head: one stream per episode, so that they depend neither on the batch nor on the device."""

# E episodes

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_NUM_WORDS = 1 << 16
_SMALLEST_WORD = -(1 << 15)


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
            share: probability of zero, in [0, 1); kept to 1/65536.
            is_on: whether to do anything; dropout is for training.
        """
        if not is_on or share == 0.0:
            return values
        dropped = round(share * _NUM_WORDS)
        kept = self._short_words(values[0].numel()) >= dropped + _SMALLEST_WORD
        mask = kept.reshape(values.shape).to(values.device).to(values.dtype)
        return values * mask * (_NUM_WORDS / (_NUM_WORDS - dropped))

    def _short_words(self, count: int) -> Tensor:
        """Whole numbers, each of 65,536 as likely as the others: (E, count) int16 on the CPU.

        Four come from each word of the generator, which takes a ninth of the time of a float32 each; dropout on whole cubes
        draws tens of millions.
        """

        def draw(generator: torch.Generator) -> Tensor:
            words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=generator)
            return words.view(torch.int16)[:count]

        return self._draw(draw)

    def _draw(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        if self._generators is None:
            raise ValueError(
                "this head draws random numbers, and the batch has no seeds for them; give EpisodeBatch.seeds, one per episode"
            )
        return torch.stack([draw(generator) for generator in self._generators])
