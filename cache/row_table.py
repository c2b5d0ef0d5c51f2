"""The planned rows in order, and for each finished shard its record."""

import hashlib
import itertools
from array import array
from collections import Counter, OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import get_args

from cache.cube import Spec, canonical_json
from cache.errors import RowNotReady, RowRejected, StoreDamaged, StoreError
from cache.records import Record, ShardDrop, ShardRecord
from cache.rows import RowKey, RowOutcome, RowRecord, Segment, Shard, Status

NUM_PARSED = 64
"""Shards whose records are kept as objects."""


class RowTable:
    """Row i of shard s is row `s * shard_rows + i`. A row that was planned anew, or removed, leaves its old place empty."""

    def __init__(self, shard_rows: int) -> None:
        if type(shard_rows) is not int or shard_rows < 1:
            raise StoreError(f"shard_rows {shard_rows!r}: expected a positive integer")
        self.shard_rows = shard_rows
        self.records: dict[int, ShardRecord] = {}
        """Shard -> the commit that holds."""
        # Names and views by place, without padding: a million rows as objects of their own would take a gigabyte.
        self._shard_starts = array("q", [0])
        self._ids: list[str] = []
        self._views = array("q")
        self._places: dict[str, dict[int, int] | int] = {}
        self._generations: Counter[int] = Counter()
        self._parsed: OrderedDict[int, tuple[ShardRecord, tuple[RowRecord, ...]]] = OrderedDict()

    @property
    def num_shards(self) -> int:
        """Planned shards."""
        return len(self._shard_starts) - 1

    @property
    def num_places(self) -> int:
        """Rows of the arrays, the padding behind each plan segment included."""
        return self.num_shards * self.shard_rows

    def ids(self) -> list[str]:
        """Videos in the store, in the order they were planned."""
        return list(self._places)

    def rows(self) -> list[RowKey]:
        """Rows in the store, video by video."""
        return self.rows_of(self._places)

    def rows_of(self, video_ids: Iterable[str]) -> list[RowKey]:
        """Rows of some videos that are in the store."""
        return [RowKey(video_id, view) for video_id in video_ids for view in sorted(self._views_of(video_id))]

    def num_rows(self) -> int:
        """How many `rows()` gives."""
        return sum(1 if isinstance(places, int) else len(places) for places in self._places.values())

    def views(self) -> list[int]:
        """Views that are planned of at least one video."""
        return sorted({view for video_id in self._places for view in self._views_of(video_id)})

    def shard(self, index: int) -> Shard:
        """A planned shard with the rows it was planned with."""
        start, end = self._shard_starts[index], self._shard_starts[index + 1]
        return Shard(index, tuple(map(RowKey, self._ids[start:end], self._views[start:end])))

    def live_places(self) -> Iterator[tuple[int, RowKey]]:
        """(place, row) of every row in the store, in the order of the places."""
        for index in range(self.num_shards):
            for position, key in enumerate(self.shard(index).rows):
                place = index * self.shard_rows + position
                if self.place(key) == place:
                    yield place, key

    def pending(self) -> list[Shard]:
        """Shards that are not committed and hold a row that is in the store."""
        shards = (self.shard(index) for index in range(self.num_shards) if index not in self.records)
        return [shard for shard in shards if any(self.wanted(shard))]

    def counts(self) -> dict[str, int]:
        """How many rows in the store are `ok`, `degraded`, `rejected` and `pending`."""
        num_rows = self.num_rows()
        nothing_moved = len(self._ids) == num_rows
        found: Counter[int] = Counter()
        for index, record in self.records.items():
            # Asking for each row takes a second per million rows.
            is_wanted = itertools.repeat(True) if nothing_moved else self.wanted(self.shard(index))
            found.update(itertools.compress(record.initials, is_wanted))
        counts = {status: found[ord(status[0])] for status in get_args(Status)}
        return {**counts, "pending": num_rows - sum(counts.values())}

    def wanted(self, shard: Shard) -> list[bool]:
        """For each row of a shard whether it still has its place there."""
        first = shard.index * self.shard_rows
        return [self.place(key) == first + position for position, key in enumerate(shard.rows)]

    def _views_of(self, video_id: str) -> dict[int, int]:
        places = self._places.get(video_id, {})
        # Nearly all stores hold one view of a video, view 0: a number in place of a dict saves 200 bytes a row.
        return {0: places} if isinstance(places, int) else places

    def place(self, key: RowKey) -> int | None:
        """Where a row is; None when it is not in the store."""
        return self._views_of(key.video_id).get(key.view)

    def unplanned(self, video_ids: Iterable[str], views: Sequence[int]) -> list[RowKey]:
        """The rows of ids x views that are not in the store, video by video."""
        video_ids = list(video_ids)
        if len(set(video_ids)) != len(video_ids):
            twice = Counter(video_ids).most_common(1)[0][0]
            raise StoreError(f"video {twice!r} is planned twice in one call; ids must be unique")
        if len(set(views)) != len(views):
            raise StoreError(f"views {list(views)} name one view twice")
        keys = (RowKey(video_id, int(view)) for video_id in video_ids for view in views)
        return [key for key in keys if self.place(key) is None]

    def add_segment(self, segment: Segment) -> None:
        """Take in one step of the plan; shards that exist stay as they are."""
        check_segment(segment)
        for key in segment.removed:
            remaining = {view: place for view, place in self._views_of(key.video_id).items() if view != key.view}
            if remaining:
                self._places[key.video_id] = remaining
            else:
                self._places.pop(key.video_id, None)
        for start in range(0, len(segment.rows), self.shard_rows):
            first = self.num_places
            for position, key in enumerate(segment.rows[start : start + self.shard_rows]):
                self._put(key, first + position)
            self._shard_starts.append(len(self._ids))

    def _put(self, key: RowKey, place: int) -> None:
        self._ids.append(key.video_id)
        self._views.append(key.view)
        views = self._views_of(key.video_id)
        if key.view == 0 and not views.keys() - {0}:
            self._places[key.video_id] = place
        else:
            self._places[key.video_id] = {**views, key.view: place}

    def generation(self, shard_index: int) -> int:
        """The generation of the next commit of a shard."""
        return self._generations[shard_index]

    def take_in(self, record: Record) -> ShardRecord | None:
        """Note a line of the ledger.

        Returns:
            The commit that this one contradicts, when another of the same generation holds already and stays.

        Raises:
            StoreError: the record does not fit the plan.
        """
        index = record.shard_index
        if not 0 <= index < self.num_shards:
            raise StoreError(f"shard {index} is not planned; the plan has {self.num_shards} shards")
        if isinstance(record, ShardDrop):
            self._generations[index] = max(self._generations[index], record.generation + 1)
            known = self.records.get(index)
            if known is not None and known.generation < self._generations[index]:
                del self.records[index]
            return None
        num_rows = self._shard_starts[index + 1] - self._shard_starts[index]
        if len(record.initials) != num_rows:
            raise StoreDamaged(f"the ledger has {len(record.initials)} rows for shard {index}, the plan {num_rows}")
        if record.generation < self._generations[index]:
            return None
        # A commit shows that all before it were dropped, even if the line that said so is lost.
        self._generations[index] = record.generation
        known = self.records.get(index)
        if known is not None and known.generation == record.generation:
            return None if known == record else known
        self.records[index] = record
        return None

    def check_rows(self, record: ShardRecord) -> None:
        """Raise StoreError unless a commit names the rows that were planned for its shard."""
        if tuple(row.key for row in self._rows_of(record)) != self.shard(record.shard_index).rows:
            raise StoreError(f"the rows of shard {record.shard_index} are not the rows that were planned for it")

    def _rows_of(self, record: ShardRecord) -> tuple[RowRecord, ...]:
        known = self._parsed.get(record.shard_index)
        if known is None or known[0] is not record:
            known = self._parsed[record.shard_index] = (record, record.rows)
            if len(self._parsed) > NUM_PARSED:
                self._parsed.popitem(last=False)
        return known[1]

    def row_record(self, key: RowKey) -> RowRecord | None:
        """The record of a row; None when it is not planned or not extracted yet."""
        place = self.place(key)
        record = None if place is None else self.records.get(place // self.shard_rows)
        return None if place is None or record is None else self._rows_of(record)[place % self.shard_rows]

    def outcomes_of(self, shard_index: int, video_ids: Container[str]) -> list[tuple[RowKey, RowOutcome | None]]:
        """Rows of a shard that are of these videos and have their place there; None for one that is not extracted yet."""
        shard, record = self.shard(shard_index), self.records.get(shard_index)
        positions = [
            position
            for position, (key, is_wanted) in enumerate(zip(shard.rows, self.wanted(shard), strict=True))
            if is_wanted and key.video_id in video_ids
        ]
        if record is None or not positions:
            return [(shard.rows[position], None) for position in positions]
        rows = self._rows_of(record)
        return [(shard.rows[position], rows[position].outcome) for position in positions]

    def live_records(self) -> Iterator[RowRecord]:
        """Of every row that is in the store and finished, in the order of the places."""
        for index in sorted(self.records):
            for position, row in enumerate(self._rows_of(self.records[index])):
                if self.place(row.key) == index * self.shard_rows + position:
                    yield row

    def ready_place(self, key: RowKey) -> int:
        """Place of a row that can be read; raises RowNotReady, RowRejected or StoreError."""
        place = self.place(key)
        if place is None:
            raise self._unknown(key)
        record = self.records.get(place // self.shard_rows)
        if record is None:
            raise RowNotReady(
                f"view {key.view} of video {key.video_id!r} is not extracted yet; run the extraction again to finish"
            )
        position = place % self.shard_rows
        if record.initials[position] == ord("r"):
            raise _rejection(key, self._rows_of(record)[position].outcome)
        return place

    def _unknown(self, key: RowKey) -> StoreError:
        views = self._views_of(key.video_id)
        if not views:
            return StoreError(f"video {key.video_id!r} is not in the store; extract it first")
        planned = ", ".join(str(view) for view in sorted(views))
        return StoreError(
            f"video {key.video_id!r} has no view {key.view} in the store (views: {planned}); extract with more views"
        )


def check_segment(segment: Segment) -> None:
    """Raise StoreError where a step of the plan names a row twice."""
    if len(set(segment.rows)) != len(segment.rows):
        twice = Counter(segment.rows).most_common(1)[0][0]
        raise StoreError(f"the plan holds view {twice.view} of video {twice.video_id!r} twice")


def _rejection(key: RowKey, outcome: RowOutcome) -> RowRejected:
    detail = f" ({outcome.detail})" if outcome.detail else ""
    return RowRejected(
        f"view {key.view} of video {key.video_id!r} was rejected: {outcome.reason}{detail}. "
        "Mend the file and extract with --retry-failed, or exclude the video from the manifest"
    )


def content_hash(spec: Spec, table: RowTable) -> str:
    """SHA-256 of what a store holds, from the records alone: independent of order, shards, codec and backend.

    Covers the rows that are ok or degraded, sorted; rejected, removed and missing rows have no content.
    """
    lines = []
    for row in table.live_records():
        for name, digest in row.sha256.items():
            array_spec = spec.arrays[name]
            lines.append((row.key.video_id, name, row.key.view, array_spec.dtype, list(array_spec.shape), digest))
    total = hashlib.sha256()
    for line in sorted(lines):
        total.update(canonical_json(line).encode("ascii") + b"\n")
    return total.hexdigest()
