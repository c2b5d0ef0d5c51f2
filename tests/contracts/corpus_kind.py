"""What one kind of odd or hostile input is, and what collects them."""

from dataclasses import dataclass
from pathlib import Path

from contracts.corpus_writers import FASTSTART, Clip, write_clip

OK = frozenset({"ok"})
DEGRADED = frozenset({"degraded"})
REJECTED = frozenset({"rejected"})


@dataclass(frozen=True)
class Kind:
    """One input and what must become of it."""

    name: str
    """Unique and printable, whatever the path is."""
    path: Path
    """The file or folder to be read."""
    statuses: frozenset[str]
    """Of ok, degraded and rejected those that are right; one, except where builds of FFmpeg may truly differ."""
    reason: str | None = None
    """Key of extract.errors.REASONS where the status is not ok."""
    num_frames: int | None = None
    """Frames of the whole video, where the kind is about them."""
    is_closed_to_others: bool = False
    """Permissions are the matter, which root does not feel: read it as another user, or leave it out."""


class Writer:
    """Collects the kinds of one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.kinds: list[Kind] = []
        self.whole = {
            "mp4": write_clip(root / "good.mp4"),
            "faststart": write_clip(root / "good_faststart.mp4", Clip(container_options=FASTSTART)),
        }

    def good(self, name: str, path: Path, num_frames: int | None = 24) -> None:
        """The kind is read whole."""
        self.kinds.append(Kind(name, path, OK, None, num_frames))

    def degraded(self, name: str, path: Path, reason: str, num_frames: int | None = None) -> None:
        """The kind gives clips, with a blemish."""
        self.kinds.append(Kind(name, path, DEGRADED, reason, num_frames))

    def rejected(self, name: str, path: Path, reason: str, is_closed_to_others: bool = False) -> None:
        """The kind gives nothing."""
        self.kinds.append(Kind(name, path, REJECTED, reason, None, is_closed_to_others))

    def file(self, name: str, content: bytes) -> Path:
        """A file of the corpus with this content."""
        path = self.root / name
        path.write_bytes(content)
        return path

    def clip(self, name: str, clip: Clip) -> Path:
        """A file of the corpus with this video."""
        return write_clip(self.root / name, clip)


def first_part(path: Path, percent: int) -> bytes:
    """The beginning of a file."""
    content = path.read_bytes()
    return content[: len(content) * percent // 100]
