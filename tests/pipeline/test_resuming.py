"""What a run that goes on may and may not find changed, and that every config a run writes can be read again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import load_config
from configs.schema import RunConfig
from contracts.backbone_families import family_config, tiny_vivit
from contracts.made_runs import MadeRuns, fill_store, make_manifest
from contracts.world import World
from episodes.datasets import Manifest, write_manifest
from pipeline import training
from pipeline.checkpoint import CheckpointError, WriteError, load_checkpoint
from pipeline.interrupts import Stopped
from pipeline.scoring import load_run
from pipeline.settings import SetupError

CPU = torch.device("cpu")


def stop_after(episode: int) -> Callable[..., None]:
    """A listener that asks the run to stop there, once."""
    asked: list[int] = []

    def listen(*said: Any) -> None:
        line: Mapping[str, Any] = said[-1]
        if line["kind"] == "step" and line["episode"] == episode and not asked:
            asked.append(episode)
            os.kill(os.getpid(), signal.SIGTERM)

    return listen


def stopped(config: RunConfig, folder: Path, episode: int = 3) -> None:
    with pytest.raises(Stopped):
        training.train(config, folder, CPU, report=stop_after(episode))


def on_cubes(made: MadeRuns, *overrides: str) -> RunConfig:
    options = (f'store.path="{made.store_path}"', "training.mode=cached", "head.name=mastaf", "training.episodes=6")
    return made.world.config(*options, "training.validation_episodes=2", *overrides)


def test_store_of_odd_batches_gives_a_run_that_every_command_reads(tmp_path: Path) -> None:
    world = make_manifest(tmp_path)
    store_path = fill_store(world, tmp_path / "cubes.zarr", shard_rows=12, forward_batch=6)
    config = load_config(
        None, [f'data.manifest="{world.manifest_path}"', f'store.path="{store_path}"', "training.mode=cached",
               "episodes.n_way=2", "training.episodes=6", "training.episodes_per_step=1", "training.validation_episodes=2",
               "head.name=neighbor"],
    )  # fmt: skip
    stopped(config, tmp_path / "run", 1)
    training.train(config, tmp_path / "run", CPU, resume=True)
    assert load_run(tmp_path / "run", CPU).config.extraction.forward_batch == 6


def test_linear_probe_is_read_again_and_takes_no_statistics(world: World, tmp_path: Path) -> None:
    options = ("training.mode=classify", "training.backbone_learning_rate=0", "training.episodes_per_forward=2")
    config = world.config(*options)
    stopped(config, tmp_path / "run")
    training.train(config, tmp_path / "run", CPU, resume=True)
    assert load_run(tmp_path / "run", CPU).config.training.backbone_batchnorm == "frozen"


def test_second_head_keeps_the_classes_that_its_weights_have_seen(made: MadeRuns, tmp_path: Path) -> None:
    start = tmp_path / "start"
    training.train(on_cubes(made), start, CPU)
    configs = [
        (on_cubes(made, "head.name=neighbor"), tmp_path / "neighbor"),
        (on_cubes(made, f'training.initial_weights="{start / "best.pt"}"'), tmp_path / "mastaf"),
    ]
    with pytest.raises(Stopped):
        training.train_together(configs, CPU, report=stop_after(3))
    before = load_checkpoint(tmp_path / "mastaf/last.pt")["inherited_classes"]
    assert before["train"]
    start.rename(tmp_path / "moved")
    training.train_together(configs, CPU, resume=True)
    assert load_checkpoint(tmp_path / "mastaf/best.pt")["inherited_classes"] == before


@pytest.mark.slow
def test_dropout_that_a_directory_states_is_there_after_a_resumption(world: World, tmp_path: Path) -> None:
    """Of the library's default sizes, so that the network could be built without the directory."""
    from transformers import VivitConfig, VivitModel

    VivitModel(VivitConfig(hidden_dropout_prob=0.1, image_size=32, num_frames=8)).save_pretrained(tmp_path / "vivit")
    config = world.config(
        "training.mode=end_to_end", "backbone.name=vivit", f'backbone.weights="{tmp_path / "vivit"}"',
        "sampling.num_frames=8", "sampling.resize_size=32", "sampling.crop_size=32", "training.episodes=2",
        "training.episodes_per_step=1", "training.validate_every=2", "training.validation_episodes=2",
        "training.learning_rate=0.001",
    )  # fmt: skip
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"options": {}})})
    training.train(config, tmp_path / "whole", CPU)
    stopped(config, tmp_path / "cut", 1)
    training.train(config, tmp_path / "cut", CPU, resume=True)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_directory_that_states_other_dropout_is_refused(world: World, tmp_path: Path) -> None:
    config = family_config(world, "vivit", tmp_path)
    directory = tiny_vivit(tmp_path / "vivit", hidden_dropout_prob=0.3)
    config = config.model_copy(
        update={
            "backbone": config.backbone.model_copy(update={"weights": str(directory)}),
            "training": config.training.model_copy(update={"mode": "end_to_end"}),
        }
    )
    stopped(config, tmp_path / "run")
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(settings | {"hidden_dropout_prob": 0.0}))
    with pytest.raises(SetupError, match=r"drops \{'hidden_dropout_prob': 0.3.* now \{'hidden_dropout_prob': 0.0"):
        training.train(config, tmp_path / "run", CPU, resume=True)


def test_where_the_first_weights_came_from_stays_in_the_record(made: MadeRuns, tmp_path: Path) -> None:
    start = tmp_path / "start"
    training.train(on_cubes(made), start, CPU)
    given = f'training.initial_weights="{start / "best.pt"}"'
    stopped(on_cubes(made, given), tmp_path / "run")
    with pytest.raises(SetupError, match=r"training\.initial_weights: run '.*start/best\.pt', now None"):
        training.train(on_cubes(made), tmp_path / "run", CPU, resume=True)
    changed = f'training.initial_weights="{start / "last.pt"}"'
    with pytest.raises(SetupError, match=r"training\.initial_weights: run .*, now '.*last\.pt'"):
        training.train(on_cubes(made, changed), tmp_path / "run", CPU, resume=True)
    start.rename(tmp_path / "moved")
    foreign = f'training.initial_weights="{tmp_path / "moved/last.pt"}"'
    with pytest.raises(
        SetupError, match=r"training\.initial_weights: run .*, now '.*moved/last\.pt', which does not hold the bytes"
    ):
        training.train(on_cubes(made, foreign), tmp_path / "run", CPU, resume=True)
    # The same words as before, though the file is gone; and where it is now.
    stopped_again = on_cubes(made, given, "training.episodes=9")
    with pytest.raises(Stopped):
        training.train(stopped_again, tmp_path / "run", CPU, resume=True, report=stop_after(6))
    assert load_config(tmp_path / "run/config.toml").training.initial_weights == str(start / "best.pt")
    moved = f'training.initial_weights="{tmp_path / "moved/best.pt"}"'
    training.train(on_cubes(made, moved, "training.episodes=9"), tmp_path / "run", CPU, resume=True)
    assert load_config(tmp_path / "run/config.toml").training.initial_weights == str(tmp_path / "moved/best.pt")


def test_first_weights_may_be_read_from_a_copy_while_the_first_file_is_there(made: MadeRuns, tmp_path: Path) -> None:
    training.train(on_cubes(made), tmp_path / "start", CPU)
    first, copied = tmp_path / "start/best.pt", tmp_path / "copy.pt"
    stopped(on_cubes(made, f'training.initial_weights="{first}"'), tmp_path / "run")
    shutil.copy(first, copied)
    training.train(on_cubes(made, f'training.initial_weights="{copied}"'), tmp_path / "run", CPU, resume=True)
    copied.write_bytes(b"other content")
    other = on_cubes(made, f'training.initial_weights="{copied}"', "training.episodes=9")
    training.train(other, tmp_path / "run", CPU, resume=True)  # the words have not changed, and the file is not read


def test_another_random_start_is_refused(world: World, tmp_path: Path) -> None:
    stopped(world.config("training.mode=end_to_end"), tmp_path / "run")
    training.train(world.config("training.mode=end_to_end", "training.episodes=0"), tmp_path / "other", CPU)
    file = f'backbone.weights="{tmp_path / "other/backbone.pt"}"'
    with pytest.raises(SetupError, match=r"backbone\.weights: run 'random:1', now '.*backbone\.pt'"):
        training.train(world.config("training.mode=end_to_end", file), tmp_path / "run", CPU, resume=True)
    with pytest.raises(SetupError, match=r"backbone\.weights: run 'random:1', now 'random:7'"):
        training.train(
            world.config("training.mode=end_to_end", "backbone.weights=random:7"), tmp_path / "run", CPU, resume=True
        )


def test_rows_of_a_manifest_may_change_places(made: MadeRuns, tmp_path: Path) -> None:
    stopped(on_cubes(made), tmp_path / "run")
    videos = list(made.world.manifest.videos)
    random.Random(0).shuffle(videos)
    write_manifest(Manifest(tuple(videos), made.world.folder), tmp_path / "shuffled.csv")
    other = on_cubes(made, f'data.manifest="{tmp_path / "shuffled.csv"}"')
    training.train(other, tmp_path / "run", CPU, resume=True)
    training.train(on_cubes(made), tmp_path / "whole", CPU)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_file_system_without_locks_is_told_and_used(
    made: MadeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    training.train(on_cubes(made), tmp_path / "run", CPU)
    assert "has no locks (Function not implemented)" in capfd.readouterr().err


def test_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(world: World, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk; torch hides the system's error in one of its own."""
    config = world.config("training.mode=end_to_end")
    training.train(config, tmp_path / "whole", CPU)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(WriteError, match=r"run/last\.pt cannot be written \(File too large\).*make room"):
            training.train(config, tmp_path / "run", CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    training.train(config, tmp_path / "run", CPU, resume=None)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("loggers", ['["csv"]', "[]"])
def test_full_disk_is_told_by_the_log_that_cannot_be_written(made: MadeRuns, tmp_path: Path, loggers: str) -> None:
    options = ("training.episodes=40", "training.episodes_per_step=1", f"training.loggers={loggers}")
    training.train(on_cubes(made, *options), tmp_path / "whole", CPU)
    metrics = tmp_path / "run/metrics.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(line: Mapping[str, Any]) -> None:
        if line["kind"] == "step" and line["episode"] == 20:
            resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.stat().st_size + 30, before[1]))

    try:
        with pytest.raises(WriteError, match=r"run/metrics\.jsonl cannot be written \(File too large\).*make room"):
            training.train(on_cubes(made, *options), tmp_path / "run", CPU, report=fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(metrics.read_text().splitlines()) > 20
    training.train(on_cubes(made, *options), tmp_path / "run", CPU, resume=True)
    assert metrics.read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_damaged_best_checkpoint_is_told_before_any_work(made: MadeRuns, tmp_path: Path) -> None:
    run, options = tmp_path / "run", ("training.validate_every=2", "training.episodes_per_step=1")
    stopped(on_cubes(made, *options), run, 3)
    whole, lines = (run / "best.pt").read_bytes(), (run / "metrics.jsonl").read_bytes()
    (run / "best.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        SetupError, match=r"best\.pt cannot be read .* best weights so far \(after 2 episodes\): restore"
    ):
        training.train(on_cubes(made, *options), run, CPU, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == lines
    (run / "best.pt").write_bytes(whole)
    training.train(on_cubes(made, *options), run, CPU, resume=True)


def test_lost_best_checkpoint_is_told_before_any_work(made: MadeRuns, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped(on_cubes(made, "training.validate_every=2", "training.episodes_per_step=1"), run, 3)
    (run / "best.pt").unlink()
    with pytest.raises(
        SetupError, match=r"best\.pt is gone\. It has the best weights so far \(after 2 episodes\): restore"
    ):
        training.train(
            on_cubes(made, "training.validate_every=2", "training.episodes_per_step=1"), run, CPU, resume=True
        )
    with pytest.raises(SetupError, match=r"best\.pt is gone"):
        load_run(run, CPU)


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_folder_that_cannot_be_written_is_refused_before_any_work(made: MadeRuns, tmp_path: Path, kind: str) -> None:
    (tmp_path / "taken").write_text("mine")
    folder = tmp_path / ("taken" if kind == "file" else "taken/run")
    with pytest.raises(SetupError, match=f"{folder}.* give a(nother)? folder"):
        training.train(on_cubes(made), folder, CPU)
    assert (tmp_path / "taken").read_text() == "mine"


def test_what_a_start_gives_is_said(made: MadeRuns, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    training.train(on_cubes(made), tmp_path / "start", CPU)
    given = f'training.initial_weights="{tmp_path / "start/best.pt"}"'
    training.train(on_cubes(made, given), tmp_path / "run", CPU)
    assert f"starting from {tmp_path}/start/best.pt (head mastaf, after 6 episodes): the head" in capfd.readouterr().err
    training.train(on_cubes(made, given, "head.name=bi_mhm"), tmp_path / "other", CPU)
    assert "gives nothing here: this head has no weights" in capfd.readouterr().err
    folder = tmp_path / "start"
    with pytest.raises(CheckpointError, match=r"is a folder\. Give a file: .*start/best\.pt"):
        training.train(on_cubes(made, f'training.initial_weights="{folder}"'), tmp_path / "third", CPU)


def test_moved_data_are_asked_for_by_the_option_that_names_them(made: MadeRuns, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"no store at .*--store PATH, or --set store\.path=PATH"):
        training.train(made.world.config('store.path="gone.zarr"'), tmp_path / "run", CPU)
    with pytest.raises(SetupError, match=r"gone\.csv is not there.*--manifest FILE, or --set data\.manifest=FILE"):
        training.train(on_cubes(made, 'data.manifest="gone.csv"'), tmp_path / "run", CPU)
