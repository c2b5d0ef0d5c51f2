"""Rows as a plain Zarr v3 group of sharded arrays. See docs/store.md.

Letters: R rows of a shard; C channels, T time steps, H W grid.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec, GzipCodec, ZstdCodec
from zarr.storage import MemoryStore

from cache.document import StoreDocument
from cache.errors import StoreDamaged, StoreError
from cache.format import Cubes
from cache.row_table import RowTable

ATTRIBUTE = "mastaf"
"""Key of what plain Zarr readers see of the spec in the attributes of the group."""
ROW_TABLE_CHUNK = 4096
"""Rows per chunk of `video_id` and `view`."""
COMPRESSIONS: dict[str, list[Any]] = {"none": [], "zstd": [ZstdCodec(level=1)], "gzip": [GzipCodec(level=1)]}
"""Codecs before the checksum."""


class ZarrFormat:
    """One sharded array for each array of the spec, one file for each shard, one chunk for each row."""

    def __init__(self, document: StoreDocument, store: Store) -> None:
        """`store` is where readers find the arrays; writing goes through the file layer."""
        if document.compression not in COMPRESSIONS:
            raise StoreError(f"compression {document.compression!r}: a Zarr store takes {', '.join(COMPRESSIONS)}")
        self._document = document
        self._store = store
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def derived(self, table: RowTable) -> Iterator[tuple[str, bytes]]:
        """As in the `Format` protocol."""
        memory = MemoryStore()
        group = zarr.create_group(memory, attributes={ATTRIBUTE: self._document.to_json()})
        # Zarr warns about foreign files in a group, but never lists an array's folder: the ledger lies in one.
        group.create_array("ledger", shape=(0,), dtype="uint8", chunks=(1,), dimension_names=["entry"])
        num_rows = table.num_places
        for name in self._document.spec.arrays:
            self._create(group, name, num_rows)
        for name, values in self._row_table(table).items():
            array = group.create_array(
                name,
                shape=(num_rows,),
                dtype=str if name == "video_id" else "int64",
                chunks=(ROW_TABLE_CHUNK,),
                fill_value="" if name == "video_id" else -1,
                compressors=[Crc32cCodec()],
                dimension_names=["row"],
                # Flat names, one folder: `c.0`.
                chunk_key_encoding={"name": "default", "separator": "."},
            )
            if num_rows:
                array[...] = values
        # The metadata comes last: a reader never sees rows before it can look up their names.
        names = sorted(memory._store_dict, key=lambda name: (name.endswith("zarr.json"), name))
        for name in names:
            data = memory._store_dict[name].to_bytes()
            if name.endswith("zarr.json"):
                # Our own layout of the text, so that it does not hang on zarr's version.
                document = json.loads(data)
                # Older versions write it empty, newer ones leave it out.
                if document.get("consolidated_metadata", 0) is None:
                    del document["consolidated_metadata"]
                data = json.dumps(document, indent=1, sort_keys=True).encode("ascii") + b"\n"
            yield name, data

    def _create(self, group: zarr.Group, name: str, num_rows: int) -> "zarr.Array[Any]":
        array_spec = self._document.spec.arrays[name]
        return group.create_array(
            name,
            shape=(num_rows, *array_spec.shape),
            dtype=array_spec.dtype,
            chunks=(1, *array_spec.shape),
            shards=(self._document.shard_rows, *array_spec.shape),
            fill_value=float("nan"),
            compressors=[*COMPRESSIONS[self._document.compression], Crc32cCodec()],
            dimension_names=["row", "C", "T", "H", "W"],
            # One flat file per shard, `c.7.0.0.0.0`: one folder to fsync instead of six.
            chunk_key_encoding={"name": "default", "separator": "."},
        )

    @staticmethod
    def _row_table(table: RowTable) -> dict[str, Any]:
        ids = np.full(table.num_places, "", dtype=object)
        views = np.full(table.num_places, -1, dtype=np.int64)
        for place, key in table.live_places():
            # Zarr texts are UTF-8; file names may hold bytes that are not.
            ids[place] = key.video_id.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            views[place] = key.view
        return {"video_id": ids, "view": views}

    def file_names(self, shard_index: int) -> tuple[str, ...]:
        """As in the `Format` protocol."""
        return tuple(self._file_name(name, shard_index) for name in self._document.spec.arrays)

    @staticmethod
    def _file_name(array: str, shard_index: int) -> str:
        return f"{array}/c.{shard_index}.0.0.0.0"

    def encode(self, shard_index: int, blocks: dict[str, Cubes]) -> dict[str, bytes | None]:
        """As in the `Format` protocol."""
        encoded: dict[str, bytes | None] = {}
        for name, block in blocks.items():
            # Zarr's own codecs, in an array of one shard: the bytes do not depend on the shard's number.
            memory = MemoryStore()
            mould = self._create(zarr.create_group(memory), name, self._document.shard_rows)
            mould[:] = block
            data = memory._store_dict.get(self._file_name(name, 0))
            encoded[self._file_name(name, shard_index)] = None if data is None else data.to_bytes()
        return encoded

    def read_row(self, array: str, place: int) -> Cubes:
        """As in the `Format` protocol."""
        row: Cubes = np.asarray(self._array(array, place + 1)[place])
        return row

    def decode(self, shard_index: int, array: str) -> Cubes:
        """As in the `Format` protocol."""
        start = shard_index * self._document.shard_rows
        end = start + self._document.shard_rows
        block: Cubes = np.asarray(self._array(array, end)[start:end])
        return block

    def _array(self, name: str, num_rows: int) -> "zarr.Array[Any]":
        """The Zarr array; opened again when it has fewer rows than needed, since another process may have grown it."""
        if name not in self._arrays or self._arrays[name].shape[0] < num_rows:
            self._arrays[name] = self._opened(name)
        return self._arrays[name]

    def _opened(self, name: str) -> "zarr.Array[Any]":
        array_spec = self._document.spec.arrays[name]
        try:
            array = zarr.open_array(self._store, path=name, mode="r")
        # Damaged metadata raises many types.
        except Exception as error:
            raise StoreDamaged(f"{name}/zarr.json of {self._store} is missing or damaged: {error}") from error
        if array.shape[1:] != array_spec.shape or array.dtype != np.dtype(array_spec.dtype):
            raise StoreDamaged(
                f"{name}/zarr.json of {self._store} is damaged: rows of {array.shape[1:]} {array.dtype}, "
                f"but the spec says {array_spec.shape} {array_spec.dtype}"
            )
        return array

    def forget(self) -> None:
        """As in the `Format` protocol."""
        self._arrays.clear()

    def close(self) -> None:
        """As in the `Format` protocol."""
        self._arrays.clear()
        self._store.close()
