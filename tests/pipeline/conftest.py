"""Fixtures of the pipeline's tests."""

import pytest

from contracts.world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Seven classes with four videos each; read only."""
    return make_world(tmp_path_factory.mktemp("world"))
