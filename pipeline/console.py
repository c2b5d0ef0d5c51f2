"""Progress for people: a rich bar on a terminal, plain lines with rate and time left elsewhere. Everything goes to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


@cache
def stderr_console() -> Console:
    """The console on stderr; one for all, so that lines appear above a running bar. stdout is kept for `--json`."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """One line to stderr, printed literally."""
    stderr_console().print(message, markup=False)


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of one job; yields a function to call with (done, total)."""
    if sys.stderr.isatty():
        with _bar(description) as update:
            yield update
    else:
        yield _lines(description)


@contextmanager
def _bar(description: str) -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, console=stderr_console()) as bar:
        task = bar.add_task(description, total=None, rate="")

        def update(done: int, total: int) -> None:
            rate = done / max(time.monotonic() - started, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f}/s")

        yield update


def _lines(description: str) -> Callable[[int, int], None]:
    started = time.monotonic()
    last = started

    def update(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES and done < total:
            return
        last = now
        rate = done / max(now - started, 1e-9)
        left = (total - done) / rate if rate > 0 else float("inf")
        say(f"{description}: {done}/{total}, {rate:.1f}/s, {left:.0f} s left")

    return update
