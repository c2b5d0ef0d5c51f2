"""Rows as HDF5: one immutable part for each shard, and an index for plain readers. See docs/store.md.

Letters: R rows of a shard; C channels, T time steps, H W grid.
"""

import io
import threading
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from cache.cube import canonical_json
from cache.document import StoreDocument
from cache.errors import StoreError
from cache.files import Files, LocalFiles
from cache.format import CHECKSUM, Cubes
from cache.hdf5_part import COMPRESSIONS, PartArray, encode_part
from cache.records import checksum
from cache.row_table import RowTable

ATTRIBUTE = "mastaf"
"""Name of what plain HDF5 readers see of the spec: JSON, an attribute of the index."""
INDEX = "index.h5"
NUM_OPEN = 64
"""Arrays of parts that are kept open: one descriptor and some hundred bytes for each row of a shard."""


class Hdf5Format:
    """`parts/000012.h5` holds shard 12; `index.h5` shows all parts as one dataset per array."""

    def __init__(self, document: StoreDocument, files: Files) -> None:
        """Writing goes through `files`; parts are read where these lie."""
        if not isinstance(files, LocalFiles):
            raise StoreError(
                f"{files.url}: HDF5 stores live on a local or network file system; end the address in .zarr"
            )
        if document.compression not in COMPRESSIONS:
            raise StoreError(
                f"compression {document.compression!r}: an HDF5 store takes {', '.join(COMPRESSIONS)}; "
                "choose one of these, or a .zarr store"
            )
        self._document = document
        self._files = files
        self._lock = threading.Lock()
        self._open: dict[tuple[int, str], PartArray] = {}

    def derived(self, table: RowTable) -> Iterator[tuple[str, bytes]]:
        """As in the `Format` protocol."""
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as index:
            index.attrs[ATTRIBUTE] = canonical_json(self._document.to_json())
            for name in self._document.spec.arrays:
                self._add_virtual(index, name, table.num_shards)
            ids, views = _row_table(table)
            index.create_dataset("video_id", data=ids, dtype=h5py.string_dtype(), track_times=False)
            index.create_dataset("view", data=views, fillvalue=-1, track_times=False)
        data = buffer.getvalue()
        yield INDEX, data
        # Another version of HDF5 may lay the same index out in other bytes: this tells a foreign index from a damaged one.
        yield INDEX + CHECKSUM, checksum(data).encode("ascii") + b"\n"

    def _add_virtual(self, index: Any, name: str, num_shards: int) -> None:
        """One dataset over all parts, (rows, C, T, H, W); a part that is missing reads as NaN."""
        array_spec = self._document.spec.arrays[name]
        dtype = np.dtype(array_spec.dtype).newbyteorder("<")
        block = (self._document.shard_rows, *array_spec.shape)
        shape = (num_shards * self._document.shard_rows, *array_spec.shape)
        if not num_shards:
            index.create_dataset(name, shape, dtype, fillvalue=np.nan, track_times=False)
            return
        # The low-level calls: `VirtualLayout` takes three times as long. 10,000 parts are mapped in 0.2 s, 100,000 in 5 s.
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_fill_value(np.array(np.nan, dtype))
        properties.set_obj_track_times(False)
        whole, source = h5py.h5s.create_simple(shape), h5py.h5s.create_simple(block)
        for shard_index in range(num_shards):
            whole.select_hyperslab((shard_index * block[0], 0, 0, 0, 0), (1,) * 5, block=block)
            # Relative to the folder of the index, so that the store can move.
            properties.set_virtual(whole, _part_name(shard_index).encode("ascii"), name.encode("ascii"), source)
        whole.select_all()
        h5py.h5d.create(index.id, name.encode("ascii"), h5py.h5t.py_create(dtype), whole, properties)

    def file_names(self, shard_index: int) -> tuple[str, ...]:
        """As in the `Format` protocol."""
        return (_part_name(shard_index),)

    def encode(self, shard_index: int, blocks: dict[str, Cubes]) -> dict[str, bytes | None]:
        """As in the `Format` protocol."""
        return {_part_name(shard_index): encode_part(blocks, self._document.compression)}

    def read_row(self, array: str, place: int) -> Cubes:
        """As in the `Format` protocol."""
        shard_index, position = divmod(place, self._document.shard_rows)
        part = self._part(shard_index, array)
        return self._no_rows(array)[0] if part is None else part.row(position)

    def decode(self, shard_index: int, array: str) -> Cubes:
        """As in the `Format` protocol."""
        block = self._no_rows(array, self._document.shard_rows)
        part = self._part(shard_index, array)
        if part is not None:
            for position in range(len(block)):
                block[position] = part.row(position)
        return block

    def _no_rows(self, array: str, num_rows: int = 1) -> Cubes:
        array_spec = self._document.spec.arrays[array]
        return np.full((num_rows, *array_spec.shape), np.nan, dtype=array_spec.dtype)

    def _part(self, shard_index: int, array: str) -> PartArray | None:
        """The part, open, the least recently used one making room for it; None when there is no such file."""
        with self._lock:
            part = self._open.pop((shard_index, array), None)
            if part is None or not part.is_current():
                array_spec = self._document.spec.arrays[array]
                path = self._files.path_of(_part_name(shard_index))
                shape = (self._document.shard_rows, *array_spec.shape)
                try:
                    part = PartArray(path, array, shape, array_spec.dtype, self._document.compression)
                except FileNotFoundError:
                    return None
            self._open[shard_index, array] = part
            if len(self._open) > NUM_OPEN:
                # Dropped and not closed: another thread may be reading it.
                del self._open[next(iter(self._open))]
            return part

    def forget(self) -> None:
        """As in the `Format` protocol."""
        with self._lock:
            self._open.clear()

    def close(self) -> None:
        """As in the `Format` protocol."""
        self.forget()


def _part_name(shard_index: int) -> str:
    return f"parts/{shard_index:06d}.h5"


def _row_table(table: RowTable) -> tuple[Any, Any]:
    """Id and view by place, (rows,) texts and (rows,) int64; "" and -1 where there is no row."""
    ids = np.full(table.num_places, "", dtype=object)
    views = np.full(table.num_places, -1, dtype="<i8")
    for place, key in table.live_places():
        # HDF5 texts are UTF-8 and end at a NUL; ids may hold other bytes.
        text = key.video_id.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        ids[place] = text.replace("\0", "\\x00")
        views[place] = key.view
    return ids, views
