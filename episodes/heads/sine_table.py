"""The positional table of TRX and STRM: sines and cosines, small beside the features that they are added to.

Frequencies as in "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762; the factor 0.1 is that of the TRX
code (https://github.com/tobyperrett/trx, commit 390c20a).
"""

# C channels, L places (time steps or patches)

import torch
from torch import Tensor, nn

SCALE = 0.1


class SineTable(nn.Module):
    """Adds 0.1 sin and 0.1 cos of the place to even and odd channels; nothing in it learns."""

    table: Tensor

    def __init__(self, num_places: int, channels: int) -> None:
        """Make a table of half as many rows again as there are places, the published length.

        It is kept in double precision until the module is cast, so that a float64 head adds the formula's own numbers; one
        that comes from a published file has single precision.
        """
        super().__init__()
        self.register_buffer("table", sine_table(int(1.5 * num_places), channels)[None])

    def forward(self, values: Tensor) -> Tensor:
        """Features (..., L, C) with the first L rows added, in the features' precision."""
        return values + self.table[0, : values.shape[-2]].to(values.dtype)


def sine_table(length: int, channels: int) -> Tensor:
    """The table, (length, C) float64."""
    frequencies = 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    pairs = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return SCALE * pairs[:, :channels]
