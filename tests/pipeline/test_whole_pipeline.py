"""`mastaf pipeline`: every stage once, whatever stops it; what is on disk decides what is finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
from cache.open import open_store
from configs.load import ConfigError, to_toml
from configs.whole import load_pipeline, pipeline_folder
from contracts.world import World, make_world, write_clip
from episodes.sampler import SamplerError
from pipeline import training, whole_configs, whole_making, whole_pipeline
from pipeline.card_reading import read_card
from pipeline.checkpoint import load_checkpoint
from pipeline.demo import render_videos
from pipeline.demo_classes import MOTION_CLASSES
from pipeline.interrupts import Stopped
from pipeline.learning import Learner
from pipeline.provenance import code_version
from pipeline.reproduce_command import reproduce
from pipeline.run_lock import locked
from pipeline.settings import SetupError
from pipeline.sources import CachedCubes
from pipeline.train_command import EvaluationRequest, evaluate_folder
from pipeline.training import train
from pipeline.weights_files import weights_name
from pipeline.whole_configs import load_configs
from pipeline.whole_pipeline import run_pipeline

ROOT = Path(__file__).resolve().parents[2]
KILLED = Path(__file__).with_name("killed_pipeline.py")
STAGES = ["train", "extract", "heads/neighbor", "heads/mastaf", "compare/1shot", "compare/2shot", "live"]
HEADS_RECIPE = """
[episodes]
n_way = 2
n_query = 1
[training]
episodes = 12
episodes_per_step = 3
validate_every = 6
validation_episodes = 8
cube_cache_bytes = 1000000
"""
PIPELINE = """
[pipeline]
backbone = "end_to_end.toml"
heads_recipe = "heads.toml"
heads = ["neighbor", "mastaf"]
# Another number of threads gives other last bits, in this process as in those that are killed.
threads = 1
[pipeline.compare]
episodes = 20
shots = [1, 2]
[pipeline.set]
extraction.decode_workers = 0
"training.decode_workers" = 0
"""

pytestmark = pytest.mark.usefixtures("one_thread", "few_timed_calls")


def write_files(world: World, folder: Path, pipeline: str = PIPELINE) -> Path:
    """A pipeline with its recipes; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "end_to_end.toml").write_text(to_toml(world.config("training.mode=end_to_end")))
    classify = world.config("training.mode=classify", "head.name=protonet", "training.episodes=6")
    (folder / "classify.toml").write_text(to_toml(classify))
    (folder / "heads.toml").write_text(HEADS_RECIPE)
    (folder / "small.toml").write_text(pipeline)
    return folder / "small.toml"


@pytest.fixture(scope="module")
def file(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(world, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def finished(file: Path) -> Path:
    """A pipeline that was run once; read only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(file, file.parent / "finished")
    torch.set_num_threads(threads)
    return file.parent / "finished"


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    shutil.copytree(finished, tmp_path / "again")
    return tmp_path / "again"


def run(file: Path, out: Path, *overrides: str, redo: tuple[str, ...] = ()) -> dict[str, Any]:
    return run_pipeline(str(file), out, overrides, "cpu", redo)[0]


def made(report: dict[str, Any]) -> list[str]:
    """The stages that a call did not skip."""
    return [name for step in report["stages"] for name in step["made"]]


def results(report: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row["results"] for row in report["rows"]}


def report_of(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text())
    return content


def files_of(out: Path) -> dict[str, tuple[int, int, int]]:
    """Every file of the stages, by what a write would change."""
    found = {path.relative_to(out).as_posix(): path.stat() for path in out.rglob("*") if path.is_file()}
    return {
        name: (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        for name, stat in found.items()
        if name.split("/")[0] not in ("report.md", "report.json", "pipeline.json", ".lock")
    }


def test_one_command_trains_caches_trains_again_and_compares(finished: Path) -> None:
    report = report_of(finished)
    assert made(report) == STAGES
    rows = results(report)
    assert list(rows) == [
        "mastaf end to end, by decoding",
        "mastaf end to end, through its cubes",
        "neighbor on the cubes",
        "mastaf on the cubes",
    ]
    assert rows["mastaf end to end, by decoding"] == rows["mastaf end to end, through its cubes"]
    assert [live["episodes_that_differ"] for live in report["live"].values()] == [0, 0]
    for k_shot in ("1", "2"):
        compared = json.loads((finished / f"comparison_{k_shot}shot/compare.json").read_text())
        assert compared["episode_hash"] == report["episode_hash"][k_shot] == report["live"][k_shot]["episode_hash"]
    assert all(step["seconds"] > 0 for step in report["stages"])
    assert all(row["training_seconds"] > 0 for row in report["rows"])
    assert report["code_version"] == code_version()
    with open_store(finished / "cubes.zarr") as store:
        assert store.pending() == []
        assert store.spec.fingerprint == report["store_fingerprint"]
    for name in ("neighbor", "mastaf"):
        assert json.loads((finished / f"heads/{name}/card.json").read_text())["head"] == name
    text = (finished / "report.md").read_text()
    assert "| mastaf end to end, by decoding |" in text
    assert "the same in each of 20 episodes" in text
    assert report["split_hash"][:12] in text


def test_cards_hold_the_scores_of_the_report_and_can_be_reproduced(finished: Path) -> None:
    rows = results(report_of(finished))
    for folder, row, has_store in (
        ("backbone", "mastaf end to end, by decoding", False),
        ("backbone", "mastaf end to end, through its cubes", True),
        ("heads/neighbor", "neighbor on the cubes", True),
        ("heads/mastaf", "mastaf on the cubes", True),
    ):
        card = json.loads((finished / folder / "card.json").read_text())
        noted = {str(each["k_shot"]): each for each in card["evaluations"] if (each["store"] is not None) == has_store}
        assert {shots: each["accuracy"] for shots, each in noted.items()} == {
            shots: score["accuracy"] for shots, score in rows[row].items()
        }
        assert len(card["evaluations"]) == (4 if folder == "backbone" else 2)
    for folder in ("backbone", "heads/neighbor", "heads/mastaf"):
        found = reproduce(finished / folder, "cpu")
        assert found.is_identical, found
        assert len(found.evaluations) == (5 if folder == "backbone" else 3), "the validation too"


def test_second_run_skips_every_stage_and_writes_none_of_its_files(
    file: Path, again: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, before = report_of(again), files_of(again)
    monkeypatch.setattr(whole_pipeline, "code_version", lambda: "of a call that makes nothing")
    second = run(file, again)
    said = capsys.readouterr().err
    assert made(second) == []
    assert files_of(again) == before
    for stage in STAGES:
        assert f"    {stage}: done before (" in said
    assert results(second) == results(first)
    assert [step["seconds"] for step in second["stages"]] == [step["seconds"] for step in first["stages"]]
    assert (again / "report.md").read_text().count("| skipped |") == 5
    assert second["code_version"] == first["code_version"]


def test_changed_recipe_is_refused_before_any_work_and_redone_on_request(
    world: World, finished: Path, tmp_path: Path
) -> None:
    file, out = write_files(world, tmp_path / "files"), tmp_path / "out"
    shutil.copytree(finished, out)
    (file.parent / "heads.toml").write_text(HEADS_RECIPE + "learning_rate = 0.5\n")
    before = files_of(out)
    with pytest.raises(SetupError, match=r"training\.learning_rate: then 0\.01, now 0\.5.*--redo heads/neighbor"):
        run(file, out)
    assert files_of(out) == before
    with pytest.raises(SetupError, match=r"extraction\.seconds_per_video: then 120\.0, now 60\.0.*--redo extract"):
        run(write_files(world, tmp_path / "others"), out, "pipeline.set_extract.extraction.seconds_per_video=60")
    report = run(file, out, redo=("heads",))
    assert made(report) == ["heads/neighbor", "heads/mastaf", "compare/1shot", "compare/2shot", "live"]
    assert {path.name for path in (out / "set_aside").iterdir()} == {
        "heads_neighbor_1", "heads_mastaf_1", "compare_1shot_1", "compare_2shot_1", "live_1",
    }  # fmt: skip
    assert (
        results(report)["mastaf end to end, by decoding"]
        == results(report_of(finished))["mastaf end to end, by decoding"]
    )


def stopped_after_lines(count: int) -> Callable[..., Any]:
    """Training that gets SIGTERM at one of the lines that it reports."""

    def stopping(*arguments: Any) -> Any:
        *others, report = arguments
        left = count

        def ticking(line: Any) -> None:
            nonlocal left
            report(line)
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        options: Any = (*others, ticking)
        return train(*options)

    return stopping


@pytest.mark.slow
def test_redone_stage_lets_everything_after_it_change_too_though_it_is_stopped(
    file: Path, again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SetupError, match=r"backbone was made with another config \(training\.seed: then 0, now 5\)"):
        run(file, again, "training.seed=5")
    with pytest.raises(SetupError, match=r"no such stage; the stages are train, extract, heads"):
        run(file, again, redo=("trian",))
    with monkeypatch.context() as patch:
        patch.setattr(whole_making, "train", stopped_after_lines(2))
        with pytest.raises(Stopped):
            run(file, again, "training.seed=5", redo=("train",))
    half_trained = load_checkpoint(again / "backbone/last.pt")["progress"]["episode"]
    assert 0 < half_trained < 12
    with pytest.raises(SetupError, match=r"training\.seed: then 0, now 6"):
        run(file, again, "training.seed=5", "heads.mastaf.training.seed=6")
    report = run(file, again, "training.seed=5")
    assert made(report) == STAGES
    assert [path.name for path in (again / "set_aside").glob("train_*")] == ["train_1"], "the half-trained one was kept"
    assert json.loads((again / "pipeline.json").read_text())["permitted"] == {}
    assert (again / "set_aside/train_1/best.pt").is_file()
    assert (again / "set_aside/extract_1.zarr").is_dir()


def test_changed_manifest_is_noticed(world: World, file: Path, again: Path, tmp_path: Path) -> None:
    rows = world.manifest_path.read_text().replace(
        "down/3,videos/down/3.mp4,down,train", "down/9,videos/down/3.mp4,down,train"
    )
    changed = tmp_path / "changed.csv"
    changed.write_text(f"# root: {world.folder}\n{rows}")
    with pytest.raises(SetupError, match=r"manifest\.content: then '[0-9a-f]+.*manifest\.split_hash"):
        run(file, again, f'data.manifest="{changed}"')


def test_exchanged_videos_are_noticed(world: World, file: Path, again: Path, tmp_path: Path) -> None:
    shutil.copytree(world.folder, tmp_path / "copy")
    copy, override = tmp_path / "copy/videos", f'data.manifest="{tmp_path}/copy/videos.csv"'
    (copy / "down/3.mp4").rename(tmp_path / "away.mp4")
    assert made(run(file, again, override)) == [], "a file that cannot be reached is no other one"
    for number in range(4):
        write_clip(copy / f"jump/{number}.mp4", "still", 90 + number, num_frames=13)
    with pytest.raises(SetupError, match=r"cubes\.zarr: 4 of its videos.*jump/0 \(from bytes=\d+ .*--redo extract"):
        run(file, again, override)
    facts, _ = run_pipeline(str(file), again, [override], redo=("extract",), is_dry=True)
    assert {row["stage"]: row["action"] for row in facts["stages"]} == {
        **dict.fromkeys(STAGES, "wait"), "train": "skip", "extract": "set aside", "live": "set aside",
    }  # fmt: skip
    write_clip(copy / "down/3.mp4", "down", 77, num_frames=13)
    with pytest.raises(
        SetupError, match=r"backbone was made with .* other videos \(manifest\.file_sizes.*--redo train"
    ):
        run(file, again, override)


def test_videos_exchanged_while_it_works_are_refused_and_not_extracted_again(
    world: World, file: Path, again: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world.folder, tmp_path / "copy")
    (again / "backbone/best.pt").unlink()

    def exchanging(*arguments: Any) -> Any:
        write_clip(tmp_path / "copy/videos/jump/0.mp4", "still", 90, num_frames=13)
        return train(*arguments)

    monkeypatch.setattr(whole_making, "train", exchanging)
    with pytest.raises(SetupError, match=r"1 of its videos were made from other files: jump/0"):
        run(file, again, f'data.manifest="{tmp_path}/copy/videos.csv"')
    assert not (again / "set_aside/extract_1.zarr").exists()


def test_same_manifest_in_another_place_is_the_same(world: World, file: Path, again: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.csv"
    moved.write_text(f"# root: {world.folder}\n{world.manifest_path.read_text()}")
    assert made(run(file, again, f'data.manifest="{moved}"')) == []


def test_deleted_checkpoint_is_noticed_and_what_comes_out_the_same_again_is_kept(file: Path, again: Path) -> None:
    (again / "backbone/best.pt").unlink()
    report = run(file, again)
    assert made(report) == ["train", *STAGES[4:]], "the same weights came out, but the new card holds no scores"
    assert (again / "set_aside/train_1/last.pt").is_file()
    assert results(report) == results(report_of(again))


@pytest.mark.parametrize("kind", ["of another run", "damaged"])
def test_card_that_is_not_the_runs_is_noticed(file: Path, again: Path, kind: str) -> None:
    text = (again / "heads/neighbor/card.json").read_text()
    (again / "heads/mastaf/card.json").write_text(text if kind == "of another run" else text[:100])
    facts, _ = run_pipeline(str(file), again, is_dry=True)
    assert {row["stage"]: row["action"] for row in facts["stages"]} == {
        **dict.fromkeys(STAGES[:4], "skip"), "heads/mastaf": "mend", **dict.fromkeys(STAGES[4:], "wait"),
    }  # fmt: skip
    before = report_of(again)
    report = run(file, again)
    assert made(report) == ["heads/mastaf", *STAGES[4:]]
    assert json.loads((again / "heads/mastaf/card.json").read_text())["head"] == "mastaf"
    assert results(report) == results(before)
    assert not list((again / "set_aside").glob("heads_*"))
    assert made(run(file, again)) == []


@pytest.mark.parametrize("kind", ["gone", "damaged"])
def test_lost_card_of_the_backbone_is_written_again_and_nothing_is_trained(
    file: Path, again: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, before = again / "backbone/card.json", report_of(again)
    logged = (again / "backbone/metrics.jsonl").read_text()
    weights = (again / "backbone/best.pt").read_bytes()
    if kind == "gone":
        card.unlink()
    else:
        card.write_bytes(card.read_bytes()[: card.stat().st_size // 2])
    monkeypatch.setattr(training, "run_loop", loop_without_steps)
    report = run(file, again)
    assert made(report) == ["train", *STAGES[4:]], "the new card holds no scores"
    assert (again / "backbone/best.pt").read_bytes() == weights
    assert (again / "backbone/metrics.jsonl").read_text() == logged
    assert not list((again / "set_aside").glob("train_*"))
    assert results(report) == results(before)
    assert made(run(file, again)) == []
    found = reproduce(again / "backbone", "cpu")
    assert found.is_identical, found


@pytest.mark.parametrize("kind", ["gone", "damaged"])
def test_lost_backbone_is_exported_again_and_nothing_is_trained(
    file: Path, again: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported, before = again / "backbone/backbone.pt", report_of(again)
    if kind == "gone":
        exported.unlink()
    else:
        exported.write_bytes(b"no checkpoint")
    monkeypatch.setattr(training, "run_loop", loop_without_steps)
    report = run(file, again)
    assert made(report) == ["train"], "the card has kept its scores"
    assert load_checkpoint(exported)["state_dict"]
    assert not list((again / "set_aside").glob("train_*"))
    assert results(report) == results(before)
    assert made(run(file, again)) == []


def loop_without_steps(learners: Sequence[Learner], *_: object) -> None:
    """In place of the training loop, where there is nothing left to train."""
    assert all(learner.done == learner.config.episodes for learner in learners)


@pytest.mark.parametrize("gone", ["last.pt", "weights"])
def test_lost_card_of_a_run_that_cannot_go_on_is_made_again(file: Path, again: Path, gone: str) -> None:
    (again / "heads/mastaf/card.json").unlink()
    if gone == "last.pt":
        for name in ("last.pt", "previous.pt"):
            (again / "heads/mastaf" / name).write_bytes(b"no checkpoint")
    else:
        shutil.copy(again / "heads/neighbor/best.pt", again / "heads/mastaf/best.pt")
    report = run(file, again)
    assert made(report) == ["heads/mastaf", *STAGES[4:]]
    assert (again / "set_aside/heads_mastaf_1/best.pt").is_file()
    assert made(run(file, again)) == []


def test_folder_of_a_run_is_none_for_a_pipeline(file: Path, again: Path) -> None:
    before = sorted((again / "heads/mastaf").rglob("*"))
    with pytest.raises(
        SetupError, match=r"heads/mastaf holds a run of `mastaf train`; give a folder of the pipeline's own"
    ):
        run(file, again / "heads/mastaf")
    assert sorted((again / "heads/mastaf").rglob("*")) == before


@pytest.mark.slow
def test_exchanged_checkpoint_is_noticed(
    file: Path, again: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_pipeline, "code_version", lambda: "another")
    (again / "heads/mastaf/last.pt").rename(again / "heads/mastaf/old.pt")
    shutil.copy(again / "heads/neighbor/best.pt", again / "heads/mastaf/best.pt")
    report = run(file, again)
    assert made(report) == ["heads/mastaf", *STAGES[4:]]
    assert report["code_version"] == "several"
    heads = next(step for step in report["stages"] if step["name"] == "heads")
    assert [call["code_version"] for call in heads["made_with_of"]["heads/mastaf"]] == ["another"]
    assert "several versions of the code;" in (again / "report.md").read_text()
    assert "other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gone", "overrides", "later"),
    [
        pytest.param("live", [], ["live"], marks=pytest.mark.slow),
        (None, ["pipeline.compare.episodes=10"], STAGES[4:]),
        pytest.param("heads/mastaf/best.pt", [], STAGES[3:], marks=pytest.mark.slow),
    ],
)
def test_damaged_store_is_mended_before_anything_reads_it(
    file: Path,
    again: Path,
    capsys: pytest.CaptureFixture[str],
    gone: str | None,
    overrides: list[str],
    later: list[str],
) -> None:
    shard = next((again / "cubes.zarr/cube").glob("c.*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    if gone is not None:
        (again / gone).rename(again / "gone")
    report = run(file, again, *overrides)
    assert made(report) == ["extract", *later]
    assert "extract: is mended" in capsys.readouterr().err
    shard.write_bytes(bytes(content[: len(content) // 2]))
    assert made(run(file, again, *overrides)) == ["extract"], "one that was cut is noticed though nothing will read it"


@pytest.mark.slow
def test_deleted_store_is_extracted_again_and_the_heads_are_kept(file: Path, again: Path) -> None:
    shutil.rmtree(again / "cubes.zarr")
    assert made(run(file, again)) == ["extract"]


@pytest.mark.slow
def test_another_head_trains_alone(file: Path, again: Path) -> None:
    report = run(file, again, 'pipeline.heads=["neighbor", "mastaf", "bi_mhm"]')
    assert made(report) == ["heads/bi_mhm", "compare/1shot", "compare/2shot", "live"]
    assert len(report["rows"]) == 5


@pytest.mark.slow
def test_head_may_start_from_the_runs_own(file: Path, again: Path) -> None:
    fresh = load_checkpoint(again / "heads/mastaf/best.pt")["model"]
    options = ("pipeline.start_from_run_head=true", "pipeline.set_heads.training.episodes=0")
    run(file, again, *options, redo=("heads",))
    theirs = load_checkpoint(again / "backbone/best.pt")["model"]
    started = load_checkpoint(again / "heads/mastaf/best.pt")["model"]
    assert all(torch.equal(value, theirs[name]) for name, value in started.items())
    assert not all(torch.equal(value, fresh[name]) for name, value in started.items())


@pytest.mark.slow
def test_end_to_end_training_may_start_from_classification(file: Path, tmp_path: Path) -> None:
    options = ("pipeline.set_train.training.episodes=0", 'pipeline.heads=["neighbor"]', "pipeline.compare.shots=[1]")
    report = run(file, tmp_path / "out", 'pipeline.pretrain="classify.toml"', *options)
    assert made(report)[:2] == ["pretrain", "train"]
    pretrained = load_checkpoint(tmp_path / "out/pretrain/backbone.pt")["state_dict"]
    started = load_checkpoint(tmp_path / "out/backbone/backbone.pt")["state_dict"]
    assert all(torch.equal(value, started[name]) for name, value in pretrained.items())
    seconds = {step["name"]: step["seconds"] for step in report["stages"]}
    assert report["rows"][0]["training_seconds"] == seconds["train"] + seconds["pretrain"]


@pytest.mark.slow
def test_backbone_may_be_trained_by_classification_alone(file: Path, tmp_path: Path) -> None:
    options = ('pipeline.heads=["mastaf"]', "pipeline.compare.shots=[1]")
    report = run(file, tmp_path / "out", 'pipeline.backbone="classify.toml"', *options)
    rows = results(report)
    assert list(rows) == [
        "protonet after classification, by decoding",
        "protonet after classification, through its cubes",
        "mastaf on the cubes",
    ]
    assert (
        rows["protonet after classification, by decoding"] == rows["protonet after classification, through its cubes"]
    )


@pytest.mark.slow
def test_half_precision_cubes_are_named_beside_the_live_accuracy(file: Path, again: Path) -> None:
    report = run(file, again, "pipeline.set_extract.store.dtype=float16", redo=("extract",))
    assert made(report) == STAGES[1:]
    assert report["store_dtype"] == "float16"
    for live in report["live"].values():
        assert live["accuracy"] == pytest.approx(live["accuracy_on_cubes"], abs=0.1)
    found = reproduce(again / "backbone", "cpu")
    assert found.is_identical, found
    assert len(found.evaluations) == 5, "validation, and both numbers of shots through the cubes of now and by decoding"
    options = ("pipeline.set_extract.store.dtype=float16",)
    assert made(run(file, again, *options)) == []


def test_scores_by_decoding_and_through_rounded_cubes_stand_in_the_card_side_by_side(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half precision in the backbone's recipe the store has the fingerprint that the run itself names."""
    file, out = write_files(world, tmp_path / "files"), tmp_path / "out"
    recipe = file.parent / "end_to_end.toml"
    recipe.write_text(recipe.read_text().replace('dtype = "float32"', 'dtype = "float16"'))
    read = CachedCubes.read
    # Half precision alone seldom changes an answer.
    monkeypatch.setattr(CachedCubes, "read", lambda *arguments: read(*arguments) ** 3)
    rows = results(report := run(file, out))
    through, live = rows["mastaf end to end, through its cubes"], rows["mastaf end to end, by decoding"]
    assert {each["store_fingerprint"] for each in report["live"].values()} == {report["store_fingerprint"]}
    assert all(through[shots]["accuracy"] != live[shots]["accuracy"] for shots in ("1", "2"))
    card = read_card(out / "backbone")
    for scores, has_store in ((live, False), (through, True)):
        noted = [each for each in card["evaluations"] if (each["store"] is not None) == has_store]
        assert {str(each["k_shot"]): each["accuracy"] for each in noted} == {
            shots: score["accuracy"] for shots, score in scores.items()
        }
    assert len({each["outcomes_file"] for each in card["evaluations"]}) == 4
    assert card["test_accuracy"] == live["1"]["accuracy"]
    assert made(run(file, out)) == []
    for store in (str(out / "cubes.zarr"), None):
        asked = EvaluationRequest(out / "backbone", "test", 20, 2, 1, store, str(world.manifest_path))
        evaluate_folder(asked, "cpu")
        assert len(read_card(out / "backbone")["evaluations"]) == 4
        assert made(run(file, out)) == [], "a score of the user's own takes no other's place"
    assert not (out / "set_aside").exists()
    found = reproduce(out / "backbone", "cpu")
    assert found.is_identical, found
    assert len(found.evaluations) == 5


@pytest.mark.slow
def test_test_video_that_was_rejected_is_in_no_row(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    (world.folder / "videos/jump/1.mp4").write_text("this is no video")
    file = write_files(world, tmp_path / "files")
    report = run(file, tmp_path / "out", 'pipeline.heads=["neighbor"]', "pipeline.compare.shots=[1]")
    assert [row["video_id"] for row in report["left_out"]] == ["jump/1"]
    assert report["live"]["1"]["episodes_that_differ"] == 0
    assert report["live"]["1"]["split_hash"] == report["split_hash"]
    assert "1 videos of test are not in the store" in (tmp_path / "out/report.md").read_text()
    for run_folder in ("backbone", "heads/neighbor"):
        found = reproduce(tmp_path / "out" / run_folder, "cpu")
        assert found.is_identical, found


def test_training_video_that_was_rejected_is_named_with_the_way_out(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    (world.folder / "videos/down/1.mp4").write_text("this is no video")
    file = write_files(world, tmp_path / "files")
    options = ("pipeline.set_train.training.episodes=0", "training.check_videos=false", 'pipeline.heads=["neighbor"]')
    with pytest.raises(SetupError, match=r"down/1 \(.*--redo extract; or .*data\.manifest=NEW\.csv --redo train,"):
        run(file, tmp_path / "out", *options)


def test_directory_of_weights_stands_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").write_bytes(b"one")
    before = weights_name(str(tmp_path / "weights"))
    shutil.copytree(tmp_path / "weights", tmp_path / "moved")
    assert weights_name(str(tmp_path / "moved")) == before
    (tmp_path / "weights/model.safetensors").write_bytes(b"two")
    assert weights_name(str(tmp_path / "weights")) != before
    assert weights_name("random:1") == "random:1"


@pytest.mark.slow
def test_videos_are_rendered_where_no_manifest_is_given(world: World, tmp_path: Path) -> None:
    file = write_files(
        world, tmp_path, PIPELINE.replace("heads = [", "demo_videos = 2\nheads = [", 1).replace("[1, 2]", "[1]")
    )
    recipe = file.parent / "end_to_end.toml"
    recipe.write_text(recipe.read_text().replace(f'manifest = "{world.manifest_path}"\n', ""))
    report = run(file, tmp_path / "out", "training.episodes=3")
    assert made(report)[0] == "videos"
    assert (tmp_path / "out/data/videos.csv").is_file()
    assert made(run(file, tmp_path / "out", "training.episodes=3")) == []
    next((tmp_path / "out/data/videos").rglob("*.mp4")).unlink()
    assert made(run(file, tmp_path / "out", "training.episodes=3")) == ["videos"], "the same files come out"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pipeline.compare.shots=[1, 8]", r"pipeline\.compare: split 'test'.* 8 \+ 1 = 9 .*pipeline\.demo_videos = 8"),
        ("pipeline.compare.queries=8", r"pipeline\.compare: split 'test'.* 1 \+ 8 = 9 .*pipeline\.demo_videos = 8"),
        ("episodes.n_way=11", r"split 'val' has 6 classes, but n_way = 11"),
        ("pipeline.set_heads.episodes.k_shot=8", r"pipeline\.heads_recipe: split 'train'.* 8 \+ 1 = 9 "),
    ],
)
def test_too_few_videos_to_render_are_refused_before_any_work(
    world: World, tmp_path: Path, override: str, message: str
) -> None:
    file = write_files(world, tmp_path, PIPELINE.replace("heads = [", "demo_videos = 8\nheads = [", 1))
    recipe = file.parent / "end_to_end.toml"
    recipe.write_text(recipe.read_text().replace(f'manifest = "{world.manifest_path}"\n', ""))
    with pytest.raises(SamplerError, match=message) as refused:
        run(file, tmp_path / "out", override)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_rendered_manifest_is_the_one_that_was_looked_at_before(tmp_path: Path) -> None:
    names = [f"{name}/{name}_{number:03d}.mp4" for name in MOTION_CLASSES for number in range(2)]
    before = whole_configs._manifest_to_be(2, tmp_path)
    assert [video.path for video in before.videos] == [f"videos/{name}" for name in names]
    assert before.split_hash == render_videos(tmp_path, 2).split_hash


def test_folder_of_something_else_is_left_alone(file: Path, tmp_path: Path) -> None:
    (tmp_path / "heads/mastaf").mkdir(parents=True)
    (tmp_path / "heads/mastaf/mine.txt").write_text("mine")
    with pytest.raises(SetupError, match=r"heads/mastaf holds something that this pipeline did not make"):
        run(file, tmp_path)
    assert not (tmp_path / "backbone").exists()
    shutil.rmtree(tmp_path / "heads")
    (tmp_path / "live").write_text("mine")
    with pytest.raises(SetupError, match=r"live holds something that this pipeline did not make"):
        run(file, tmp_path)


def test_second_pipeline_in_the_same_folder_is_refused(file: Path, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(SetupError, match="another pipeline is at work"):
        run(file, tmp_path)


def test_dry_run_tells_what_is_to_do_and_does_nothing(file: Path, again: Path, tmp_path: Path) -> None:
    facts, text = run_pipeline(str(file), tmp_path / "new", is_dry=True)
    assert [row["action"] for row in facts["stages"]] == ["begin"] * len(STAGES)
    assert not (tmp_path / "new").exists()
    (again / "backbone/best.pt").unlink()
    shutil.rmtree(again / "heads/mastaf")
    before = files_of(again)
    facts, text = run_pipeline(str(file), again, is_dry=True)
    actions = {row["stage"]: row["action"] for row in facts["stages"]}
    assert actions["train"] == "set aside"
    assert actions["extract"] == "wait"
    assert actions["heads/mastaf"] == "begin"
    assert "train" in text
    assert "best.pt is missing" in text
    assert files_of(again) == before


def test_json_of_the_command_is_the_report(file: Path, again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pipeline", str(file), "--out", str(again), "--device", "cpu", "--json"]
    cli.mastaf.main(args=words, standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == report_of(again)
    cli.mastaf.main(args=[*words, "--dry-run"], standalone_mode=False)
    assert [row["action"] for row in json.loads(capsys.readouterr().out)["stages"]] == ["skip"] * len(STAGES)


def stopped(file: Path, out: Path, signal_name: str, where: str, count: int) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, KILLED, signal_name, where, count, "pipeline", file, "--out", out, "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, timeout=200, env=environment
    )


@pytest.mark.slow
def test_stopped_in_training_and_killed_in_extraction_it_goes_on_to_the_same_report(
    file: Path, finished: Path, tmp_path: Path
) -> None:
    done = stopped(file, tmp_path / "out", "SIGTERM", "train", 4)
    assert done.returncode == 143, done.stderr
    assert "the same command goes on from here" in done.stderr
    assert "--resume" not in done.stderr
    assert "Traceback" not in done.stderr
    assert stopped(file, tmp_path / "out", "SIGKILL", "extract", 2).returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "out/backbone/last.pt")["progress"]["episode"] == 12
    report = run(file, tmp_path / "out")
    assert made(report) == STAGES[1:]
    assert results(report) == results(report_of(finished))
    assert report["store_fingerprint"] == report_of(finished)["store_fingerprint"]
    assert all(step["seconds"] > 0 for step in report["stages"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "count", "skipped"),
    [
        ("train", 4, []),
        ("heads", 5, STAGES[:2]),
        ("compare", 1, STAGES[:4]),
        ("live", 1, STAGES[:6]),
        ("records", 3, []),
        ("records", 4, STAGES[:1]),
        ("records", 7, STAGES[:1]),
    ],
)
def test_killed_anywhere_it_goes_on_to_the_same_report(
    file: Path, finished: Path, tmp_path: Path, where: str, count: int, skipped: list[str]
) -> None:
    assert stopped(file, tmp_path / "out", "SIGKILL", where, count).returncode == -signal.SIGKILL
    report = run(file, tmp_path / "out")
    assert made(report) == [stage for stage in STAGES if stage not in skipped]
    assert results(report) == results(report_of(finished))
    assert report["store_fingerprint"] == report_of(finished)["store_fingerprint"]
    assert all(step["seconds"] > 0 for step in report["stages"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code", "where"), [("SIGTERM", 143, "compare"), ("SIGINT", 130, "live")])
def test_stopped_while_it_scores_it_leaves_at_once_and_goes_on(
    file: Path, finished: Path, tmp_path: Path, name: str, code: int, where: str
) -> None:
    done = stopped(file, tmp_path / "out", name, where, 1)
    assert done.returncode == code, done.stderr
    assert "the same command goes on from here" in done.stderr
    assert "Traceback" not in done.stderr
    assert results(run(file, tmp_path / "out")) == results(report_of(finished))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pipeline.headz=1", r"unknown key headz; did you mean 'heads'"),
        ("pipeline.compare.shotz=[1]", r"unknown key compare\.shotz; did you mean 'shots'"),
        ("pipeline.compare.shots=[1, 1]", r"different numbers"),
        ('pipeline.heads=["nieghbor"]', r"no head 'nieghbor'; did you mean 'neighbor'"),
        ('pipeline.heads=["mastaf", "mastaf"]', r"'mastaf' twice"),
        ("pipeline.set_train.training.mode=cached", r'training\.mode = "cached", which trains no backbone'),
        ('pipeline.heads_recipe="end_to_end.toml"', r"heads train on the cubes"),
        ('pipeline.pretrain="end_to_end.toml"', r'not "classify"'),
        ('pipeline.backbone="nothing.toml"', r"no recipe 'nothing\.toml'"),
        ("pipeline.set_heads.sampling.num_frames=5", r"states sampling\.num_frames = 5, but the cubes are made with 4"),
        ("pipeline.set_heads.episodes.train_views=3", r"episodes\.train_views = 3, but sampling\.num_views = 1"),
        ("pipeline.set_heads.episodes.n_way=3", r"episodes\.n_way is 2 in the backbone's recipe and 3"),
        ("pipeline.set_train.head.alpha=0.5", None),
        ("pipeline.compare.shots=[1, 4]", r"pipeline\.compare: .*fewer than k_shot \+ n_query = 4 \+ 1"),
        ("pipeline.set_heads.episodes.k_shot=4", r"pipeline\.heads_recipe: split 'train'.* = 4 \+ 1"),
        ("training.episodez=3", r"pipeline\.backbone \(end_to_end\.toml\): unknown key training\.episodez"),
        ("pipeline.set_heads.training.seed=-1", r"pipeline\.heads_recipe \(heads\.toml\): training\.seed"),
        (
            "pipeline.set_extract.store.dtypo=3",
            r"\[pipeline\.set_extract\] \(end_to_end\.toml\): unknown key store\.dtypo",
        ),
    ],
)
def test_contradictions_are_refused_when_the_config_is_built(
    file: Path, tmp_path: Path, override: str, message: str | None
) -> None:
    overrides = [override]
    if message is None:
        overrides.append("pipeline.start_from_run_head=true")
        message = r"mastaf has other options than in the end-to-end run: alpha"
    with pytest.raises(ValueError, match=message):
        run(file, tmp_path / "out", *overrides)
    assert not (tmp_path / "out").exists()


def test_overrides_of_the_file_reach_their_stages_and_the_command_line_beats_them(world: World, tmp_path: Path) -> None:
    text = PIPELINE + '[pipeline.set_train]\ntraining.episodes = 6\ntraining.rates = {"encoder.*.weight" = 0.5}\n'
    text += "[pipeline.set_heads]\nheads.mastaf.training.learning_rate = 0.5\n"
    path = write_files(world, tmp_path, text)
    configs = load_configs(load_pipeline(str(path)), tmp_path / "no.csv")
    assert configs.train.training.episodes == 6
    assert configs.train.training.rates == {"encoder.*.weight": 0.5}
    assert configs.train.training.decode_workers == 0
    assert [config.training.learning_rate for config in configs.heads.values()] == [0.01, 0.5]
    configs = load_configs(
        load_pipeline(str(path), ["training.episodes=3", "heads.mastaf.tau=2.0"]), tmp_path / "no.csv"
    )
    assert [config.training.episodes for config in (configs.train, *configs.heads.values())] == [3, 3, 3]
    assert configs.heads["mastaf"].head.options["tau"] == 2.0


def test_file_with_a_recipes_tables_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[training]\nepisodes = 3\n")
    with pytest.raises(ConfigError, match=r"has 'training', but all of it stands in \[pipeline\]"):
        load_pipeline(str(tmp_path / "recipe.toml"))
    with pytest.raises(ConfigError, match=r"no pipeline 'demo_pipline'.*did you mean 'demo_pipeline'"):
        load_pipeline("demo_pipline")


@pytest.mark.parametrize("path", sorted(pipeline_folder().glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_pipelines_load_and_name_their_command(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.mastaf.main(args=["list", "pipelines", "--json"], standalone_mode=False)
    assert path.stem in [row["name"] for row in json.loads(capsys.readouterr().out)]
    configs = load_configs(load_pipeline(path.stem), tmp_path / "videos.csv")
    assert configs.renders
    assert f"mastaf pipeline {path.stem}" in path.read_text()
