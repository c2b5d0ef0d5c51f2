"""The command line as its users meet it: real processes, real files, exit codes and the words on stderr."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

import cli
from contracts.world import STEPS, World, make_world

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "sampling.num_frames=4", "sampling.resize_size=28", "sampling.crop_size=24", "backbone.options.width=4",
    "store.shard_rows=8", "extraction.forward_batch=4",
]  # fmt: skip
SET_SMALL = [word for override in SMALL for word in ("--set", override)]


def mastaf(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in its own process."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)


def succeeded(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = mastaf(*arguments)
    assert done.returncode == 0, done.stderr
    return done


def refused(*arguments: object) -> str:
    """The one line of a refusal."""
    done = mastaf(*arguments)
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning:")]
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr
    return lines[0]


FORMS = (
    ("mp4", "mpeg4", 10, 64, 48),
    ("avi", "mjpeg", 25, 50, 70),
    ("mkv", "mpeg4", 30, 48, 48),
    ("mov", "mjpeg", 12, 96, 40),
)


def write_mixed(path: Path, class_name: str, number: int) -> None:
    """A moving square in one of several containers, codecs, rates and sizes."""
    ending, codec, rate, width, height = FORMS[number % len(FORMS)]
    path = path.with_suffix(f".{ending}")
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.Generator(np.random.Philox(key=[number, len(class_name)]))
    colours = generator.integers(0, 256, (2, 3))
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)  # PyAV types a stream as video, audio or subtitle
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for index in range(8 + number):
            frame = np.broadcast_to(colours[0], (height, width, 3)).astype(np.uint8)
            top, left = (int(np.clip(14 + 2 * index * step, 0, 30)) for step in STEPS[class_name])
            frame[top : top + 9, left : left + 9] = colours[1]
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


@pytest.fixture(scope="module")
def own_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: six classes, mixed files, one broken, one of three frames, one stray text file."""
    folder = tmp_path_factory.mktemp("own") / "clips"
    for class_name in ("right", "left", "down", "up", "diagonal", "jump"):
        for number in range(6):
            write_mixed(folder / class_name / f"take {number}", class_name, number)
    broken = folder / "diagonal" / "take 0.mp4"  # a training class under the split of the test below
    broken.write_bytes(broken.read_bytes()[:300])
    short = next(path for path in sorted((folder / "jump").iterdir()) if path.name == "take 1.avi")
    short.unlink()
    write_three_frames(short)
    (folder / "jump" / "notes.txt").write_text("filmed on Sunday")
    return folder


def write_three_frames(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=10)  # as above
        stream.width, stream.height, stream.pix_fmt = 40, 40, "yuvj420p"
        for value in (0, 100, 200):
            frame = np.full((40, 40, 3), value, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def test_own_clips_from_folder_to_accuracy(own_clips: Path, tmp_path: Path) -> None:
    manifest, store, clean, run = tmp_path / "own.csv", tmp_path / "own.zarr", tmp_path / "clean.csv", tmp_path / "run"
    scanned = succeeded("dataset", "scan", own_clips, "--out", manifest, "--split", "34/33/33", "--seed", 0)
    assert "notes.txt" in scanned.stderr
    report = json.loads(succeeded("dataset", "check", manifest, "--json").stdout)
    assert {split: report[split]["classes"] for split in ("train", "val", "test")} == {"train": 2, "val": 2, "test": 2}
    assert report["missing"] == [] == report["overlaps"]

    extracted = succeeded(
        "extract", "--manifest", manifest, "--backbone", "small3d", "--weights", "random:0", "--store", store,
        "--device", "cpu", *SET_SMALL, "--json",
    )  # fmt: skip
    facts = json.loads(extracted.stdout)
    assert (facts["num_videos"], facts["num_ok"], facts["num_degraded"], facts["num_rejected"]) == (36, 34, 1, 1)
    failures = json.loads(succeeded("store", "failures", store, "--json").stdout)
    by_status = {row["status"]: row for row in failures}
    assert by_status["degraded"]["video_id"] == "jump/take 1"
    assert by_status["degraded"]["reason"] == "short_video"
    rejected = by_status["rejected"]["video_id"]
    assert rejected == "diagonal/take 0"
    assert f"rejected: {rejected}" in extracted.stderr

    overrides = [
        f'store.path="{store}"',
        "episodes.n_way=2",
        "training.episodes=20",
        "training.validate_every=20",
        "training.validation_episodes=10",
        "training.episodes_per_step=4",
    ]
    training = ["--device", "cpu", *(word for override in overrides for word in ("--set", override))]
    refusal = refused(
        "train", "demo_mastaf", "--out", tmp_path / "no", "--set", f'data.manifest="{manifest}"', *training
    )
    assert rejected in refusal
    assert "dataset exclude" in refusal
    succeeded("dataset", "exclude", manifest, "--from-store", store, "--out", clean)
    succeeded("train", "demo_mastaf", "--out", run, "--set", f'data.manifest="{clean}"', *training)
    result = json.loads(
        succeeded("evaluate", run, "--split", "test", "--episodes", 30, "--json", "--device", "cpu").stdout
    )
    wanted = {
        "accuracy",
        "interval95",
        "episodes",
        "n_way",
        "k_shot",
        "split_hash",
        "episode_hash",
        "store_fingerprint",
        "code_version",
    }
    assert wanted <= result.keys()
    new_hash = json.loads(succeeded("dataset", "check", clean, "--json").stdout)["split_hash"]
    assert result["split_hash"] == new_hash != report["split_hash"]
    assert 0.0 <= result["accuracy"] <= 1.0
    info = json.loads(succeeded("store", "info", store, "--json").stdout)
    assert result["store_fingerprint"] == info["fingerprint"]
    assert (info["num_videos"], info["num_ok"], info["num_degraded"], info["num_rejected"]) == (36, 34, 1, 1)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("cli"), 2)


@pytest.mark.slow
def test_strict_extraction_exits_with_3(tmp_path: Path) -> None:
    small_world = make_world(tmp_path / "world", 2)
    (small_world.folder / "videos/jump/0.mp4").write_bytes(b"gone")
    done = mastaf(
        "extract", "--manifest", small_world.manifest_path, "--backbone", "small3d", "--weights", "none", "--store", tmp_path / "s.zarr",
        "--strict", *SET_SMALL,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "rejected: jump/0" in done.stderr
    assert "untrained" in done.stderr

    other = refused(
        "extract", "--manifest", small_world.manifest_path, "--backbone", "small3d", "--weights", "random:7", "--store",
        tmp_path / "s.zarr", *SET_SMALL, "--set", "sampling.num_frames=8",
    )  # fmt: skip
    assert "sampling.num_frames" in other
    assert "weights_digest" in other


@pytest.mark.slow
def test_end_to_end_run_is_extracted_again_and_scored_through_its_cubes(small_world: World, tmp_path: Path) -> None:
    run, store = tmp_path / "run", tmp_path / "a store.zarr"
    overrides = [
        *SMALL,
        f'data.manifest="{small_world.manifest_path}"',
        "episodes.n_way=2",
        "episodes.n_query=1",
        "training.episodes=2",
        "training.validate_every=2",
        "training.validation_episodes=4",
    ]
    succeeded(
        "train", "demo_end_to_end", "--out", run, *(word for override in overrides for word in ("--set", override))
    )
    succeeded("extract", "--from-run", run, "--store", store, "--set", "store.dtype=float32")
    again = json.loads(
        succeeded("extract", "--from-run", run, "--store", store, "--set", "store.dtype=float32", "--json").stdout
    )
    assert again["num_skipped"] == again["num_videos"] == 14
    live, cached = (
        json.loads(succeeded("evaluate", run, "--episodes", 20, "--json", *extra).stdout)
        for extra in ([], ["--store", store])
    )
    assert live["accuracy"] == cached["accuracy"]
    assert live["episode_hash"] == cached["episode_hash"]
    assert live["store_fingerprint"] == cached["store_fingerprint"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "no_such_recipe"], ["no_such_recipe", "mastaf list recipes"]),
        (["train", "demo_mastaf", "--set", "data.manifest=absent.csv"], ["absent.csv"]),
        (["train", "demo_mastaf", "--set", "head.name=mastav"], ["mastav", "mastaf"]),
        (["train", "demo_mastaf", "--set", "trainin.seed=1"], ["trainin", "training"]),
        (["train", "demo_mastaf", "--set", "training.seed"], ["table.key=value"]),
        (["extract", "--manifest", "absent.csv"], ["--backbone"]),
        (["extract", "--manifest", "absent.csv", "--backbone", "r3d5", "--store", "s.zarr"], ["r3d5", "r3d50"]),
        (
            ["extract", "--manifest", "absent.csv", "--backbone", "r3d18", "--store", "s.zarr", "--device", "tpu"],
            ["tpu", "cuda"],
        ),
        (
            [
                "extract",
                "--manifest",
                "absent.csv",
                "--backbone",
                "tsn_resnet18",
                "--weights",
                "absent.pth",
                "--store",
                "s.zarr",
            ],
            ["absent"],
        ),
        (["store", "info", "absent.zarr"], ["absent.zarr"]),
        (["evaluate", "absent"], ["absent"]),
        (["list", "nothing"], ["nothing", "backbones"]),
        (["extract", "--backbone", "small3d", "--store", "s.zarr", "--store-kind", "memory"], ["memory"]),
        (["dataset", "splits", "ucf10", "--videos", ".", "--out", "x.csv"], ["ucf101"]),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # In this process: other tests show that a process of its own ends with the same code.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mastaf", *arguments])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith("warning:")]
    assert (stop.value.code, printed.out, len(lines)) == (2, "", 1), printed
    for word in words:
        assert word in lines[0]


def test_bad_input_ends_a_process_with_code_2() -> None:
    assert "mastaf list recipes" in refused("train", "no_such_recipe")


def test_debug_shows_the_traceback() -> None:
    done = mastaf("train", "no_such_recipe", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("backbones", {"r3d18", "r3d34", "r3d50", "r3d101", "tv_r3d_18", "tsn_resnet50", "vivit", "small3d"}),
        ("heads", {"mastaf", "neighbor", "self", "cross"}),
        ("datasets", {"ucf101", "hmdb51", "ssv2-part", "ssv2-all", "kinetics100"}),
        ("recipes", {"demo_mastaf", "ucf101_r3d50_1shot"}),
    ],
)
def test_list_names_what_there_is(what: str, names: set[str]) -> None:
    rows = json.loads(succeeded("list", what, "--json").stdout)
    assert names <= {row["name"] for row in rows}
    assert all(row["description"] for row in rows)
