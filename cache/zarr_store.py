"""A store in one folder that plain Zarr v3 opens: sharded arrays, a row table, and the ledger. See docs/store.md.

Letters: C channels, T time steps, H W grid.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import zarr
from numpy.typing import NDArray

from cache.cube import Spec
from cache.durable import PARTIAL, fsync_path, fsync_tree, locked, read_json, write_durably
from cache.ledger import Ledger, checksum
from cache.plan import PlanFiles
from cache.rows import FileRecord, ShardRecord, StoreError
from cache.table import Cubes, TableStore
from cache.zarr_layout import make_store, read_spec_document, remove_abandoned


class ZarrStore(TableStore):
    """Cubes in a Zarr v3 group. Any number may read while writers write."""

    def __init__(self, path: Path, mode: Literal["r", "a"] = "r") -> None:
        """Open a store that exists; `create` makes one.

        Args:
            mode: `r` never changes a byte; `a` first clears what killed writers left, then may plan and commit.
        """
        self.path = path
        self._mode = mode
        document = read_spec_document(path)
        spec = document.spec
        super().__init__(spec, document.shard_rows)
        self._compression = document.compression
        self._plan_files = PlanFiles(path / "ledger", spec.fingerprint)
        self._ledger = Ledger(path / "ledger", spec.fingerprint)
        if mode == "a":
            self._recover()
        self._refresh()
        self._arrays = self._open_arrays()

    @classmethod
    def create(cls, path: Path, spec: Spec, shard_rows: int = 64, compression: str = "none") -> Self:
        """Make an empty store and open it for writing. It appears whole or not at all.

        Raises:
            FileExistsError: the path is taken, perhaps by a process that was faster.
        """
        make_store(path, spec, shard_rows, compression)
        return cls(path, "a")

    def _open_arrays(self) -> dict[str, "zarr.Array[Any]"]:
        arrays = {}
        for name, array_spec in self._spec.arrays.items():
            try:
                array = zarr.open_array(self.path / name, mode="r" if self._mode == "r" else "r+")
            # Damaged metadata raises many types.
            except Exception as error:
                raise StoreError(f"{self.path / name / 'zarr.json'} is missing or damaged: {error}") from error
            if array.shape[1:] != array_spec.shape or array.dtype != np.dtype(array_spec.dtype):
                raise StoreError(
                    f"{self.path / name / 'zarr.json'} is damaged: rows of {array.shape[1:]} {array.dtype}, "
                    f"but the spec says {array_spec.shape} {array_spec.dtype}"
                )
            arrays[name] = array
        return arrays

    def _refresh(self) -> None:
        # Records first: whoever committed a shard had planned it before.
        records = self._ledger.new_records()
        for rows in self._plan_files.new_segments():
            self._table.add_segment(rows)
        for record in records:
            self._table.check_record(record)
            known = self._table.records.get(record.shard_index, record)
            self._table.records[record.shard_index] = known if known == record else self._on_disk(known, record)

    def _on_disk(self, first: ShardRecord, second: ShardRecord) -> ShardRecord:
        """Which of two commits of one shard (two writers by mistake) the files belong to; the first if neither."""
        found = {name: self._file_record(name, first.shard_index) for name in self._spec.arrays}
        return second if second.files == found else first

    def _recover(self) -> None:
        with locked(self.path / "ledger" / "lock"):
            # Listed before asking who is alive: a living writer's files are then either unlisted or guarded.
            litter = list(self.path.rglob(f"*{PARTIAL}"))
            self._refresh()
            if not self._ledger.recover():
                for path in litter:
                    path.unlink(missing_ok=True)
            remove_abandoned(self.path)
            self._sync_row_table()

    def _add_rows(self, video_ids: Sequence[str], views: Sequence[int]) -> None:
        self._check_writable()
        with locked(self.path / "ledger" / "lock"):
            self._refresh()
            rows = self._table.unplanned(video_ids, views)
            if rows:
                self._plan_files.add_segment(rows)
                self._refresh()
                self._sync_row_table()

    def _sync_row_table(self) -> None:
        """Make the Zarr arrays follow the plan: at least as many rows, and the ids and views in the row table.

        The plan files are the truth, so that a kill between plan and arrays is mended at the next opening.
        """
        table = {
            "video_id": np.full(self._table.num_rows, "", dtype=object),
            "view": np.full(self._table.num_rows, -1, dtype=np.int64),
        }
        for key in self._table.rows():
            row_index = self._table.row_index(key)
            # Zarr texts are UTF-8; file names may hold bytes that are not.
            table["video_id"][row_index] = key.video_id.encode("utf-8", "surrogateescape").decode(
                "utf-8", "backslashreplace"
            )
            table["view"][row_index] = key.view
        for name in (*table, *self._spec.arrays):
            self._grow(name)
        for name, values in table.items():
            array = zarr.open_array(self.path / name, mode="r+")
            if not _holds(array, values):
                array[...] = values
                fsync_tree(self.path / name)

    def _grow(self, name: str) -> None:
        """Set the number of rows in an array's metadata; `zarr.Array.resize` would neither fsync nor only grow."""
        path = self.path / name / "zarr.json"
        metadata = read_json(path)
        if metadata["shape"][0] < self._table.num_rows:
            metadata["shape"][0] = self._table.num_rows
            write_durably(path, json.dumps(metadata, indent=2).encode("ascii"), replace=True)

    def _write_shard(self, shard_index: int, blocks: dict[str, Cubes]) -> dict[str, FileRecord | None]:
        self._check_writable()
        self._ledger.claim()
        first_row = shard_index * self._table.shard_rows
        end_row = first_row + self._table.shard_rows
        files: dict[str, FileRecord | None] = {}
        if any(self._array(name, end_row).shape[0] < end_row for name in blocks):
            # Another process has planned these rows and not grown the arrays yet, or was killed in between.
            with locked(self.path / "ledger" / "lock"):
                self._sync_row_table()
        for name, block in blocks.items():
            try:
                # The whole shard at once; a part of one would read and rewrite the rest.
                self._array(name, end_row)[first_row:end_row] = block
                files[name] = self._file_record(name, shard_index)
                if files[name] is not None:
                    fsync_path(self._shard_path(name, shard_index))
                fsync_path(self.path / name)
            except OSError as error:
                raise StoreError(f"{self._shard_path(name, shard_index)} could not be written: {error}") from error
            if files[name] is None and not np.isnan(block[:, 0, 0, 0, 0]).all():
                raise StoreError(f"{self._shard_path(name, shard_index)} is missing right after it was written")
        return files

    def _publish(self, record: ShardRecord) -> None:
        self._ledger.append(record)

    def _read_row(self, array: str, row_index: int) -> Cubes:
        row: Cubes = np.asarray(self._array(array, row_index + 1)[row_index])
        return row

    def _array(self, name: str, num_rows: int) -> "zarr.Array[Any]":
        """The Zarr array; opened again when it has fewer rows than needed, since another process may have grown it."""
        if self._arrays[name].shape[0] < num_rows:
            self._arrays = self._open_arrays()
        return self._arrays[name]

    def _shard_path(self, name: str, shard_index: int) -> Path:
        return self.path / name / f"c.{shard_index}.0.0.0.0"

    def _file_record(self, name: str, shard_index: int) -> FileRecord | None:
        """Size and checksum of a shard's file; None without a file: Zarr writes none when all rows are NaN."""
        try:
            data = self._shard_path(name, shard_index).read_bytes()
        except FileNotFoundError:
            return None
        return FileRecord(len(data), checksum(data))

    def _check_writable(self) -> None:
        if self._mode == "r":
            raise StoreError(f"{self.path} is open for reading; open it with mode 'a' to plan or commit")

    def layout(self) -> dict[str, Any]:
        """Backend, sizes and arrays, as a JSON object."""
        num_bytes = sum(Path(parent, name).stat().st_size for parent, _, names in os.walk(self.path) for name in names)
        return {"backend": "zarr", "compression": self._compression, "bytes": num_bytes, **self._shared_layout()}

    def close(self) -> None:
        """Let go of the ledger and its lock."""
        self._ledger.close()


def _holds(array: "zarr.Array[Any]", values: NDArray[Any]) -> bool:
    try:
        return np.array_equal(np.asarray(array[...], dtype=values.dtype), values)
    # A damaged chunk raises many types; it is written anew.
    except Exception:
        return False
