"""`mastaf extract` that gets stuck at a place of choice: `stuck_extract.py forward|commit extract --manifest ...`.

It writes `stuck` to stdout when it has come there, and then waits for 100 s, in the second batch or commit.
"""

from __future__ import annotations

import sys
import time
from itertools import count

import torch

import cli
from cache.files import LocalFiles
from extract.backbones.small3d import Small3D

_calls = count()


def _be_stuck() -> None:
    print("stuck", flush=True)
    time.sleep(100)


def _stuck_forward(original: object) -> object:
    def forward(self: Small3D, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        if next(_calls) == 2:  # the first call finds the shape of the cubes
            _be_stuck()
        return original(self, frames)  # type: ignore[operator,no-any-return]

    return forward


def _stuck_put(original: object) -> object:
    def put(self: LocalFiles, name: str, data: bytes, replace: bool = True) -> None:
        if name.startswith("cube/c.") and next(_calls) == 1:
            _be_stuck()
        original(self, name, data, replace)  # type: ignore[operator]

    return put


if __name__ == "__main__":
    place = sys.argv.pop(1)
    if place == "forward":
        Small3D.forward = _stuck_forward(Small3D.forward)  # type: ignore[method-assign,assignment]
    else:
        LocalFiles.put = _stuck_put(LocalFiles.put)  # type: ignore[method-assign,assignment]
    cli.main()
