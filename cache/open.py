"""Opens a store by the ending of its path, and refuses one of another spec."""

import contextlib
from pathlib import Path
from typing import Literal, get_args

from cache.cube import Spec
from cache.rows import SpecMismatch, StoreError
from cache.store import FeatureStore, MemoryStore
from cache.zarr_layout import is_zarr_store, read_spec_document
from cache.zarr_store import ZarrStore

STORES: dict[str, type[ZarrStore] | type[MemoryStore]] = {"zarr": ZarrStore, "memory": MemoryStore}
"""Backend name -> class."""
ENDINGS = {".zarr": "zarr"}
"""Ending of a path -> backend name."""
Mode = Literal["r", "a"]


def store_kind(path: str | Path | None, kind: str | None) -> str:
    """Name of the backend: as given, or by the ending of the path."""
    if kind is None:
        if path is None:
            raise StoreError("give the path of a store, such as cubes.zarr, or kind 'memory'")
        ending = Path(path).suffix
        if ending not in ENDINGS and is_zarr_store(Path(path)):
            return "zarr"
        if ending in (".h5", ".hdf5"):
            raise StoreError(f"store {path}: HDF5 comes with the next release: use .zarr")
        if ending not in ENDINGS:
            raise StoreError(f"store {path}: cannot tell the backend from the ending {ending!r}; end it in .zarr")
        kind = ENDINGS[ending]
    if kind not in STORES:
        raise StoreError(f"store kind {kind!r}: allowed are {', '.join(STORES)}")
    return kind


def open_store(
    path: str | Path | None,
    kind: str | None = None,
    spec: Spec | None = None,
    mode: Mode = "r",
    shard_rows: int = 64,
    compression: str = "none",
) -> FeatureStore:
    """Open a store, or create it.

    Args:
        path: folder of the store; ignored for kind `memory`.
        kind: `zarr` or `memory`; None chooses by the ending of the path.
        spec: what the caller expects; another one in the store is refused. Needed to create.
        mode: `r` reads a store that exists; `a` also plans and commits, and creates a store that is absent.
        shard_rows, compression: layout of a store that is created; one that exists keeps its own.

    Raises:
        SpecMismatch: the store holds cubes of another spec, and is left as it is; the text lists every field that differs.
        StoreError: there is no store, or it is damaged.
    """
    if mode not in get_args(Mode):
        raise StoreError(f"store mode {mode!r}: allowed are {', '.join(get_args(Mode))}")
    if store_kind(path, kind) == "memory":
        return MemoryStore(_needed(spec, "a store in memory"), shard_rows)
    if path is None:
        raise StoreError("a Zarr store needs a path, such as cubes.zarr")
    return _open_zarr(Path(path), spec, mode, shard_rows, compression)


def _open_zarr(path: Path, spec: Spec | None, mode: Mode, shard_rows: int, compression: str) -> FeatureStore:
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file, but a Zarr store is a folder")
    is_empty = not path.exists() or next(path.iterdir(), None) is None
    if not is_empty and not is_zarr_store(path):
        raise StoreError(f"{path} is a folder but not a store (it has no folders ledger and view); give another path")
    if is_empty and mode == "r":
        raise StoreError(
            f"there is no store at {path}; check the path, or make it with `mastaf extract --store {path}`"
        )
    if is_empty:
        # Several processes of one job start together: one makes the store, the others open it.
        with contextlib.suppress(FileExistsError):
            return ZarrStore.create(path, _needed(spec, f"the new store {path}"), shard_rows, compression)
    # Before opening, which clears what killed writers left: a store of another spec is not ours to change.
    differences = [] if spec is None else read_spec_document(path).spec.differences(spec)
    if differences:
        raise SpecMismatch(
            f"{path} holds cubes of another spec. {'; '.join(differences)}. "
            "Extract into another folder, or change these settings back"
        )
    return ZarrStore(path, mode)


def _needed(spec: Spec | None, what: str) -> Spec:
    if spec is None:
        raise StoreError(f"{what} needs a spec: what its cubes are made of")
    return spec
