"""Ray from its start to its end, so that no signal and no hang of Ray's own leaves processes behind."""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading
import time
from typing import Any

from pipeline.interrupts import SIGNALS, StopRequest

POLL_SECONDS = 0.2
START_POLL_SECONDS = 0.01
START_SECONDS = 3.0
"""Allowed for a start that goes on when a signal comes; an end in good order needs a start that is complete."""
SHUTDOWN_SECONDS = 30.0
"""Allowed for Ray to end its processes."""
STOP_SECONDS = 6.0
"""The same after a signal: all is over within ten seconds of it."""
KILL_SECONDS = 1.0
"""Between SIGKILL and the end of a process."""


class RaySession:
    """Starts and ends Ray in a thread of its own.

    In the main thread, Ray would put its own handlers of SIGTERM in the place of ours. The thread lives as long as Ray, since the
    system ends Ray's processes together with the thread that started them.

    Args:
        ray: the module.
        settings: of `ray.init`.
    """

    def __init__(self, ray: Any, **settings: Any) -> None:
        self._ray, self._settings = ray, settings
        self._error: BaseException | None = None
        self._is_up, self._is_wanted_no_more = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray session", daemon=True)

    def _run(self) -> None:
        try:
            self._ray.init(**self._settings)
        except BaseException as error:  # whatever it is, it belongs to the caller
            self._error = error
        self._is_up.set()
        self._is_wanted_no_more.wait()
        self._ray.shutdown()

    def start(self, stop: StopRequest) -> None:
        """Return when Ray runs, or soon after a signal; raises what `ray.init` raises."""
        self._thread.start()
        stop_by = None
        while not self._is_up.wait(START_POLL_SECONDS):
            _put_handlers_back()
            if stop.signal_number is not None:
                stop_by = stop_by or time.monotonic() + START_SECONDS
                if time.monotonic() > stop_by:
                    return
        _put_handlers_back()
        if self._error is not None:
            raise self._error

    def end(self, stop: StopRequest) -> None:
        """End Ray's processes on this machine, in good order if it lets itself be ended."""
        processes = _descendants() if self._settings["address"] == "local" else []
        self._is_wanted_no_more.set()
        began = time.monotonic()
        while self._is_up.is_set() and self._thread.is_alive():
            self._thread.join(POLL_SECONDS)
            if time.monotonic() - began > (SHUTDOWN_SECONDS if stop.signal_number is None else STOP_SECONDS):
                break
        # Ray's agents outlive a raylet that was killed.
        psutil = importlib.import_module("psutil")
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # nor is another killed that has its number now
                process.kill()
        # After a signal nobody waits: Ray's native part ends this process with a code of its own when it finds the others gone.
        if stop.signal_number is None:
            psutil.wait_procs(processes, timeout=KILL_SECONDS)


def _put_handlers_back() -> None:
    """Ray's native part takes SIGTERM for a crash and installs a handler beneath Python, which still knows its own."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.getsignal(number))


def _descendants() -> list[Any]:
    """All processes that this one and its children have started."""
    # Ray brings it along, and makes it importable when it is imported itself.
    psutil = importlib.import_module("psutil")
    return list(psutil.Process().children(recursive=True))
