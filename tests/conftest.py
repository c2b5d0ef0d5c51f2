"""For all tests: what is run by hand only is never taken for quick, and every test begins with as many threads."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is loaded: several processes that each take all cores are slower than one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

_NUM_THREADS: list[int] = []
"""Of torch, when the first test that finds it loaded began."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Commands that run in this process choose torch's number of threads for it; the next test begins with the usual one."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if not _NUM_THREADS:
        _NUM_THREADS.append(torch.get_num_threads())
    torch.set_num_threads(_NUM_THREADS[0])


def pytest_configure() -> None:
    """pytest-xdist's processes ignore Ctrl-C, and what they start would inherit that."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m "not slow"` takes the place of the default `-m "not campaign"`, so a campaign is slow as well."""
    for item in items:
        if item.get_closest_marker("campaign") is not None:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: a kill leaves the same there, and an fsync costs nothing."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)
