"""`mastaf extract --from-run` of runs that have no backbone to extract with: what to do instead."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.document import SPEC, put_twice, read_document
from cache.open import open_files
from contracts.made_runs import MadeRuns
from contracts.world import World
from pipeline import training
from pipeline.extract_command import extract_config
from pipeline.settings import SetupError

CPU = torch.device("cpu")


def refusal(run: Path, tmp_path: Path) -> str:
    with pytest.raises(SetupError) as error:
        extract_config(None, None, None, str(tmp_path / "new.zarr"), None, None, run, ())
    return str(error.value)


@pytest.fixture
def cached(made: MadeRuns, tmp_path: Path) -> Path:
    """A run on a store of its own, which can be given an origin."""
    store = shutil.copytree(made.store_path, tmp_path / "cubes.zarr")
    run = Path(shutil.copytree(made.heads[0], tmp_path / "run"))
    config = (run / "config.toml").read_text()
    assert str(made.store_path) in config
    (run / "config.toml").write_text(config.replace(str(made.store_path), str(store)))
    return run


def give_origin(store: Path, origin: dict[str, Any]) -> None:
    files = open_files(store)
    put_twice(files, SPEC, replace(read_document(files), origin=origin).to_json(), replace=True)


ORIGINS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, "Extract with the run that filled the store (--from-run), or with --backbone NAME and --weights W."),
    "a run": ({"from_run": "/data/my runs/one"}, "/cubes.zarr: --from-run '/data/my runs/one'"),
    "weights": (
        {"from_run": None, "config": {"backbone": {"name": "r3d18", "weights": "pretrained"}}},
        "/cubes.zarr: --backbone r3d18 --weights pretrained",
    ),
    "nonsense": ({"config": 7}, "or with --backbone NAME and --weights W."),
}


@pytest.mark.parametrize("what", ORIGINS)
def test_run_on_a_store_names_who_filled_the_store(cached: Path, tmp_path: Path, what: str) -> None:
    origin, way_out = ORIGINS[what]
    give_origin(tmp_path / "cubes.zarr", origin)
    said = refusal(cached, tmp_path)
    assert said.startswith(f'{cached} has no backbone of its own: with training.mode = "cached" it has learned a head')
    assert said.endswith(way_out)
    assert "--resume" not in said


@pytest.mark.parametrize("is_damaged", [False, True])
def test_store_that_cannot_be_asked_is_no_other_error(cached: Path, tmp_path: Path, is_damaged: bool) -> None:
    if is_damaged:
        (tmp_path / "cubes.zarr" / SPEC).write_text("{")
    else:
        shutil.rmtree(tmp_path / "cubes.zarr")
    assert refusal(cached, tmp_path).endswith("or with --backbone NAME and --weights W.")


def test_ended_run_that_has_lost_its_backbone_writes_it_anew(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = world.config("training.mode=end_to_end", "training.episodes=3", "training.validation_episodes=6")
    training.train(config, run, CPU)
    (run / "backbone.pt").unlink()
    assert refusal(run, tmp_path).startswith(f"{run} holds no backbone.pt")
    assert "--resume" in refusal(run, tmp_path)
    training.train(config, run, CPU, resume=True)
    assert (run / "backbone.pt").is_file()


def test_folder_without_a_run_is_said_to_be_none(tmp_path: Path) -> None:
    assert refusal(tmp_path, tmp_path).startswith(f"{tmp_path} holds no run (no config.toml)")
