"""Folders of the user's own videos: classes, splits drawn by class, ids, and nothing lost in silence."""

from collections import Counter
from pathlib import Path

import pytest

from episodes.checks import check_manifest
from episodes.datasets import ManifestError, read_manifest, write_manifest
from episodes.scan import parse_shares, scan_folder, split_classes


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def ids(root: Path) -> list[str]:
    return [video.video_id for video in scan_folder(root).manifest.videos]


def test_every_video_is_found_and_the_rest_is_told(tmp_path: Path) -> None:
    touch(tmp_path, "run/a.mp4", "run/b.AVI", "run/c.webm", "run/.hidden.mp4", "run/notes.txt", ".cache/d.mp4", "m.csv")
    touch(tmp_path, "walk/frames/00000001.jpg", "walk/frames/00000002.jpg", "walk/png.clip/1.PNG", "walk/empty/.keep")
    (tmp_path / "nothing").mkdir()
    scan = scan_folder(tmp_path)
    found = {video.video_id: video.path for video in scan.manifest.videos}
    assert found == {
        "run/a": "run/a.mp4",
        "run/b": "run/b.AVI",
        "run/c": "run/c.webm",
        "walk/frames": "walk/frames",
        "walk/png.clip": "walk/png.clip",
    }
    assert scan.empty_classes == ("nothing",)
    assert set(scan.ignored) == {"m.csv", "run/notes.txt", "walk/empty"}
    assert scan.num_hidden == 2
    assert not scan.uses_split_folders
    assert scan.outside == ()
    assert check_manifest(scan.manifest).missing == ()


def test_ids_stay_unique_when_names_differ_in_their_endings_only(tmp_path: Path) -> None:
    touch(tmp_path, "run/a.mp4", "run/a.avi", "run/b.mp4", "walk/a.mp4", "run/a.mp4.mov", "run/c.v2.mp4")
    assert sorted(ids(tmp_path)) == ["run/a.avi", "run/a.mp4", "run/a.mp4.mov", "run/b", "run/c.v2", "walk/a"]


def test_odd_names_survive(tmp_path: Path) -> None:
    odd = ["sw, ord/a b.mp4", "sw, ord/#1!&;(x)[y].avi", 'q"uote/ü.mp4', "-dash/-x_Y.webm", "line\nbreak/\t.mp4"]
    touch(tmp_path / "videos", *odd)
    scan = scan_folder(tmp_path / "videos")
    write_manifest(scan.manifest, tmp_path / "m.csv")
    assert {video.path for video in read_manifest(tmp_path / "m.csv").videos} == {f"videos/{name}" for name in odd}


@pytest.mark.parametrize("where", ["videos/m.csv", "m.csv", "other/m.csv"])
def test_scanned_manifest_reads_back_from_anywhere(tmp_path: Path, where: str) -> None:
    touch(tmp_path / "videos", *(f"class{number}/a.mp4" for number in range(5)))
    write_manifest(scan_folder(tmp_path / "videos").manifest, tmp_path / where)
    manifest = read_manifest(tmp_path / where)
    assert check_manifest(manifest).missing == ()
    assert len(manifest.videos) == 5


def test_scanned_folder_may_be_a_link(tmp_path: Path) -> None:
    touch(tmp_path / "disk", "a/1.mp4", "b/1.mp4", "c/1.mp4")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/videos").symlink_to(tmp_path / "disk")
    scan = scan_folder(tmp_path / "home/videos")
    write_manifest(scan.manifest, tmp_path / "home/m.csv")
    assert check_manifest(read_manifest(tmp_path / "home/m.csv")).missing == ()


def test_links_out_of_the_folder_are_told(tmp_path: Path) -> None:
    touch(tmp_path / "disk", "x.mp4")
    touch(tmp_path / "videos", "a/1.mp4")
    (tmp_path / "videos/a/2.mp4").symlink_to(tmp_path / "disk/x.mp4")
    (tmp_path / "videos/a/3.mp4").symlink_to(tmp_path / "videos/nowhere.mp4")
    scan = scan_folder(tmp_path / "videos")
    assert scan.outside == ("a/2",)
    assert check_manifest(scan.manifest).missing == ("a/3",)


@pytest.mark.parametrize("num_classes", [3, 4, 5, 7, 10, 51, 101])
@pytest.mark.parametrize("shares", [(60, 20, 20), (98, 1, 1), (1, 1, 1)])
def test_no_class_is_in_two_splits_and_no_split_is_empty(num_classes: int, shares: tuple[int, int, int]) -> None:
    names = [f"class{number}" for number in range(num_classes)]
    split_of = split_classes(names, shares, seed=3)
    assert sorted(split_of) == sorted(names)
    counts = Counter(split_of.values())
    assert set(counts) == {"train", "val", "test"}
    for split, share in zip(("train", "val", "test"), shares, strict=True):
        # Largest remainders are off by less than one class; a split that would be empty takes one more.
        assert abs(counts[split] - num_classes * share / sum(shares)) < 1 or counts[split] == 1 or split == "train"


def test_share_of_zero_leaves_a_split_empty() -> None:
    assert set(split_classes(["a", "b", "c", "d"], (50, 0, 50), 0).values()) == {"train", "test"}


def test_split_depends_on_names_and_seed_alone() -> None:
    names = [f"class{number}" for number in range(10)]
    assert split_classes(names[::-1], (60, 20, 20), 0) == split_classes(names, (60, 20, 20), 0)
    assert split_classes(names, (60, 20, 20), 1) != split_classes(names, (60, 20, 20), 0)
    # Pinned: the same on every machine and with every version of numpy.
    held_out = {name: split for name, split in split_classes(names, (60, 20, 20), 0).items() if split != "train"}
    assert held_out == {"class2": "val", "class4": "val", "class7": "test", "class9": "test"}


def test_split_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    touch(tmp_path, "train/run/a.mp4", "val/walk/a.mp4", "test/jump/a.mp4", "test/jump/b/1.jpg", "readme.md")
    (tmp_path / "test/hop").mkdir()
    scan = scan_folder(tmp_path)
    assert scan.uses_split_folders
    assert {video.video_id: video.split for video in scan.manifest.videos} == {
        "run/a": "train",
        "walk/a": "val",
        "jump/a": "test",
        "jump/b": "test",
    }
    assert scan.empty_classes == ("hop",)
    assert scan.ignored == ("readme.md",)


def test_same_class_in_two_split_folders_gets_two_ids(tmp_path: Path) -> None:
    touch(tmp_path, "train/run/a.mp4", "test/run/a.mp4", "test/run/b.mp4")
    assert sorted(ids(tmp_path)) == ["run/b", "test/run/a", "train/run/a"]


def test_class_called_train_is_a_class(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.mp4", "plane/a.mp4", "car/a.mp4")
    assert sorted(ids(tmp_path)) == ["car/a", "plane/a", "train/a"]


def test_splits_mixed_with_classes_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train/run/a.mp4", "test/walk/a.mp4", "validation/jump/a.mp4")
    with pytest.raises(ManifestError, match="beside validation"):
        scan_folder(tmp_path)


@pytest.mark.parametrize("names", [["a.mp4"], ["run/deeper/a.mp4"], ["run/a.txt"], [".hidden/a.mp4"], []])
def test_folder_without_videos_is_refused(tmp_path: Path, names: list[str]) -> None:
    touch(tmp_path, *names)
    with pytest.raises(ManifestError, match=r"no video in .* expected FOLDER/class/video\.mp4"):
        scan_folder(tmp_path)


def test_shares_are_parsed_or_refused() -> None:
    assert parse_shares("60/20/20") == (60, 20, 20)
    for text in ("60/40", "60/20/20/0", "a/b/c", "0/0/0", "-1/2/3", "0.6/0.2/0.2", ""):
        with pytest.raises(ManifestError, match="write for instance 60/20/20"):
            parse_shares(text)
