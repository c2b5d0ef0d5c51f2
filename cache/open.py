"""Opens a store by its content or the ending of its path, and refuses one of another spec."""

import contextlib
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal, get_args

from cache.cube import Spec
from cache.disk_store import DiskStore, MakeFormat, make_document, new_store_id
from cache.document import SPEC, StoreDocument, copy_of, read_document
from cache.errors import SpecMismatch, StoreDamaged, StoreError
from cache.files import Files, LocalFiles
from cache.format import Format
from cache.store import FeatureStore, MemoryStore

if TYPE_CHECKING:
    from cache.object_files import ObjectFiles

Mode = Literal["r", "a"]


def _zarr_format(document: StoreDocument, files: Files) -> Format:
    from zarr.storage import LocalStore, ObjectStore

    from cache.zarr_format import ZarrFormat

    if is_address(files.url):
        return ZarrFormat(document, ObjectStore(_object_files(files.url).client.store, read_only=True))
    return ZarrFormat(document, LocalStore(files.url, read_only=True))


def _hdf5_format(document: StoreDocument, files: Files) -> Format:
    if is_address(files.url):
        raise StoreError(
            f"store {files.url}: HDF5 files need a file system; give an object store a name that ends in .zarr"
        )
    from cache.hdf5_format import Hdf5Format

    return Hdf5Format(document, files)


FORMATS: dict[str, MakeFormat] = {"zarr": _zarr_format, "hdf5": _hdf5_format}
"""Backend name -> how it is made. Imported on use: h5py and zarr take a third of a second each."""
KINDS = (*FORMATS, "memory")
ENDINGS = {".zarr": "zarr", ".h5": "hdf5", ".hdf5": "hdf5"}
"""Ending of a path -> backend name."""


def is_address(path: str | Path) -> bool:
    """Whether a text is the address of an object store, such as `s3://bucket/S.zarr`, rather than a path."""
    return "://" in str(path)


def open_files(path: str | Path) -> Files:
    """The file layer of a store's path or address."""
    # An address stays a text: a Path would take one of its slashes.
    return _object_files(str(path)) if is_address(path) else LocalFiles(Path(path))


def _object_files(url: str) -> "ObjectFiles":
    try:
        from cache.object_files import ObjectFiles
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise StoreError(
            f"store {url}: object stores need the extra cloud. Install it in a checkout of mastaf: pip install -e '.[cloud]'"
        ) from error
    return ObjectFiles(url)


def is_store(files: Files) -> bool:
    """Whether there is a store; a damaged one counts, so that its own error is shown."""
    names = files.sizes("ledger")
    return SPEC in names or copy_of(SPEC) in names


def store_kind(path: str | Path | None, kind: str | None) -> str:
    """Name of the backend: as given, by what is there, or by the ending of the path."""
    if kind is None:
        if path is None:
            raise StoreError("give the path of a store, such as cubes.zarr, or kind 'memory'")
        ending = PurePath(path).suffix
        if is_store(open_files(path)):
            kind = read_document(open_files(path)).backend
        elif ending in ENDINGS:
            kind = ENDINGS[ending]
        else:
            raise StoreError(
                f"store {path}: cannot tell the backend from the ending {ending!r}; end it in {' or '.join(ENDINGS)}"
            )
    if kind not in KINDS:
        raise StoreError(f"store kind {kind!r}: allowed are {', '.join(KINDS)}")
    return kind


def open_store(
    path: str | Path | None,
    kind: str | None = None,
    spec: Spec | None = None,
    mode: Mode = "r",
    shard_rows: int = 64,
    compression: str = "none",
    origin: dict[str, Any] | None = None,
) -> FeatureStore:
    """Open a store, or create it.

    Args:
        path: folder of the store, or its address on an object store; ignored for kind `memory`.
        kind: a backend; None chooses by the ending of the path.
        spec: what the caller expects; another one in the store is refused. Needed to create.
        mode: `r` reads a store that exists; `a` also plans and commits, and creates a store that is absent.
        shard_rows, compression: layout of a store that is created; one that exists keeps its own.
        origin: kept in a store that is created, see `StoreDocument.origin`.

    Raises:
        SpecMismatch: the store holds cubes of another spec, and is left as it is; the text lists every field that differs.
        StoreError: there is no store, or it is damaged.
    """
    if mode not in get_args(Mode):
        raise StoreError(f"store mode {mode!r}: allowed are {', '.join(get_args(Mode))}")
    kind = store_kind(path, kind)
    if kind == "memory":
        return MemoryStore(_needed(spec, "a store in memory"), shard_rows)
    if path is None:
        raise StoreError("a store on disk needs a path, such as cubes.zarr")
    return open_disk_store(path, kind, spec, mode, shard_rows, compression, origin)


def open_disk_store(
    path: str | Path,
    kind: str,
    spec: Spec | None = None,
    mode: Mode = "r",
    shard_rows: int = 64,
    compression: str = "none",
    origin: dict[str, Any] | None = None,
) -> DiskStore:
    """As `open_store`, for a store that outlives the process."""
    files = open_files(path)
    _refuse_foreign(path, files)
    if not is_store(files):
        if mode == "r" or spec is None:
            raise StoreError(
                f"there is no store at {path}; check the path, or make it with `mastaf extract --store {path}`"
            )
        document = StoreDocument(
            _needed(spec, f"the new store {path}"), kind, shard_rows, compression, new_store_id(), origin or {}
        )
        FORMATS[kind](document, files).close()  # refuses what the backend cannot do before anything is written
        # Several processes of one job start together: one makes the store, the others open it.
        with contextlib.suppress(FileExistsError):
            make_document(files, document)
    # Before opening, which clears what killed writers left: a store of another spec is not ours to change.
    document = read_document(files)
    if document.backend != kind:
        raise StoreError(f"{path} is a {document.backend} store, not a {kind} store; leave the kind out")
    differences = [] if spec is None else document.spec.differences(spec)
    if differences:
        raise SpecMismatch(
            f"{path} holds cubes of another spec. {'; '.join(differences)}. "
            "Extract into another folder, or change these settings back"
        )
    return DiskStore(files, FORMATS[kind], mode)


def _refuse_foreign(path: str | Path, files: Files) -> None:
    if is_address(path):
        names = _object_files(str(path)).client.top_names()
    else:
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{path} is a file, but a store is a folder")
        names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    # A creation that was killed leaves at most the folder of the ledger.
    if names - {"ledger"} and not is_store(files):
        if "ledger" in names:
            raise StoreDamaged(f"{path} has lost {SPEC} and its copy; without them its cubes cannot be told apart")
        raise StoreError(f"{path} is not a store but holds something (there is no ledger/spec.json); give another path")


def _needed(spec: Spec | None, what: str) -> Spec:
    if spec is None:
        raise StoreError(f"{what} needs a spec: what its cubes are made of")
    return spec
