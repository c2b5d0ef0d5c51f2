"""The live source: the same clips for any number of processes and threads, each video decoded once, bad ones named."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from tracemalloc import DomainFilter
from typing import Any

import numpy as np
import pytest
import torch

from contracts.child_processes import children_of, is_running, wait_until
from contracts.world import World, write_clip
from extract import decode, pool
from extract.clips import View, scoring_views
from extract.config import SamplingConfig
from extract.decode import VideoError, VideoSource, ViewClips, read_views
from pipeline.extraction import video_sources
from pipeline.live_clips import LiveClips, SourceError

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = SamplingConfig(num_frames=4, policy="reference", resize_size=28, crop_size=24, crop="random", flip=True)
CLIP_BYTES = 4 * 24 * 24 * 3
IDS = ["right/0", "left/1", "down/2", "right/0", "up/3", "right/1"]
VIEWS = [0, 3, 1, 2, 0, 7]


def live(world: World, decode_workers: int | None = 0, **options: Any) -> LiveClips:
    return LiveClips(video_sources(world.manifest), options.pop("sampling", SAMPLING), decode_workers, **options)


def expected(world: World, ids: Sequence[str], views: Sequence[int]) -> torch.Tensor:
    videos = video_sources(world.manifest)
    clips = [read_views(videos[video_id], SAMPLING, [view]).clips[0] for video_id, view in zip(ids, views, strict=True)]
    return torch.from_numpy(np.stack(clips))


class Decoding:
    """What this process decodes: counted, held up, or made to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counter[tuple[str, View]] = Counter()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()
        monkeypatch.setattr(pool, "read_views", self._read_views)
        self._open_reader = decode._open_reader
        monkeypatch.setattr(decode, "_open_reader", self._open)

    def _read_views(self, source: VideoSource, sampling: SamplingConfig, views: Sequence[View]) -> ViewClips:
        with self._lock:
            self.count.update((source.video_id, view) for view in views)
        self.may_go_on.wait()
        return read_views(source, sampling, views)

    def _open(self, path: Path, root: Path | None) -> Any:
        with self._lock:
            error = self.errors.pop() if self.errors else None
        if error is not None:
            raise error
        return self._open_reader(path, root)


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Decoding:
    return Decoding(monkeypatch)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_clips_are_the_same_for_any_number_of_processes(world: World, workers: int) -> None:
    before = children_of(os.getpid())
    with live(world, workers) as clips:
        read = clips.read(IDS, VIEWS)
        assert read.dtype == torch.uint8
        assert torch.equal(read, expected(world, IDS, VIEWS))
        assert torch.equal(clips.read(IDS[::-1], VIEWS[::-1]), read.flip(0))
        assert len(children_of(os.getpid()) - before) == workers


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_that_read_at_once_each_get_their_own_clips(world: World, workers: int) -> None:
    ids = [video.video_id for video in world.manifest.videos]
    generator = np.random.default_rng(0)
    wanted = [[(ids[generator.integers(len(ids))], int(generator.integers(3))) for _ in range(6)] for _ in range(24)]
    with live(world, workers, cache_bytes=5 * CLIP_BYTES) as clips, ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda rows: clips.read(*zip(*rows, strict=True)), wanted))
    for rows, read in zip(wanted, found, strict=True):
        assert torch.equal(read, expected(world, *zip(*rows, strict=True)))


def test_what_one_read_decodes_another_does_not_decode_again(world: World, decoding: Decoding) -> None:
    with live(world, cache_bytes=0) as clips:
        decoding.may_go_on.clear()
        first = clips.begin_read(["right/0", "left/1"], [1, 0])
        second = clips.begin_read(["left/1", "right/0", "right/0"], [0, 1, 2])
        decoding.may_go_on.set()
        assert torch.equal(second(), expected(world, ["left/1", "right/0", "right/0"], [0, 1, 2]))
        assert torch.equal(first(), expected(world, ["right/0", "left/1"], [1, 0]))
    assert decoding.count == Counter({("right/0", 1): 1, ("left/1", 0): 1, ("right/0", 2): 1})


def test_latest_clips_stay_in_memory_up_to_the_limit(world: World, decoding: Decoding) -> None:
    with live(world, cache_bytes=2 * CLIP_BYTES) as clips:
        for video_id in ("right/0", "right/1", "right/0", "right/2", "right/0", "right/1"):
            clips.read([video_id], [0])
    # When right/2 comes, right/1 was read longest ago.
    assert decoding.count == Counter({("right/0", 0): 1, ("right/1", 0): 2, ("right/2", 0): 1})


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_holds_the_kept_clips_and_not_all_that_was_decoded_with_them(world: World, workers: int) -> None:
    limit = 3 * CLIP_BYTES
    with live(world, workers, cache_bytes=limit) as clips:
        clips.read(["right/0"], [0])
        tracemalloc.start()
        try:
            for video_id in ("right/0", "left/1", "down/2"):
                clips.read([video_id] * 30, range(1, 31))
            clips.close()  # the threads hold nothing any more
            arrays = tracemalloc.take_snapshot().filter_traces([DomainFilter(True, np.lib.tracemalloc_domain)])
        finally:
            tracemalloc.stop()
        held = sum(trace.size for trace in arrays.traces)
    assert CLIP_BYTES <= held <= 2 * limit  # the clips, and what little else NumPy keeps


def test_processes_start_with_the_first_read_and_end_with_close(world: World) -> None:
    before = children_of(os.getpid())
    clips = live(world, 2)
    clips.check(IDS, [0])
    assert children_of(os.getpid()) == before
    clips.read(["right/0"], [0])
    assert len(children_of(os.getpid()) - before) == 2
    clips.close()
    assert children_of(os.getpid()) == before
    with pytest.raises(RuntimeError, match="closed"):
        clips.read(["left/0"], [0])
    clips.close()


def test_source_that_nobody_holds_ends_its_processes(world: World) -> None:
    before = children_of(os.getpid())
    clips = live(world, 1)
    clips.read(["right/0"], [0])
    del clips
    gc.collect()
    wait_until(lambda: children_of(os.getpid()) == before)


def test_close_fails_a_read_that_waits(world: World, decoding: Decoding) -> None:
    clips = live(world)
    decoding.may_go_on.clear()
    reads = [clips.begin_read([video.video_id], [0]) for video in world.manifest.videos]
    wait_until(lambda: decoding.count.total() > 0)
    closing = threading.Thread(target=clips.close)
    closing.start()
    with pytest.raises(CancelledError):
        reads[-1]()
    decoding.may_go_on.set()
    closing.join()
    assert reads[0]().shape == (1, 4, 24, 24, 3)


KILLED = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from extract.config import SamplingConfig
from extract.decode import VideoSource
from pipeline.live_clips import LiveClips
videos = {{name: VideoSource(name, Path({path!r})) for name in "abcd"}}
clips = LiveClips(videos, SamplingConfig(num_frames=512, resize_size=6000, crop_size=32), 2)
waiting = clips.begin_read(list("abcd"), [0] * 4)
print("begun", flush=True)
waiting()
"""


def test_no_process_survives_a_training_that_is_killed(tmp_path: Path) -> None:
    write_clip(tmp_path / "slow.mp4", "right", 0, num_frames=512, size=64)
    script = KILLED.format(root=str(ROOT), path=str(tmp_path / "slow.mp4"))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begun\n"
        workers = children_of(parent.pid)
        assert len(workers) == 2
        parent.kill()
    wait_until(lambda: not any(map(is_running, workers)))


def test_bad_video_is_named_with_its_reason_and_the_way_out(broken_world: World) -> None:
    with live(broken_world) as clips:
        with pytest.raises(SourceError) as refused:
            clips.read(["right/1", "left/1", "down/0"], [0, 0, 0])
        assert str(refused.value).startswith("video left/1 cannot be used: not_a_video: ")
        for way_out in (
            "goes on with --resume",
            "mastaf dataset exclude",
            "a new run (another --out, ",
            "training.initial_weights",
        ):
            assert way_out in str(refused.value)
        assert clips.read(["right/1", "down/0"], [0, 1]).shape == (2, 4, 24, 24, 3)
        assert list(clips.failed) == ["left/1"]
        assert clips.num_second_tries == 0


def test_trying_all_names_every_bad_video_at_once_and_keeps_no_clip(broken_world: World, decoding: Decoding) -> None:
    ids = [video.video_id for video in broken_world.manifest.videos]
    done = []
    with live(broken_world) as clips:
        with pytest.raises(SourceError) as refused:
            clips.try_all(ids, lambda number, total: done.append((number, total)))
        assert done == [(number, len(ids)) for number in range(1, len(ids) + 1)]
        assert {video_id: text.split(":")[0] for video_id, text in clips.failed.items()} == {
            "right/0": "not_a_video",
            "left/1": "not_a_video",
            "up/2": "missing",
        }
        assert clips.degraded == {"down/1": "short_video"}
        assert str(refused.value).startswith(f"3 of {len(ids)} videos cannot be decoded: right/0 (not_a_video: ")
        assert all(f"{video_id} (" in str(refused.value) for video_id in clips.failed)
        assert "mastaf dataset exclude" in str(refused.value)
        clips.try_all([video_id for video_id in ids if video_id not in clips.failed])
        clips.read(["right/1"], [0])
    assert decoding.count["right/1", 0] == 3


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ("drop", "video down/1 cannot be used: short_video: 3 frames"),
        ("fail", "video down/1 has 3 frames.*short_policy is 'fail'"),
    ],
)
def test_short_video_stops_training_where_the_policy_says_so(broken_world: World, policy: str, text: str) -> None:
    sampling = SAMPLING.model_copy(update={"short_policy": policy})
    with live(broken_world, sampling=sampling) as clips:
        with pytest.raises(SourceError, match=text):
            clips.read(["down/1"], [0])
        with pytest.raises(SourceError, match="1 of 2 videos"):
            clips.try_all(["down/0", "down/1"])
    with live(broken_world) as clips:
        assert torch.equal(clips.read(["down/1"], [0])[0, 2], clips.read(["down/1"], [0])[0, 3])
        assert clips.degraded == {"down/1": "short_video"}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError("no room")])
def test_fault_that_may_pass_gets_a_second_try(world: World, decoding: Decoding, error: Exception) -> None:
    with live(world) as clips:
        decoding.errors = [error]
        assert torch.equal(clips.read(["right/0"], [1]), expected(world, ["right/0"], [1]))
        assert (clips.num_second_tries, clips.failed) == (1, {})
        decoding.errors = [error, error]
        with pytest.raises(SourceError, match="video left/0 cannot be used, at a second try neither: "):
            clips.read(["left/0"], [0])
        assert (clips.num_second_tries, list(clips.failed)) == (2, ["left/0"])
        assert clips.read(["left/0"], [0]).shape == (1, 4, 24, 24, 3)
        assert clips.failed == {}


def test_late_process_costs_a_second_try_and_no_pixel(world: World) -> None:
    before = children_of(os.getpid())
    with live(world, 1, cache_bytes=0, seconds_per_video=2.0) as clips:
        wanted = clips.read(IDS, VIEWS)
        (worker,) = children_of(os.getpid()) - before
        os.kill(worker, signal.SIGSTOP)
        assert torch.equal(clips.read(IDS, VIEWS), wanted)
        assert clips.num_second_tries == 1
        assert children_of(os.getpid()) - before != {worker}


def test_process_tells_whether_a_fault_may_pass() -> None:
    for is_passing in (True, False):
        error = pickle.loads(pickle.dumps(VideoError("corrupt", "no answer", is_passing)))
        assert (str(error), error.is_passing) == ("corrupt: no answer", is_passing)


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(8, 1, 7), (8, 2, 3), (8, 4, 1), (4, 8, 1), (64, 1, 16)])
def test_ranks_of_one_machine_share_its_cores(
    world: World, monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2 * ranks, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, str(value))
    assert live(world, None)._decoder.num_at_once == workers
    assert live(world, 5)._decoder.num_at_once == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_to_score_come_by_video_with_view_0_among_them(world: World, workers: int) -> None:
    ids = ["up/0", "still/1", "up/0"]
    with live(world, workers) as clips:
        found = clips.read_scoring(ids, 2, 3)
        assert found.shape == (3, 6, 4, 24, 24, 3)
        assert torch.equal(found[0], found[2])
        videos = video_sources(world.manifest)
        for video_id, wanted in zip(ids, found, strict=True):
            decoded = read_views(videos[video_id], SAMPLING, scoring_views(2, 3)).clips
            assert torch.equal(wanted, torch.from_numpy(decoded))
        assert torch.equal(clips.read_scoring(ids, 1, 1)[:, 0], expected(world, ids, [0, 0, 0]))
