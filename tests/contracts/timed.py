"""How long the trials of an attack took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar


class Timed(Protocol):
    """What became of the trials of one attack."""

    seconds: float


T = TypeVar("T", bound=Timed)


@contextmanager
def timed(tally: T) -> Iterator[T]:
    """Add the seconds within."""
    start = time.perf_counter()
    try:
        yield tally
    finally:
        tally.seconds += time.perf_counter() - start
