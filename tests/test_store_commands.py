"""`mastaf store ...` as its users meet it: real processes, real stores, exit codes and words."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.open import open_store
from contracts.corpus import write_corpus
from contracts.flips import contents, group_of
from contracts.world import World, make_world
from episodes.datasets import Manifest, read_manifest, write_manifest
from episodes.video import Video
from extract.errors import REASONS

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "sampling.num_frames=4", "sampling.resize_size=28", "sampling.crop_size=24", "backbone.options.width=4",
    "store.shard_rows=4", "extraction.forward_batch=4", "extraction.decode_workers=1",
]  # fmt: skip
BACKBONE = ["--backbone", "small3d", "--weights", "random:1", "--device", "cpu"]
SET_SMALL = [word for override in SMALL for word in ("--set", override)]


def mastaf(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in its own process and hold it to its exit code."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def printed(*arguments: object, code: int = 0) -> Any:
    return json.loads(mastaf(*arguments, "--json", code=code).stdout)


def extract(manifest: Path, store: Path, *options: str) -> Any:
    return printed("extract", "--manifest", manifest, "--store", store, *BACKBONE, *SET_SMALL, *options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), videos_per_class=3)


@pytest.fixture(scope="module")
def stores(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full store of each backend; do not change them."""
    folder = tmp_path_factory.mktemp("stores")
    for ending in ("zarr", "h5"):
        extract(world.manifest_path, folder / f"good.{ending}")
    return {ending: folder / f"good.{ending}" for ending in ("zarr", "h5")}


def content_hash(store: Path) -> str:
    with open_store(store) as opened:
        return opened.content_hash()


def test_both_backends_hold_the_same_content(stores: dict[str, Path]) -> None:
    assert content_hash(stores["zarr"]) == content_hash(stores["h5"])


def flip(store: Path, draws: random.Random) -> str:
    """Flip one bit of one file; groups of files are drawn alike. Returns the file's name."""
    groups: dict[str, list[str]] = {}
    for name in sorted(contents(store)):
        groups.setdefault(group_of(name), []).append(name)
    name = draws.choice(groups[draws.choice(sorted(groups))])
    data = bytearray((store / name).read_bytes())
    bit = draws.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    (store / name).write_bytes(data)
    return name


@pytest.mark.parametrize("ending", ["zarr", pytest.param("h5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_flips", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.campaign])])
def test_flips_are_verified_and_repaired_by_the_commands(
    world: World, stores: dict[str, Path], tmp_path: Path, ending: str, num_flips: int
) -> None:
    draws = random.Random(num_flips)
    wanted = content_hash(stores[ending])
    before = contents(stores[ending])
    for number in range(num_flips):
        store = tmp_path / f"{number}.{ending}"
        shutil.copytree(stores[ending], store)
        name = flip(store, draws)
        report = printed("store", "verify", store, code=1)
        assert not report["is_whole"]
        assert [damage["file"] for damage in report["damages"]] == [name]
        report = printed("store", "repair", store, "--manifest", world.manifest_path, "--device", "cpu")
        assert report["num_rows_pending"] == 0
        assert report["num_rows_changed"] in (0, None)
        assert printed("store", "verify", store)["is_whole"]
        assert content_hash(store) == wanted
        after = contents(store)
        assert {file for file in before if after.get(file) != before[file]} <= {
            file for file in before if file.endswith(".jsonl")
        }
        shutil.rmtree(store)


def test_verify_says_what_is_wrong_and_how_to_mend_it(stores: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "S.zarr"
    shutil.copytree(stores["zarr"], store)
    done = mastaf("store", "verify", store)
    assert "\nwhole: 6 shards, 21 rows, " in done.stderr
    (store / "cube/c.1.0.0.0.0").unlink()
    done = mastaf("store", "verify", store, "--fast", code=1)
    assert "data: cube/c.1.0.0.0.0: missing; rows " in done.stderr
    assert f"Mend: mastaf store repair {store}" in done.stderr
    done = mastaf("store", "repair", store, code=1)
    assert "4 rows have to be extracted" in done.stderr


@pytest.mark.slow
def test_repair_refuses_other_weights_and_changes_no_row(world: World, stores: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "S.zarr"
    shutil.copytree(stores["zarr"], store)
    (store / "cube/c.1.0.0.0.0").unlink()
    done = mastaf(
        "store", "repair", store, "--manifest", world.manifest_path, "--weights", "random:2", "--device", "cpu", code=2
    )
    assert "weights_digest" in done.stderr
    with open_store(store) as opened:
        assert opened.pending() == []


def damaged_copy(good: Path, target: Path) -> Path:
    """A copy whose shard 1 cannot be read."""
    shutil.copytree(good, target)
    (file,) = [*target.glob("cube/c.1.*"), *target.glob("parts/000001.h5")]
    file.write_bytes(b"")
    return target


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["zarr", "h5"])
@pytest.mark.parametrize("is_dropped_before", [False, True])
def test_repair_drops_nothing_that_it_cannot_make_from_the_same_files(
    world: World, stores: dict[str, Path], tmp_path: Path, ending: str, is_dropped_before: bool
) -> None:
    store = damaged_copy(stores[ending], tmp_path / f"S.{ending}")
    if is_dropped_before:
        assert "4 rows have to be extracted" in mastaf("store", "repair", store, code=1).stderr
    with open_store(store) as opened:
        wanted, video_id = stores[ending], opened.ids()[4]  # the first of shard 1
    folder = tmp_path / "elsewhere"
    shutil.copytree(world.folder, folder)
    original = folder / f"videos/{video_id}.mp4"
    manifest = folder / world.manifest_path.name
    before = contents(store)
    original.unlink()
    done = mastaf("store", "repair", store, "--manifest", manifest, "--device", "cpu", code=2)
    assert (
        f"the files of 1 videos that have to be extracted anew cannot be found: {video_id} ({original})" in done.stderr
    )
    assert contents(store) == before
    shutil.copy(world.folder / "videos/jump/2.mp4", original)
    done = mastaf("store", "repair", store, "--manifest", manifest, "--device", "cpu", code=2)
    assert f"1 videos that have to be extracted anew were made from other input: {video_id} (stored from" in done.stderr
    assert contents(store) == before
    report = printed("store", "repair", store, "--manifest", world.manifest_path, "--device", "cpu")
    assert (report["num_rows_lost"], report["num_rows_changed"], report["num_rows_pending"]) == (0, 0, 0)
    assert content_hash(store) == content_hash(wanted)


@pytest.mark.slow
def test_shard_with_videos_that_the_manifest_lacks_is_kept(
    world: World, stores: dict[str, Path], tmp_path: Path
) -> None:
    store = damaged_copy(stores["zarr"], tmp_path / "S.zarr")
    (store / "cube/c.2.0.0.0.0").unlink()
    with open_store(store) as opened:
        lacking = opened.ids()[5]
    few = tuple(video for video in world.manifest.videos if video.video_id != lacking)
    write_manifest(Manifest(few, world.folder), tmp_path / "M.csv")
    done = mastaf("store", "repair", store, "--manifest", tmp_path / "M.csv", "--device", "cpu", "--json", code=1)
    assert "shard 1 stays as it is, with what can still be read of it: 1 of its rows are of videos that" in done.stderr
    assert f"{tmp_path}/M.csv lacks ({lacking})" in done.stderr
    assert "1 of 1 dropped shards extracted anew; 0 rows are pending" in done.stderr
    report = json.loads(done.stdout)
    assert (report["dropped_shards"], report["kept_shards"], report["num_rows_pending"]) == ([2], [1], 0)
    assert {damage["shard"] for damage in printed("store", "verify", store, code=1)["damages"]} == {1}
    mastaf("store", "repair", store, "--manifest", world.manifest_path, "--device", "cpu")
    assert content_hash(store) == content_hash(stores["zarr"])


@pytest.mark.slow
def test_rows_that_are_lost_or_changed_are_counted_apart(world: World, stores: dict[str, Path], tmp_path: Path) -> None:
    store = damaged_copy(stores["zarr"], tmp_path / "S.zarr")
    with open_store(store) as opened:
        ids = opened.ids()[4:8]
    folder = tmp_path / "elsewhere"
    shutil.copytree(world.folder, folder)
    # Of the same size: one cannot be decoded, one shows something else.
    for video_id in ids[:2]:
        file = folder / f"videos/{video_id}.mp4"
        data = file.read_bytes()
        file.write_bytes(bytes(len(data)))
    other = folder / f"videos/{ids[1]}.mp4"
    donors = (path for path in world.folder.glob("videos/*/*.mp4") if path != world.folder / f"videos/{ids[1]}.mp4")
    smaller = min(donors, key=lambda path: path.stat().st_size).read_bytes()
    other.write_bytes(smaller + bytes(other.stat().st_size - len(smaller)))
    done = mastaf("store", "repair", store, "--manifest", folder / "videos.csv", "--device", "cpu", "--json", code=1)
    report = json.loads(done.stdout)
    assert (report["num_rows_lost"], report["num_rows_changed"], report["num_rows_pending"]) == (1, 1, 0)
    assert f"LOST: 1 rows were good and are rejected now: {ids[0]} (view 0)" in done.stderr
    assert "warning: 1 of 4 rows differ in some bits from what they were" in done.stderr
    assert f"{ids[1]} (view 0)" in done.stderr


def test_missing_store_is_one_line(tmp_path: Path) -> None:
    for words in (["verify"], ["repair"], ["info"], ["failures"], ["remove"], ["convert"]):
        done = mastaf(
            "store",
            *words,
            tmp_path / "none.zarr",
            *([tmp_path / "x.zarr"] * (words == ["convert"])),
            *(["v"] * (words == ["remove"])),
            code=2,
        )
        assert done.stderr.count("\n") == 1
        assert "there is no store at" in done.stderr


def test_removed_videos_are_gone_and_conversion_gives_the_space_back(stores: dict[str, Path], tmp_path: Path) -> None:
    store = tmp_path / "S.zarr"
    shutil.copytree(stores["zarr"], store)
    names = tmp_path / "names.txt"
    names.write_text("left/0\nleft/1\n", encoding="utf-8")
    assert printed("store", "remove", store, "up/0", "--from", names)["num_videos"] == 18
    assert contents(store).keys() >= contents(stores["zarr"]).keys()
    report = printed("store", "convert", store, tmp_path / "T.h5", "--compression", "gzip")
    assert report["num_rows"] == 18
    facts = printed("store", "info", tmp_path / "T.h5")
    assert (facts["backend"], facts["num_videos"], facts["num_ok"]) == ("hdf5", 18, 18)
    assert facts["content_hash"] == printed("store", "info", store)["content_hash"]
    done = mastaf("store", "remove", store, "up/0", code=2)
    assert "'up/0' is not in the store" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["zarr", "h5"])
def test_plan_gives_the_bytes_and_files_that_extraction_makes(world: World, tmp_path: Path, ending: str) -> None:
    store = tmp_path / f"S.{ending}"
    plan = printed("store", "plan", store, "--manifest", world.manifest_path, *BACKBONE, *SET_SMALL, "--sample", "10")
    assert list(tmp_path.glob(".mastaf-plan*")) == []
    assert not store.exists()
    assert plan["num_rows"] == 21
    assert plan["seconds"] > 0
    extract(world.manifest_path, store)
    files = [file for file in store.rglob("*") if file.is_file()]
    assert plan["num_files"] == len(files)
    assert plan["num_bytes"] == pytest.approx(sum(file.stat().st_size for file in files), rel=0.02)
    again = printed("store", "plan", store, "--manifest", world.manifest_path, *BACKBONE, *SET_SMALL, "--sample", "10")
    assert again["num_rows"] == 0


@pytest.mark.slow
def test_every_kind_of_input_ends_as_the_corpus_says_and_good_neighbours_are_untouched(
    world: World, tmp_path: Path
) -> None:
    kinds = write_corpus(tmp_path / "corpus")
    # As root nothing is closed to us; these kinds have their own test, as another user.
    kinds = [kind for kind in kinds if not kind.is_closed_to_others]
    assert len(kinds) >= 108
    videos = [
        Video(f"kind {index:03d}", str(kind.path.relative_to(tmp_path)), "odd", "train")
        for index, kind in enumerate(kinds)
        if _can_be_in_a_manifest(kind.path, tmp_path)
    ]
    good = [
        Video(video.video_id, str(Path("world", video.path)), video.class_name, video.split)
        for video in read_manifest(world.manifest_path).videos
    ]
    shutil.copytree(world.folder / "videos", tmp_path / "world" / "videos")
    # A good one after each few odd ones.
    mixed = [*good, *videos]
    random.Random(0).shuffle(mixed)
    write_manifest(Manifest(tuple(mixed), tmp_path), tmp_path / "mixed.csv")
    # The corpus states its outcomes for clips of eight frames.
    as_corpus = ["--set", "sampling.num_frames=8", "--set", "sampling.resize_size=32", "--set", "sampling.crop_size=32"]
    extract(world.manifest_path, tmp_path / "clean.zarr", *as_corpus)
    report = extract(tmp_path / "mixed.csv", tmp_path / "S.zarr", "--set", "data.allow_outside=true", *as_corpus)
    assert report["num_videos"] == len(mixed) == report["num_ok"] + report["num_degraded"] + report["num_rejected"]
    assert report["num_restarts"] == 0
    with open_store(tmp_path / "S.zarr") as store, open_store(tmp_path / "clean.zarr") as clean:
        for video in good:
            np.testing.assert_array_equal(store.read([video.video_id], [0]), clean.read([video.video_id], [0]))
        for video in videos:
            kind = kinds[int(video.video_id.split()[1])]
            outcome = store.outcome(video.video_id)
            assert outcome is not None
            assert outcome.status in kind.statuses, (kind.name, outcome)
            assert outcome.reason == kind.reason, (kind.name, outcome)
    reasons = Counter(problem["reason"] for problem in report["problems"])
    assert set(reasons) <= set(REASONS)
    assert len(reasons) >= 10
    failures = printed("store", "failures", tmp_path / "S.zarr")
    assert Counter(row["reason"] for row in failures) == reasons


def _can_be_in_a_manifest(path: Path, root: Path) -> bool:
    """Some names cannot stand in a CSV of UTF-8 lines; they are tested without one."""
    name = str(path.relative_to(root))
    return name.isprintable() and name == name.strip() and not re.search(r"[\r\n]", name)
