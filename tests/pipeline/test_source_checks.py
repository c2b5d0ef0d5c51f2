"""Videos that are tried before the first step: which, when, and what is said of bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from configs.schema import RunConfig
from contracts.world import World, make_world
from pipeline import training
from pipeline.live_clips import LiveClips, SourceError

CPU = torch.device("cpu")
BAD = {"train": "right/0", "test": "jump/1"}


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The videos of each trial."""
    calls: list[set[str]] = []
    whole = LiveClips.try_all

    def spy(self: LiveClips, video_ids: list[str], on_progress: object) -> None:
        calls.append(set(video_ids))
        whole(self, video_ids, on_progress)  # type: ignore[arg-type]

    monkeypatch.setattr(LiveClips, "try_all", spy)
    return calls


def ids_of(world: World, *splits: str) -> set[str]:
    return {video.video_id for video in world.manifest.videos if video.split in splits}


def config_of(world: World, *overrides: str) -> RunConfig:
    return world.config("training.mode=end_to_end", "training.episodes=0", "training.validation_episodes=1", *overrides)


def spoil(world: World, video_id: str) -> Path:
    (path,) = (world.manifest.path_of(video) for video in world.manifest.videos if video.video_id == video_id)
    path.write_bytes(b"this is no video")
    return path


@pytest.mark.parametrize(
    ("knob", "at_first", "at_resumption"),
    [
        ((), ("train", "val", "test"), ("val",)),
        (("training.check_videos=true",), ("train", "val", "test"), ("train", "val", "test")),
        (("training.check_videos=false",), ("val",), ("val",)),
    ],
    ids=["default", "on", "off"],
)
def test_a_run_that_begins_tries_all_its_videos_and_one_that_goes_on_those_it_is_scored_on(
    world: World,
    tmp_path: Path,
    tried: list[set[str]],
    knob: tuple[str, ...],
    at_first: tuple[str, ...],
    at_resumption: tuple[str, ...],
) -> None:
    knobs = ("training.episodes=1", "training.episodes_per_step=1", *knob)
    training.train(config_of(world, *knobs), tmp_path / "run", CPU)
    training.train(config_of(world, *knobs), tmp_path / "run", CPU, resume=True)
    assert tried == [ids_of(world, *at_first), ids_of(world, *at_resumption)]


def test_bad_training_video_stops_the_run_before_it_begins_with_ways_out_that_work(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", 3)
    spoil(world, BAD["train"])
    with pytest.raises(SourceError) as refused:
        training.train(config_of(world), tmp_path / "run", CPU)
    for part in (BAD["train"], "--resume", "dataset exclude", "another --out", "training.initial_weights"):
        assert part in str(refused.value)
    assert list(json.loads((tmp_path / "run/bad_videos.json").read_text())) == [BAD["train"]]
    assert not (tmp_path / "run/config.toml").exists()


@pytest.mark.parametrize("tracks_test", [False, True])
def test_bad_test_video_is_told_of_and_refused_only_where_the_run_scores_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tracks_test: bool
) -> None:
    world = make_world(tmp_path / "world", 3)
    bad = spoil(world, BAD["test"])
    (name,) = (video.video_id for video in world.manifest.videos if world.manifest.path_of(video) == bad)
    config = config_of(world, f"training.track_test={str(tracks_test).lower()}")
    if tracks_test:
        with pytest.raises(SourceError, match=name):
            training.train(config, tmp_path / "run", CPU)
        return
    training.train(config, tmp_path / "run", CPU)
    said = " ".join(capsys.readouterr().err.split())
    assert f"warning: 1 videos of the test split cannot be decoded: {name} (not_a_video: " in said
    assert not (tmp_path / "run/bad_videos.json").exists()
    assert name not in (tmp_path / "run/card.json").read_text()
