"""SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) become a wish to stop, granted at the next safe point or within seconds."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_END = b"\0"  # no signal has this number
_ONE_SIGNAL_SECONDS = 0.5
"""Ctrl-C reaches a process from the terminal and again from the launcher that forwards it: these count as one."""


def exit_code(signal_number: int) -> int:
    """What a process that a signal stopped should exit with."""
    return 130 if signal_number == signal.SIGINT else 143


class Stopped(Exception):
    """The work was stopped by a signal after everything was saved."""

    def __init__(self, signal_number: int, saved: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; {saved}")
        self.exit_code = exit_code(signal_number)
        """What the process should exit with."""


class StopRequest:
    """Context manager that collects the signals; a second one acts at once, as without it.

    Args:
        is_launched: whether a launcher started this process. It passes signals on that came here already, so a second one counts as
            the first; a process that does not end is killed by it.
        is_silent: say nothing.
    """

    def __init__(self, is_launched: bool = False, is_silent: bool = False) -> None:
        self.signal_number: int | None = None
        """The signal that came, or None."""
        self.agreed_number: int | None = None
        """Where several ranks train: the signal that all of them know of, so that they leave at the same step."""
        self._is_launched = is_launched
        self._is_silent = is_silent
        self._launcher = os.getppid()
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
        if self._is_launched and error is not None:
            # The launcher tells all processes to end as soon as one has; what went wrong here shall still be said.
            for number in self._previous:
                signal.signal(number, signal.SIG_IGN)
            self._previous = {}
        self._restore()

    def look(self) -> None:
        """Take it for SIGTERM that the launcher is gone: nobody else would end this process."""
        if self._is_launched and self.signal_number is None and os.getppid() != self._launcher:
            self.signal_number = signal.SIGTERM

    def _note(self, number: int, _frame: FrameType | None) -> None:
        is_first = self.signal_number is None
        self.signal_number = number if is_first else self.signal_number
        again = "" if self._is_launched else "; the same signal again stops at once"
        if is_first and not self._is_silent:
            os.write(2, f"stopping after this step{again}\n".encode())
        if not self._is_launched:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() itself returned
        self._previous = {}


class PromptStop:
    """For work that has to end within seconds of a signal, whatever native code it is in; a context manager.

    The system's signal handler writes to a pipe that a thread reads, so a signal is noticed at once, and not only when the main
    thread next runs Python (a convolution on a CPU takes seconds, and a lock can be waited for much longer). The work looks at
    `signal_number` and ends by itself. If it has not within `seconds`, or on a second signal, the process exits on the spot.

    Args:
        last_words: called before an exit for being late; what is saved, for a person.
        seconds: allowed from the first signal to the end of the `with` block.
    """

    def __init__(self, last_words: Callable[[], str], seconds: float = 8.0) -> None:
        self.signal_number: int | None = None
        """The signal that came, or None."""
        self._last_words = last_words
        self._seconds = seconds
        self._previous: dict[int, object] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PromptStop:
        # Python hands signals to the main thread only; elsewhere the caller's own handling stays in force.
        if threading.current_thread() is threading.main_thread():
            self._read_end, self._write_end = os.pipe()
            os.set_blocking(self._write_end, False)
            self._previous_descriptor = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, lambda number, frame: None)
            self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() itself returned
        signal.set_wakeup_fd(self._previous_descriptor)
        os.write(self._write_end, _END)
        self._thread.join()
        os.close(self._read_end)
        os.close(self._write_end)

    def _watch(self) -> None:
        number = self._next_signal(None)
        if number is None:
            return
        self.signal_number = number
        _tell(f"stopping within {self._seconds:g} s; a second signal stops at once")
        began = time.monotonic()
        try:
            while time.monotonic() - began < _ONE_SIGNAL_SECONDS:
                if self._next_signal(began + self._seconds) is None:
                    return
        except TimeoutError:
            try:
                self._say_last_words(number)
            finally:  # whatever went wrong on the way: the process must not stay
                os._exit(exit_code(number))
        os._exit(exit_code(number))

    def _say_last_words(self, number: int) -> None:
        try:
            saved = self._last_words()
        except Exception as error:
            saved = f"what was saved cannot be said ({type(error).__name__}: {error})"
        # A progress bar has hidden the cursor of the terminal.
        _tell(("\x1b[?25h\n" if os.isatty(2) else "") + f"mastaf: {Stopped(number, saved)}")

    def _next_signal(self, deadline: float | None) -> int | None:
        """Wait for a signal; None at the end of the `with` block. Raises TimeoutError at the deadline."""
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._read_end], [], [], left)[0]:
                raise TimeoutError
            byte = os.read(self._read_end, 1)
            if byte == _END:
                return None
            if byte[0] in SIGNALS:  # others have handlers of their own
                return byte[0]


def _tell(line: str) -> None:
    # Not through `say`: its lock may be held by what does not end.
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
