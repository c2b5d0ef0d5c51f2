"""The knobs of a store."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class StoreConfig(BaseModel):
    """Where cubes are kept and how. Only `dtype` enters the fingerprint; the rest is layout."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = None
    """Folder of the store, such as `ucf101.zarr`. None: given on the command line, or a store in memory."""
    kind: Literal["zarr", "hdf5", "memory"] | None = None
    """Backend. None: chosen by the ending of `path`."""
    dtype: Literal["float16", "float32"] = "float16"
    """Stored number type. float16 halves the bytes; heads read it back as float32."""
    shard_rows: int = Field(default=64, ge=1)
    """Rows per shard: what is written, committed and redone as one. 64 rows of 800 kB make files of 50 MB."""
    compression: Literal["none", "zstd", "gzip"] = "none"
    """Zarr takes all three, HDF5 none and gzip. Stores ReLU features in about 0.6 of the bytes; rows take longer to read."""
