"""torchrun itself: what a person sees of several ranks, what is left when they are struck, and what becomes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cache.open import open_store
from configs.load import to_toml
from contracts.world import World
from extract.build import build_backbone
from pipeline.checkpoint import load_checkpoint
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.scoring import evaluate_run, load_run

CPU = torch.device("cpu")
CLI = Path(__file__).resolve().parents[2] / "cli.py"
PATIENCE_SECONDS = 120
"""Far more than anything here takes; a job that hangs for an hour does not pass."""

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Job:
    """A torchrun that runs."""

    process: subprocess.Popen[bytes]
    """torchrun, the first of a process group of its own."""
    mark: str
    """What the environment of its ranks holds."""
    errors: Path
    """What it and its ranks write to stderr."""

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that live, by their numbers."""
        found: dict[int, int] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"MASTAF_TEST={self.mark}".encode() in words:
                found |= {int(word[5:]): int(folder.name) for word in words if word.startswith(b"RANK=")}
        return found

    def ended(self) -> tuple[int, str]:
        """Exit code and stderr, when torchrun and its ranks are gone."""
        code = self.process.wait(timeout=PATIENCE_SECONDS)
        began = time.monotonic()
        while self.ranks():
            assert time.monotonic() - began < PATIENCE_SECONDS
            time.sleep(0.1)
        return code, self.errors.read_text()


@contextmanager
def torchrun(folder: Path, *arguments: object, options: tuple[object, ...] = ()) -> Iterator[Job]:
    """Two ranks of the command line."""
    errors = folder / f"errors{len(list(folder.glob('errors*')))}"
    mark = str(errors)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with errors.open("wb") as file:
        process = subprocess.Popen(
            [*launcher, *map(str, options), str(CLI), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MASTAF_TEST": mark},
            start_new_session=True,
        )
    job = Job(process, mark, errors)
    try:
        with process:
            yield job
    finally:
        for number in ([process.pid] if process.poll() is None else []) + list(job.ranks().values()):
            os.kill(number, signal.SIGKILL)


@pytest.fixture(scope="module")
def recipe(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    config = world.config(
        f'store.path="{folder / "cubes.zarr"}"',
        "training.episodes=600",
        "training.episodes_per_step=4",
        "training.validate_every=300",
        "training.save_seconds=0.05",
    )
    backbone = build_backbone(config.backbone, config.sampling)
    spec = build_spec(config, backbone, CPU)
    with open_store(folder / "cubes.zarr", spec=spec, mode="a", shard_rows=8) as store:
        extract_videos(store, list(video_sources(world.manifest).values()), backbone, config, CPU)
    (folder / "recipe.toml").write_text(to_toml(config))
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """A run of two ranks that nothing struck; read only."""
    folder = recipe.parent / "whole"
    with torchrun(recipe.parent, "train", recipe, "--out", folder) as job:
        code, errors = job.ended()
        assert code == 0, errors
    return folder


def test_training_and_scoring_speak_with_one_voice(recipe: Path, tmp_path: Path) -> None:
    redirected = ("--redirects", "3", "--log-dir", tmp_path / "logs")
    short = ("--set", "training.episodes=8")
    with torchrun(tmp_path, "train", recipe, "--out", tmp_path / "run", *short, options=redirected) as job:
        code, errors = job.ended()
        assert code == 0, errors
    said = {path.parent.name: path.read_text() for path in tmp_path.glob("logs/*/attempt_0/*/stderr.log")}
    assert said.keys() == {"0", "1"}
    assert said["1"] == ""
    assert "mastaf evaluate" in said["0"]
    assert not any(path.read_text() for path in tmp_path.glob("logs/*/attempt_0/*/stdout.log"))
    with torchrun(tmp_path, "evaluate", tmp_path / "run", "--episodes", 70, "--split", "test", "--json") as job:
        output, _ = job.process.communicate(timeout=PATIENCE_SECONDS)
        code, errors = job.ended()
        assert code == 0, errors
    scored, _ = evaluate_run(load_run(tmp_path / "run", CPU), "test", 70, CPU)
    assert json.loads(output) == {"run": str(tmp_path / "run"), **scored}


def steps(run: Path) -> list[int]:
    """The last episodes of the steps that metrics.jsonl lists in whole lines."""
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1] if (run / "metrics.jsonl").exists() else []
    return [line["episode"] for line in map(json.loads, lines) if line["kind"] == "step"]


def kill_rank(number: int) -> Callable[[Job], None]:
    return lambda job: os.kill(job.ranks()[number], signal.SIGKILL)


def tell_all_to_end(job: Job) -> None:
    """The ranks hear of it a second time from torchrun."""
    for number in (*job.ranks().values(), job.process.pid):
        os.kill(number, signal.SIGTERM)


STRIKES: tuple[tuple[str, Callable[[Job], None], str], ...] = (
    ("the second rank is killed", kill_rank(1), "mastaf: rank 0: another rank of this job has ended"),
    ("a cluster tells every process to end", tell_all_to_end, "mastaf: rank 0: stopped by SIGTERM"),
    ("Ctrl-C", lambda job: os.killpg(job.process.pid, signal.SIGINT), "mastaf: rank 0: stopped by SIGINT"),
    ("one rank is warned", lambda job: os.kill(job.ranks()[1], signal.SIGUSR1), "mastaf: rank 0: stopped by SIGUSR1"),
    ("torchrun is killed", lambda job: job.process.kill(), "mastaf: rank 0: stopped by SIGTERM"),
    ("the first rank is killed", kill_rank(0), "mastaf: rank 1: another rank of this job has ended"),
)


def test_a_run_that_is_struck_again_and_again_ends_as_if_it_had_not(recipe: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ("train", recipe, "--out", run, "--resume-or-start")
    for what, strike, words in STRIKES:
        before = load_checkpoint(run / "last.pt")["progress"]["episode"] if run.exists() else 0
        with torchrun(tmp_path, *command) as job:
            began = time.monotonic()
            while (steps(run) or [0])[-1] < before + 12:
                assert job.process.poll() is None, job.errors.read_text()
                assert time.monotonic() - began < PATIENCE_SECONDS, what
                time.sleep(0.01)
            strike(job)
            code, errors = job.ended()
        assert code != 0, what
        # A rank's own lines stand before torchrun's.
        assert words in errors, f"{what}: {errors}"
        assert before < load_checkpoint(run / "last.pt")["progress"]["episode"] < 600, what
    with torchrun(tmp_path, *command) as job:
        code, errors = job.ended()
        assert code == 0, errors
    assert (run / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    ours, theirs = load_checkpoint(run / "last.pt"), load_checkpoint(whole / "last.pt")
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0, atol=0)
    assert ours["progress"]["resumptions"] == len(STRIKES)
    assert not list(run.glob(".*.partial"))


def test_an_error_is_shown_by_its_rank_and_in_the_summary_of_torchrun(recipe: Path, tmp_path: Path) -> None:
    with torchrun(tmp_path, "train", recipe, "--out", tmp_path / "run", "--set", "training.episodes_per_step=1") as job:
        code, errors = job.ended()
    assert code != 0
    words = "training.episodes_per_step = 1 cannot be shared by 2 ranks"
    assert f"mastaf: rank 0: {words}" in errors
    assert words in errors[errors.index("Root Cause") :]
