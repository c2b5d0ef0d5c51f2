"""What a run before this one has trained on is never scored as unseen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contracts.world import World
from episodes.datasets import Manifest, write_manifest
from pipeline.ancestry import SeenClasses, classes_behind
from pipeline.checkpoint import load_checkpoint
from pipeline.extract_command import extract_to_store
from pipeline.scoring import evaluate_run, load_run
from pipeline.settings import SetupError
from pipeline.training import train

CPU = torch.device("cpu")
FIRST = ("training.episodes=0", "training.mode=end_to_end", "head.name=protonet")


@pytest.fixture(scope="module")
def ancestor(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose training classes are the test classes of `world`, and the other way round."""
    folder = tmp_path_factory.mktemp("ancestor")
    swapped = {"train": "test", "test": "train", "val": "val"}
    videos = tuple(
        replace(video, split=swapped[video.split], path=str(world.folder / video.path))
        for video in world.manifest.videos
    )
    write_manifest(Manifest(videos, world.folder), folder / "videos.csv")
    train(
        world.config(*FIRST, f'data.manifest="{folder / "videos.csv"}"', "data.allow_outside=true"), folder / "run", CPU
    )
    return folder / "run"


def refusal(run: Path, split: str) -> str:
    with pytest.raises(SetupError) as refused:
        evaluate_run(load_run(run, CPU), split, 4, CPU)
    return str(refused.value)


@pytest.mark.parametrize("way", ["initial weights", "backbone weights", "cubes"])
def test_classes_of_a_run_before_are_not_scored_as_unseen(
    world: World, ancestor: Path, tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = f'backbone.weights="{ancestor / "backbone.pt"}"'
    if way == "initial weights":
        config = world.config(*FIRST, f'training.initial_weights="{ancestor / "best.pt"}"')
    elif way == "backbone weights":
        config = world.config(*FIRST, weights)
    else:
        store = str(tmp_path / "cubes.zarr")
        extract_to_store(world.manifest_path, None, None, store, None, None, ancestor, "cpu", ())
        config = world.config("training.episodes=0", f'store.path="{store}"', weights)
    train(config, tmp_path / "run", CPU)
    assert "warning: 2 classes of split 'test' were used by a run that the weights come from" in capsys.readouterr().err
    assert (
        "2 classes of split 'test' were trained on, or chosen by, in a run that this one's weights come from"
        in refusal(tmp_path / "run", "test")
    )
    # What only chose the checkpoint of the run before may choose again.
    evaluate_run(load_run(tmp_path / "run", CPU), "val", 4, CPU)


def test_a_chain_of_runs_remembers_them_all(world: World, ancestor: Path, tmp_path: Path) -> None:
    train(world.config(*FIRST, f'backbone.weights="{ancestor / "backbone.pt"}"'), tmp_path / "second", CPU)
    seen = classes_behind(tmp_path / "second/backbone.pt")
    splits = {split: frozenset(world.manifest.classes(split)) for split in ("train", "val", "test")}
    assert seen == SeenClasses(splits["train"] | splits["test"], splits["val"])
    assert seen == classes_behind(tmp_path / "second/best.pt")
    train(world.config(*FIRST, f'backbone.weights="{ancestor / "backbone.pt"}"'), tmp_path / "second", CPU, resume=True)
    inherited = load_checkpoint(tmp_path / "second/last.pt")["inherited_classes"]
    assert inherited == {"train": sorted(splits["test"]), "val": sorted(splits["val"])}


def test_of_weights_that_are_not_ours_nothing_is_known(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "theirs.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for path in (None, "random:1", tmp_path / "theirs.pt", tmp_path / "text.pt", tmp_path):
        assert classes_behind(path) == SeenClasses()
