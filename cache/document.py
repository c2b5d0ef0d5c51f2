"""What a store says of itself: spec, layout and the plan, each kept twice with its SHA-256."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cache.cube import Spec, canonical_json, sha256_of
from cache.errors import StoreDamaged, StoreError
from cache.files import Files
from cache.records import MALFORMED
from cache.rows import RowKey, Segment

FORMAT = 2
"""Version of the layout on disk."""
SPEC = "ledger/spec.json"


def copy_of(name: str) -> str:
    """Name of the second copy of a document."""
    return name.removesuffix(".json") + ".copy.json"


def seal(document: dict[str, Any]) -> bytes:
    """A JSON document together with its SHA-256, as the bytes of a file."""
    return canonical_json({"document": document, "sha256": sha256_of(document)}).encode("ascii") + b"\n"


def unseal(data: bytes) -> dict[str, Any] | None:
    """The document within; None when the bytes are not exactly what `seal` gave."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    document = value.get("document") if isinstance(value, dict) else None
    # Byte for byte, so that not even a space can change unseen.
    return document if isinstance(document, dict) and seal(document) == data else None


def read_sealed(files: Files, name: str) -> dict[str, Any]:
    """A document of the store; raises StoreDamaged, naming the file and the way out."""
    way_out = f"Mend the store: mastaf store repair {files.url}"
    try:
        document = unseal(files.read(name))
    except FileNotFoundError:
        raise StoreDamaged(f"{files.path_of(name)} is missing. {way_out}") from None
    if document is None:
        raise StoreDamaged(f"{files.path_of(name)} is damaged: its content does not match its SHA-256. {way_out}")
    return document


@dataclass(frozen=True, slots=True)
class StoreDocument:
    """The spec of a store and how it is laid out."""

    spec: Spec
    backend: str
    shard_rows: int
    compression: str
    store_id: str
    """Random, so that the ledger of another store with the same spec is told apart."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What the caller needs to make damaged rows anew (config, files of weights), as a JSON object; decides nothing."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able dict, the form that is hashed and stored."""
        return {
            "format": FORMAT,
            "fingerprint": self.spec.fingerprint,
            "spec": self.spec.to_json(),
            "layout": {"backend": self.backend, "shard_rows": self.shard_rows, "compression": self.compression},
            "store": self.store_id,
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], where: str) -> "StoreDocument":
        """The inverse; `where` names the file in errors."""
        if value.get("format") != FORMAT:
            raise StoreDamaged(
                f"{where} has format {value.get('format')!r}, this version reads {FORMAT}; extract into a new store"
            )
        try:
            layout = value["layout"]
            texts = [layout["backend"], layout["compression"], value["store"]]
            if type(layout["shard_rows"]) is not int or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"layout {layout!r}: expected texts, and an integer shard_rows")
            return cls(
                Spec.from_json(value["spec"]), texts[0], layout["shard_rows"], texts[1], texts[2], dict(value["origin"])
            )
        except MALFORMED as error:
            raise StoreDamaged(f"{where} cannot be read by this version: {type(error).__name__}: {error}") from error


def read_document(files: Files) -> StoreDocument:
    """Spec and layout of a store; raises StoreDamaged."""
    return StoreDocument.from_json(read_sealed(files, SPEC), files.path_of(SPEC))


def put_twice(files: Files, name: str, document: dict[str, Any], replace: bool) -> None:
    """Write a document and its copy; raises FileExistsError as `Files.put` does, before the copy is touched."""
    data = seal(document)
    files.put(name, data, replace)
    files.put(copy_of(name), data)


class Plan:
    """The steps of the plan, `ledger/plan-000000.json` and on: every growth, retry and removal adds one."""

    def __init__(self, files: Files, store_id: str) -> None:
        self._files = files
        self._store_id = store_id
        self._num_segments = 0

    @property
    def num_segments(self) -> int:
        """Steps that were read so far."""
        return self._num_segments

    def new_segments(self) -> Iterator[Segment]:
        """Steps that were added, by anyone, since the last call; in order."""
        names = self._files.sizes("ledger")
        while (name := self.name(self._num_segments)) in names or copy_of(name) in names:
            yield segment_from_json(read_sealed(self._files, name), self._store_id, self._files.path_of(name))
            # Only now: a step that the caller could not take in is given again.
            self._num_segments += 1

    def add_segment(self, segment: Segment) -> None:
        """Write the next step; the caller has read all steps, and reads this one back by `new_segments`."""
        put_twice(self._files, self.name(self._num_segments), segment_to_json(segment, self._store_id), replace=False)

    def mend_copies(self) -> None:
        """Write the second copies that a kill kept from being written."""
        names = self._files.sizes("ledger")
        for name in (SPEC, *map(self.name, range(self._num_segments))):
            if copy_of(name) not in names:
                self._files.put(copy_of(name), self._files.read(name))

    @staticmethod
    def name(index: int) -> str:
        """Name of one step's file."""
        return f"ledger/plan-{index:06d}.json"


def segment_to_json(segment: Segment, store_id: str) -> dict[str, Any]:
    """One step of the plan as a document."""
    return {
        "store": store_id,
        "rows": [[key.video_id, key.view] for key in segment.rows],
        "removed": [[key.video_id, key.view] for key in segment.removed],
    }


def segment_from_json(value: dict[str, Any], store_id: str, where: str) -> Segment:
    """The inverse; `where` names the file in errors."""
    if value.get("store") != store_id:
        raise StoreDamaged(f"{where} belongs to another store; put the right file in its place")
    try:
        rows, removed = (
            tuple(RowKey(video_id, view) for video_id, view in value[name]) for name in ("rows", "removed")
        )
    except (*MALFORMED, StoreError) as error:
        raise StoreDamaged(f"{where} cannot be read by this version: {type(error).__name__}: {error}") from error
    return Segment(rows, removed)
