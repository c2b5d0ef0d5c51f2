"""What tells one backend from another: how rows become the bytes of files, and back. The commit protocol is the same.

Letters: R rows of a shard; C channels, T time steps, H W grid.
"""

from collections.abc import Iterator
from typing import Any, Protocol

from numpy.typing import NDArray

from cache.row_table import RowTable

Cubes = NDArray[Any]
"""Rows of one array, (n, C, T, H, W) float16 or float32 as the spec says."""
CHECKSUM = ".crc32"
"""Ending of a derived file that holds the checksum of another one, whose bytes depend on a library's version."""


class Format(Protocol):
    """The files of one backend. All names are relative to the store."""

    def derived(self, table: RowTable) -> Iterator[tuple[str, bytes]]:
        """Every file that follows from the spec, the layout and the plan alone: (name, bytes), in the order of writing.

        `repair` writes them anew, and `verify` compares them byte for byte.
        """

    def file_names(self, shard_index: int) -> tuple[str, ...]:
        """The data files that a shard may have."""

    def encode(self, shard_index: int, blocks: dict[str, Cubes]) -> dict[str, bytes | None]:
        """A shard as the bytes of its files; None for a file that is not needed, as every row in it is NaN.

        Args:
            blocks: each array of the spec, (R, C, T, H, W) in its dtype, NaN where there is no row.
        """

    def read_row(self, array: str, place: int) -> Cubes:
        """One row, (C, T, H, W), checked against its own checksum; NaN throughout where there is none."""

    def decode(self, shard_index: int, array: str) -> Cubes:
        """A whole shard of one array, (R, C, T, H, W)."""

    def forget(self) -> None:
        """Files have changed: open them anew at the next read."""

    def close(self) -> None:
        """Let go of open files."""
