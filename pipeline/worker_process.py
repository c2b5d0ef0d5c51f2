"""One process of `--workers`: how the parent starts, hears and ends it."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.launch import WORKER

KEPT_LINES = 40
"""Of each process's stderr, to be shown if it fails."""


class Worker:
    """One process, in a session of its own: the terminal's Ctrl-C reaches the parent alone, which passes it on once."""

    def __init__(self, command: Sequence[str], index: int, count: int, environment: Mapping[str, str]) -> None:
        self.index = index
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._printed = bytearray()
        self.has_ended = False
        """Whether `end` was called."""
        self.report: dict[str, Any] | None = None
        """What it printed as JSON, once it has ended well."""
        self.process = subprocess.Popen(
            command,
            # Its end tells the process that the parent is gone, even by SIGKILL.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**environment, WORKER: f"{index}/{count}"},
            start_new_session=True,
        )
        self._threads = [threading.Thread(target=read, daemon=True) for read in (self._read_output, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        self._printed += self.process.stdout.read()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line.decode(errors="replace").rstrip())

    def send(self, number: int) -> None:
        """Pass a signal on; none once it has ended."""
        self.process.send_signal(number)

    def end(self) -> None:
        """Kill it if it runs, and free its pipes."""
        if self.has_ended:
            return
        self.has_ended = True
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join(timeout=2.0)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        if self.process.returncode == 0:
            self.report = json.loads(bytes(self._printed))
        self._printed.clear()

    @property
    def lines(self) -> list[str]:
        """The last lines of its stderr."""
        return list(self._lines)

    @property
    def end_in_words(self) -> str:
        """How a process that failed has ended."""
        code = self.process.returncode
        if code < 0:
            hint = " (out of memory, if nobody sent it)" if -code == signal.SIGKILL else ""
            return f"was killed by {signal.Signals(-code).name}{hint}"
        return f"ended with exit code {code}"
