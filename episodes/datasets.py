"""The manifest: all videos of a data set, read from and written to one CSV file."""

import csv
import difflib
import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from episodes.folders import RealPaths, how_it_leaves
from episodes.video import SPLITS, Video

COLUMNS = tuple(field.name for field in fields(Video))
"""Columns of the CSV file, in the order in which they are written."""
REQUIRED_COLUMNS = ("video_id", "path", "class_name", "split")
ROOT_MARK = "# root:"
"""Opens the line, above the header, that names the folder of the videos. Without it that is the manifest's own folder."""


class ManifestError(ValueError):
    """A data set that cannot be used as it is; the message names what is wrong, where, and the way out."""


# Without slots: cached_property needs the instance's dict.
@dataclass(frozen=True)
class Manifest:
    """All videos of a data set, each with its class and split."""

    videos: tuple[Video, ...]
    """In the order of the file."""
    root: Path
    """Folder that the videos' paths start from; made absolute."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "videos", tuple(self.videos))
        object.__setattr__(self, "root", Path(self.root).resolve())
        seen: set[str] = set()
        for video in self.videos:
            if video.video_id in seen:
                raise ManifestError(f"video_id {video.video_id!r} appears twice; every video needs its own")
            seen.add(video.video_id)

    @cached_property
    def split_hash(self) -> str:
        """SHA-256 of what episodes can be drawn from, as hexadecimal digits.

        Covers split, class, id, times and whether a video is excluded. Order of rows, places of files, subjects and the
        wording of exclusions do not matter, so that two machines with the same data set have the same hash.
        """
        lines = (
            json.dumps(
                [
                    video.split,
                    video.class_name,
                    video.video_id,
                    None if video.start_seconds is None else float(video.start_seconds),
                    None if video.end_seconds is None else float(video.end_seconds),
                    video.excluded is not None,
                ]
            )
            for video in self.videos
        )
        return hashlib.sha256("\n".join(sorted(lines)).encode("ascii")).hexdigest()

    @cached_property
    def _by_split(self) -> dict[str, tuple[Video, ...]]:
        used = [video for video in self.videos if video.excluded is None]
        return {split: tuple(video for video in used if video.split == split) for split in SPLITS}

    def videos_of(self, split: str) -> tuple[Video, ...]:
        """The videos of a split that episodes may use: those not excluded."""
        if split not in SPLITS:
            raise ManifestError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        return self._by_split[split]

    def classes(self, split: str) -> list[str]:
        """Names of the classes that a split has usable videos of, sorted."""
        return sorted({video.class_name for video in self.videos_of(split)})

    @property
    def all_classes(self) -> list[str]:
        """Names of the classes of all splits, sorted. Excluded videos count, so that exclusions move no label."""
        return sorted({video.class_name for video in self.videos})

    def path_of(self, video: Video) -> Path:
        """Absolute path of a video of this manifest."""
        return self.root / video.path


def exclude(manifest: Manifest, reasons: Mapping[str, str]) -> Manifest:
    """A manifest whose episodes leave out some videos. Its split hash is another one.

    Args:
        reasons: video id -> why. A video that is excluded already keeps its first reason.

    Raises:
        ManifestError: an id that the manifest does not have.
    """
    unknown = sorted(set(reasons) - {video.video_id for video in manifest.videos})
    if unknown:
        raise ManifestError(
            f"{len(unknown)} videos to exclude are not in the manifest, for example {unknown[0]!r}; is it the right manifest?"
        )
    videos = (
        replace(video, excluded=reasons[video.video_id] or "no reason given")
        if video.video_id in reasons and video.excluded is None
        else video
        for video in manifest.videos
    )
    return Manifest(tuple(videos), manifest.root)


def read_manifest(path: Path, allow_outside: bool = False) -> Manifest:
    """Read a manifest.

    Args:
        path: CSV file in UTF-8; see docs/datasets.md.
        allow_outside: accept videos outside of the root, by absolute paths, by ".." or through links.

    Raises:
        ManifestError: anything wrong with the file, with the number of the line.
    """
    path = Path(path)
    try:
        # A byte order mark is what spreadsheets write; bytes that are no UTF-8 are names of files that are none either.
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ManifestError(f"manifest {path} cannot be read: {error.strerror}") from error
    root, num_comments, table = _split_comments(text, path)
    videos = []
    line_of: dict[str, int] = {}
    for line, cells in _rows(table, num_comments, path):
        video = _video(cells, f"{path}, line {line}")
        if video.video_id in line_of:
            raise ManifestError(
                f"{path}, line {line}: video_id {video.video_id!r} is already in line {line_of[video.video_id]}; "
                "every video needs its own"
            )
        line_of[video.video_id] = line
        videos.append(video)
    if not videos:
        raise ManifestError(f"manifest {path} lists no video; write one row per video below the header")
    manifest = Manifest(tuple(videos), root)
    if not allow_outside:
        _refuse_outside(manifest, line_of, path)
    return manifest


def _split_comments(text: str, path: Path) -> tuple[Path, int, str]:
    """Root, number of comment lines, and the CSV text below them."""
    root: str | None = None
    num_comments = 0
    while text.startswith("#"):
        line, _, text = text.partition("\n")
        num_comments += 1
        if not line.startswith(ROOT_MARK):
            continue
        if root is not None:
            raise ManifestError(f"{path}, line {num_comments}: a second line {ROOT_MARK!r}; keep one")
        root = line.removeprefix(ROOT_MARK).strip()
        if not root or "\0" in root:
            raise ManifestError(
                f"{path}, line {num_comments}: {ROOT_MARK!r} names no folder; name it or remove the line"
            )
    return path.parent / (root or "."), num_comments, text


def _rows(table: str, num_comments: int, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column of each row that is not blank."""
    reader = csv.reader(io.StringIO(table, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(header, path)
        for cells in reader:
            line = num_comments + reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise ManifestError(
                    f"{path}, line {line}: {len(cells)} cells, but the header has {len(header)} columns"
                )
            yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ManifestError(f"{path}, line {num_comments + reader.line_num}: not CSV ({error})") from error


def _check_header(header: list[str], path: Path) -> None:
    for name in header:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name.lower(), COLUMNS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ManifestError(
                f"{path}: unknown column {name!r}{hint} Known columns, separated by commas: {', '.join(COLUMNS)}"
            )
        if header.count(name) > 1:
            raise ManifestError(f"{path}: column {name!r} appears twice; keep one")
    missing = [name for name in REQUIRED_COLUMNS if name not in header]
    if missing:
        raise ManifestError(
            f"{path}: the header lacks {', '.join(missing)}; it needs at least {','.join(REQUIRED_COLUMNS)}"
        )


def _video(cells: dict[str, str], place: str) -> Video:
    times: dict[str, float | None] = {}
    for name in ("start_seconds", "end_seconds"):
        text = cells.get(name, "").strip()
        try:
            times[name] = float(text) if text else None
        except ValueError:
            raise ManifestError(
                f"{place}: {name} = {text!r} is not a number; give seconds, or leave it empty"
            ) from None
    try:
        return Video(
            video_id=cells["video_id"],
            path=cells["path"],
            class_name=cells["class_name"],
            split=cells["split"].strip(),
            start_seconds=times["start_seconds"],
            end_seconds=times["end_seconds"],
            subject=cells.get("subject") or None,
            excluded=cells.get("excluded") or None,
        )
    except ValueError as error:
        raise ManifestError(f"{place}: {error}") from error


def _refuse_outside(manifest: Manifest, line_of: Mapping[str, int], path: Path) -> None:
    real_paths = RealPaths()
    for video in manifest.videos:
        how = how_it_leaves(manifest.root, video.path, real_paths)
        if how is not None:
            raise ManifestError(
                f"{path}, line {line_of[video.video_id]}: path {video.path!r} {how} ({manifest.root}). Make it relative to "
                f"the root, declare the root in a first line '{ROOT_MARK} FOLDER', or set data.allow_outside = true"
            )


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest so that `read_manifest` gives it back, wherever the file lies; the file appears whole or not at all.

    Paths become relative to the file's folder when that holds the root. Otherwise a first line states the root.
    """
    path = Path(path)
    folder = path.parent.resolve()
    text = io.StringIO(newline="")
    prefix = PurePosixPath(".")
    if manifest.root.is_relative_to(folder):
        prefix = PurePosixPath(manifest.root.relative_to(folder))
    else:
        root = str(manifest.root)
        if root != root.strip() or "\n" in root or "\r" in root:
            raise ManifestError(f"root {root!r} has line breaks or spaces at its ends; write the manifest inside of it")
        text.write(f"{ROOT_MARK} {root}\n")
    writer = csv.writer(text, lineterminator="\n", strict=True)
    columns = [
        name
        for name in COLUMNS
        if name in REQUIRED_COLUMNS or any(getattr(video, name) is not None for video in manifest.videos)
    ]
    writer.writerow(columns)
    for video in manifest.videos:
        row = replace(video, path=str(prefix / video.path))
        # None becomes an empty cell, and a float its shortest exact text.
        writer.writerow([getattr(row, name) for name in columns])
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(path, text.getvalue().encode("utf-8", errors="surrogateescape"))


def _write_whole(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
