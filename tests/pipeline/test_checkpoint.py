"""The newest good checkpoint is found, whatever became of the last write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint import (
    CheckpointError,
    content_digest,
    load_checkpoint,
    load_newest,
    remove_leftovers,
    save_checkpoint,
)


def content_of(episode: int) -> dict[str, Any]:
    return {
        "episode": episode,
        "model": {"a": torch.full((300,), float(episode)), "b": torch.ones((), dtype=torch.bfloat16)},
    }


def newest(folder: Path) -> int:
    return int(load_newest([folder / "last.pt", folder / "previous.pt"]).content["episode"])


def test_each_write_leaves_the_one_before_it(tmp_path: Path) -> None:
    for episode in range(4):
        save_checkpoint(tmp_path / "last.pt", content_of(episode), keep=tmp_path / "previous.pt")
    assert load_checkpoint(tmp_path / "last.pt")["episode"] == 3
    assert load_checkpoint(tmp_path / "previous.pt")["episode"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_a_write_over_two_names_of_one_file_leaves_no_litter(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", content_of(0))
    (tmp_path / "previous.pt").hardlink_to(tmp_path / "last.pt")
    save_checkpoint(tmp_path / "last.pt", content_of(1), keep=tmp_path / "previous.pt")
    assert load_checkpoint(tmp_path / "last.pt")["episode"] == 1
    assert load_checkpoint(tmp_path / "previous.pt")["episode"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_a_damaged_last_checkpoint_is_passed_over_and_told(tmp_path: Path) -> None:
    for episode in range(2):
        save_checkpoint(tmp_path / "last.pt", content_of(episode), keep=tmp_path / "previous.pt")
    whole = (tmp_path / "last.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole.replace(b"\x00\x00\x80\x3f", b"\x00\x00\x81\x3f", 1)):
        (tmp_path / "last.pt").write_bytes(damaged)
        assert newest(tmp_path) == 0
        found = load_newest([tmp_path / "last.pt", tmp_path / "previous.pt"])
        assert str(tmp_path / "last.pt") in found.problems[0]
    (tmp_path / "last.pt").unlink()
    assert newest(tmp_path) == 0


def test_when_no_checkpoint_is_good_the_first_reason_is_given(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.pt cannot be read"):
        newest(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        newest(tmp_path / "nowhere")


def test_every_changed_byte_of_the_values_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, content_of(1))
    whole = path.read_bytes()
    start = whole.index(b"\x00\x00\x80\x3f" * 300)
    for place in range(start, start + 1200, 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
            load_checkpoint(path)


def test_the_digest_follows_values_types_shapes_and_names() -> None:
    base = content_of(1)
    others = [
        content_of(2),
        {**base, "more": None},
        {"episode": 1, "model": {"a": base["model"]["a"].double(), "b": base["model"]["b"]}},
        {"episode": 1, "model": {"a": base["model"]["a"].reshape(3, 100), "b": base["model"]["b"]}},
        {"episode": 1.0, "model": base["model"]},
        {"episode": 1, "model": {"c": base["model"]["a"], "b": base["model"]["b"]}},
    ]
    assert content_digest(base) == content_digest(content_of(1))
    assert len({content_digest(each) for each in [base, *others]}) == 7


def test_leftovers_of_killed_writes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    for name in (".last.pt.123.partial", "last.pt", ".lock", "notes.partial", "evaluations/.a.npz.123.partial"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "evaluations", "last.pt", "notes.partial"]
    assert not list((tmp_path / "evaluations").iterdir())
