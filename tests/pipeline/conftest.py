"""Fixtures of the pipeline's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from contracts.made_runs import MadeRuns, compared, make_runs
from contracts.world import World, make_world, write_clip
from pipeline import comparison


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Seven classes with four videos each; read only."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def broken_world(tmp_path: Path) -> World:
    """One file cut to nothing useful, one text file, one video of three frames, one missing file."""
    world = make_world(tmp_path / "broken", 3)
    (world.folder / "videos/right/0.mp4").write_bytes(b"\x00" * 100)
    (world.folder / "videos/left/1.mp4").write_text("this is no video")
    (world.folder / "videos/up/2.mp4").unlink()
    write_clip(world.folder / "videos/down/1.mp4", "down", 1, num_frames=3)
    return world


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRuns:
    """Six short runs on made-up cubes; read only."""
    return make_runs(tmp_path_factory.mktemp("made"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread only waits, for long on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def few_timed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not look at what is timed."""
    monkeypatch.setattr(comparison, "TIMED_CALLS", 1)
    monkeypatch.setattr(comparison, "TIMED_EPISODES", 2)


@pytest.fixture(scope="session")
def found(made: MadeRuns) -> comparison.Comparison:
    """The four heads, compared once; read only."""
    return compared(made.heads)
