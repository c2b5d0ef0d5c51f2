"""What can be wrong with a manifest: missing files, splits that share classes or videos, counts that differ from a paper's."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from episodes.datasets import Manifest, ManifestError
from episodes.folders import RealPaths, stem_of
from episodes.published import published_dataset
from episodes.splits import SplitSize
from episodes.video import SPLITS, Video


class OverlapError(ManifestError):
    """Splits share a class or a video, so that accuracy on the test split would mean nothing."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Something that two or more splits share."""

    kind: Literal["class", "video"]
    """One class in several splits, however it is spelt there, or one video under two ids."""
    name: str
    """The class (its spellings, joined by " / "), or the path of the video."""
    splits: tuple[str, ...]
    """Where it is."""
    video_ids: tuple[str, ...] = ()
    """The ids of the video, one from each of the splits."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """One video under two ids of the same split: an episode may ask for it with itself as an example."""

    path: str
    """The video."""
    video_ids: tuple[str, str]
    """Its ids."""


@dataclass(frozen=True, slots=True)
class ManifestCheck:
    """What `dataset check` has to say. Excluded videos count as `excluded` alone, and may be missing."""

    splits: dict[str, SplitSize]
    """Classes and videos of each split."""
    missing: tuple[str, ...]
    """Ids of the videos whose file or folder does not exist."""
    overlaps: tuple[Overlap, ...]
    """What splits share."""
    duplicates: tuple[Duplicate, ...]
    """Videos that a split has twice."""
    similar_classes: tuple[tuple[str, ...], ...]
    """Class names of one split that differ in case, spaces or underscores only: probably one class. Across splits they
    are overlaps."""
    excluded: int
    """Videos that episodes leave out."""
    split_hash: str
    """Of the manifest."""
    expected: dict[str, SplitSize] | None
    """The published sizes, where the data set is known."""
    differences: tuple[str, ...]
    """Where the sizes are not the published ones, one sentence each."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON: one entry per split, then the rest."""
        rest = {key: value for key, value in asdict(self).items() if key != "splits"}
        return {**{split: asdict(size) for split, size in self.splits.items()}, **rest}


def check_manifest(manifest: Manifest, name: str | None = None) -> ManifestCheck:
    """Look at a manifest and at the files it names.

    Args:
        name: the published protocol it should be (a key of `episodes.splits.DATASETS`), if any.

    Raises:
        ManifestError: an unknown name.
    """
    expected = None if name is None else dict(published_dataset(name).sizes)
    sizes = {split: _size(manifest.videos_of(split)) for split in SPLITS}
    used = [video for split in SPLITS for video in manifest.videos_of(split)]
    overlaps, duplicates = _compare_places(manifest)
    return ManifestCheck(
        splits=sizes,
        missing=tuple(video.video_id for video in used if not _can_be_found(manifest.path_of(video))),
        overlaps=(*_class_overlaps(manifest), *overlaps),
        duplicates=tuple(duplicates),
        similar_classes=tuple(names for split in SPLITS for names in _similar(manifest.classes(split))),
        excluded=len(manifest.videos) - len(used),
        split_hash=manifest.split_hash,
        expected=expected,
        differences=tuple(_differences(sizes, expected or {})),
    )


def refuse_overlap(manifest: Manifest, allow: bool = False) -> None:
    """Go on only if no class and no video is in two splits, or if that is allowed.

    Raises:
        OverlapError: names what is shared.
    """
    if allow:
        return
    overlaps = [*_class_overlaps(manifest), *_compare_places(manifest)[0]]
    if overlaps:
        shown = "; ".join(f"{overlap.kind} {overlap.name!r} in {', '.join(overlap.splits)}" for overlap in overlaps[:3])
        more = f" and {len(overlaps) - 3} more" if len(overlaps) > 3 else ""
        raise OverlapError(
            f"splits of the manifest overlap: {shown}{more}. Few-shot splits share no class and no video; move or exclude "
            "what is shared (see `mastaf dataset check`), or set data.allow_overlap = true."
        )


def _can_be_found(path: Path) -> bool:
    try:
        return path.exists()
    # Below a folder that may not be entered; extraction will reject the video as well.
    except PermissionError:
        return False


def _size(videos: Iterable[Video]) -> SplitSize:
    counts = Counter(video.class_name for video in videos)
    values = counts.values()
    return SplitSize(len(counts), counts.total(), min(values, default=0), max(values, default=0))


def _differences(sizes: dict[str, SplitSize], expected: dict[str, SplitSize]) -> list[str]:
    return [
        f"{split}: {found} {what}, published {wanted}"
        for split, published in expected.items()
        for what, found, wanted in (
            ("classes", sizes[split].classes, published.classes),
            ("videos", sizes[split].videos, published.videos),
            ("videos in the smallest class", sizes[split].smallest_class, published.smallest_class),
            ("videos in the largest class", sizes[split].largest_class, published.largest_class),
        )
        if found != wanted
    ]


def _class_overlaps(manifest: Manifest) -> list[Overlap]:
    """Classes that are in several splits, under one spelling or under several."""
    splits_of: dict[str, dict[str, None]] = {}
    spellings_of: dict[str, dict[str, None]] = {}
    for split in SPLITS:
        for class_name in manifest.classes(split):
            splits_of.setdefault(_folded(class_name), {})[split] = None
            spellings_of.setdefault(_folded(class_name), {})[class_name] = None
    return [
        Overlap("class", " / ".join(spellings_of[folded]), tuple(splits))
        for folded, splits in sorted(splits_of.items())
        if len(splits) > 1
    ]


def _folded(class_name: str) -> str:
    """A class name without what spelling alone changes: case, spaces and underscores."""
    return "".join(class_name.split()).replace("_", "").lower()


def _similar(class_names: Iterable[str]) -> list[tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name in class_names:
        groups.setdefault(_folded(name), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _compare_places(manifest: Manifest) -> tuple[list[Overlap], list[Duplicate]]:
    """Ids that stand for the same video: the same place on disk after following links, or the same id but for its ending.

    Stretches of one file that do not meet are different videos.
    """
    real_paths = RealPaths()
    videos_at: dict[Path | str, list[Video]] = {}
    for split in SPLITS:
        for video in manifest.videos_of(split):
            videos_at.setdefault(real_paths.of(manifest.path_of(video)), []).append(video)
            if stem_of(video.video_id) != video.video_id:
                videos_at.setdefault(stem_of(video.video_id), []).append(video)
    overlaps: dict[tuple[str, ...], Overlap] = {}
    duplicates: dict[tuple[str, str], Duplicate] = {}
    for videos in videos_at.values():
        for first, second in _meeting(videos) if len(videos) > 1 else []:
            ids = (first.video_id, second.video_id)
            if first.split != second.split:
                overlaps.setdefault(ids, Overlap("video", second.path, (first.split, second.split), ids))
            else:
                duplicates.setdefault(ids, Duplicate(second.path, ids))
    return list(overlaps.values()), list(duplicates.values())


def _meeting(videos: list[Video]) -> list[tuple[Video, Video]]:
    """Pairs of stretches of one file that share some time: each with the latest-ending earlier one of every split."""
    pairs = []
    latest: dict[str, Video] = {}
    for video in sorted(videos, key=lambda video: (video.start_seconds or 0.0, video.video_id)):
        pairs += [(earlier, video) for earlier in latest.values() if (video.start_seconds or 0.0) < _end(earlier)]
        if video.split not in latest or _end(video) > _end(latest[video.split]):
            latest[video.split] = video
    return pairs


def _end(video: Video) -> float:
    return math.inf if video.end_seconds is None else video.end_seconds
