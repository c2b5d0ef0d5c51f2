"""Forks a process for each command of mastaf that it reads, which saves the seconds of imports; the attacks kill them.

A request is a line of JSON on stdin, the answer one number: `{"arguments", "output", "errors", "waits"}` gives the process id of
`mastaf ARGUMENTS`, `{"wait": process id}` its exit status (negative for a signal).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# E402: the path above comes first, since this file runs as a process of its own.
# What the commands import when they need it is imported here once.
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402

import cache.zarr_format  # noqa: E402, F401
import cli  # noqa: E402
import pipeline.train_command  # noqa: E402, F401


def run(request: dict[str, Any]) -> int:
    """Be the command; its exit status."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what comes on stdin are the parent's requests
    for name, descriptor in ((request["output"], 1), (request["errors"], 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    if request["waits"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    sys.argv = ["mastaf", *request["arguments"]]
    torch.seed()  # a process of its own begins with another seed each time
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def nursery() -> None:
    # Forks are whole only while there is one thread; and no operation here has started torch's own.
    torch.set_num_threads(1)
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    assert num_threads == 1, f"{num_threads} threads after the imports"
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                # Not `sys.exit`: what the parent has open is not this process's to clean up.
                status = run(request)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            if request["waits"]:
                os.waitpid(answer, os.WUNTRACED)
        print(answer, flush=True)


if __name__ == "__main__":
    nursery()
