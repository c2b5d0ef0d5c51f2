"""The published protocols: shipped classes, lists, sizes, and names that do not match at first sight.

The real lists are used where they lie beside the repository (../shared/splits); generated ones of the same format stand in
elsewhere. That every SSv2-all pseudo-class is one official class cannot be tested without the official labels.
"""

from collections import Counter
from pathlib import Path

import pytest

from episodes.checks import check_manifest, refuse_overlap
from episodes.datasets import ManifestError, read_manifest, write_manifest
from episodes.published import published_manifest, read_list
from episodes.splits import DATASETS, SplitSize
from episodes.video import SPLITS

REAL_LISTS = Path(__file__).resolve().parents[2].parent / "shared" / "splits"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write_lists(folder: Path, train: list[str], val: list[str], test: list[str], number: str = "03") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in zip(SPLITS, (train, val, test), strict=True):
        (folder / f"{split}list{number}.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


def lists_of(name: str, tmp_path: Path) -> tuple[Path, dict[str, SplitSize]]:
    """Folder of a protocol's lists and the sizes to expect: the real ones, or small ones made here."""
    dataset = DATASETS[name]
    real = REAL_LISTS / dataset.lists_folder
    if real.is_dir():
        return real, dict(dataset.sizes)
    lines = [[f"{split} class {c}/{split}_{c}_{v}" for c in range(4) for v in range(5 + c)] for split in SPLITS]
    made = write_lists(tmp_path / "lists", lines[0], lines[1], lines[2], dataset.list_number)
    return made, {split: SplitSize(4, 26, 5, 8) for split in SPLITS}


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_lists_have_the_published_sizes_and_no_overlap(name: str, tmp_path: Path) -> None:
    lists, sizes = lists_of(name, tmp_path)
    is_real = lists.parent == REAL_LISTS
    # One video on disk is enough: the others are listed as missing and counted all the same.
    first = read_list(lists / f"trainlist{DATASETS[name].list_number}.txt", "train")[0]
    touch(tmp_path / "videos", f"{first.name}.avi")
    published = published_manifest(name, tmp_path / "videos", lists)
    check = check_manifest(published.manifest, name)
    assert check.splits == sizes
    assert check.overlaps == ()
    assert check.duplicates == ()
    assert check.similar_classes == ()
    assert len(published.missing) == len(published.manifest.videos) - 1
    assert first.video_id not in published.missing
    # The MD5 prefixes of the published lists.
    assert bool(published.unknown_lists) != is_real
    assert bool(check.differences) != is_real
    # Names alone tell videos apart: nothing is in two splits even under another class.
    names = Counter(video.video_id.rpartition("/")[2].lower().replace(" ", "_") for video in published.manifest.videos)
    assert names.most_common(1)[0][1] == 1


@pytest.mark.parametrize(("name", "counts"), [("ucf101", (70, 10, 21)), ("hmdb51", (31, 10, 10))])
def test_shipped_classes_are_those_of_the_lists(name: str, counts: tuple[int, int, int]) -> None:
    dataset = DATASETS[name]
    partition = dataset.partition
    assert partition is not None
    assert tuple(len(set(partition[split])) for split in SPLITS) == counts
    assert len(dataset.split_of_class()) == sum(counts)
    folder = REAL_LISTS / dataset.lists_folder
    if folder.is_dir():
        for split in SPLITS:
            listed = {line.class_name for line in read_list(folder / f"{split}list{dataset.list_number}.txt", split)}
            assert listed == set(partition[split])


@pytest.mark.parametrize("name", [pytest.param("ucf101", marks=pytest.mark.slow), "hmdb51"])
def test_class_folders_alone_give_the_same_split_as_the_lists(name: str, tmp_path: Path) -> None:
    dataset = DATASETS[name]
    if (REAL_LISTS / dataset.lists_folder).is_dir():
        lists = REAL_LISTS / dataset.lists_folder
    else:
        lines = [[f"{c}/{c}_{v}" for c in (dataset.partition or {})[split] for v in range(3)] for split in SPLITS]
        lists = write_lists(tmp_path / "lists", lines[0], lines[1], lines[2], dataset.list_number)
    for split in SPLITS:
        touch(
            tmp_path / "videos",
            *(f"{line.video_id}.avi" for line in read_list(lists / f"{split}list{dataset.list_number}.txt", split)),
        )
    by_class = published_manifest(name, tmp_path / "videos")
    by_list = published_manifest(name, tmp_path / "videos", lists)
    assert by_class.manifest.split_hash == by_list.manifest.split_hash
    assert set(by_class.manifest.videos) == set(by_list.manifest.videos)
    assert by_class.missing_classes == ()
    assert by_list.missing == ()
    refuse_overlap(by_class.manifest)
    write_manifest(by_class.manifest, tmp_path / "elsewhere" / "m.csv")
    check = check_manifest(read_manifest(tmp_path / "elsewhere" / "m.csv"), name)
    assert check.missing == ()
    assert bool(check.differences) != (lists.parent == REAL_LISTS)


def test_upper_and_lower_case_of_ucf_names_do_not_matter(tmp_path: Path) -> None:
    lists = write_lists(
        tmp_path / "lists",
        ["Archery/v_Archery_g01"],
        ["HandstandPushups/v_HandStandPushups_g01"],
        ["Diving/v_Diving_g01"],
    )
    touch(tmp_path / "videos", "Archery/v_Archery_g01.avi", "HandstandPushups/v_HandstandPushups_g01.avi")
    published = published_manifest("ucf101", tmp_path / "videos", lists)
    assert {video.video_id: video.path for video in published.manifest.videos} == {
        "Archery/v_Archery_g01": "Archery/v_Archery_g01.avi",
        "HandstandPushups/v_HandStandPushups_g01": "HandstandPushups/v_HandstandPushups_g01.avi",
        "Diving/v_Diving_g01": "Diving/v_Diving_g01",
    }
    assert published.missing == ("Diving/v_Diving_g01",)


def test_hmdb_names_are_matched_whole_and_with_all_their_signs(tmp_path: Path) -> None:
    odd = "(Rad)Schlag_die_Bank!_cart#1;&[x]_f"
    lists = write_lists(
        tmp_path / "lists", ["sword_exercise/s_1"], [f"cartwheel/{odd}"], ["kick/k_1", "kick_ball/k_1_ball"]
    )
    touch(tmp_path / "videos", f"cartwheel/{odd}.avi", "kick/k_1.avi", "kick_ball/k_1_ball.avi", "sword/s_1_x.avi")
    published = published_manifest("hmdb51", tmp_path / "videos", lists)
    assert published.missing == ("sword_exercise/s_1",)
    assert published.num_unlisted == 1
    assert {video.path for video in published.manifest.videos_of("test")} == {"kick/k_1.avi", "kick_ball/k_1_ball.avi"}


def test_kinetics_ids_keep_their_case_and_classes_their_spaces(tmp_path: Path) -> None:
    lists = write_lists(
        tmp_path / "lists",
        ["hurling (sport)/-aB_c_000001_000011", "hurling (sport)/-ab_C_000001_000011"],
        ["baking cookies/xx_000001_000011"],
        ["blasting sand/yy_000001_000011"],
    )
    touch(
        tmp_path / "videos", "train/hurling_(sport)/-aB_c_000001_000011.mp4", "val/baking cookies/xx_000001_000011.mkv"
    )
    published = published_manifest("kinetics100", tmp_path / "videos", lists)
    assert published.missing == ("hurling (sport)/-ab_C_000001_000011", "blasting sand/yy_000001_000011")
    assert published.manifest.classes("train") == ["hurling (sport)"]


def test_ssv2_is_found_flat_and_in_frame_folders(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists", ["a, b's (c)/1", "x/2"], ["y/3"], ["pull / push/4"])
    touch(tmp_path / "videos", "1.webm", "frames/2/00000001.jpg", "frames/2/00000002.jpg", "3.webm", "4.webm")
    published = published_manifest("ssv2-part", tmp_path / "videos", lists)
    assert published.missing == ()
    assert {video.path for video in published.manifest.videos} == {"1.webm", "frames/2", "3.webm", "4.webm"}
    # The last slash parts class and video.
    assert published.manifest.classes("test") == ["pull / push"]


def test_spaces_and_underscores_are_the_same_in_video_names(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists", ["a/the clip 1"], ["b/the_clip_2"], ["c/the clip_3"])
    touch(tmp_path / "videos", "the_clip_1.mp4", "the clip 2.mp4", "the clip_3.mp4", "the_clip_3.mp4")
    published = published_manifest("kinetics100", tmp_path / "videos", lists)
    paths = [video.path for video in published.manifest.videos]
    assert paths == ["the_clip_1.mp4", "the clip 2.mp4", "the clip_3.mp4"]


def test_name_that_fits_two_videos_is_refused_with_both(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists", ["a/1"], ["b/2"], ["c/3"])
    touch(tmp_path / "videos", "x/1.mp4", "y/1.mp4")
    with pytest.raises(ManifestError, match=r"'a/1' could be x/1\.mp4 or y/1\.mp4"):
        published_manifest("kinetics100", tmp_path / "videos", lists)
    touch(tmp_path / "videos", "a/1.mp4")
    published = published_manifest("kinetics100", tmp_path / "videos", lists)
    assert published.manifest.videos[0].path == "a/1.mp4"


def test_two_listed_names_never_share_a_file(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists", ["a/x 1"], ["b/x_1"], ["c/3"])
    touch(tmp_path / "videos", "x_1.mp4")
    with pytest.raises(ManifestError, match="fits both 'a/x 1' and 'b/x_1'"):
        published_manifest("kinetics100", tmp_path / "videos", lists)


def test_wrong_folder_of_videos_is_refused(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists", ["a/1"], ["b/2"], ["c/3"])
    touch(tmp_path / "videos", "other.mp4")
    with pytest.raises(ManifestError, match="none of the 3 listed videos"):
        published_manifest("ucf101", tmp_path / "videos", lists)
    with pytest.raises(ManifestError, match="no video in a class folder of UCF101"):
        published_manifest("ucf101", tmp_path / "videos")


def test_lists_are_found_by_the_numbers_that_exist(tmp_path: Path) -> None:
    touch(tmp_path / "videos", "1.mp4", "2.mp4", "3.mp4")
    lines = (["a/1"], ["b/2"], ["c/3"])
    for folder in ("only", "nested/ssv2_OTAM"):
        write_lists(tmp_path / folder, *lines, number="03")
        assert (
            len(published_manifest("ssv2-all", tmp_path / "videos", tmp_path / folder.split("/")[0]).manifest.videos)
            == 3
        )
    both = write_lists(tmp_path / "only", ["a/1"], ["b/2"], ["c/9"], number="07")
    assert published_manifest("ssv2-all", tmp_path / "videos", both).missing == ("c/9",)
    two = write_lists(write_lists(tmp_path / "two", *lines, number="01"), *lines, number="02")
    with pytest.raises(ManifestError, match=r"lists 0[12], 0[12], but not 07"):
        published_manifest("ssv2-all", tmp_path / "videos", two)
    (two / "vallist01.txt").unlink()
    (two / "vallist02.txt").unlink()
    with pytest.raises(ManifestError, match=r"does not hold trainlist07\.txt"):
        published_manifest("ssv2-all", tmp_path / "videos", two)


def test_line_without_a_class_is_refused(tmp_path: Path) -> None:
    lists = write_lists(tmp_path / "lists", ["a/1", "2"], ["b/2"], ["c/3"])
    with pytest.raises(ManifestError, match=r"trainlist03\.txt, line 2: '2' is not of the form class/video"):
        published_manifest("ucf101", tmp_path, lists)


@pytest.mark.parametrize("name", ["ssv2-part", "ssv2-all", "kinetics100"])
def test_chosen_videos_need_lists(name: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="give --lists DIR"):
        published_manifest(name, tmp_path)


def test_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="'UCF-101'; did you mean 'ucf101'"):
        published_manifest("UCF-101", tmp_path)


def test_class_folders_are_matched_without_case_spaces_and_hyphens(tmp_path: Path) -> None:
    touch(tmp_path, "Shot-put/1.avi", "apply_eye makeup/2.avi", "Extra/3.avi", "YoYo/thumbnail.jpg", "YoYo/4.avi")
    published = published_manifest("ucf101", tmp_path)
    assert {(video.video_id, video.split) for video in published.manifest.videos} == {
        ("Shotput/1", "val"),
        ("ApplyEyeMakeup/2", "train"),
        ("YoYo/4", "train"),
    }
    assert published.unknown_folders == ("Extra",)
    assert len(published.missing_classes) == 98
    touch(tmp_path, "shotput/5.avi")
    with pytest.raises(ManifestError, match="could be the folder 'Shot-put' or 'shotput'"):
        published_manifest("ucf101", tmp_path)


def test_kick_is_not_kick_ball(tmp_path: Path) -> None:
    touch(tmp_path, "kick ball/1.avi", "kick/1.avi", "sword/1.avi", "Sword-Exercise/1.avi", "climb stairs/stairs/1.avi")
    published = published_manifest("hmdb51", tmp_path)
    assert {video.video_id: video.path for video in published.manifest.videos} == {
        "kick_ball/1": "kick ball/1.avi",
        "kick/1": "kick/1.avi",
        "sword/1": "sword/1.avi",
        "sword_exercise/1": "Sword-Exercise/1.avi",
        "climb_stairs/1": "climb stairs/stairs/1.avi",
    }
