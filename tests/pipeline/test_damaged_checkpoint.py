"""A checkpoint that cannot be read is refused in our own words, without advice to let its code run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


class RunsACommand:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    return str(caught.value)


def test_cut_checkpoint_is_refused_in_one_sentence_and_a_question(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_checkpoint(path, {"weights": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:500])
    assert refusal(path) == (
        f"{path} cannot be read as a checkpoint (PytorchStreamReader failed reading zip archive: failed finding central "
        "directory). Is the file whole, and from a source you trust?"
    )
    path.write_bytes(b"")
    assert "(EOFError)" in refusal(path)


def test_advice_to_load_all_code_is_not_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    torch.save(RunsACommand(), path)
    said = refusal(path)
    assert "posix.system" in said
    assert "weights_only" not in said
    assert "\n" not in said
    path.write_bytes(b"\x80\x02\x95 not a checkpoint")
    assert "weights_only" not in refusal(path)
