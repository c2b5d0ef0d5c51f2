"""`mastaf reproduce` on several ranks of real processes: the answer of one process, and an error that ends them all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contracts.rank_processes import run_ranks
from contracts.world import World, make_world
from pipeline import training
from pipeline.card_reading import read_card
from pipeline.reproduce_command import reproduce, reproduce_on
from pipeline.train_command import EvaluationRequest, evaluate_folder

CPU = torch.device("cpu")


def run_in(folder: Path) -> World:
    """A world with an end-to-end run in `run`, scored on test with one and with two shots; reproducing it decodes videos."""
    world = make_world(folder / "world")
    knobs = ("training.mode=end_to_end", "training.episodes=3", "training.validation_episodes=6")
    training.train(world.config(*knobs), folder / "run", CPU)
    for shots in (None, 2):
        evaluate_folder(EvaluationRequest(folder / "run", episodes=8, shots=shots), "cpu")
    return world


def test_ranks_reproduce_what_one_process_does(tmp_path: Path) -> None:
    run_in(tmp_path)
    alone = reproduce(tmp_path / "run", "cpu")
    assert alone.is_identical, alone.to_text()
    found = run_ranks(2, reproduce_on, CPU, tmp_path / "run", read_card(tmp_path / "run"))
    # What differs from the card's machine may differ among processes too: their numbers of threads.
    assert [replace(each, changes=()) for each in found] == 2 * [replace(alone, changes=())]


def test_a_video_that_one_rank_cannot_read_ends_all_and_is_named(tmp_path: Path) -> None:
    """A rank that went on to the next evaluation would leave the other in this one, or answer something else."""
    world, run = run_in(tmp_path), tmp_path / "run"
    (world.folder / "videos/jump/3.mp4").write_bytes(b"this is no video")  # of the second rank's share
    alone = reproduce(run, "cpu")
    assert [len(alone.evaluations), len(alone.not_done)] == [1, 2]
    assert all("jump/3" in each.reason for each in alone.not_done)
    with pytest.raises(RuntimeError) as error:
        run_ranks(2, reproduce_on, CPU, run, read_card(run))
    said = str(error.value)
    assert "pipeline.ranks.RankLost: another rank of this job has ended" in said
    assert "SourceError: " in said
    assert "jump/3" in said
    assert "AssertionError" not in said
