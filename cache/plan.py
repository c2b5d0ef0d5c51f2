"""The plan on disk: `plan-000000.json` holds the rows of the first segment; growth adds one more file each time."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from cache.cube import canonical_json
from cache.durable import read_json, sealed, unsealed, write_durably
from cache.rows import RowKey, StoreError


class PlanFiles:
    """Reads and adds the plan segments of a folder."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self._num_segments = 0

    def new_segments(self) -> Iterable[list[RowKey]]:
        """Segments that were added, by anyone, since the last call; in order."""
        num_files = len(list(self.folder.glob("plan-*.json")))
        while self._num_segments < num_files:
            path = self._path(self._num_segments)
            document = unsealed(read_json(path), path)
            if document.get("fingerprint") != self._fingerprint:
                raise StoreError(f"{path} belongs to a store of another spec; restore the right file from a copy")
            self._num_segments += 1
            yield [RowKey(video_id, view) for video_id, view in document["rows"]]

    def add_segment(self, rows: Sequence[RowKey]) -> None:
        """Write the next segment; the caller has read all segments, and reads this one back by `new_segments`."""
        document = {"fingerprint": self._fingerprint, "rows": [[key.video_id, key.view] for key in rows]}
        data = canonical_json(sealed(document)).encode("ascii") + b"\n"
        write_durably(self._path(self._num_segments), data, replace=False)

    def _path(self, index: int) -> Path:
        return self.folder / f"plan-{index:06d}.json"
