"""A run that goes on elsewhere says so: with another number of threads or ranks, another device, torch or mastaf."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from contracts.made_runs import MadeRuns
from pipeline import training
from pipeline.card_checks import contradictions
from pipeline.card_reading import read_card
from pipeline.computed_on import computed_here, moves, note_place

CPU = torch.device("cpu")
HERE = {"device": "Some CPU", "threads": 2, "ranks": 1, "torch": "2.15.0", "code": "0.1.0+abc"}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def trained(made: MadeRuns, folder: Path, episodes: int, threads: int, resume: bool = False) -> dict[str, Any]:
    torch.set_num_threads(threads)
    options = (f"store.path={made.store_path}", "head.name=mastaf", "training.mode=cached", "training.validate_every=3")
    return training.train(made.world.config(*options, f"training.episodes={episodes}"), folder, CPU, resume)


def test_other_threads_are_told_and_stay_in_the_card(
    made: MadeRuns, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained(made, tmp_path / "run", episodes=3, threads=1)
    card = trained(made, tmp_path / "run", episodes=6, threads=2, resume=True)
    warned = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert warned == ["warning: threads were 1, now 2: bits may differ from those of a run that was never stopped"]
    assert [(place["from_episode"], place["threads"]) for place in card["computed_on"]] == [(0, 1), (3, 2)]
    assert "| computed | after 3 episodes: threads were 1, now 2 |" in (tmp_path / "run/card.md").read_text()
    assert contradictions(tmp_path / "run", card, card["num_parameters"]) == []
    tampered = {**card, "computed_on": card["computed_on"][1:]}
    assert any("computed_on" in each for each in contradictions(tmp_path / "run", tampered, card["num_parameters"]))


def test_nothing_is_told_where_nothing_is_other_or_nothing_is_left_to_compute(
    made: MadeRuns, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained(made, tmp_path / "run", episodes=3, threads=1)
    trained(made, tmp_path / "run", episodes=6, threads=1, resume=True)
    trained(made, tmp_path / "run", episodes=6, threads=2, resume=True)
    card = read_card(tmp_path / "run")
    assert card["computed_on"] == [{"from_episode": 0, **computed_here(CPU, 1), "threads": 1}]
    assert "warning" not in capfd.readouterr().err
    assert "| computed |" not in (tmp_path / "run/card.md").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "Another CPU"}, "the device was Some CPU, now Another CPU"),
        ({"ranks": 4}, "ranks were 1, now 4"),
        ({"torch": "2.16.0", "code": "0.2.0"}, "torch was 2.15.0, now 2.16.0, mastaf was 0.1.0+abc, now 0.2.0"),
    ],
)
def test_each_change_is_named(change: dict[str, Any], words: str) -> None:
    places: list[dict[str, Any]] = []
    assert note_place(places, 0, HERE) == ""
    assert note_place(places, 5, HERE) == ""
    assert note_place(places, 7, HERE | change) == words
    assert [place["from_episode"] for place in places] == [0, 7]
    assert moves(places) == [f"after 7 episodes: {words}"]


def test_a_move_to_a_gpu_names_the_gpu_only() -> None:
    on_gpu = {key: value for key, value in HERE.items() if key != "threads"} | {"device": "Some GPU"}
    places: list[dict[str, Any]] = []
    note_place(places, 0, HERE)
    assert note_place(places, 2, on_gpu) == "the device was Some CPU, now Some GPU"
    assert note_place(places, 4, on_gpu) == ""


def test_a_run_of_an_earlier_version_begins_its_list_where_it_goes_on() -> None:
    places: list[dict[str, Any]] = []
    assert note_place(places, 40, HERE) == ""
    assert places == [{"from_episode": 40, **HERE}]
