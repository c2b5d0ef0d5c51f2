"""A video that is never decoded: a signal ends what waits for it, in training and in evaluation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from contracts.child_processes import children_of, wait_until
from contracts.world import World
from extract.config import SamplingConfig
from pipeline import training
from pipeline.checkpoint import load_checkpoint
from pipeline.extraction import video_sources
from pipeline.interrupts import Stopped
from pipeline.live_clips import LiveClips

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = SamplingConfig(num_frames=4, policy="reference", resize_size=28, crop_size=24)
CPU = torch.device("cpu")
STUCK_SECONDS = 60
"""Far less than the 120 s after which a decoding process is given up, and far more than any of this takes."""


class Left(Exception):
    """Raised by who was waiting."""


@contextmanager
def one_frozen_worker(world: World) -> Iterator[LiveClips]:
    before = children_of(os.getpid())
    with LiveClips(video_sources(world.manifest), SAMPLING, 1, cache_bytes=0) as clips:
        clips.read(["right/0"], [0])
        (worker,) = children_of(os.getpid()) - before
        os.kill(worker, signal.SIGSTOP)
        yield clips


def leave(*_: object) -> None:
    raise Left


@pytest.mark.timeout(STUCK_SECONDS)
def test_who_waits_for_clips_may_leave(world: World) -> None:
    with one_frozen_worker(world) as clips:
        with pytest.raises(Left):
            clips.begin_read(["left/0"], [0], leave)()
        with pytest.raises(Left):
            clips.read_scoring(["left/0"], 2, 1, leave)
        with pytest.raises(Left):
            clips.try_all(["left/0", "left/1"], leave)


@pytest.mark.timeout(STUCK_SECONDS)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "validate_every"),
    [("end_to_end", 1000), ("end_to_end", 1), ("classify", 1)],
    ids=["step", "val", "held_out"],
)
def test_signal_ends_a_run_that_waits_for_a_hung_video(
    world: World, tmp_path: Path, mode: str, validate_every: int
) -> None:
    before, done = children_of(os.getpid()), list[int]()

    def freeze(line: Mapping[str, Any]) -> None:
        if line["kind"] != "step":
            return
        done.append(line["episode"])
        if len(done) == 1:
            for worker in children_of(os.getpid()) - before:
                os.kill(worker, signal.SIGSTOP)
            threading.Thread(target=stop_when_stuck).start()

    def stop_when_stuck() -> None:
        seen = -1
        while seen != len(done):  # what was decoded already is still used
            seen = len(done)
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    config = world.config(
        f"training.mode={mode}",
        "training.decode_workers=1",
        "training.clip_cache_bytes=0",
        "training.episodes=1000",
        "training.episodes_per_step=2",
        "training.batches_ahead=1",
        f"training.validate_every={validate_every}",
        "training.check_videos=false",
    )
    with pytest.raises(Stopped, match="go on with --resume"):
        training.train(config, tmp_path / "run", CPU, report=freeze)
    assert load_checkpoint(tmp_path / "run/last.pt")["progress"]["episode"] == done[-1] < 20
    assert children_of(os.getpid()) == before


EVALUATE = """
import os, sys, threading
sys.path.insert(0, {root!r})
sys.argv = ["mastaf", "evaluate", {run!r}, "--split", "test", "--episodes", "2"]
from pipeline import sources
from extract.pool_worker import DecodeProcess
ask, frozen = DecodeProcess.ask, threading.Event()
def freeze_first(self, *task):
    os.kill(self._popen.pid, 19)
    if not frozen.is_set():
        frozen.set()
        print("frozen", flush=True)
    return ask(self, *task)
DecodeProcess.ask = freeze_first
import cli
cli.main()
"""


@pytest.mark.timeout(STUCK_SECONDS)
def test_interrupted_evaluation_does_not_wait_for_a_hung_video(world: World, tmp_path: Path) -> None:
    config = world.config("training.mode=end_to_end", "training.episodes=0", "training.check_videos=false")
    training.train(config, tmp_path / "run", CPU)
    path = tmp_path / "run/config.toml"
    path.write_text(path.read_text().replace("\ndecode_workers = 0", "\ndecode_workers = 1"))
    script = EVALUATE.format(root=str(ROOT), run=str(tmp_path / "run"))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        # As a shell starts the background jobs of a script.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "frozen\n"
        workers = children_of(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert workers
    wait_until(lambda: not workers & children_of(process.pid))
