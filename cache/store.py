"""The protocol of a store, and the store in memory.

Letters: R rows of a shard, n rows of a read; C channels, T time steps, H W grid.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from cache.cube import Spec
from cache.errors import RowDamaged, RowNotReady, RowRejected, ShardHeld, SpecMismatch, StoreDamaged, StoreError
from cache.format import Cubes
from cache.records import ShardRecord
from cache.rows import Claim, FileRecord, RowKey, RowOutcome, Segment, Shard
from cache.table import TableStore

__all__ = [
    "Claim",
    "FeatureStore",
    "MemoryStore",
    "RowDamaged",
    "RowKey",
    "RowNotReady",
    "RowOutcome",
    "RowRejected",
    "Shard",
    "ShardHeld",
    "SpecMismatch",
    "StoreDamaged",
    "StoreError",
]


class FeatureStore(Protocol):
    """Cubes by (video, view). Close it after use, or use it in a `with` statement."""

    @property
    def spec(self) -> Spec:
        """What decides the numbers in the store."""

    def plan(self, video_ids: Sequence[str], views: Sequence[int]) -> None:
        """Add the rows of ids x views that are not planned yet, video by video; a second call adds nothing."""

    def replan(self, rows: Sequence[RowKey]) -> None:
        """Make finished rows anew: they get a place in new shards and count as not extracted until these are committed."""

    def remove(self, video_ids: Sequence[str]) -> None:
        """Take videos out of the store. Shards are not rewritten; `convert` gives the space back."""

    def pending(self) -> list[Shard]:
        """Shards that are planned and not committed. See `wanted`."""

    def wanted(self, shard: Shard) -> list[bool]:
        """For each row of a shard whether it still has its place there; one that was removed or planned anew needs no values
        (commit it as rejected)."""

    def claim(self, shard: Shard) -> Claim:
        """Ask for a shard before working on it: `ours`, `done` by another meanwhile, or `held` by a writer that is alive."""

    def release(self, shard: Shard) -> None:
        """Give a claimed shard back without a commit; others may take it at once."""

    def commit(self, shard: Shard, arrays: Mapping[str, Cubes], outcomes: Sequence[RowOutcome]) -> None:
        """Store a whole shard; its rows are ready when this returns.

        Args:
            shard: one of `pending()`.
            arrays: each array of the spec, (R, C, T, H, W) in exactly its dtype, one row per row of the shard.
                Rows that are rejected may hold anything; the others must be finite.
            outcomes: one per row of the shard.

        Raises:
            ShardHeld: another living writer has claimed the shard; the text says who.
            StoreError: the values do not fit, or they could not be written.
        """

    def ids(self) -> list[str]:
        """Planned videos, in the order they were planned."""

    def rows(self) -> list[RowKey]:
        """Planned rows, in order."""

    def outcome(self, video_id: str, view: int = 0) -> RowOutcome | None:
        """How a row ended, and its source; None when it is not extracted yet, or not planned."""

    def outcomes(self, video_ids: Container[str]) -> Iterator[tuple[RowKey, RowOutcome | None]]:
        """Rows of these videos, each with what `outcome` gives. In the order of the shards: many times faster than asking for
        one row after the other in another order."""

    def read(self, video_ids: Sequence[str], views: Sequence[int], array: str = "cube") -> Cubes:
        """Rows in the order asked, (n, C, T, H, W) in the stored dtype; row i is `views[i]` of `video_ids[i]`.

        Raises:
            RowNotReady, RowRejected, RowDamaged, StoreError: each names the video; nothing is ever filled in.
        """

    def content_hash(self) -> str:
        """SHA-256 of the rows that are ready, as hex; the same for equal content in any layout or backend."""

    def layout(self) -> dict[str, Any]:
        """Backend, sizes and arrays, as a JSON object."""

    def close(self) -> None:
        """Let go of files and locks."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class MemoryStore(TableStore):
    """Cubes in memory, gone with the process."""

    def __init__(self, spec: Spec, shard_rows: int = 64) -> None:
        super().__init__(spec, shard_rows)
        self._blocks: dict[tuple[str, int], Cubes] = {}

    def layout(self) -> dict[str, Any]:
        """Backend, sizes and arrays, as a JSON object."""
        num_bytes = sum(block.nbytes for block in self._blocks.values())
        return {"backend": "memory", "compression": "none", "bytes": num_bytes, **self._shared_layout()}

    def close(self) -> None:
        """Let go of files and locks."""
        pass

    def _refresh(self) -> None:
        pass

    def _add_segment(self, make: Callable[[], Segment]) -> None:
        self._table.add_segment(make())

    def claim(self, shard: Shard) -> Claim:
        """As in the `FeatureStore` protocol; there is one writer."""
        return Claim("done" if shard.index in self._table.records else "ours")

    def release(self, shard: Shard) -> None:
        """As in the `FeatureStore` protocol."""

    def _write_shard(self, shard: Shard, blocks: dict[str, Cubes]) -> dict[str, FileRecord | None]:
        self._blocks |= {(name, shard.index): block for name, block in blocks.items()}
        return dict.fromkeys(blocks)

    def _publish(self, record: ShardRecord) -> None:
        pass

    def _read_row(self, array: str, place: int) -> Cubes:
        shard_index, position = divmod(place, self._table.shard_rows)
        row: Cubes = self._blocks[array, shard_index][position]
        return row
