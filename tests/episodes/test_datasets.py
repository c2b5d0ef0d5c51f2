"""Manifests: what is read, what is refused, what a hash covers, and that a file gives back what was written."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from episodes.datasets import Manifest, ManifestError, exclude, read_manifest, write_manifest
from episodes.video import Video

HEADER = "video_id,path,class_name,split"


def video(name: str, class_name: str = "walk", split: str = "train") -> Video:
    return Video(f"{class_name}/{name}", f"{class_name}/{name}.mp4", class_name, split)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_lines(*lines: str, name: str = "m.csv") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
        return path

    return write_lines


def test_plain_csv_takes_paths_from_its_own_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    manifest = read_manifest(write(HEADER, "a,clips/a.mp4,walk,train", "", '"b, 2",clips/b.mp4,"run, fast",val'))
    assert [entry.video_id for entry in manifest.videos] == ["a", "b, 2"]
    assert manifest.path_of(manifest.videos[0]) == tmp_path.resolve() / "clips/a.mp4"
    assert manifest.classes("val") == ["run, fast"]
    assert manifest.videos[0] == Video("a", "clips/a.mp4", "walk", "train")


def test_optional_columns_in_any_order_are_read(write: Callable[..., Path]) -> None:
    manifest = read_manifest(
        write(
            "split,excluded,end_seconds,start_seconds,subject,class_name,path,video_id",
            "test,broken,2.5,0.5,anna,walk,a.mp4,a",
            "test,,,,,walk,b.mp4,b",
        )
    )
    assert manifest.videos[0] == Video("a", "a.mp4", "walk", "test", 0.5, 2.5, "anna", "broken")
    assert manifest.videos[1] == Video("b", "b.mp4", "walk", "test")
    assert [entry.video_id for entry in manifest.videos_of("test")] == ["b"]


def test_spreadsheet_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(b"\xef\xbb\xbf" + HEADER.encode() + b"\r\na,a.mp4,walk,train\r\n")
    assert read_manifest(path).videos == (Video("a", "a.mp4", "walk", "train"),)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [HEADER, "a,a.mp4,walk,train", "b,b.mp4,walk,training"],
            r"line 3: .*'training' is not one of train, val, test",
        ),
        ([HEADER, "a,a.mp4,walk,train", "a,b.mp4,walk,train"], r"line 3: video_id 'a' is already in line 2"),
        (["video_id,path,split", "a,a.mp4,train"], "lacks class_name"),
        (
            ["video_id,path,clas_name,split", "a,a.mp4,walk,train"],
            "unknown column 'clas_name'; did you mean 'class_name'?",
        ),
        (["video_id;path;class_name;split", "a;a.mp4;walk;train"], "separated by commas"),
        ([f"{HEADER},split", "a,a.mp4,walk,train,train"], "column 'split' appears twice"),
        ([f"{HEADER},start_seconds", "a,a.mp4,walk,train,soon"], "line 2: start_seconds = 'soon' is not a number"),
        ([f"{HEADER},start_seconds", "a,a.mp4,walk,train,-1"], "line 2: .*start_seconds = -1.0 is not a time"),
        ([f"{HEADER},end_seconds", "a,a.mp4,walk,train,nan"], "line 2: .*end_seconds = nan is not a time"),
        ([f"{HEADER},start_seconds,end_seconds", "a,a.mp4,walk,train,2,2"], "line 2: .*end_seconds = 2.0 is not after"),
        ([HEADER, "a,a.mp4,walk"], "line 2: 3 cells, but the header has 4"),
        ([HEADER, "a,a\0.mp4,walk,train"], "line 2: .*NUL"),
        ([HEADER, "a,a.mp4,,train"], "line 2: .*class_name is empty"),
        ([HEADER, '"a,a.mp4,walk,train'], "not CSV"),
        ([HEADER], "lists no video"),
        ([""], "lacks video_id"),
        (["# root: x", "# root: y", HEADER, "a,a.mp4,walk,train"], "line 2: a second line"),
        (["# root:", HEADER, "a,a.mp4,walk,train"], "line 1: .*names no folder"),
        (["# note", HEADER, "a,a.mp4,walk,nowhere"], "line 3: .*'nowhere'"),
    ],
)
def test_wrong_file_is_refused_with_its_line(write: Callable[..., Path], lines: list[str], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read_manifest(write(*lines))


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"none\.csv cannot be read: No such file"):
        read_manifest(tmp_path / "none.csv")


@pytest.mark.parametrize("path", ["../a.mp4", "clips/../../a.mp4", "/somewhere/a.mp4"])
def test_path_out_of_the_root_needs_permission(write: Callable[..., Path], path: str) -> None:
    file = write(HEADER, f"a,{path},walk,train")
    with pytest.raises(ManifestError, match=r"line 2: path .* set data\.allow_outside = true"):
        read_manifest(file)
    assert read_manifest(file, allow_outside=True).videos[0].path == path


def test_link_out_of_the_root_needs_permission(write: Callable[..., Path], tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "clips").mkdir(parents=True)
    outside.mkdir()
    (outside / "a.mp4").touch()
    (inside / "clips/a.mp4").symlink_to(outside / "a.mp4")
    (inside / "folder").symlink_to(outside)
    (inside / "clips/own.mp4").touch()
    (inside / "clips/same.mp4").symlink_to(inside / "clips/own.mp4")
    for path in ("clips/a.mp4", "folder/a.mp4", "folder/absent.mp4"):
        file = write(HEADER, f"a,{path},walk,train", name="inside/m.csv")
        with pytest.raises(ManifestError, match="through a link"):
            read_manifest(file)
        read_manifest(file, allow_outside=True)
    read_manifest(write(HEADER, "a,clips/same.mp4,walk,train", name="inside/m.csv"))


def test_links_in_a_circle_are_left_to_whoever_reads_the_video(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to(tmp_path / "b.mp4")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "a.mp4")
    assert read_manifest(write(HEADER, "a,a.mp4,walk,train")).videos[0].path == "a.mp4"


def test_root_line_moves_the_root_and_keeps_its_border(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "clips").mkdir()
    relative = write("# root: ../clips", HEADER, "a,a.mp4,walk,train", name="work/m.csv")
    absolute = write(f"# root: {tmp_path / 'clips'}", HEADER, "a,a.mp4,walk,train", name="work/n.csv")
    for file in (relative, absolute):
        manifest = read_manifest(file)
        assert manifest.path_of(manifest.videos[0]) == tmp_path.resolve() / "clips/a.mp4"
    with pytest.raises(ManifestError, match=r"by '\.\.'"):
        read_manifest(write("# root: ../clips", HEADER, "a,../a.mp4,walk,train", name="work/m.csv"))


@pytest.mark.parametrize("where", ["clips/m.csv", "m.csv", "deep/er/m.csv"])
def test_written_manifest_reads_back_wherever_it_lies(tmp_path: Path, where: str) -> None:
    root = tmp_path / "clips"
    root.mkdir()
    videos = (
        video("a"),
        Video('odd "name", 1', "odd/na me#1!;&.mp4", "hurling (sport)", "val", 0.1, 2.0, "ben", "it's, well, broken"),
        Video("line\nbreak\r", "li\nne.mp4", " spaces ", "test"),
        Video("not \udcff utf-8", "not \udcff.mp4", "ü", "test", start_seconds=1e-9),
    )
    manifest = Manifest(videos, root)
    write_manifest(manifest, tmp_path / where)
    back = read_manifest(tmp_path / where)
    assert [entry.video_id for entry in back.videos] == [entry.video_id for entry in videos]
    for before, after in zip(videos, back.videos, strict=True):
        assert replace(after, path=before.path) == before
        assert back.path_of(after) == manifest.path_of(before)
    assert back.split_hash == manifest.split_hash
    assert [entry.name for entry in (tmp_path / where).parent.iterdir() if "partial" in entry.name] == []


def test_manifest_above_its_videos_stays_plain_and_relative(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    write_manifest(Manifest((video("a"),), tmp_path / "clips"), tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_text() == f"{HEADER}\nwalk/a,clips/walk/a.mp4,walk,train\n"


def test_failed_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    write_manifest(Manifest((video("a"),), tmp_path), path)
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        # A lone surrogate that stands for no byte cannot be written in any file.
        write_manifest(Manifest((video("\ud800"),), tmp_path), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_manifest_refuses_two_videos_of_one_id(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="'walk/a' appears twice"):
        Manifest((video("a"), video("a")), tmp_path)


def test_split_hash_ignores_order_places_and_wording(tmp_path: Path) -> None:
    videos = [video(str(number), class_name) for class_name in ("run", "walk") for number in range(9)]
    videos[3] = replace(videos[3], excluded="too short", start_seconds=1)
    manifest = Manifest(tuple(videos), tmp_path)
    shuffled = random.Random(0).sample(videos, len(videos))
    moved = [
        replace(
            entry,
            path=f"x/{entry.path}",
            subject="s",
            excluded=entry.excluded and "broken",
            start_seconds=entry.start_seconds,
        )
        for entry in shuffled
    ]
    assert Manifest(tuple(moved), tmp_path / "elsewhere").split_hash == manifest.split_hash
    as_float = [replace(entry, start_seconds=entry.start_seconds and 1.0) for entry in videos]
    assert Manifest(tuple(as_float), tmp_path).split_hash == manifest.split_hash


@pytest.mark.parametrize(
    "change",
    [
        {"split": "val"},
        {"class_name": "run"},
        {"video_id": "walk/c"},
        {"start_seconds": 1.0},
        {"end_seconds": 1.0},
        {"excluded": "broken"},
    ],
)
def test_split_hash_covers_all_that_episodes_depend_on(tmp_path: Path, change: dict[str, str | float]) -> None:
    first, second = video("a"), video("b")
    # mypy cannot see through a dict of keyword arguments.
    changed = Manifest((first, replace(second, **change)), tmp_path)  # type: ignore[arg-type]
    assert changed.split_hash != Manifest((first, second), tmp_path).split_hash


def test_split_hash_is_pinned_for_ever(tmp_path: Path) -> None:
    # Results name this hash. If the test fails, every published number of ours loses its episodes.
    manifest = Manifest((video("a"), replace(video("b", "ü", "test"), start_seconds=0.1, excluded="x")), tmp_path)
    assert manifest.split_hash == "474ad4b58e7c6b4383d6317e5c738c15b5c1884d2d48d00b6df5d402a6c4b756"


def test_names_cannot_be_shifted_between_columns(tmp_path: Path) -> None:
    one = Manifest((Video('b", "c', "p", "a", "train"),), tmp_path)
    other = Manifest((Video("c", "p", 'a", "b', "train"),), tmp_path)
    assert one.split_hash != other.split_hash


def test_excluding_changes_the_hash_and_keeps_the_first_reason(tmp_path: Path) -> None:
    manifest = Manifest((video("a"), video("b"), video("c", "run")), tmp_path)
    once = exclude(manifest, {"walk/a": "broken", "run/c": "short"})
    assert once.split_hash != manifest.split_hash
    assert [entry.video_id for entry in once.videos_of("train")] == ["walk/b"]
    assert once.classes("train") == ["walk"]
    assert once.all_classes == ["run", "walk"]
    twice = exclude(once, {"walk/a": "other words"})
    assert twice.videos == once.videos
    with pytest.raises(ManifestError, match="'walk/z'"):
        exclude(manifest, {"walk/z": "broken"})


def test_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="'validation' is not one of"):
        Manifest((video("a"),), tmp_path).videos_of("validation")
