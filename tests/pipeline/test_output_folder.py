"""A folder that nothing can be written into is refused before any work, and looking leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.output_folder import check_output_folder
from pipeline.settings import SetupError


def test_folder_that_can_be_made_is_accepted_and_left_as_it_was(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").write_text("kept")
    check_output_folder(tmp_path / "old")
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "kept"]


@pytest.mark.parametrize("name", ["file", "file/within", "n" * 300, "new/" + "n" * 300, "/proc/new"])
def test_place_that_nothing_can_be_written_into_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="give a") as refusal:
        check_output_folder(tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
