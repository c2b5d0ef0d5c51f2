"""The run card: what made a run, what it scores, honestly labelled, for programs and for people."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.open import open_store
from configs.load import load_config
from contracts.made_runs import NUM_EPISODES, MadeRuns
from contracts.world import World, write_clip
from pipeline import reproduce_command, training
from pipeline.card_reading import CardError, read_card
from pipeline.checkpoint import load_checkpoint
from pipeline.clip_decoder import ClipDecoder
from pipeline.outcomes import bits_digest, parting, read_outcomes
from pipeline.run_card import record_evaluation
from pipeline.run_page import to_markdown
from pipeline.scoring import evaluate_run, load_run
from pipeline.sources import LiveClips
from pipeline.train_command import EvaluationRequest, evaluate_folder, train_recipe

CPU = torch.device("cpu")
OF_VERSION_ONE = {
    "mode", "head", "head_options", "episodes", "best_episode", "selected_on", "val_accuracy", "val_interval95",
    "validation_episodes", "test_selected_accuracy_published_protocol", "degraded_videos", "seconds",
    "heads_trained_together", "split_hash", "store_fingerprint", "num_parameters", "code_version", "libraries", "hardware",
}  # fmt: skip
"""Keys that programs of others may read already."""


@pytest.fixture
def run(made: MadeRuns, tmp_path: Path) -> Path:
    """A copy of the run with the quickest head, to be scored and spoilt."""
    return Path(shutil.copytree(made.heads[0], tmp_path / "run"))


def evaluated(run: Path, **asked: Any) -> dict[str, Any]:
    return evaluate_folder(EvaluationRequest(run, **asked), "cpu")[0]


def test_card_says_what_made_the_run(made: MadeRuns) -> None:
    run = made.heads[1]
    card = read_card(run)
    assert card.keys() >= OF_VERSION_ONE
    assert (card["run"], card["head"], card["mode"]) == ("mastaf", "mastaf", "cached")
    assert card["config"]["head"]["name"] == "mastaf"
    assert card["config"]["training"]["episodes"] == card["episodes"] == 6
    with open_store(made.store_path) as store:
        assert card["store_fingerprint"] == store.spec.fingerprint
        assert card["store_content_hash"] == store.content_hash()
    assert card["split_hash"] == made.world.manifest.split_hash
    assert card["started_utc"] <= card["ended_utc"]
    assert (card["resumptions"], card["ranks"]) == (0, 1)
    assert card["hardware"]["processor"]
    assert card["val_accuracy"] == card["validation"]["accuracy"]


def test_validation_of_the_card_is_that_of_the_best_checkpoint(made: MadeRuns) -> None:
    card = read_card(made.heads[1])
    result, score = evaluate_run(load_run(made.heads[1], CPU), "val", card["validation_episodes"], CPU)
    assert score.outcomes is not None
    validation = card["validation"]
    assert (validation["accuracy"], validation["interval95"]) == (result["accuracy"], result["interval95"])
    assert validation["episode_hash"] == result["episode_hash"]
    assert validation["outcomes_sha256"] == bits_digest(score.outcomes.is_right)


def test_weights_digest_is_over_the_weights_and_not_over_the_file(made: MadeRuns) -> None:
    digests = [read_card(run)["best_weights_sha256"] for run in made.heads[1:]]
    assert len(set(digests)) == len(digests)
    card = read_card(made.heads[1])
    is_last_best = card["best_episode"] == card["episodes"]
    assert (card["best_weights_sha256"] == card["last_weights_sha256"]) == is_last_best
    names = ("best.pt", "last.pt")
    best, last = (load_checkpoint(made.heads[1] / name) for name in names)
    assert is_last_best == all(torch.equal(best["model"][name], last["model"][name]) for name in best["model"])
    assert len({(made.heads[1] / name).read_bytes() for name in names}) == 2


def test_test_accuracy_is_none_until_the_runs_own_protocol_is_scored(run: Path) -> None:
    assert read_card(run)["test_accuracy"] is None
    evaluated(run, shots=2)
    evaluated(run, split="val")
    assert read_card(run)["test_accuracy"] is None
    few = evaluated(run, episodes=10)
    assert (read_card(run)["test_accuracy"], read_card(run)["test_episodes"]) == (few["accuracy"], 10)
    own = evaluated(run)
    evaluated(run, episodes=NUM_EPISODES + 5)
    card = read_card(run)
    assert (card["test_accuracy"], card["test_interval95"]) == (own["accuracy"], own["interval95"])
    assert card["test_episodes"] == NUM_EPISODES
    assert len(card["evaluations"]) == 5


def test_same_evaluation_takes_the_place_of_the_earlier_one(run: Path) -> None:
    first, second = evaluated(run), evaluated(run)
    assert first == second
    entries = read_card(run)["evaluations"]
    assert len(entries) == 1
    assert {key: entries[0][key] for key in ("accuracy", "split", "k_shot", "episode_hash", "store_fingerprint")} == {
        key: first[key] for key in ("accuracy", "split", "k_shot", "episode_hash", "store_fingerprint")
    }
    assert [path.name for path in (run / "evaluations").glob("test_*")] == [Path(entries[0]["outcomes_file"]).name]


def test_every_answer_of_an_evaluation_is_kept(run: Path) -> None:
    evaluated(run)
    entry = read_card(run)["evaluations"][0]
    is_right = read_outcomes(run / entry["outcomes_file"], entry["outcomes_sha256"])
    _, score = evaluate_run(load_run(run, CPU), "test", NUM_EPISODES, CPU)
    assert is_right is not None
    assert score.outcomes is not None
    assert np.array_equal(is_right, score.outcomes.is_right)
    assert read_outcomes(run / entry["outcomes_file"], "0" * 64) is None
    (run / entry["outcomes_file"]).write_bytes(b"PK broken")
    assert read_outcomes(run / entry["outcomes_file"], entry["outcomes_sha256"]) is None


def test_parting_counts_episodes_and_queries_and_names_the_first() -> None:
    first = np.zeros((5, 4), dtype=np.bool_)
    second = first.copy()
    second[3, 1] = second[4, 0] = second[4, 2] = True
    parts = parting(first, second)
    assert (parts.episodes, parts.queries, parts.first_episode) == (2, 3, 3)
    assert parting(first, first).first_episode is None


def test_digest_of_answers_tells_their_shape_too() -> None:
    answers = np.ones((6, 4), dtype=np.bool_)
    assert bits_digest(answers) != bits_digest(answers.reshape(4, 6))
    assert bits_digest(answers) == bits_digest(answers.copy())


def test_page_names_every_accuracy_and_labels_the_test_selected_one(run: Path) -> None:
    own = evaluated(run)
    text = (run / "card.md").read_text()
    assert text == to_markdown(read_card(run))
    assert f"| test | {100 * own['accuracy']:.2f} ± {100 * own['interval95']:.2f} % | {NUM_EPISODES} |" in text
    assert "not scored yet" not in text
    assert "test-selected" not in text
    published = to_markdown({**read_card(run), "test_selected_accuracy_published_protocol": 0.75})
    row = next(line for line in published.splitlines() if line.startswith("| test-selected"))
    assert "75.00 %" in row
    assert "not an honest estimate" in row


def test_page_holds_no_path_of_the_machine_and_whole_tables(run: Path, made: MadeRuns) -> None:
    assert "not scored yet" in (run / "card.md").read_text()
    evaluated(run)
    text = (run / "card.md").read_text()
    assert str(run.parent) not in text
    assert str(made.store_path.parent) not in text
    columns = 0
    for line in text.splitlines():
        if line.startswith("|"):
            bars = line.replace("\\|", "").count("|")
            columns = columns or bars
            assert bars == columns
        else:
            columns = 0


def test_page_shows_other_data_in_the_words_of_whoever_gave_them(
    run: Path, made: MadeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere/data"
    shutil.copytree(made.store_path, elsewhere / "cubes.zarr")
    shutil.copy(made.world.manifest_path, elsewhere / "videos.csv")
    (tmp_path / "runs").mkdir()
    moved = Path(shutil.move(run, tmp_path / "runs/run"))
    monkeypatch.chdir(elsewhere)
    evaluated(moved, store_path="cubes.zarr", manifest="videos.csv")
    text = (moved / "card.md").read_text()
    assert str(tmp_path) not in text
    assert str(made.store_path.parent) not in text
    assert "store cubes.zarr, manifest videos.csv" in text
    entry = read_card(moved)["evaluations"][0]
    assert entry["store"] == str(elsewhere / "cubes.zarr")
    assert entry["manifest"] == str(elsewhere / "videos.csv")


def test_address_of_an_object_store_stays_one(run: Path) -> None:
    result, score = evaluate_run(load_run(run, CPU), "test", 4, CPU)
    record_evaluation(run, result, score, "s3://bucket/S.zarr")
    (entry,) = [each for each in read_card(run)["evaluations"] if each["episodes"] == 4]
    assert entry["store"] == "s3://bucket/S.zarr"
    assert reproduce_command._place(run, entry["store"]) == "s3://bucket/S.zarr"


def test_page_says_over_what_the_interval_of_held_out_videos_is_and_whether_they_chose(run: Path) -> None:
    card = {**read_card(run), "heldout_top1": 0.5, "heldout_low95": 0.25, "heldout_high95": 0.75, "heldout_videos": 12}
    assert "over the videos" not in to_markdown(read_card(run))
    for selected_on, has_chosen in (("val", False), ("held-out videos", True)):
        text = to_markdown({**card, "selected_on": selected_on, "val_accuracy": None})
        row = next(line for line in text.splitlines() if line.startswith("| held-out videos"))
        assert "| 50.00 % (25.00 to 75.00) |" in row
        assert "12 videos of the training classes, classified" in row
        assert ("chose the checkpoint, so a little too high" in row) == has_chosen
        assert "interval over episodes, that of held-out videos is Wilson's over the videos." in text


def test_card_keeps_what_an_earlier_call_met(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A video that was short when the run began, and what was counted then."""
    own = World(Path(shutil.copytree(world.folder, tmp_path / "world")), tmp_path / "world/videos.csv")
    write_clip(own.folder / "videos/up/1.mp4", "up", 1, num_frames=3)
    options = ("training.mode=end_to_end", "training.validate_every=3", "training.validation_episodes=2")
    train = partial(training.train, folder=tmp_path / "run", device=CPU)
    card = train(own.config(*options, "training.episodes=3"))
    assert (card["second_tries"], card["lost_decoding_processes"]) == (0, 0)
    assert card["degraded_videos"] == {"up/1": "short_video"}
    assert "decoding" not in (tmp_path / "run/card.md").read_text()
    write_clip(own.folder / "videos/up/1.mp4", "up", 1)
    monkeypatch.setattr(LiveClips, "num_second_tries", 3)
    monkeypatch.setattr(ClipDecoder, "num_restarts", 1)
    for episodes, times in ((6, 1), (9, 2)):
        card = train(own.config(*options, f"training.episodes={episodes}"), resume=True)
        assert card["degraded_videos"] == {"up/1": "short_video"}
        assert (card["second_tries"], card["lost_decoding_processes"]) == (3 * times, times)
    assert "| decoding | 6 videos decoded at a second try, 2 decoding processes lost |" in to_markdown(card)
    capsys.readouterr()
    overrides = ("training.episodes=12",)
    train_recipe(str(tmp_path / "run/config.toml"), tmp_path / "run", True, "cpu", overrides)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "9 videos decoded at a second try, 3 decoding processes lost" in last


def test_names_of_the_users_do_not_break_the_page(run: Path) -> None:
    card = {**read_card(run), "run": "a|b*c*", "degraded_videos": {"x|y_[1]": "few_frames"}, "excluded_videos": {}}
    text = to_markdown(card)
    assert text.startswith("# Run a|b\\*c\\*\n")
    assert r"x\|y\_\[1\] (few\_frames)" in text


def test_card_of_an_earlier_version_takes_evaluations_too(run: Path) -> None:
    card = read_card(run)
    (run / "card.json").write_text(json.dumps({key: card[key] for key in OF_VERSION_ONE}))
    own = evaluated(run)
    card = read_card(run)
    assert [entry["accuracy"] for entry in card["evaluations"]] == [own["accuracy"]]
    assert f"{100 * own['accuracy']:.2f}" in (run / "card.md").read_text()


@pytest.mark.parametrize("spoilt", ["no card", "damaged card", "unwritable"])
def test_result_that_cannot_be_noted_is_given_all_the_same(
    run: Path, spoilt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if spoilt == "no card":
        (run / "card.json").unlink()
    elif spoilt == "damaged card":
        (run / "card.json").write_text('{"mode": ')
    else:
        shutil.rmtree(run / "evaluations", ignore_errors=True)
        (run / "evaluations").write_text("a file where the folder should be")
    result = evaluated(run)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "not noted" in warnings[0]
    assert 0 <= result["accuracy"] <= 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ('{"mode": "cached"', "no JSON"),
        ("[]", "damaged"),
        ('{"name": "something else"}', "damaged"),
    ],
)
def test_damaged_card_is_one_plain_error(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(CardError, match=words):
        read_card(tmp_path)


def test_evaluations_outlive_a_finished_run_that_is_resumed(run: Path) -> None:
    own = evaluated(run)
    card = training.train(load_config(run / "config.toml"), run, CPU, resume=True)
    assert (card["test_accuracy"], len(card["evaluations"])) == (own["accuracy"], 1)
    assert card["resumptions"] == 0  # there was nothing left to do
