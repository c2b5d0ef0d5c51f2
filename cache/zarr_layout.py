"""How a Zarr store lies on disk: making an empty one, and the document that says what it holds. See docs/store.md.

Letters: C channels, T time steps, H W grid.
"""

import contextlib
import errno
import glob
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from cache.cube import Spec, canonical_json
from cache.durable import PARTIAL, fsync_path, fsync_tree, read_json, sealed, unsealed
from cache.rows import RowTable, StoreError

FORMAT = 1
"""Version of the layout on disk."""
ATTRIBUTE = "mastaf"
"""Key of the second copy of spec and layout in the attributes of the Zarr group."""
ROW_TABLE_CHUNK = 4096
"""Rows per chunk of `video_id` and `view`."""
COMPRESSIONS: dict[str, list[Any]] = {"none": [], "zstd": [ZstdCodec(level=1)]}
"""Codecs before the checksum."""


def is_zarr_store(path: Path) -> bool:
    """Whether the folder carries our mark; a damaged store counts, so that its own error is shown."""
    return (path / "ledger").is_dir() and (path / "view").is_dir()


@dataclass(frozen=True, slots=True)
class StoreDocument:
    """What a store says of itself."""

    spec: Spec
    shard_rows: int
    compression: str


def make_store(path: Path, spec: Spec, shard_rows: int, compression: str) -> None:
    """Make an empty store. It appears whole or not at all.

    Raises:
        FileExistsError: the path is taken, perhaps by a process that was faster.
    """
    RowTable(shard_rows)  # refuses a bad number before anything is written
    if compression not in COMPRESSIONS:
        raise StoreError(f"compression {compression!r}: allowed are {', '.join(COMPRESSIONS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        _write_empty_store(aside, spec, shard_rows, compression)
        fsync_tree(aside)
        try:
            aside.rename(path)
        except OSError as error:
            # A folder is never renamed onto one that holds something.
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(error.errno, "a store was made there meanwhile", str(path)) from error
            raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync_path(path.parent)


def remove_abandoned(path: Path) -> None:
    """Folders aside that a killed `create` left; making a store takes far less than a minute."""
    for folder in path.parent.glob(glob.escape(path.name) + "." + "[0-9a-f]" * 8 + PARTIAL):
        # Its owner may rename it at this very moment.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > 60:
                shutil.rmtree(folder)


def read_spec_document(path: Path) -> StoreDocument:
    """Spec and layout; both copies must be whole and equal."""
    document = unsealed(read_json(path / "ledger" / "spec.json"), path / "ledger" / "spec.json")
    metadata = read_json(path / "zarr.json")
    attributes = metadata.get("attributes", {}) if isinstance(metadata, dict) else {}
    copy = unsealed(attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None, path / "zarr.json")
    if copy != document:
        raise StoreError(
            f"{path / 'zarr.json'} and {path / 'ledger' / 'spec.json'} hold different specs: "
            "one was changed or belongs to another store; restore it from a copy"
        )
    if document.get("format") != FORMAT:
        raise StoreError(f"{path} has format {document.get('format')!r}, this version reads {FORMAT}")
    try:
        spec = Spec.from_json(document["spec"])
    except ValueError as error:
        raise StoreError(f"{path / 'ledger' / 'spec.json'} cannot be read by this version: {error}") from error
    return StoreDocument(spec, document["layout"]["shard_rows"], document["layout"]["compression"])


def _write_empty_store(path: Path, spec: Spec, shard_rows: int, compression: str) -> None:
    layout = {"backend": "zarr", "shard_rows": shard_rows, "compression": compression}
    document = sealed({"format": FORMAT, "fingerprint": spec.fingerprint, "spec": spec.to_json(), "layout": layout})
    group = zarr.create_group(path, attributes={ATTRIBUTE: document})
    for name, array_spec in spec.arrays.items():
        group.create_array(
            name,
            shape=(0, *array_spec.shape),
            dtype=array_spec.dtype,
            chunks=(1, *array_spec.shape),
            shards=(shard_rows, *array_spec.shape),
            fill_value=float("nan"),
            compressors=[*COMPRESSIONS[compression], Crc32cCodec()],
            dimension_names=["row", "C", "T", "H", "W"],
            # One flat file per shard, `c.7.0.0.0.0`: one folder to fsync instead of six.
            chunk_key_encoding={"name": "default", "separator": "."},
        )
    for name, dtype, fill_value in (("video_id", str, ""), ("view", "int64", -1)):
        group.create_array(
            name,
            shape=(0,),
            dtype=dtype,
            chunks=(ROW_TABLE_CHUNK,),
            fill_value=fill_value,
            compressors=[Crc32cCodec()],
            dimension_names=["row"],
        )
    # Zarr warns about foreign files in a group, but never lists an array's folder: the ledger lies in one.
    group.create_array("ledger", shape=(0,), dtype="uint8", chunks=(1,), dimension_names=["entry"])
    (path / "ledger" / "spec.json").write_text(canonical_json(document) + "\n", encoding="ascii")
