"""What every store shares: the planned rows, the checks of a commit, the hashes, the guarded read.

Letters: R rows of a shard, n rows of a read; C channels, T time steps, H W grid.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from cache.cube import Spec, sha256_of_row
from cache.errors import RowDamaged, RowNotReady, ShardHeld, StoreError
from cache.format import Cubes
from cache.records import ShardRecord, rows_to_text, status_initials
from cache.row_table import RowTable, content_hash
from cache.rows import Claim, FileRecord, RowKey, RowOutcome, RowRecord, Segment, Shard


class TableStore(ABC):
    """A store whose plan and records live in a `RowTable`; a subclass adds where the bytes lie.

    May be used from several threads, such as one that reads and one that commits.
    """

    def __init__(self, spec: Spec, shard_rows: int) -> None:
        self._spec = spec
        self._table = RowTable(shard_rows)
        self._store_id = "memory"
        self._lock = threading.RLock()

    @property
    def spec(self) -> Spec:
        """What decides the numbers in the store."""
        return self._spec

    @abstractmethod
    def layout(self) -> dict[str, Any]:
        """Backend, sizes and arrays, as a JSON object."""

    @abstractmethod
    def _refresh(self) -> None:
        """Take in what other processes have planned and committed."""

    @abstractmethod
    def _add_segment(self, make: Callable[[], Segment]) -> None:
        """Take the next step of the plan, durably; `make` is called when nobody else can plan, and may give an empty one."""

    @abstractmethod
    def claim(self, shard: Shard) -> Claim:
        """As in the `FeatureStore` protocol."""

    @abstractmethod
    def release(self, shard: Shard) -> None:
        """As in the `FeatureStore` protocol."""

    @abstractmethod
    def _write_shard(self, shard: Shard, blocks: dict[str, Cubes]) -> dict[str, FileRecord | None]:
        """Write each array's rows, (shard_rows, C, T, H, W) with NaN where there is no row, durably. Called without the lock."""

    @abstractmethod
    def _publish(self, record: ShardRecord) -> None:
        """Make the record durable: the last step of a commit."""

    @abstractmethod
    def _read_row(self, array: str, place: int) -> Cubes:
        """One row, (C, T, H, W)."""

    def plan(self, video_ids: Sequence[str], views: Sequence[int]) -> None:
        """As in the `FeatureStore` protocol."""
        with self._lock:
            self._refresh()
            if self._table.unplanned(video_ids, views):
                self._add_segment(lambda: Segment(rows=tuple(self._table.unplanned(video_ids, views))))

    def plan_rows(self, rows: Sequence[RowKey]) -> None:
        """Like `plan`, for rows that are no product of videos and views."""
        with self._lock:
            self._refresh()
            self._add_segment(
                lambda: Segment(rows=tuple(dict.fromkeys(key for key in rows if self._table.place(key) is None)))
            )

    def replan(self, rows: Sequence[RowKey]) -> None:
        """As in the `FeatureStore` protocol."""
        with self._lock:
            self._refresh()
            for key in rows:
                if self._table.place(key) is None:
                    raise StoreError(f"view {key.view} of video {key.video_id!r} is not in the store; plan it first")
            # A row that is still to be made needs no second place.
            self._add_segment(
                lambda: Segment(
                    rows=tuple(dict.fromkeys(key for key in rows if self._table.row_record(key) is not None))
                )
            )

    def remove(self, video_ids: Sequence[str]) -> None:
        """As in the `FeatureStore` protocol."""
        with self._lock:
            self._refresh()
            unknown = sorted(set(video_ids) - set(self._table.ids()))
            if unknown:
                raise StoreError(f"video {unknown[0]!r} is not in the store, so it cannot be removed")
            self._add_segment(lambda: Segment(removed=tuple(self._table.rows_of(video_ids))))

    def pending(self) -> list[Shard]:
        """As in the `FeatureStore` protocol."""
        with self._lock:
            self._refresh()
            return self._table.pending()

    def counts(self) -> dict[str, int]:
        """How many rows are `ok`, `degraded`, `rejected` and `pending` by now, whoever made them. Reads only what is new."""
        with self._lock:
            self._refresh()
            return self._table.counts()

    def wanted(self, shard: Shard) -> list[bool]:
        """As in the `FeatureStore` protocol."""
        with self._lock:
            return self._table.wanted(shard)

    def commit(self, shard: Shard, arrays: Mapping[str, Cubes], outcomes: Sequence[RowOutcome]) -> None:
        """As in the `FeatureStore` protocol."""
        with self._lock:
            self._refresh()
            self._check_commit(shard, arrays, outcomes)
            rows = self._row_records(shard, arrays, outcomes)
            # Claimed before anything is written: what another writer has committed meanwhile must not be touched.
            claim = self.claim(shard)
            if claim.state == "held":
                raise ShardHeld(
                    f"shard {shard.index} is being made by {claim.holder}. Leave it to that writer, or stop it and run "
                    "this one again"
                )
            if claim.state == "done":
                if self._table.records[shard.index].rows != rows:
                    raise StoreError(
                        f"shard {shard.index} is committed already, with other content or sources; the first commit "
                        "stays. Take the shards to extract from pending()"
                    )
                return
        blocks = {name: self._block(arrays[name], outcomes) for name in self._spec.arrays}
        self._commit_blocks(shard, blocks, rows_to_text(rows))

    def _commit_blocks(self, shard: Shard, blocks: dict[str, Cubes], rows_text: bytes) -> None:
        files = self._write_shard(shard, blocks)
        with self._lock:
            generation = self._table.generation(shard.index)
            record = ShardRecord(shard.index, generation, self._store_id, files, rows_text, status_initials(rows_text))
            self._publish(record)
            self._table.take_in(record)
            self.release(shard)

    def _check_commit(self, shard: Shard, arrays: Mapping[str, Cubes], outcomes: Sequence[RowOutcome]) -> None:
        if not 0 <= shard.index < self._table.num_shards or self._table.shard(shard.index) != shard:
            raise StoreError(f"shard {shard.index} with these rows is not planned; take the shards from pending()")
        if len(outcomes) != len(shard.rows):
            raise StoreError(f"shard {shard.index} has {len(shard.rows)} rows, got {len(outcomes)} outcomes")
        if set(arrays) != set(self._spec.arrays):
            raise StoreError(f"got the arrays {sorted(arrays)}, the spec names {sorted(self._spec.arrays)}")
        for name, array_spec in self._spec.arrays.items():
            values, shape = arrays[name], (len(shard.rows), *array_spec.shape)
            if values.shape != shape:
                raise StoreError(f"array {name!r} of shard {shard.index} has shape {values.shape}, expected {shape}")
            if values.dtype != np.dtype(array_spec.dtype):
                raise StoreError(
                    f"array {name!r} of shard {shard.index} has dtype {values.dtype}, expected {array_spec.dtype}; "
                    "cast before the commit"
                )
            for key, outcome, row in zip(shard.rows, outcomes, values, strict=True):
                if outcome.status != "rejected" and not np.isfinite(row).all():
                    raise StoreError(
                        f"array {name!r} of view {key.view} of video {key.video_id!r} holds NaN or infinity "
                        f"(as {array_spec.dtype}); reject the row, or store float32"
                    )

    def _row_records(
        self, shard: Shard, arrays: Mapping[str, Cubes], outcomes: Sequence[RowOutcome]
    ) -> tuple[RowRecord, ...]:
        records = []
        for position, (key, outcome) in enumerate(zip(shard.rows, outcomes, strict=True)):
            is_stored = outcome.status != "rejected"
            digests = {name: sha256_of_row(arrays[name][position]) for name in self._spec.arrays} if is_stored else {}
            records.append(RowRecord(key, outcome, digests))
        return tuple(records)

    def _block(self, values: Cubes, outcomes: Sequence[RowOutcome]) -> Cubes:
        """A whole shard, (shard_rows, C, T, H, W): padding and rejected rows are NaN."""
        block = np.full((self._table.shard_rows, *values.shape[1:]), np.nan, dtype=values.dtype)
        is_stored = [outcome.status != "rejected" for outcome in outcomes]
        block[: len(values)][is_stored] = values[is_stored]
        return block

    def ids(self) -> list[str]:
        """As in the `FeatureStore` protocol."""
        with self._lock:
            return self._table.ids()

    def rows(self) -> list[RowKey]:
        """As in the `FeatureStore` protocol."""
        with self._lock:
            return self._table.rows()

    def outcome(self, video_id: str, view: int = 0) -> RowOutcome | None:
        """As in the `FeatureStore` protocol."""
        with self._lock:
            record = self._table.row_record(RowKey(video_id, int(view)))
        return None if record is None else record.outcome

    def outcomes(self, video_ids: Container[str]) -> Iterator[tuple[RowKey, RowOutcome | None]]:
        """As in the `FeatureStore` protocol."""
        for index in range(self._table.num_shards):
            with self._lock:
                found = self._table.outcomes_of(index, video_ids)
            yield from found

    def read(self, video_ids: Sequence[str], views: Sequence[int], array: str = "cube") -> Cubes:
        """As in the `FeatureStore` protocol."""
        if array not in self._spec.arrays:
            raise StoreError(f"the store has no array {array!r}; it has {', '.join(sorted(self._spec.arrays))}")
        if len(video_ids) != len(views):
            raise StoreError(f"read of {len(video_ids)} videos with {len(views)} views: give one view per video")
        keys = [RowKey(video_id, int(view)) for video_id, view in zip(video_ids, views, strict=True)]
        with self._lock:
            try:
                places = [self._table.ready_place(key) for key in keys]
            except RowNotReady:
                # Perhaps somebody has committed it since this store was opened.
                self._refresh()
                places = [self._table.ready_place(key) for key in keys]
        array_spec = self._spec.arrays[array]
        cubes = np.empty((len(keys), *array_spec.shape), dtype=array_spec.dtype)
        # One row at a time: fancy indexing of a sharded array was 78 times slower in zarr 3.1.6.
        for position, (key, place) in enumerate(zip(keys, places, strict=True)):
            try:
                cubes[position] = self._read_row(array, place)
            # Codecs and metadata raise many types; each means that this row cannot be had.
            except Exception as error:
                raise RowDamaged(self._damage(key, array, place, str(error) or type(error).__name__)) from error
            # A committed row is finite throughout; a missing chunk or file reads as NaN throughout.
            if np.isnan(cubes[position, 0, 0, 0, 0]):
                raise RowDamaged(self._damage(key, array, place, "its data is missing"))
        return cubes

    def _damage(self, key: RowKey, array: str, place: int, cause: str) -> str:
        return (
            f"array {array!r} of view {key.view} of video {key.video_id!r} is damaged "
            f"(shard {place // self._table.shard_rows}): {cause}. Extract this shard anew: mastaf store repair"
        )

    def content_hash(self) -> str:
        """As in the `FeatureStore` protocol."""
        with self._lock:
            return content_hash(self._spec, self._table)

    def _shared_layout(self) -> dict[str, Any]:
        return {
            "num_rows": self._table.num_rows(),
            "shard_rows": self._table.shard_rows,
            "num_shards": self._table.num_shards,
            "num_shards_committed": len(self._table.records),
            "views": self._table.views(),
            "arrays": {
                name: {"shape": list(array.shape), "dtype": array.dtype} for name, array in self._spec.arrays.items()
            },
        }

    @abstractmethod
    def close(self) -> None:
        """Free what the store holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
