"""What `dataset check` finds, and what training refuses."""

import errno
import json
import os
from pathlib import Path

import pytest

from episodes.checks import OverlapError, check_manifest, refuse_overlap
from episodes.datasets import Manifest, ManifestError, exclude
from episodes.video import Video


def make(root: Path, *videos: Video) -> Manifest:
    for video in videos:
        (root / video.path).parent.mkdir(parents=True, exist_ok=True)
        (root / video.path).touch()
    return Manifest(videos, root)


def test_counts_missing_files_and_exclusions_are_reported(tmp_path: Path) -> None:
    manifest = make(
        tmp_path,
        Video("a", "a.mp4", "walk", "train"),
        Video("b", "b.mp4", "walk", "train"),
        Video("c", "c.mp4", "run", "train"),
        Video("d", "d.mp4", "jump", "test"),
        Video("e", "e.mp4", "jump", "test", excluded="broken"),
    )
    (tmp_path / "b.mp4").unlink()
    (tmp_path / "e.mp4").unlink()
    check = check_manifest(manifest)
    assert check.missing == ("b",)
    assert check.excluded == 1
    report = json.loads(json.dumps(check.to_dict()))
    assert report["train"] == {"classes": 2, "videos": 3, "smallest_class": 1, "largest_class": 2}
    assert report["val"] == {"classes": 0, "videos": 0, "smallest_class": 0, "largest_class": 0}
    assert report["test"]["videos"] == 1
    assert report["split_hash"] == manifest.split_hash
    assert report["overlaps"] == []
    assert report["expected"] is None


def test_class_in_two_splits_is_refused(tmp_path: Path) -> None:
    manifest = make(tmp_path, Video("a", "a.mp4", "walk", "train"), Video("b", "b.mp4", "walk", "test"))
    (overlap,) = check_manifest(manifest).overlaps
    assert (overlap.kind, overlap.name, overlap.splits) == ("class", "walk", ("train", "test"))
    with pytest.raises(OverlapError, match=r"class 'walk' in train, test.*data\.allow_overlap"):
        refuse_overlap(manifest)
    refuse_overlap(manifest, allow=True)
    refuse_overlap(exclude(manifest, {"b": "class is in train"}))


@pytest.mark.parametrize("path", ["one.mp4", "x/../one.mp4", "link.mp4", "folder/one.mp4"])
def test_one_file_in_two_splits_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "one.mp4").touch()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "one.mp4")
    (tmp_path / "folder").symlink_to(tmp_path)
    manifest = Manifest((Video("a", "one.mp4", "walk", "train"), Video("b", path, "run", "test")), tmp_path)
    (overlap,) = check_manifest(manifest).overlaps
    assert (overlap.kind, overlap.splits, overlap.video_ids) == ("video", ("train", "test"), ("a", "b"))
    with pytest.raises(OverlapError, match=r"video .* in train, test"):
        refuse_overlap(manifest)


def test_same_id_with_another_ending_is_one_video(tmp_path: Path) -> None:
    manifest = make(tmp_path, Video("x.avi", "1/x.avi", "walk", "train"), Video("x.mp4", "2/x.mp4", "run", "val"))
    with pytest.raises(OverlapError, match="video"):
        refuse_overlap(manifest)


def test_same_id_with_another_ending_in_one_split_is_told_once(tmp_path: Path) -> None:
    videos = [Video(f"a.{ending}", f"a.{ending}", "walk", "train") for ending in ("avi", "mp4")]
    manifest = make(
        tmp_path, *videos, Video("b.c", "b.c.mp4", "walk", "train"), Video("b.d", "b.d.mp4", "walk", "train")
    )
    (duplicate,) = check_manifest(manifest).duplicates
    assert (duplicate.path, duplicate.video_ids) == ("a.mp4", ("a.avi", "a.mp4"))
    refuse_overlap(manifest)
    (tmp_path / "a.mp4").unlink()
    (tmp_path / "a.mp4").symlink_to(tmp_path / "a.avi")
    assert len(check_manifest(manifest).duplicates) == 1


def test_equal_file_names_in_different_folders_are_different_videos(tmp_path: Path) -> None:
    refuse_overlap(make(tmp_path, Video("a/1", "a/1.mp4", "a", "train"), Video("b/1", "b/1.mp4", "b", "test")))


@pytest.mark.parametrize(
    ("first", "second", "overlaps"),
    [
        ((0.0, 2.0), (2.0, 4.0), False),
        ((0.0, 2.0), (1.9, 4.0), True),
        ((None, None), (5.0, None), True),
        ((None, 5.0), (5.0, None), False),
        ((3.0, 9.0), (4.0, 5.0), True),
    ],
)
def test_stretches_of_one_file_overlap_when_they_share_time(
    tmp_path: Path,
    first: tuple[float | None, float | None],
    second: tuple[float | None, float | None],
    overlaps: bool,
) -> None:
    manifest = make(
        tmp_path, Video("a", "long.mp4", "walk", "train", *first), Video("b", "long.mp4", "run", "test", *second)
    )
    assert bool(check_manifest(manifest).overlaps) == overlaps


def test_long_stretch_is_compared_with_all_that_follow(tmp_path: Path) -> None:
    manifest = make(
        tmp_path,
        Video("long", "f.mp4", "walk", "train", 0.0, 100.0),
        Video("short", "f.mp4", "walk", "train", 1.0, 2.0),
        Video("late", "f.mp4", "run", "test", 50.0, 60.0),
    )
    check = check_manifest(manifest)
    assert [overlap.video_ids for overlap in check.overlaps] == [("long", "late")]
    assert [duplicate.video_ids for duplicate in check.duplicates] == [("long", "short")]


def test_file_twice_in_one_split_is_told(tmp_path: Path) -> None:
    manifest = make(tmp_path, Video("a", "x.mp4", "walk", "train"), Video("b", "x.mp4", "run", "train"))
    (duplicate,) = check_manifest(manifest).duplicates
    assert (duplicate.path, duplicate.video_ids) == ("x.mp4", ("a", "b"))
    refuse_overlap(manifest)


def test_classes_that_differ_in_spelling_only_are_told(tmp_path: Path) -> None:
    names = ("brush_hair", "Brush Hair", "walk")
    manifest = make(tmp_path, *(Video(name, f"{name}.mp4", name, "train") for name in names))
    assert check_manifest(manifest).similar_classes == (("Brush Hair", "brush_hair"),)


def test_class_in_two_splits_under_two_spellings_is_refused(tmp_path: Path) -> None:
    classes = [("brush_hair", "train"), ("Brush Hair", "test"), ("Brush_Hair", "test"), ("walk", "train")]
    manifest = make(tmp_path, *(Video(name, f"{name}.mp4", name, split) for name, split in classes))
    check = check_manifest(manifest)
    (overlap,) = check.overlaps
    assert (overlap.kind, overlap.splits) == ("class", ("train", "test"))
    assert overlap.name == "brush_hair / Brush Hair / Brush_Hair"
    assert check.similar_classes == (("Brush Hair", "Brush_Hair"),)
    with pytest.raises(OverlapError, match=r"class 'brush_hair / Brush Hair / Brush_Hair' in train, test"):
        refuse_overlap(manifest)
    refuse_overlap(manifest, allow=True)


def test_similar_classes_of_one_split_are_not_refused(tmp_path: Path) -> None:
    classes = [("brush_hair", "train"), ("Brush Hair", "train"), ("brush hairs", "test")]
    manifest = make(tmp_path, *(Video(name, f"{name}.mp4", name, split) for name, split in classes))
    assert check_manifest(manifest).overlaps == ()
    refuse_overlap(manifest)


def test_file_below_an_unreadable_folder_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make(tmp_path, Video("a", "closed/a.mp4", "walk", "train"), Video("b", "open/b.mp4", "walk", "train"))
    stat = Path.stat

    # The rights of a folder do not bind a test that is run by root.
    def guarded(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if "closed" in path.parent.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", guarded)
    assert check_manifest(manifest).missing == ("a",)


def test_known_data_set_is_compared_with_its_published_sizes(tmp_path: Path) -> None:
    manifest = make(tmp_path, Video("a", "a.mp4", "Archery", "train"))
    check = check_manifest(manifest, "ucf101")
    assert "train: 1 classes, published 70" in check.differences
    assert "test: 0 videos, published 2745" in check.differences
    assert check.to_dict()["expected"]["val"]["videos"] == 1421
    with pytest.raises(ManifestError, match="did you mean 'hmdb51'"):
        check_manifest(manifest, "hmdb")
