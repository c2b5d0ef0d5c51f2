"""Errors of the system at the calls of the commit path: told in one line, nothing lost, and the next run completes.

The long form, every error at every call and a disk that is really full, is in benchmarks/.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.open import FORMATS
from contracts.attacks import Nursery
from contracts.attacks_strace import ERRORS, attack_calls


@pytest.fixture(params=FORMATS)
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def folder(scratch: Path) -> Iterator[Path]:
    """An empty folder of one test."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        yield Path(folder)


@pytest.mark.parametrize("is_resuming", [False, True])
def test_error_of_the_system_is_told_by_path_and_loses_nothing(
    nursery: Nursery, folder: Path, kind: str, is_resuming: bool
) -> None:
    # Odd, so that each of the four errors has its turn.
    every = 101 if kind == "zarr" else 53
    tally = attack_calls(nursery, folder, kind, ERRORS, every=every, seed=2, is_resuming=is_resuming)
    assert (tally.lost_rows, tally.wrong_rows, tally.bad) == (0, 0, [])
    assert tally.trials >= 4
