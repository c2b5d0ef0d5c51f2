"""`mastaf pipeline` that gets a signal from itself at a chosen instant: killed_pipeline.py SIGNAL WHERE COUNT ARGUMENTS..."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import cli
from cache.table import TableStore
from pipeline import whole_making
from pipeline.whole_record import Records

Tick = Callable[[], None]


def after(target: Any, name: str, tick: Tick) -> None:
    """Tick whenever a function has returned."""
    original = getattr(target, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        tick()
        return result

    setattr(target, name, wrapped)


def on_lines(name: str, tick: Tick) -> None:
    """Tick at every line that training reports."""
    original = getattr(whole_making, name)

    def wrapped(*arguments: Any) -> Any:
        *others, report = arguments

        def ticking(*line: Any) -> None:
            report(*line)
            tick()

        return original(*others, ticking)

    setattr(whole_making, name, wrapped)


WHERE: dict[str, Callable[[Tick], None]] = {
    "train": lambda tick: on_lines("train", tick),
    "extract": lambda tick: after(TableStore, "commit", tick),
    "heads": lambda tick: on_lines("train_together", tick),
    "compare": lambda tick: after(whole_making, "compare_folders", tick),
    "live": lambda tick: after(whole_making, "evaluate_run", tick),
    "records": lambda tick: after(Records, "write", tick),
}


def main() -> None:
    number, where, count = signal.Signals[sys.argv[1]], sys.argv[2], int(sys.argv[3])
    sys.argv = ["mastaf", *sys.argv[4:]]

    def tick() -> None:
        nonlocal count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), number)

    WHERE[where](tick)
    cli.main()


if __name__ == "__main__":
    main()
