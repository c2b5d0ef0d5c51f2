"""What counts as a video on disk, and where links really lead."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ENDINGS = (
    "3g2 3gp asf avi divx dv f4v flv gif h264 hevc ivf m1v m2t m2ts m2v m4v mjpeg mjpg mkv mov mp4 mpe mpeg mpg mts mxf nut "
    "ogg ogv qt rm rmvb ts vob webm wmv y4m"
)
VIDEO_ENDINGS = frozenset(f".{ending}" for ending in _ENDINGS.split())
"""Endings of video files, in lower case."""
FRAME_ENDINGS = (".jpg", ".jpeg", ".png")
"""Endings of the pictures in a folder of frames; the ones that extraction reads."""


def is_hidden(name: str) -> bool:
    """Whether a name is one that systems and editors leave behind (".DS_Store", "._clip.mp4")."""
    return name.startswith(".")


def stem_of(name: str) -> str:
    """A file name without its ending if that is a video's; other dots belong to the name."""
    stem, dot, ending = name.rpartition(".")
    return stem if stem and dot and f".{ending}".lower() in VIDEO_ENDINGS else name


def holds_frames(folder: str | Path) -> bool:
    """Whether a folder is a video kept as pictures: there are some, and neither video files nor folders beside them.

    A class folder with a stray thumbnail must not become a video.
    """
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not is_hidden(entry.name)]
    has_pictures = any(entry.name.lower().endswith(FRAME_ENDINGS) for entry in shown)
    return has_pictures and not any(stem_of(entry.name) != entry.name or entry.is_dir() for entry in shown)


def is_video(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a video: a folder of frames, or anything else with a video's ending.

    A link that leads nowhere counts, so that the extraction reports it by name.
    """
    if entry.is_dir():
        return holds_frames(entry.path)
    return stem_of(entry.name) != entry.name


def sorted_entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder by name, in the order of code points, which no locale changes."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def walk_videos(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """All visible videos at any depth, in the order of their names. Folders of frames are not entered; nor are links to
    a folder that holds them, as those would never end."""
    yield from _walk(Path(folder), ())


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[os.DirEntry[str]]:
    here = folder.resolve()
    if here in above:
        return
    for entry in sorted_entries(folder):
        if is_hidden(entry.name):
            continue
        if is_video(entry):
            yield entry
        elif entry.is_dir():
            yield from _walk(Path(entry.path), (*above, here))


class RealPaths:
    """Where many paths really lead. One listing per folder instead of a look at every file, which network disks are slow at."""

    def __init__(self) -> None:
        """Nothing is known at the start; folders are listed when they are first asked about."""
        self._folders: dict[Path, tuple[Path, frozenset[str] | None]] = {}

    def of(self, path: Path) -> Path:
        """The path without links; the file need not exist."""
        if path.name in ("", ".."):
            return _resolved(path)
        if path.parent not in self._folders:
            self._folders[path.parent] = (_resolved(path.parent), _links_in(path.parent))
        folder, links = self._folders[path.parent]
        return _resolved(path) if links is None or path.name in links else folder / path.name


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError:  # links that lead in a circle lead nowhere else; whoever reads the video says so
        return path


def how_it_leaves(root: Path, path: str, real_paths: RealPaths) -> str | None:
    """How a relative path leads out of a folder (itself without links); None if it does not."""
    relative = PurePosixPath(path)
    if relative.is_absolute():
        return "is absolute"
    depth = 0
    for part in relative.parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return "leads out of the root by '..'"
    if not real_paths.of(root / path).is_relative_to(root):
        return "leads out of the root through a link"
    return None


def _links_in(folder: Path) -> frozenset[str] | None:
    """Names of the links in a folder; None where it cannot be listed, though its files may be open to us."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_symlink())
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except PermissionError:
        return None
