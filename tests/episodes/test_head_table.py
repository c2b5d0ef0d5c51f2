"""The table of docs/heads.md is what its script prints."""

from pathlib import Path

import pytest

from benchmarks import head_table
from episodes.build import HEADS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "heads.md").read_text()


@pytest.mark.parametrize("name", HEADS)
def test_row_of_the_docs_is_measured_on_single_maps(name: str) -> None:
    table = PAGE.partition(head_table.BEGIN)[2].partition(head_table.END)[0]
    (written,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
    single = head_table.CUBES["R3D-50, 16 frames"]
    assert written.endswith(f"| {head_table.cells(head_table.cost(name, single))} |")


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_whole_row_of_the_docs_is_measured(name: str) -> None:
    assert head_table.row(name) in PAGE
