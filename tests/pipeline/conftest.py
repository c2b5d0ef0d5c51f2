"""Fixtures of the pipeline's tests."""

from pathlib import Path

import pytest

from contracts.world import World, make_world, write_clip


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
