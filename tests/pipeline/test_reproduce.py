"""`mastaf reproduce`: identical means every query of every episode, and no number of a card can be tampered with unseen."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cli
from contracts.made_runs import MadeRuns, train_run
from contracts.world import World
from pipeline import training
from pipeline.card_checks import contradictions
from pipeline.card_reading import CardError, held_out_scores, read_card
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.outcomes import bits_digest, read_outcomes
from pipeline.run_page import to_markdown
from pipeline.train_command import EvaluationRequest, evaluate_folder

Run = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scored(made: MadeRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with the quickest head, scored on test with one and with two shots; read only."""
    return score(Path(shutil.copytree(made.heads[0], tmp_path_factory.mktemp("scored") / "run")))


def score(run: Path) -> Path:
    for shots in (None, 2):
        evaluate_folder(EvaluationRequest(run, shots=shots), "cpu")
    return run


@pytest.fixture
def run(scored: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(scored, tmp_path / "run"))


@pytest.fixture
def mastaf(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mastaf", *map(str, arguments)])
        # The program's own handlers stay out of this process.
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(str(stop.code))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def rewrite(run: Path, change: Callable[[dict[str, Any]], None], with_page: bool = True) -> None:
    card = read_card(run)
    change(card)
    (run / "card.json").write_text(json.dumps(card))
    if with_page:
        (run / "card.md").write_text(to_markdown(card))


@pytest.mark.parametrize("given", ["folder", "card"])
def test_untouched_run_is_identical_in_every_query(mastaf: Run, scored: Path, given: str) -> None:
    code, out, _ = mastaf("reproduce", scored if given == "folder" else scored / "card.json", "--device", "cpu")
    assert code == 0, out
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["identical"] * 3
    assert "all 160 queries of 40 episodes" in out
    assert lines[-1].endswith("identical")
    assert not [line for line in lines if line.startswith(("WRONG", "changed"))]


@pytest.mark.parametrize("mode", ["end_to_end", "classify"])
def test_run_that_learned_its_backbone_is_identical_too(mastaf: Run, world: World, tmp_path: Path, mode: str) -> None:
    training.train(
        world.config(
            f"training.mode={mode}", "training.episodes=3", "training.validation_episodes=6", "evaluation.episodes=8",
            "training.decode_workers=0",
        ),
        tmp_path / "run",
        torch.device("cpu"),
    )  # fmt: skip
    evaluate_folder(EvaluationRequest(tmp_path / "run"), "cpu")
    code, out, _ = mastaf("reproduce", tmp_path / "run", "--device", "cpu")
    assert code == 0, out
    assert [line.split(",")[0].split()[-1] for line in out.splitlines()[:2]] == ["val", "test"]


def test_json_holds_every_evaluation(mastaf: Run, scored: Path) -> None:
    code, out, _ = mastaf("reproduce", scored, "--device", "cpu", "--json", "--split", "test")
    report = json.loads(out)
    assert (code, report["identical"], report["contradictions"], report["changes"]) == (0, True, [], [])
    assert len(report["evaluations"]) == 2
    for each in report["evaluations"]:
        assert each["is_identical"]
        assert each["recorded_accuracy"] == each["found_accuracy"]
        assert (each["episodes_differing"], each["queries_differing"]) == (0, 0)


def test_evaluation_whose_store_is_gone_hides_no_other(mastaf: Run, made: MadeRuns, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.heads[0], tmp_path / "run"))
    shutil.copytree(made.store_path, tmp_path / "other.zarr")
    evaluate_folder(EvaluationRequest(run, episodes=10, store_path=str(tmp_path / "other.zarr")), "cpu")
    (tmp_path / "other.zarr").rename(tmp_path / "moved.zarr")
    code, out, _ = mastaf("reproduce", run, "--device", "cpu")
    assert code == 1
    first, second = out.splitlines()[:2]
    assert first.startswith("identical  val")
    assert second.startswith("NOT DONE   test, 2-way 1-shot")
    assert f"there is no store at {tmp_path}/other.zarr. If it was moved, say where it is now: --store PATH" in second
    assert "run/card.json: not identical" in out
    code, out, _ = mastaf("reproduce", run, "--device", "cpu", "--store", tmp_path / "moved.zarr")
    assert (code, out.count("identical  ")) == (0, 2), out


def test_other_weights_are_named_where_nothing_can_be_run(mastaf: Run, made: MadeRuns, tmp_path: Path) -> None:
    run = score(Path(shutil.copytree(made.heads[1], tmp_path / "run")))
    shutil.copy(made.seeds[0] / "best.pt", run / "best.pt")
    code, _, err = mastaf("reproduce", run, "--device", "cpu", "--store", tmp_path / "gone.zarr")
    assert code == 2
    assert f"the weights of {run}/best.pt are " in err


def test_other_weights_are_found_with_the_first_episode_that_differs(
    mastaf: Run, made: MadeRuns, tmp_path: Path
) -> None:
    run = score(Path(shutil.copytree(made.heads[1], tmp_path / "mastaf")))
    content = load_checkpoint(run / "best.pt")
    generator = torch.Generator().manual_seed(1)
    for name, value in content["model"].items():
        if value.is_floating_point() and name.startswith("head.cam") and not name.endswith("running_var"):
            value.copy_(3 * torch.randn(value.shape, generator=generator))
    save_checkpoint(run / "best.pt", content)
    code, out, err = mastaf("reproduce", run, "--device", "cpu", "--json", "--split", "test")
    assert code == 1, err
    report = json.loads(out)
    assert "the weights of best.pt are" in report["contradictions"][0]
    entries = read_card(run)["evaluations"]
    for entry, each in zip(entries, report["evaluations"], strict=True):
        kept = read_outcomes(run / entry["outcomes_file"], entry["outcomes_sha256"])
        assert kept is not None
        assert not each["is_identical"]
        assert 0 < each["episodes_differing"] <= each["queries_differing"] <= kept.size
        assert 0 <= each["first_differing_episode"] < len(kept)


def test_one_answer_that_differs_is_found_and_named(mastaf: Run, run: Path) -> None:
    """The card of a run that had one more query right, consistent in itself."""

    def claim(card: dict[str, Any]) -> None:
        entry = next(each for each in card["evaluations"] if each["k_shot"] == 1)
        is_right = read_outcomes(run / entry["outcomes_file"], entry["outcomes_sha256"])
        assert is_right is not None
        episode, query = np.argwhere(~is_right)[-1]
        is_right[episode, query] = True
        np.savez(
            run / entry["outcomes_file"], is_right=np.packbits(is_right.reshape(-1)), shape=np.array(is_right.shape)
        )
        per_episode = is_right.mean(axis=1)
        entry |= {"outcomes_sha256": bits_digest(is_right), "accuracy": float(per_episode.mean())}
        card["test_accuracy"] = entry["accuracy"]
        claimed.append(int(episode))

    claimed: list[int] = []
    rewrite(run, claim)
    code, out, _ = mastaf("reproduce", run, "--device", "cpu")
    assert code == 1
    assert f"1 of 40 episodes and 1 of 160 queries differ, first in episode {claimed[0]}" in out
    assert [line.split()[0] for line in out.splitlines()[:3]].count("identical") == 2


TAMPERED: dict[str, Callable[[dict[str, Any]], None]] = {
    "test: accuracy of an evaluation": lambda card: card["evaluations"][0].update(accuracy=0.99),
    "test: interval of an evaluation": lambda card: card["evaluations"][0].update(interval95=0.001),
    "test: digest of an evaluation": lambda card: card["evaluations"][0].update(outcomes_sha256="0" * 64),
    "test: episodes of an evaluation": lambda card: card["evaluations"][0].update(episode_hash="0" * 64),
    "val: test accuracy": lambda card: card.update(test_accuracy=0.99),
    "val: test interval": lambda card: card.update(test_interval95=0.001),
    "val: its accuracy": lambda card: card.update(val_accuracy=0.99),
    "val: its evaluation": lambda card: card["validation"].update(accuracy=0.99),
    "val: both": lambda card: (card.update(val_accuracy=0.99), card["validation"].update(accuracy=0.99))[0],
    "val: test-selected number": lambda card: card.update(test_selected_accuracy_published_protocol=0.99),
    "val: weights": lambda card: card.update(best_weights_sha256="0" * 64),
    "val: config": lambda card: card["config"]["training"].update(learning_rate=0.5),
    "val: table of the config": lambda card: card["config"].pop("sampling"),
    "test: no validation, but its accuracy": lambda card: card.update(validation=None, val_accuracy=0.99),
    "test: no validation": lambda card: card.update(validation=None, val_accuracy=None, val_interval95=None),
    "test: evaluation of the validation": lambda card: card["validation"].update(accuracy=0.99),
}
"""With the split whose evaluations are run again: whatever is wrong elsewhere is found beside them."""


@pytest.mark.parametrize("what", TAMPERED)
def test_tampered_number_is_found(mastaf: Run, run: Path, what: str) -> None:
    rewrite(run, TAMPERED[what])
    code, out, err = mastaf("reproduce", run, "--device", "cpu", "--split", what.split(":")[0])
    assert code == 1, err
    assert [line for line in out.splitlines() if line.startswith(("DIFFERS", "WRONG"))]
    assert out.splitlines()[-1].endswith("not identical")


@pytest.fixture(scope="module")
def classified(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classification run with held-out videos; read only."""
    folder = tmp_path_factory.mktemp("classified") / "run"
    options = ("training.episodes=6", "training.validate_every=3", "training.validation_episodes=6")
    training.train(world.config("training.mode=classify", "classify.holdout=0.25", *options), folder, CPU)
    evaluate_folder(EvaluationRequest(folder, episodes=8), "cpu")
    return folder


TAMPERED_EVERYWHERE: dict[str, object] = {
    "mode": "end_to_end", "head": "mastaf", "head_options": {"distance": "none"}, "num_parameters": 7,
    "episodes": 9, "best_episode": 99, "selected_on": "nothing", "validation_episodes": 7, "seconds": 1.0,
    "resumptions": 5, "started_utc": "2000-01-01", "second_tries": 3, "lost_decoding_processes": 3,
    "last_weights_sha256": "0" * 64, "best_weights_sha256": "0" * 64, "store_content_hash": "0" * 64,
    "store_fingerprint": "0" * 64, "split_hash": "0" * 64, "computed_on": [], "degraded_videos": {"up/1": "short_video"},
    "val_accuracy": 0.99, "val_interval95": 0.001, "test_selected_accuracy_published_protocol": 0.99,
}  # fmt: skip
TAMPERED_HELD_OUT = {
    "heldout_top1": 0.99, "heldout_low95": 0.98, "heldout_high95": 0.999, "heldout_videos": 99, "heldout_top5": 0.99,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["cached", "classify"])
def test_every_key_is_held_against_the_files_of_the_run(scored: Path, classified: Path, kind: str) -> None:
    folder, tampered = scored, TAMPERED_EVERYWHERE
    if kind == "classify":
        folder, tampered = classified, {**TAMPERED_EVERYWHERE, **TAMPERED_HELD_OUT}
    card = read_card(folder)
    assert contradictions(folder, card, card["num_parameters"]) == []
    for key, value in tampered.items():
        assert card.get(key) != value
        wrong = contradictions(folder, {**card, key: value}, card["num_parameters"])
        assert [each for each in wrong if "card.md" not in each], key


def test_card_lacking_what_its_version_has_is_found(classified: Path) -> None:
    card = read_card(classified)
    for key in ("heldout_top1", "degraded_videos", "validation", "config", "last_weights_sha256"):
        less = {name: value for name, value in card.items() if name != key}
        wrong = contradictions(classified, less, card["num_parameters"])
        assert [each for each in wrong if "card.md" not in each], key


def test_held_out_videos_are_classified_once_more(mastaf: Run, classified: Path, tmp_path: Path) -> None:
    code, out, _ = mastaf("reproduce", classified, "--device", "cpu")
    assert code == 0, out
    assert "all 3 videos" in out
    run = Path(shutil.copytree(classified, tmp_path / "run"))
    claimed = 2 / 3 if read_card(run)["heldout_top1"] < 0.5 else 0.0
    rewrite(run, lambda card: card.update(heldout_top1=claimed))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    changed = [{**line, "heldout_top1": claimed} if "heldout_top1" in line else line for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    code, out, _ = mastaf("reproduce", run, "--device", "cpu")
    assert code == 1
    assert [line.split(",")[0] for line in out.splitlines() if line.startswith(("DIFFERS", "WRONG"))] == [
        "DIFFERS    held-out videos of the training classes"
    ]


def test_held_out_videos_alone_are_enough_to_reproduce(mastaf: Run, classified: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(classified, tmp_path / "run"))
    rewrite(run, lambda card: card.update(evaluations=[], validation=None))
    code, out, _ = mastaf("reproduce", run, "--device", "cpu")
    assert code == 1  # a validation split chose this one's checkpoint
    assert out.startswith("identical  held-out videos")


def test_store_that_has_grown_is_named_and_no_difference(mastaf: Run, run: Path) -> None:
    """Where last.pt is gone, nothing says what the store was."""
    (run / "last.pt").unlink()
    rewrite(run, lambda card: card.update(store_content_hash="0" * 64))
    code, out, _ = mastaf("reproduce", run, "--device", "cpu", "--split", "val")
    assert code == 0
    assert f"changed    store content hash: card {'0' * 64}" in out


@pytest.mark.parametrize("command", ["evaluate", "reproduce", "train"])
def test_commands_of_the_card_run_in_the_folder_that_holds_the_run(
    mastaf: Run, made: MadeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Whatever was given relative to another folder while the run was made."""
    (tmp_path / "data").mkdir()
    shutil.copytree(made.store_path, tmp_path / "data/cubes.zarr")
    shutil.copy(made.world.manifest_path, tmp_path / "data/videos.csv")
    shutil.copy(made.heads[1] / "best.pt", tmp_path / "data/start.pt")
    monkeypatch.chdir(tmp_path / "data")
    world = World(tmp_path / "data", Path("videos.csv"))
    options = ('training.initial_weights="start.pt"', "head.name=mastaf", "training.episodes=3")
    run = train_run(world, Path("cubes.zarr"), tmp_path / "runs/one", *options)
    evaluate_folder(EvaluationRequest(run, episodes=10, store_path="cubes.zarr", manifest="videos.csv"), "cpu")
    monkeypatch.chdir(run.parent)
    program, *arguments = shlex.split(read_card(run)["commands"][command])
    assert program == "mastaf"
    code, out, err = mastaf(*arguments, "--device", "cpu")
    assert code == 0, out + err


def test_evaluation_on_a_store_beside_the_run_moves_with_it(
    mastaf: Run, made: MadeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run = Path(shutil.copytree(made.heads[0], first / "run"))
    shutil.copytree(made.store_path, first / "data/cubes.zarr")
    monkeypatch.chdir(first / "data")
    evaluate_folder(EvaluationRequest(run, episodes=10, store_path="cubes.zarr"), "cpu")
    assert read_card(run)["evaluations"][0]["store"] == "../data/cubes.zarr"
    first.rename(second)
    monkeypatch.chdir(tmp_path)
    code, out, err = mastaf("reproduce", "second/run", "--device", "cpu", "--split", "test")
    assert code == 0, out + err
    assert "10 episodes, seed 0, store ../data/cubes.zarr: card" in out, (
        "beside one without a store, it has to be told apart"
    )


@pytest.mark.parametrize("is_gone", [False, True])
def test_store_and_manifest_beside_the_run_are_found_through_a_link_to_it(
    mastaf: Run, made: MadeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_gone: bool
) -> None:
    there = tmp_path / "there"
    run = Path(shutil.copytree(made.heads[0], there / "run"))
    shutil.copytree(made.store_path, there / "data/cubes.zarr")
    shutil.copy(made.world.manifest_path, there / "data/videos.csv")
    store, manifest = there / "data/cubes.zarr", there / "data/videos.csv"
    evaluate_folder(EvaluationRequest(run, episodes=10, store_path=str(store), manifest=str(manifest)), "cpu")
    entry = read_card(run)["evaluations"][0]
    assert (entry["store"], entry["manifest"]) == ("../data/cubes.zarr", "../data/videos.csv")
    if is_gone:
        shutil.rmtree(store)
    (tmp_path / "best").symlink_to("there/run")
    monkeypatch.chdir(tmp_path)
    code, out, err = mastaf("reproduce", "best", "--device", "cpu")
    assert code == is_gone, out + err
    assert (f"there is no store at {store}. " in out) == is_gone


def test_store_is_found_from_the_link_that_a_moved_run_has_left(mastaf: Run, made: MadeRuns, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made.heads[0], tmp_path / "first/run"))
    store = Path(shutil.copytree(made.store_path, tmp_path / "first/cubes.zarr"))
    evaluate_folder(EvaluationRequest(run, episodes=10, store_path=str(store)), "cpu")
    (tmp_path / "second").mkdir()
    run.symlink_to(run.rename(tmp_path / "second/run"))
    code, out, err = mastaf("reproduce", run, "--device", "cpu", "--split", "test")
    assert code == 0, out + err


def test_page_that_says_something_else_is_found(mastaf: Run, run: Path) -> None:
    page = run / "card.md"
    page.write_text(page.read_text().replace(" % |", "9 % |"))
    code, out, _ = mastaf("reproduce", run, "--device", "cpu", "--split", "val")
    assert code == 1
    assert "WRONG      card.md is not the page of this card.json" in out


def test_page_that_is_no_text_is_found(mastaf: Run, run: Path) -> None:
    (run / "card.md").write_bytes(b"\xff\xfe")
    code, out, err = mastaf("reproduce", run, "--device", "cpu", "--split", "val")
    assert code == 1, err
    assert "WRONG      card.md is not the page of this card.json" in out


DAMAGED_LINES = {
    "torn": (b'{"kind": "step", "epis', "it is no JSON"),
    "no text": (b'{"kind": "\xff"}', "it is no JSON"),
    "not an object": (b"7", "its content"),
    "no kind": (b'{"episode": 3}', "kind"),
    "no episode": (b'{"kind": "step"}', "episode"),
    "episode is a word": (b'{"kind": "step", "episode": "3"}', "episode"),
    "accuracy is a word": (
        b'{"kind": "validation", "episode": 3, "test_accuracy_not_for_selection": "high"}',
        "test_accuracy_not_for_selection",
    ),
}


@pytest.mark.parametrize("what", DAMAGED_LINES)
def test_damaged_metrics_are_named_beside_the_evaluations(mastaf: Run, run: Path, what: str) -> None:
    damaged, words = DAMAGED_LINES[what]
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines()
    metrics.write_bytes(b"\n".join([lines[0], damaged, *lines[1:]]) + b"\n")
    code, out, err = mastaf("reproduce", run, "--device", "cpu", "--split", "val")
    assert code == 1, err
    first, second, *_ = out.splitlines()
    assert first.startswith("identical  val")
    said = f"WRONG      metrics.jsonl cannot be held against the card: line 2 of {metrics} is damaged: {words}"
    assert second.startswith(said)
    with pytest.raises(CardError, match=r"line 2 of .*run/metrics\.jsonl is damaged"):
        held_out_scores(metrics, 6)


def test_other_machine_and_versions_are_named_and_no_difference(mastaf: Run, run: Path) -> None:
    def elsewhere(card: dict[str, Any]) -> None:
        for each in (card, *card["evaluations"]):
            each["libraries"]["torch"] = "1.0"
            each["hardware"]["processor"] = "another one"
            each["code_version"] = "0.0.1"

    rewrite(run, elsewhere)
    code, out, _ = mastaf("reproduce", run, "--device", "cpu", "--split", "val")
    assert code == 0
    changed = [line for line in out.splitlines() if line.startswith("changed")]
    assert [line.split(": card")[0] for line in changed] == [
        "changed    code version", "changed    libraries: torch", "changed    hardware: processor"
    ]  # fmt: skip


def test_other_manifest_means_other_episodes(mastaf: Run, run: Path, made: MadeRuns, tmp_path: Path) -> None:
    lines = made.world.manifest_path.read_text().splitlines()
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("\n".join(line for line in lines if not line.startswith("test0/0")) + "\n")
    code, out, _ = mastaf("reproduce", run, "--device", "cpu", "--manifest", fewer, "--split", "test")
    assert code == 1
    assert "these are other episodes" in out
    assert "changed    split hash" in out


def without_evaluations(run: Path) -> None:
    rewrite(run, lambda card: card.update(evaluations=[], validation=None))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no card": (lambda run: (run / "card.json").unlink(), "card.json"),
    "damaged card": (lambda run: (run / "card.json").write_text('{"mode":'), "damaged"),
    "other JSON": (lambda run: (run / "card.json").write_text("{}"), "damaged"),
    "negative episodes": (
        lambda run: rewrite(run, lambda card: card["validation"].update(episodes=-1), False),
        "damaged",
    ),
    "unknown table": (lambda run: rewrite(run, lambda card: card["config"].update(moon={})), "'moon'"),
    "no evaluation": (without_evaluations, "mastaf evaluate"),
    "no checkpoint": (lambda run: (run / "best.pt").unlink(), "best.pt"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_bad_input_is_one_line(mastaf: Run, run: Path, what: str) -> None:
    spoil, word = SPOILT[what]
    spoil(run)
    code, out, err = mastaf("reproduce", run, "--device", "cpu")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert word in err


@pytest.mark.parametrize("name", ["card.md", "config.toml", "best.pt"])
def test_another_file_of_the_run_is_no_damaged_card(mastaf: Run, scored: Path, name: str) -> None:
    code, out, err = mastaf("reproduce", scored / name)
    assert (code, out) == (2, "")
    wanted = f"Give the run's folder or its card.json: mastaf reproduce {scored}"
    assert err == f"mastaf: {scored / name} is no card.json. {wanted}\n"


def test_split_that_was_not_scored_is_refused(mastaf: Run, run: Path) -> None:
    code, _, err = mastaf("reproduce", run, "--split", "train")
    assert code == 2
    assert "test, val only" in err
