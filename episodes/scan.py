"""A manifest from a folder of videos: one sub-folder per class, or train/val/test folders of such."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from episodes.datasets import Manifest, ManifestError
from episodes.draws import Draws, key_of
from episodes.folders import RealPaths, how_it_leaves, is_hidden, is_video, sorted_entries, stem_of
from episodes.video import SPLITS, Video

DEFAULT_SHARES = (60, 20, 20)
"""Of the classes in train, val and test, in per cent."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What a folder holds: the videos, and all else that was seen there."""

    manifest: Manifest
    """All videos found."""
    uses_split_folders: bool
    """Whether the first level is train, val and test, so that nothing was drawn."""
    empty_classes: tuple[str, ...]
    """Class folders without a video; in no split."""
    ignored: tuple[str, ...]
    """Files and folders that are no video, relative to the folder."""
    num_hidden: int
    """Files and folders whose names begin with a dot; not looked into."""
    outside: tuple[str, ...]
    """Ids of videos that are links out of the folder: reading the manifest needs ``data.allow_outside``."""


@dataclass(slots=True)
class _Found:
    """Collects while the folders are read."""

    videos: dict[tuple[str, str], list[Path]] = field(default_factory=dict)
    """By split folder ("" where there are none) and class."""
    ignored: list[Path] = field(default_factory=list)
    num_hidden: int = 0

    def visible(self, folder: Path) -> list[os.DirEntry[str]]:
        """The entries of a folder without the hidden ones, which are counted."""
        entries = sorted_entries(folder)
        shown = [entry for entry in entries if not is_hidden(entry.name)]
        self.num_hidden += len(entries) - len(shown)
        return shown

    def folders(self, folder: Path) -> list[os.DirEntry[str]]:
        """The visible sub-folders; what lies beside them is ignored."""
        entries = self.visible(folder)
        self.ignored += [Path(entry.path) for entry in entries if not entry.is_dir()]
        return [entry for entry in entries if entry.is_dir()]

    def read_class(self, split: str, class_folder: os.DirEntry[str]) -> None:
        """Take every video of a folder as one of its class."""
        videos = self.videos.setdefault((split, class_folder.name), [])
        for entry in self.visible(Path(class_folder.path)):
            (videos if is_video(entry) else self.ignored).append(Path(entry.path))


def parse_shares(text: str) -> tuple[int, int, int]:
    """Read "60/20/20".

    Raises:
        ManifestError: not three whole numbers from 0 on with a sum above 0.
    """
    parts = text.split("/")
    if len(parts) == len(SPLITS) and all(part.strip().isdecimal() for part in parts) and any(map(int, parts)):
        return int(parts[0]), int(parts[1]), int(parts[2])
    raise ManifestError(f"split {text!r} is not TRAIN/VAL/TEST in whole numbers; write for instance 60/20/20")


def scan_folder(folder: Path, shares: Sequence[int] = DEFAULT_SHARES, seed: int = 0) -> Scan:
    """Find the videos of a folder and give each class to one split.

    A video is a file with a video's ending or a folder of jpg or png frames; ids are "class/name" without the ending,
    which stays where two names of a class differ in nothing else. If all sub-folders are called train, val or test, they
    are the splits and hold the class folders.

    Args:
        shares: proportion of the classes in train, val and test.
        seed: of the draw that gives classes to splits; the same on every machine.

    Raises:
        ManifestError: no video, or split folders mixed with others.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise ManifestError(f"{folder} is not a folder; give the one that holds the class folders")
    found = _read(folder)
    uses_split_folders = all(split for split, _ in found.videos)
    empty_classes = {class_name for (_, class_name), paths in found.videos.items() if not paths}
    if not any(found.videos.values()):
        raise ManifestError(
            f"no video in {folder}: expected FOLDER/class/video.mp4 (or FOLDER/class/video/00000001.jpg), found "
            f"{_some(found, folder)}"
        )
    if not uses_split_folders:
        split_of = split_classes([class_name for (_, class_name), paths in found.videos.items() if paths], shares, seed)
        found.videos = {(split, name): found.videos["", name] for name, split in split_of.items()}
    videos = _name_videos(folder, found)
    real_paths = RealPaths()
    return Scan(
        manifest=Manifest(tuple(videos), folder),
        uses_split_folders=uses_split_folders,
        empty_classes=tuple(sorted(empty_classes)),
        ignored=tuple(path.relative_to(folder).as_posix() for path in found.ignored),
        num_hidden=found.num_hidden,
        outside=tuple(video.video_id for video in videos if how_it_leaves(folder, video.path, real_paths)),
    )


def _read(folder: Path) -> _Found:
    found = _Found()
    folders = found.folders(folder)
    splits = [entry for entry in folders if entry.name in SPLITS]
    # One class may well be called "train"; two of these names are no accident.
    if len(splits) < 2:
        for class_folder in folders:
            found.read_class("", class_folder)
        return found
    if len(splits) < len(folders):
        raise ManifestError(
            f"{folder} holds {', '.join(entry.name for entry in splits)} beside "
            f"{', '.join([entry.name for entry in folders if entry.name not in SPLITS][:3])}; its folders must be the splits "
            f"({', '.join(SPLITS)}) or classes, not both. Rename or move the others, or scan one level deeper."
        )
    for split_folder in splits:
        for class_folder in found.folders(Path(split_folder.path)):
            found.read_class(split_folder.name, class_folder)
    return found


def _name_videos(folder: Path, found: _Found) -> list[Video]:
    places = [
        (split, class_name, video_name, path)
        for (split, class_name), paths in found.videos.items()
        for video_name, path in zip(short_names([path.name for path in paths]), paths, strict=True)
    ]
    # The same name in two split folders: both keep the split in their id, and the check of overlaps finds them.
    times_seen = Counter((class_name, video_name) for _, class_name, video_name, _ in places)
    return [
        Video(
            video_id=f"{f'{split}/' if times_seen[class_name, video_name] > 1 else ''}{class_name}/{video_name}",
            path=path.relative_to(folder).as_posix(),
            class_name=class_name,
            split=split,
        )
        for split, class_name, video_name, path in places
    ]


def short_names(names: Sequence[str]) -> list[str]:
    """File names without their endings; those that would then be the same as another keep them."""
    stems = Counter(map(stem_of, names))
    whole = set(names)
    return [
        name if stems[stem_of(name)] > 1 or (stem_of(name) != name and stem_of(name) in whole) else stem_of(name)
        for name in names
    ]


def split_classes(class_names: Sequence[str], shares: Sequence[int], seed: int) -> dict[str, str]:
    """Give every class to one split, by chance and in proportion.

    Every split with a share above 0 gets a class if there are that many.

    Returns:
        The split of each class, by class name in sorted order.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or sum(shares) == 0:
        raise ManifestError(f"shares {tuple(shares)} are not three numbers from 0 on with a sum above 0")
    counts = _apportion(len(class_names), shares)
    order = Draws(key_of("mastaf class split 1", seed)).shuffled(sorted(class_names))
    ends = [sum(counts[: place + 1]) for place in range(len(SPLITS))]
    split_of = {
        name: next(split for split, end in zip(SPLITS, ends, strict=True) if place < end)
        for place, name in enumerate(order)
    }
    return dict(sorted(split_of.items()))


def _apportion(total: int, shares: Sequence[int]) -> list[int]:
    """Whole numbers with this sum, in proportion (largest remainders), none 0 where `total` allows it."""
    counts = [total * share // sum(shares) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda place: -(total * shares[place] % sum(shares)))
    for place in by_remainder[: total - sum(counts)]:
        counts[place] += 1
    wanting = [place for place, share in enumerate(shares) if share > 0 and counts[place] == 0]
    for place in wanting:
        largest = counts.index(max(counts))
        if counts[largest] > 1:
            counts[largest] -= 1
            counts[place] += 1
    return counts


def _some(found: _Found, folder: Path) -> str:
    seen = [path.relative_to(folder).as_posix() for path in found.ignored]
    seen += [f"{Path(*name).as_posix()}/ (empty)" for name in found.videos]
    return ", ".join(seen[:3]) + (f" and {len(seen) - 3} more" if len(seen) > 3 else "") or "nothing"
