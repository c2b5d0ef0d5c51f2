"""A manifest of a published protocol: the published lists, matched with the videos on a disk."""

import difflib
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from episodes.datasets import Manifest, ManifestError
from episodes.folders import is_hidden, sorted_entries, stem_of, walk_videos
from episodes.scan import short_names
from episodes.splits import DATASETS, PublishedDataset
from episodes.video import SPLITS, Video


@dataclass(frozen=True, slots=True)
class Published:
    """The manifest of a published protocol, and where the disk differs from it."""

    manifest: Manifest
    """Every listed video. One that is not on the disk is here too, so that the split hash is the same everywhere; its path
    is then a place where it could be put."""
    missing: tuple[str, ...] = ()
    """Ids of listed videos that are not on the disk."""
    missing_classes: tuple[str, ...] = ()
    """Classes without a folder, when no lists are used."""
    unknown_folders: tuple[str, ...] = ()
    """Folders that are no class of the protocol, when no lists are used."""
    num_unlisted: int = 0
    """Videos on the disk that no list names."""
    unknown_lists: tuple[str, ...] = ()
    """Names of list files whose content is not the published one."""


@dataclass(frozen=True, slots=True)
class _ListLine:
    split: str
    class_name: str
    name: str

    @property
    def video_id(self) -> str:
        """Class and name, as in the list."""
        return f"{self.class_name}/{self.name}"


@dataclass(slots=True)
class _Disk:
    """The videos below a folder, to be found by their names."""

    folder: Path
    ignores_case: bool
    paths: list[Path] = field(default_factory=list)
    indices: list[tuple[Callable[[str], str], dict[str, list[Path]]]] = field(default_factory=list)
    """From the strictest way to compare names to the loosest."""

    def __post_init__(self) -> None:
        self.paths = [Path(entry.path) for entry in walk_videos(self.folder)]
        ways: list[Callable[[str], str]] = [str, lambda name: name.replace(" ", "_")]
        if self.ignores_case:
            ways[1:1] = [str.lower]
            ways.append(lambda name: name.lower().replace(" ", "_"))
        for way in ways:
            index: dict[str, list[Path]] = {}
            for path in self.paths:
                index.setdefault(way(stem_of(path.name)), []).append(path)
            self.indices.append((way, index))

    def find(self, line: _ListLine) -> Path | None:
        """The one video with this name; if there are several, the one in a folder of the class."""
        for way, index in self.indices:
            found = index.get(way(line.name), [])
            if len(found) > 1:
                in_class = [path for path in found if _letters(path.parent.name) == _letters(line.class_name)]
                found = in_class if len(in_class) == 1 else found
            if len(found) > 1:
                raise ManifestError(
                    f"{line.video_id!r} could be {found[0].relative_to(self.folder)} or {found[1].relative_to(self.folder)} in "
                    f"{self.folder}; move one of them away"
                )
            if found:
                return found[0]
        return None


def published_manifest(name: str, videos_folder: Path, lists_folder: Path | None = None) -> Published:
    """The manifest of a published protocol.

    With lists, videos are found by name alone, wherever they lie below the folder: exactly, then (UCF101 and HMDB51) in
    any case, then with spaces for underscores. Without, every video in a class folder of UCF101 or HMDB51 is taken.

    Args:
        name: a key of `DATASETS`.
        videos_folder: holds video files or folders of frames, in class folders or not.
        lists_folder: holds ``trainlist03.txt`` and so on, itself or in the folder that the released code calls it by.

    Raises:
        ManifestError: an unknown name, lists or videos that cannot be found at all, or a name that fits two videos.
    """
    dataset = published_dataset(name)
    folder = Path(videos_folder).resolve()
    if not folder.is_dir():
        raise ManifestError(f"{folder} is not a folder; give the one that holds the videos of {dataset.title}")
    if lists_folder is None:
        return _from_class_folders(dataset, folder)
    lists = _find_lists(dataset, Path(lists_folder))
    return _from_lists(dataset, folder, lists)


def published_dataset(name: str) -> PublishedDataset:
    """Look a protocol up.

    Raises:
        ManifestError: there is none of this name.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ManifestError(f"unknown data set {name!r}{hint} Known: {', '.join(DATASETS)}")
    return DATASETS[name]


def read_list(path: Path, split: str) -> list[_ListLine]:
    """Read a published list: one ``class/video`` a line, parted by the last slash.

    Raises:
        ManifestError: a line that is not of this form.
    """
    lines = []
    text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        class_name, slash, name = line.strip().rpartition("/")
        if not (class_name and slash and name):
            raise ManifestError(f"{path}, line {number}: {line.strip()!r} is not of the form class/video")
        lines.append(_ListLine(split, class_name, stem_of(name)))
    return lines


def _find_lists(dataset: PublishedDataset, folder: Path) -> dict[str, Path]:
    """The list file of each split; of several numbered sets the protocol's own."""
    seen: list[str] = []
    for place in (folder, folder / dataset.lists_folder):
        sets: dict[str, dict[str, Path]] = {}
        for entry in sorted_entries(place) if place.is_dir() else []:
            match = re.fullmatch(r"(train|val|test)list(\d+)\.txt", entry.name)
            if match:
                sets.setdefault(match[2], {})[match[1]] = Path(entry.path)
                seen.append(entry.name)
        complete = [number for number, lists in sets.items() if len(lists) == len(SPLITS)]
        if dataset.list_number in complete:
            return sets[dataset.list_number]
        if len(complete) == 1:
            return sets[complete[0]]
        if complete:
            raise ManifestError(
                f"{place} holds the lists {', '.join(complete)}, but not {dataset.list_number}, which {dataset.title} uses; "
                "leave one set there"
            )
    wanted = ", ".join(f"{split}list{dataset.list_number}.txt" for split in SPLITS)
    raise ManifestError(f"{folder} does not hold {wanted}; found {', '.join(seen) or 'no list file'}")


def _from_lists(dataset: PublishedDataset, folder: Path, lists: dict[str, Path]) -> Published:
    lines = [line for split in SPLITS for line in read_list(lists[split], split)]
    disk = _Disk(folder, dataset.ignores_case)
    used: dict[Path, str] = {}
    videos, missing = [], []
    for line in lines:
        path = disk.find(line)
        if path is None:
            missing.append(line.video_id)
        elif path in used:
            raise ManifestError(
                f"{path.relative_to(folder)} fits both {used[path]!r} and {line.video_id!r}; one of the two is missing in {folder}"
            )
        else:
            used[path] = line.video_id
        place = line.video_id if path is None else path.relative_to(folder).as_posix()
        videos.append(Video(line.video_id, place, line.class_name, line.split))
    if not used:
        raise ManifestError(
            f"none of the {len(lines)} listed videos of {dataset.title} is below {folder}, for example {lines[0].name!r}; "
            f"found {len(disk.paths)} other videos there. Give the folder of the videos."
        )
    digests = [hashlib.md5(lists[split].read_bytes(), usedforsecurity=False).hexdigest()[:8] for split in SPLITS]
    return Published(
        manifest=Manifest(tuple(videos), folder),
        missing=tuple(missing),
        num_unlisted=len(disk.paths) - len(used),
        unknown_lists=tuple(
            lists[split].name
            for split, digest, known in zip(SPLITS, digests, dataset.list_digests, strict=True)
            if digest != known
        ),
    )


def _from_class_folders(dataset: PublishedDataset, folder: Path) -> Published:
    split_of = dataset.split_of_class()
    folders = [entry.name for entry in sorted_entries(folder) if entry.is_dir() and not is_hidden(entry.name)]
    class_of = {_letters(class_name): class_name for class_name in split_of}
    folder_of: dict[str, str] = {}
    for name in folders:
        class_name = class_of.get(_letters(name))
        if class_name is None:
            continue
        if class_name in folder_of:
            raise ManifestError(
                f"class {class_name!r} could be the folder {folder_of[class_name]!r} or {name!r} in {folder}; move one away"
            )
        folder_of[class_name] = name
    videos = [
        video
        for class_name, name in sorted(folder_of.items())
        for video in _class_videos(folder, name, class_name, split_of[class_name])
    ]
    if not videos:
        raise ManifestError(
            f"{folder} holds no video in a class folder of {dataset.title} ({next(iter(split_of))}, ...); found the folders "
            f"{', '.join(folders[:3]) or '(none)'}. Give the folder that holds the class folders, or --lists DIR."
        )
    found = {video.class_name for video in videos}
    return Published(
        manifest=Manifest(tuple(videos), folder),
        missing_classes=tuple(class_name for class_name in split_of if class_name not in found),
        unknown_folders=tuple(name for name in folders if name not in folder_of.values()),
    )


def _class_videos(folder: Path, class_folder: str, class_name: str, split: str) -> list[Video]:
    paths: Sequence[Path] = [Path(entry.path) for entry in walk_videos(folder / class_folder)]
    names = short_names([path.name for path in paths])
    return [
        Video(f"{class_name}/{name}", path.relative_to(folder).as_posix(), class_name, split)
        for name, path in zip(names, paths, strict=True)
    ]


def _letters(name: str) -> str:
    """A class name without case, spaces, underscores and hyphens: authors write "Shot-put" and "shot_put"."""
    return re.sub(r"[\s_-]", "", name).lower()
