"""What a run writes down: metrics.jsonl holds what is deterministic, every log holds each line once, whatever was killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cli
from cache.open import open_store
from configs.load import load_config, to_toml
from contracts.made_runs import MadeRuns
from pipeline import run_log, training
from pipeline.csv_log import CsvFile
from pipeline.interrupts import Stopped
from pipeline.run_log import RunLog
from pipeline.settings import DIGEST, SetupError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MEASURED = {"clips_per_second": 3.5, "seconds_waiting": 0.25, "gpu_memory_bytes": 2048.0}
BOTH = ("csv", "tensorboard")


def step(episode: int, **more: Any) -> dict[str, Any]:
    terms = {"loss": 1.0 / episode, "loss_few_shot": 0.5 / episode, "accuracy": 0.25, "learning_rate": 0.1}
    return {"kind": "step", "episode": episode, **terms, "gradient_norm": 2.0 * episode, **more}


def validation(episode: int) -> dict[str, Any]:
    return {"kind": "validation", "episode": episode, "val_accuracy": 0.5, "val_interval95": 0.125, "val_episodes": 8}


def lines_to(last: int) -> list[dict[str, Any]]:
    """A step every episode, a validation every third."""
    lines = []
    for episode in range(1, last + 1):
        lines.append(step(episode))
        if episode % 3 == 0:
            lines.append(validation(episode))
    return lines


def log_of(folder: Path, *loggers: str) -> RunLog:
    return RunLog(folder, loggers or BOTH, {"head": {"name": "mastaf"}}, folder.name)


def written(folder: Path, last: int, *loggers: str) -> Path:
    with log_of(folder, *loggers) as log:
        for line in lines_to(last):
            log.write(line, MEASURED)
    return folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def events(folder: Path, kind: str) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, as TensorBoard reads them."""
    accumulator = EventAccumulator(str(folder / "tensorboard" / kind), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def assert_same_logs(folder: Path, whole: Path) -> None:
    """Everything that the episodes decide is the same; each line is there once."""
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("steps", "validations"):
        assert table(folder / f"{name}.csv") == table(whole / f"{name}.csv")
        assert events(folder, name) == events(whole, name)


def test_metrics_hold_what_the_episodes_decide_and_the_other_logs_what_was_measured_too(tmp_path: Path) -> None:
    folder = written(tmp_path, 3)
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == lines_to(3)
    steps = table(folder / "steps.csv")
    assert list(steps[0]) == [*step(1), *MEASURED][1:]
    assert [row["loss"] for row in steps] == [repr(1.0 / episode) for episode in (1, 2, 3)]
    assert {row["clips_per_second"] for row in steps} == {"3.5"}
    assert [row["val_accuracy"] for row in table(folder / "validations.csv")] == ["0.5"]


def test_tensorboard_names_every_number_of_a_line_by_what_it_is_about(tmp_path: Path) -> None:
    with log_of(tmp_path) as log:
        log.write(step(4, was_skipped=True), MEASURED)
        log.write({**validation(4), "test_accuracy_not_for_selection": 0.75, "heldout_top1": 0.5})
    steps, validations = events(tmp_path, "steps"), events(tmp_path, "validations")
    assert set(steps) == {
        "train/loss", "train/loss_few_shot", "train/accuracy", "train/learning_rate", "train/gradient_norm",
        "speed/clips_per_second", "speed/seconds_waiting", "memory/gpu_memory_bytes",
    }  # fmt: skip
    assert steps["train/gradient_norm"] == [(4, 8.0)]
    assert set(validations) == {
        "val/accuracy", "val/interval95", "val/episodes", "test/accuracy_not_for_selection", "val/heldout_top1",
    }  # fmt: skip


def test_a_line_is_in_the_files_when_write_returns(tmp_path: Path) -> None:
    with log_of(tmp_path, "csv") as log:
        for number, line in enumerate(lines_to(3), start=1):
            log.write(line, MEASURED)
            assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == number
            assert table(tmp_path / "steps.csv")[-1]["episode"] == str(min(number, 3))


@pytest.mark.parametrize(("episode", "validated"), [(2, -1), (3, -1), (3, 3), (5, 3), (6, 3), (7, 6), (0, -1)])
def test_resumed_logs_are_those_of_an_uninterrupted_run(tmp_path: Path, episode: int, validated: int) -> None:
    whole, cut = written(tmp_path / "whole", 8), written(tmp_path / "cut", 7)
    with log_of(cut) as log:
        log.resume_at(episode, validated)
        kept = [line for line in lines_to(8) if line["episode"] <= (episode if line["kind"] == "step" else validated)]
        assert [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()] == kept if kept else True
        for line in lines_to(8):
            if line not in kept:
                log.write(line, MEASURED)
    assert_same_logs(cut, whole)


def test_many_resumptions_within_one_second_are_read_in_their_order(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for last in range(1, 13):
        with log_of(folder) as log:
            log.resume_at(last - 1, 3 * ((last - 1) // 3) or -1)
            log.write({**step(last), "loss": 0.0}, MEASURED)  # is lost, and written again with its true value
        with log_of(folder) as log:
            log.resume_at(last - 1, 3 * ((last - 1) // 3) or -1)
            for line in lines_to(12):
                if line["episode"] == last:
                    log.write(line, MEASURED)
    assert_same_logs(folder, written(tmp_path / "whole", 12))


@pytest.mark.parametrize("torn_bytes", [1, 2, 15, 25])
def test_lines_that_a_kill_tore_are_cut_and_written_again(tmp_path: Path, torn_bytes: int) -> None:
    whole, cut = written(tmp_path / "whole", 8), written(tmp_path / "cut", 6)
    torn = [cut / "metrics.jsonl", cut / "steps.csv", cut / "validations.csv", *cut.glob("tensorboard/*/*tfevents*")]
    assert len(torn) == 5
    for path in torn:
        os.truncate(path, path.stat().st_size - torn_bytes)
    with log_of(cut) as log:
        log.resume_at(4, 3)
        for line in lines_to(8):
            if line["episode"] > 4:
                log.write(line, MEASURED)
    assert_same_logs(cut, whole)


WRITER = """
import itertools, sys
from pathlib import Path
from pipeline.run_log import RunLog

with RunLog(Path(sys.argv[1]), ("csv", "tensorboard"), {}, "run") as log:
    for episode in itertools.count(1):
        log.write({"kind": "step", "episode": episode, "loss": 1.0 / episode}, {"clips_per_second": 1.0})
        if episode == 200:
            print("written", flush=True)
"""


def test_killed_process_leaves_logs_that_can_be_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.kill()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) >= 200
    with log_of(folder) as log:
        log.resume_at(150, -1)
        log.write({"kind": "step", "episode": 151, "loss": 1.0 / 151}, {"clips_per_second": 1.0})
    wanted = list(range(1, 152))
    assert [int(row["episode"]) for row in table(folder / "steps.csv")] == wanted
    assert [json.loads(line)["episode"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == wanted
    # TensorBoard's thread had not yet written all of what it was handed: of the last seconds before a kill there may be none.
    steps = [number for number, _ in events(folder, "steps")["train/loss"]]
    assert steps == sorted(set(steps))
    assert steps[-1] == 151


def test_name_that_comes_later_gets_a_column_and_loses_no_row(tmp_path: Path) -> None:
    file = CsvFile(tmp_path / "rows.csv")
    file.append({"episode": 1, "loss": 0.5})
    file.append({"episode": 2, "loss": 0.25, "loss_late": 1.5})
    file.append({"episode": 3, "loss": 0.125})
    file.close()
    assert file.path.read_text() == "episode,loss,loss_late\n1,0.5,\n2,0.25,1.5\n3,0.125,\n"


def test_log_of_a_run_without_csv_and_tensorboard_is_made_from_its_metrics(tmp_path: Path) -> None:
    folder = written(tmp_path / "old", 5, "none")
    assert not (folder / "steps.csv").exists()
    with log_of(folder) as log:
        log.resume_at(5, 3)
        log.write(step(6), MEASURED)
        log.write(validation(6))
    steps = table(folder / "steps.csv")
    assert [row["episode"] for row in steps] == ["1", "2", "3", "4", "5", "6"]
    assert [row["clips_per_second"] for row in steps] == ["", "", "", "", "", "3.5"]
    assert [number for number, _ in events(folder, "steps")["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [number for number, _ in events(folder, "validations")["val/accuracy"]] == [3, 6]


def test_new_run_removes_the_logs_of_one_that_never_did_a_step(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", 4)
    with log_of(folder) as log:
        log.begin()
        log.write(step(1), MEASURED)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == len(table(folder / "steps.csv")) == 1
    assert events(folder, "steps")["train/loss"] == [(1, 1.0)]
    assert not (folder / "validations.csv").exists()
    assert not list(folder.glob("tensorboard/validations/*"))


def test_norm_that_overflowed_is_valid_json(tmp_path: Path) -> None:
    with log_of(tmp_path) as log:
        log.write(step(1, gradient_norm=float("inf")), MEASURED)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["gradient_norm"] is None
    assert table(tmp_path / "steps.csv")[0]["gradient_norm"] == "inf"


def test_logs_take_no_signals_and_leave_no_threads(tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers, threads = [signal.getsignal(number) for number in numbers], set(threading.enumerate())
    written(tmp_path, 3)
    assert [signal.getsignal(number) for number in numbers] == handlers
    assert set(threading.enumerate()) <= threads


def test_clips_per_second_times_the_seconds_are_the_clips_of_a_step(made: MadeRuns) -> None:
    config = load_config(made.heads[1] / "config.toml")
    episodes, per_step = config.episodes, config.training.episodes_per_step
    num_clips = per_step * episodes.n_way * (episodes.k_shot + episodes.n_query)
    rows = table(made.heads[1] / "steps.csv")
    assert len(rows) == 2
    for row in rows:
        assert float(row["clips_per_second"]) * float(row["seconds_step"]) == pytest.approx(num_clips)


def test_stopped_and_resumed_training_has_the_logs_of_an_uninterrupted_one(made: MadeRuns, tmp_path: Path) -> None:
    with open_store(made.store_path) as store:
        weights = f"backbone.weights={DIGEST}{store.spec.weights_digest}"
    config = made.world.config(
        f'store.path="{made.store_path}"', weights, "head.name=neighbor", "training.validation_episodes=2",
        'training.loggers=["csv", "tensorboard"]',
    )  # fmt: skip
    training.train(config, tmp_path / "whole", CPU)

    def stop(line: Mapping[str, Any]) -> None:
        if line["kind"] == "step" and line["episode"] == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        training.train(config, tmp_path / "cut", CPU, report=stop)
    training.train(config, tmp_path / "cut", CPU, resume=True)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    for name in ("steps", "validations"):
        whole, cut = events(tmp_path / "whole", name), events(tmp_path / "cut", name)
        is_decided = ("train/", "val/")
        assert {tag: rows for tag, rows in cut.items() if tag.startswith(is_decided)} == {
            tag: rows for tag, rows in whole.items() if tag.startswith(is_decided)
        }
        assert [row["episode"] for row in table(tmp_path / f"cut/{name}.csv")] == [
            row["episode"] for row in table(tmp_path / f"whole/{name}.csv")
        ]


@pytest.fixture
def offline_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    wandb.teardown()


@pytest.mark.usefixtures("offline_wandb")
def test_wandb_offline_keeps_one_id_over_a_resumption(tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    folder = written(tmp_path / "run", 3, "wandb")
    run_id = (folder / "wandb/run_id").read_text()
    with log_of(folder, "wandb") as log:
        log.resume_at(3, 3)
        log.write(step(4), MEASURED)
        log.write(validation(4))
    assert (folder / "wandb/run_id").read_text() == run_id
    assert {path.stem for path in folder.glob("wandb/offline-run-*/*.wandb")} == {f"run-{run_id}"}
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers


def test_wandb_that_nobody_has_logged_in_to_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(SetupError, match=r"configured\. .*WANDB_MODE=offline"), log_of(tmp_path, "wandb") as log:
        log.begin()


def test_absent_wandb_is_refused_before_any_training(
    made: MadeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(run_log, "version", absent)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(made.world.config(f'store.path="{made.store_path}"', 'training.loggers=["wandb"]')))
    monkeypatch.setattr(sys, "argv", ["mastaf", "train", str(recipe), "--out", str(tmp_path / "run")])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the program's own handlers stay out of this process
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.count("\n") == 1
    assert "pip install 'mastaf[wandb]'" in printed
    assert not (tmp_path / "run").exists()
