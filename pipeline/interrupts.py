"""SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) become a wish to stop that the loop grants at its next safe point."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The work was stopped by a signal after everything was saved."""

    def __init__(self, signal_number: int, saved: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {saved}")
        self.exit_code = 130 if signal_number == signal.SIGINT else 143
        """What the process should exit with."""


class StopRequest:
    """Context manager that collects the signals; a second one acts at once, as without it."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        """The signal that came, or None."""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Python hands signals to the main thread only; elsewhere the caller's own handling stays in force.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number
        os.write(2, b"stopping after this step; the same signal again stops at once\n")
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() itself returned
        self._previous = {}
