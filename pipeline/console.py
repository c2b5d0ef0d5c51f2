"""Progress for people: a rich bar on a terminal, plain lines with rate and time left elsewhere. Everything goes to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


@cache
def stderr_console() -> Console:
    """The console on stderr; one for all, so that lines appear above a running bar. stdout is kept for `--json`."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def silence() -> None:
    """Let this process say nothing more: of several ranks only the first speaks. Errors still go to stderr."""
    stderr_console().quiet = True


def say(message: str) -> None:
    """One line to stderr, printed literally."""
    stderr_console().print(message, markup=False)


def shortened(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of one job; yields a function to call with (done, total)."""
    if sys.stderr.isatty() and not stderr_console().quiet:
        with _bar(description) as update:
            yield update
    else:
        yield progress_lines(description)


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
    with Progress(*columns, console=stderr_console()) as bar:
        task = bar.add_task(description, total=None, rate="")

        meter = _Meter()

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, rate=f"{meter.rate(done):.1f}/s")

        yield update


class _Meter:
    """Rate since the first report, so that neither set-up nor what an earlier call had done counts."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def rate(self, done: int) -> float:
        """Units a second; 0 at the first report."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        return (done - self._first[1]) / max(now - self._first[0], 1e-9)


def progress_lines(description: str) -> Callable[[int, int], None]:
    """As `progress`, in lines every ten seconds and at the end, which may appear above another job's bar."""
    last = time.monotonic()
    meter = _Meter()

    def update(done: int, total: int) -> None:
        nonlocal last
        rate = meter.rate(done)
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES and done < total:
            return
        last = now
        left = f", {rate:.1f}/s, {(total - done) / rate:.0f} s left" if rate > 0 else ""
        say(f"{description}: {done}/{total}{left}")

    return update
