"""One shard as one HDF5 file: made once, in memory, and read as if a stranger had made it.

HDF5 itself follows links and external storage to any file of the machine, believes every size, and takes a flipped bit
in its tables for the address of another row. So it is asked only where the rows lie; each row is then read from our
own descriptor, a stretch of a size known beforehand, and checked against a CRC-32.

Letters: R rows of a shard; C channels, T time steps, H W grid.
"""

import io
import math
import os
import stat
import weakref
import zlib
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from h5py.h5z import FILTER_DEFLATE, FILTER_FLETCHER32, FILTER_SHUFFLE

from cache.errors import StoreDamaged
from cache.format import Cubes

SIGNATURE = b"\x89HDF\r\n\x1a\n"
FLETCHER_BYTES = 4
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "gzip": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
}
"""Options of a dataset, besides the checksum."""
_PIPELINES = {"none": (FILTER_FLETCHER32,), "gzip": (FILTER_SHUFFLE, FILTER_DEFLATE, FILTER_FLETCHER32)}
_DEFLATE_SKIPPED = 0b010
"""Filter mask of a row that HDF5 left unpacked, as packing would have made it larger: a bit for each filter left out."""


def checksum_name(array: str) -> str:
    """The dataset with the CRC-32 of each row of an array, (R,) uint32; array names hold no dot."""
    return f"{array}.crc32"


def encode_part(blocks: dict[str, Cubes], compression: str) -> bytes | None:
    """A shard as the bytes of an HDF5 file, equal for equal content; None when every row is NaN.

    Args:
        blocks: each array of the spec, (R, C, T, H, W), NaN where there is no row.
    """
    # A row is finite throughout, or NaN throughout.
    positions = {name: np.flatnonzero(~np.isnan(block[:, 0, 0, 0, 0])) for name, block in blocks.items()}
    if not any(map(len, positions.values())):
        return None
    buffer = io.BytesIO()
    # The default `libver`: what it writes is readable by every HDF5 that knows virtual datasets.
    with h5py.File(buffer, "w") as part:
        for name, block in blocks.items():
            dtype = block.dtype.newbyteorder("<")
            dataset = part.create_dataset(
                name,
                block.shape,
                dtype,
                chunks=(1, *block.shape[1:]),
                fillvalue=np.nan,
                fletcher32=True,
                track_times=False,
                **COMPRESSIONS[compression],
            )
            checksums = np.zeros(len(block), dtype="<u4")
            for position in positions[name]:
                row = np.ascontiguousarray(block[position], dtype=dtype)
                dataset[position] = row
                checksums[position] = zlib.crc32(row.data)
            part.create_dataset(checksum_name(name), data=checksums, track_times=False)
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class _StoredRow:
    """Where one row lies in the file."""

    byte_offset: int
    num_bytes: int
    is_deflated: bool


class PartArray:
    """One array of one part, open for reading. Any number of threads may read; closed when nobody holds it any more."""

    def __init__(self, path: str, array: str, shape: tuple[int, ...], dtype: str, compression: str) -> None:
        """Open a part and check it before any row is read.

        Args:
            shape: (R, C, T, H, W), as the spec says; so `dtype` and `compression`.

        Raises:
            FileNotFoundError: there is no such part.
            StoreDamaged: it is not what `encode_part` would have made.
        """
        self._path = path
        self._array = array
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._compression = compression
        self._row_bytes = math.prod(shape[1:]) * self._dtype.itemsize
        # A pipe would block for ever; a link could lead outside of the store.
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise self._damaged("it is not a regular file")
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        weakref.finalize(self, os.close, self._descriptor)
        self._state = _state(os.fstat(self._descriptor))
        try:
            self._rows, self._checksums = self._read_tables()
        except StoreDamaged:
            raise
        # Damaged metadata raises many types.
        except Exception as error:
            raise self._damaged(str(error) or type(error).__name__) from error

    def is_current(self) -> bool:
        """Whether the file at the path is still the one that was opened, unchanged."""
        try:
            return _state(os.lstat(self._path)) == self._state
        except FileNotFoundError:
            return False

    def row(self, position: int) -> Cubes:
        """One row, (C, T, H, W); NaN throughout where the part holds none. Raises StoreDamaged."""
        stored = self._rows.get(position)
        if stored is None:
            return np.full(self._shape[1:], np.nan, dtype=self._dtype)
        data = os.pread(self._descriptor, stored.num_bytes, stored.byte_offset)
        if len(data) != stored.num_bytes:
            raise self._damaged(f"row {position} is cut short")
        values = memoryview(data)[:-FLETCHER_BYTES]
        if stored.is_deflated:
            values = memoryview(self._inflated(values, position))
        if self._compression == "gzip":
            values = _unshuffled(values, self._dtype.itemsize)
        if len(values) != self._row_bytes or zlib.crc32(values) != self._checksums[position]:
            raise self._damaged(f"row {position} does not match its checksum")
        row = np.frombuffer(values, self._dtype.newbyteorder("<")).reshape(self._shape[1:])
        return row.astype(self._dtype, copy=False)

    def _inflated(self, values: memoryview, position: int) -> bytes:
        """At most a row's bytes, however much the stream would give."""
        try:
            return zlib.decompressobj().decompress(values, self._row_bytes)
        except zlib.error as error:
            raise self._damaged(f"row {position} cannot be unpacked: {error}") from error

    def _damaged(self, cause: str) -> StoreDamaged:
        return StoreDamaged(f"{self._array!r} of {self._path} cannot be read: {cause}")

    def _read_tables(self) -> tuple[dict[int, _StoredRow], Cubes]:
        """Position -> where the row lies, and the CRC-32 of each row, (R,) uint32."""
        if os.pread(self._descriptor, len(SIGNATURE), 0) != SIGNATURE:
            raise self._damaged("it does not begin as an HDF5 file does")
        # A Python file and not a path. Parts never change once they have their name, so nothing needs a lock of HDF5,
        # which fails on file systems without locks; but opening by path with `locking=False` fails while the same
        # process has the part open through index.h5 with the default locking.
        with open(self._descriptor, "rb", buffering=0, closefd=False) as raw, h5py.File(raw, "r") as part:
            dataset = self._dataset(part, self._array, self._shape, self._dtype, (1, *self._shape[1:]))
            rows = self._stored_rows(dataset)
            name = checksum_name(self._array)
            checksums = self._dataset(part, name, self._shape[:1], np.dtype(np.uint32), None)[:]
        return rows, checksums

    def _dataset(
        self, part: Any, name: str, shape: tuple[int, ...], dtype: "np.dtype[Any]", chunks: tuple[int, ...] | None
    ) -> Any:
        """A dataset that lies in this very file and is what it should be; no data is read, none allocated."""
        link = part.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise self._damaged(f"{name!r} is {'missing' if link is None else 'a link to elsewhere'}")
        dataset = part[name]
        if not isinstance(dataset, h5py.Dataset):
            raise self._damaged(f"{name!r} is not a dataset")
        if dataset.external is not None or dataset.is_virtual:
            raise self._damaged(f"the data of {name!r} lies in another file")
        wanted = (shape, dtype.newbyteorder("<"), chunks)
        found = (dataset.shape, dataset.dtype, dataset.chunks)
        if found != wanted:
            raise self._damaged(
                f"{name!r} has shape, dtype and chunks {', '.join(map(str, found))}; "
                f"the spec says {', '.join(map(str, wanted))}"
            )
        return dataset

    def _stored_rows(self, dataset: Any) -> dict[int, _StoredRow]:
        plist = dataset.id.get_create_plist()
        pipeline = tuple(plist.get_filter(index)[0] for index in range(plist.get_nfilters()))
        if pipeline != _PIPELINES[self._compression]:
            raise self._damaged(f"it has the filters {pipeline}, expected {_PIPELINES[self._compression]}")
        chunks: list[Any] = []

        def note(chunk: Any) -> bool | None:
            chunks.append(chunk)
            # Anything but None ends the iteration: a table may be endless, or a ring.
            return True if len(chunks) > self._shape[0] else None

        dataset.id.chunk_iter(note)
        rows = {chunk.chunk_offset[0]: self._stored_row(chunk) for chunk in chunks}
        if len(rows) != len(chunks):
            raise self._damaged("its table of chunks names one row twice")
        return rows

    def _stored_row(self, chunk: Any) -> _StoredRow:
        is_deflated = self._compression == "gzip" and chunk.filter_mask != _DEFLATE_SKIPPED
        full = self._row_bytes + FLETCHER_BYTES
        # Noise grows when it is packed, by no more than zlib's bound.
        most = full + full // 1000 + 16
        is_expected = (
            0 <= chunk.chunk_offset[0] < self._shape[0]
            and chunk.chunk_offset[1:] == (0, 0, 0, 0)
            and chunk.filter_mask in ((0, _DEFLATE_SKIPPED) if self._compression == "gzip" else (0,))
            and (FLETCHER_BYTES < chunk.size <= most if is_deflated else chunk.size == full)
        )
        if not is_expected:
            raise self._damaged(f"its table of chunks holds {tuple(chunk)}")
        return _StoredRow(chunk.byte_offset, chunk.size, is_deflated)


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _unshuffled(values: memoryview, itemsize: int) -> memoryview:
    """Undo HDF5's shuffle filter, which puts the first bytes of all numbers first, then the second bytes."""
    planes = np.frombuffer(values, np.uint8)
    if len(planes) % itemsize:
        return values
    return np.ascontiguousarray(planes.reshape(itemsize, -1).T).data.cast("B")
