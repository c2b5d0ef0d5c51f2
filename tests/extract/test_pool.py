"""Decoding in worker processes: the same clips as in this process, and one video lost where a worker is."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from contracts.child_processes import children_of, decoders_of, is_running, stat_of, wait_until
from extract.config import SamplingConfig
from extract.decode import VideoError, VideoSource, VideoTooShortError, ViewClips, read_views
from extract.pool import DecodePool, DecodeTask, WorkerStartError, decoded_in_order

WriteVideo = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
SMALL = SamplingConfig(num_frames=8, policy="reference", resize_size=48, crop_size=32, crop="random", flip=True)
SLOW = SamplingConfig(num_frames=512, resize_size=2048, crop_size=32)
"""Enlarges every frame: with `slow_video`, several seconds of work and little memory."""


@pytest.fixture
def videos(write_video: WriteVideo) -> list[VideoSource]:
    paths = [write_video(f"{index}.mp4", num_frames=20 + 3 * index, width=96 + 2 * index) for index in range(5)]
    return [VideoSource(path.stem, path) for path in paths]


@pytest.fixture
def slow_video(write_video: WriteVideo) -> VideoSource:
    return VideoSource("slow", write_video("slow.mp4", num_frames=512, codec="mpeg4"))


def wait_until_busy(pid: int) -> None:
    """Until the process has used another 0.2 s of processor time."""

    def ticks() -> int:
        return sum(map(int, stat_of(pid)[11:13]))

    begin = ticks()
    wait_until(lambda: ticks() >= begin + 20)


def assert_same(found: ViewClips, wanted: ViewClips) -> None:
    assert np.array_equal(found.clips, wanted.clips)
    assert found.clips.dtype == wanted.clips.dtype
    assert np.array_equal(found.frame_indices, wanted.frame_indices)
    assert np.array_equal(found.frame_seconds, wanted.frame_seconds)
    assert (found.status, found.reason, found.num_frames) == (wanted.status, wanted.reason, wanted.num_frames)


def outcomes(pool: DecodePool, videos: list[VideoSource], sampling: SamplingConfig = SMALL) -> list[object]:
    tasks = [DecodeTask(video, sampling, [0]) for video in videos]
    return [decoded.outcome for decoded in decoded_in_order(pool, tasks)]


@pytest.mark.parametrize("num_processes", [0, 1, 2])
def test_clips_are_those_of_read_views_in_the_order_of_the_tasks(
    num_processes: int, videos: list[VideoSource], write_video: WriteVideo
) -> None:
    videos.append(VideoSource("short", write_video("short.mp4", num_frames=3)))
    videos.append(VideoSource("part", videos[0].path, 0.1, 0.5))
    tasks = [DecodeTask(video, SMALL, (0, 3)) for video in videos]
    with DecodePool(num_processes) as pool:
        found = list(decoded_in_order(pool, iter(tasks)))
        assert pool.num_restarts == 0
    assert [decoded.task for decoded in found] == tasks
    for decoded in found:
        assert isinstance(decoded.outcome, ViewClips)
        assert_same(decoded.outcome, read_views(decoded.task.source, SMALL, (0, 3)))
        decoded.outcome.clips[0] = 0  # writable, as those of read_views


def test_results_may_be_asked_for_in_any_order_and_once(videos: list[VideoSource]) -> None:
    with DecodePool(2) as pool:
        tickets = [pool.submit(video, SMALL, [1]) for video in videos]
        for ticket, video in reversed(list(zip(tickets, videos, strict=True))):
            assert_same(pool.result(ticket), read_views(video, SMALL, [1]))
        with pytest.raises(ValueError, match="asked for before"):
            pool.result(tickets[0])


@pytest.mark.parametrize("num_processes", [0, 1])
def test_video_errors_come_with_reason_and_detail_and_cost_no_process(
    num_processes: int, videos: list[VideoSource], tmp_path: Path
) -> None:
    (tmp_path / "text.mp4").write_text("not a video " * 100)
    os.mkfifo(tmp_path / "pipe.mp4")
    bad = [VideoSource(name, tmp_path / name) for name in ("text.mp4", "pipe.mp4", "none.mp4")]
    with DecodePool(num_processes) as pool:
        found = outcomes(pool, [bad[0], videos[0], bad[1], bad[2], videos[1]])
        assert pool.num_restarts == 0
    for video, outcome in zip(bad, (found[0], found[2], found[3]), strict=True):
        with pytest.raises(VideoError) as wanted:
            read_views(video, SMALL, [0])
        assert isinstance(outcome, VideoError)
        assert str(outcome) == str(wanted.value)
    assert isinstance(found[1], ViewClips)
    assert isinstance(found[4], ViewClips)


@pytest.mark.parametrize("num_processes", [0, 1])
def test_video_that_is_too_short_stops_the_run_only_where_the_policy_says_so(
    num_processes: int, write_video: WriteVideo
) -> None:
    short = VideoSource("short", write_video("short.mp4", num_frames=3))
    with DecodePool(num_processes) as pool:
        (dropped,) = outcomes(pool, [short], SMALL.model_copy(update={"short_policy": "drop"}))
        assert isinstance(dropped, VideoError)
        assert dropped.reason == "short_video"
        with pytest.raises(VideoTooShortError, match="short_policy is 'fail'"):
            outcomes(pool, [short, short], SMALL.model_copy(update={"short_policy": "fail"}))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_worker_that_dies_costs_its_video_alone(
    number: signal.Signals, videos: list[VideoSource], slow_video: VideoSource
) -> None:
    with DecodePool(1) as pool:
        before = pool.submit(videos[0], SMALL, [0])
        slow = pool.submit(slow_video, SLOW, [0])
        after = [pool.submit(video, SMALL, [0]) for video in videos]
        assert_same(pool.result(before), read_views(videos[0], SMALL, [0]))
        (worker,) = decoders_of(os.getpid())
        wait_until_busy(worker)
        os.kill(worker, number)
        with pytest.raises(VideoError) as caught:
            pool.result(slow)
        assert (caught.value.reason, caught.value.detail) == (
            "stopped",
            f"the decoding process died (signal {number.value})",
        )
        for ticket, video in zip(after, videos, strict=True):
            assert_same(pool.result(ticket), read_views(video, SMALL, [0]))
        assert pool.num_restarts == 1
        assert decoders_of(os.getpid()) != {worker}
    assert decoders_of(os.getpid()) == set()


def test_worker_that_dies_while_idle_costs_no_video(videos: list[VideoSource]) -> None:
    with DecodePool(1) as pool:
        (worker,) = decoders_of(os.getpid())
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: not is_running(worker))
        assert_same(pool.result(pool.submit(videos[0], SMALL, [0])), read_views(videos[0], SMALL, [0]))
        assert pool.num_restarts == 1


def test_late_video_is_stopped_and_its_neighbours_are_not(videos: list[VideoSource], slow_video: VideoSource) -> None:
    with DecodePool(1, seconds_per_video=1.0) as pool:
        (worker,) = decoders_of(os.getpid())
        tickets = [pool.submit(videos[0], SMALL, [0]), pool.submit(slow_video, SLOW, [0])]
        tickets += [pool.submit(video, SMALL, [0]) for video in videos]
        assert_same(pool.result(tickets[0]), read_views(videos[0], SMALL, [0]))
        with pytest.raises(VideoError, match="stopped: took longer than 1 s; allow more time"):
            pool.result(tickets[1])
        assert not is_running(worker)
        for ticket, video in zip(tickets[2:], videos, strict=True):
            assert_same(pool.result(ticket), read_views(video, SMALL, [0]))
        assert pool.num_restarts == 1


def test_stopped_worker_is_late(videos: list[VideoSource]) -> None:
    with DecodePool(1, seconds_per_video=0.5) as pool:
        (worker,) = decoders_of(os.getpid())
        os.kill(worker, signal.SIGSTOP)
        with pytest.raises(VideoError, match=r"took longer than 0\.5 s"):
            pool.result(pool.submit(videos[0], SMALL, [0]))
        assert not is_running(worker)


def test_memory_limit_rejects_the_video_and_keeps_the_process(videos: list[VideoSource]) -> None:
    greedy = SMALL.model_copy(update={"resize_size": 6400})  # 9600 x 6400 pixels: 184 MB a frame
    with DecodePool(1, memory_bytes=384 << 20) as pool:
        (worker,) = decoders_of(os.getpid())
        with pytest.raises(VideoError) as caught:
            pool.result(pool.submit(videos[0], greedy, [0]))
        assert caught.value.reason == "out_of_memory"
        assert_same(pool.result(pool.submit(videos[0], SMALL, [0])), read_views(videos[0], SMALL, [0]))
        assert decoders_of(os.getpid()) == {worker}


def test_worker_has_no_torch_no_shared_memory_and_leaves_no_core(videos: list[VideoSource]) -> None:
    with DecodePool(1) as pool:
        pool.result(pool.submit(videos[0], SMALL, [0]))
        (worker,) = decoders_of(os.getpid())
        maps = Path(f"/proc/{worker}/maps").read_text()
        limits = Path(f"/proc/{worker}/limits").read_text().splitlines()
    assert "libavcodec" in maps
    assert "torch" not in maps
    assert "/dev/shm" not in maps
    assert [line.split()[-3:-1] for line in limits if line.startswith("Max core file size")] == [["0", "0"]]


def test_interrupt_is_left_to_the_parent(slow_video: VideoSource) -> None:
    with DecodePool(1) as pool:
        (worker,) = decoders_of(os.getpid())
        assert os.getpgid(worker) != os.getpgid(0)  # Ctrl-C does not reach it, not even while it starts
        ticket = pool.submit(slow_video, SLOW.model_copy(update={"resize_size": 512}), [0])
        wait_until_busy(worker)
        os.kill(worker, signal.SIGINT)
        pool.result(ticket)
        assert (pool.num_restarts, decoders_of(os.getpid())) == (0, {worker})


def test_close_in_the_middle_of_videos_leaves_no_process(slow_video: VideoSource) -> None:
    pool = DecodePool(2)
    tickets = [pool.submit(slow_video, SLOW, [0]) for _ in range(4)]
    for worker in decoders_of(os.getpid()):
        wait_until_busy(worker)
    pool.close()
    assert decoders_of(os.getpid()) == set()
    assert pool.num_restarts == 0
    for ticket in (tickets[0], tickets[3]):  # begun, and not begun
        with pytest.raises(RuntimeError, match="pool is closed"):
            pool.result(ticket)
    with pytest.raises(RuntimeError, match="pool is closed"):
        pool.submit(slow_video, SLOW, [0])
    pool.close()


def test_exception_of_a_signal_handler_gets_out_of_result(slow_video: VideoSource) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    previous = signal.signal(signal.SIGUSR1, stop)
    begin = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        with DecodePool(1) as pool:
            ticket = pool.submit(slow_video, SLOW, [0])
            begin.start()
            with pytest.raises(Stop):
                pool.result(ticket)
    finally:
        begin.join()
        signal.signal(signal.SIGUSR1, previous)
    assert decoders_of(os.getpid()) == set()


@pytest.mark.parametrize("num_processes", [0, 1])
def test_closed_pool_refuses_work(num_processes: int, videos: list[VideoSource]) -> None:
    pool = DecodePool(num_processes)
    ticket = pool.submit(videos[0], SMALL, [0])
    pool.close()
    with pytest.raises(RuntimeError, match="pool is closed"):
        pool.result(ticket)
    with pytest.raises(RuntimeError, match="pool is closed"):
        pool.submit(videos[0], SMALL, [0])


def test_missing_interpreter_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(WorkerStartError, match=r"could not start: .*No such file"):
        DecodePool(2)


@pytest.fixture
def broken_import(tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "av.py").write_text("raise ImportError('no libavcodec')\n")
    return folder


def test_worker_that_cannot_import_is_an_error_at_once(broken_import: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = children_of(os.getpid())
    monkeypatch.syspath_prepend(broken_import)
    with pytest.raises(WorkerStartError, match="could not start: ImportError: no libavcodec"):
        DecodePool(2)
    assert children_of(os.getpid()) == before


def test_worker_that_cannot_be_replaced_ends_the_run(
    videos: list[VideoSource], slow_video: VideoSource, broken_import: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DecodePool(1) as pool:
        slow, waiting = pool.submit(slow_video, SLOW, [0]), pool.submit(videos[0], SMALL, [0])
        (worker,) = decoders_of(os.getpid())
        wait_until_busy(worker)
        monkeypatch.syspath_prepend(broken_import)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(VideoError, match="stopped"):
            pool.result(slow)
        with pytest.raises(WorkerStartError, match="ImportError: no libavcodec"):
            pool.result(waiting)
        with pytest.raises(WorkerStartError, match="ImportError: no libavcodec"):
            pool.submit(videos[0], SMALL, [0])
        assert pool.num_restarts == 1


@pytest.mark.slow
def test_descriptors_stay_constant_over_videos_and_restarts(videos: list[VideoSource]) -> None:
    def num_descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    outside = num_descriptors()
    with DecodePool(1) as pool:
        inside = num_descriptors()
        for index in range(60):
            if index % 6 == 0:
                (worker,) = decoders_of(os.getpid())
                os.kill(worker, signal.SIGKILL)
                wait_until(lambda pid=worker: not is_running(pid))  # type: ignore[misc]
            pool.result(pool.submit(videos[index % 5], SMALL, [0]))
        assert pool.num_restarts == 10
        assert num_descriptors() == inside
    assert num_descriptors() == outside


def test_tasks_are_pulled_only_as_there_is_room(videos: list[VideoSource]) -> None:
    num_pulled = 0

    def endless() -> Iterator[DecodeTask]:
        nonlocal num_pulled
        for video in itertools.cycle(videos):
            num_pulled += 1
            yield DecodeTask(video, SMALL, [0])

    clip_bytes = 8 * 32 * 32 * 3
    with DecodePool(1, ahead_bytes=3 * clip_bytes) as pool:
        decoded = decoded_in_order(pool, endless())
        for num_taken in range(1, 10):
            next(decoded)
            assert num_pulled <= num_taken + 3  # three in flight or handed out; one is known and waits for room
    num_pulled = 0
    with DecodePool(1, ahead_bytes=1) as pool:
        next(decoded_in_order(pool, endless()))  # a clip larger than the room is decoded by itself
        assert num_pulled == 2
    num_pulled = 0
    with DecodePool(1) as pool:
        next(decoded_in_order(pool, endless()))
        assert num_pulled == pool.videos_ahead + 1


def test_iterator_that_is_left_early_gives_its_tickets_up(videos: list[VideoSource]) -> None:
    with DecodePool(1) as pool:
        decoded = decoded_in_order(pool, [DecodeTask(video, SMALL, [0]) for video in videos])
        next(decoded)
        assert isinstance(decoded, Iterator)
        del decoded
        ticket = pool.submit(videos[0], SMALL, [0])
        assert_same(pool.result(ticket), read_views(videos[0], SMALL, [0]))
        for early in range(ticket):
            with pytest.raises(ValueError, match=f"ticket {early}"):
                pool.result(early)


@pytest.mark.parametrize("num_processes", [0, 1])
def test_relative_path_is_that_of_the_moment_of_submission(
    num_processes: int, videos: list[VideoSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DecodePool(num_processes) as pool:
        monkeypatch.chdir(tmp_path)
        ticket = pool.submit(VideoSource("0", Path("0.mp4")), SMALL, [0])
        monkeypatch.chdir("/")
        assert_same(pool.result(ticket), read_views(videos[0], SMALL, [0]))


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from extract.config import SamplingConfig
from extract.decode import VideoError, VideoSource
from extract.pool import DecodePool
pool = DecodePool({num_processes})
for name in {names!r}:
    ticket = pool.submit(VideoSource("video", Path(name)), SamplingConfig(**{sampling!r}), [0])
    print("submitted", flush=True)
    try:
        print(int(pool.result(ticket).clips.sum()))
    except VideoError as error:
        print(error.reason)
"""


def script_for(paths: list[Path], sampling: SamplingConfig, num_processes: int) -> str:
    return SCRIPT.format(
        root=str(ROOT), names=[str(path) for path in paths], sampling=sampling.model_dump(), num_processes=num_processes
    )


def test_script_from_standard_input_works_anywhere_and_writes_no_line_of_its_own(
    videos: list[VideoSource], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.mp4"
    content = bytearray(videos[1].path.read_bytes())
    content[200:600] = bytes(400)
    damaged.write_bytes(content)
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-"],
        input=script_for([videos[0].path, damaged], SMALL, 2),
        capture_output=True,
        text=True,
        cwd=tmp_path / "elsewhere",
        check=False,
    )
    # The pool is not closed there: the end of the process ends the workers.
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1] == str(int(read_views(videos[0], SMALL, [0]).clips.sum()))


def test_script_file_is_not_run_again_by_the_workers(videos: list[VideoSource], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("print('begin')\n" + script_for([videos[0].path], SMALL, 2))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("begin") == 1


def test_workers_die_with_a_parent_that_is_killed_in_the_middle_of_a_video(
    slow_video: VideoSource, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    # Minutes of work: the worker would not find out by itself that the other end of its socket is gone.
    script.write_text(script_for([slow_video.path], SLOW.model_copy(update={"resize_size": 6000}), 2))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "submitted\n"
        workers = decoders_of(parent.pid)
        assert len(workers) == 2
        wait_until(lambda: max(int(stat_of(worker)[11]) for worker in workers) > 60)
        parent.kill()
    give_up = time.monotonic() + 20
    wait_until(lambda: not any(map(is_running, workers)) or time.monotonic() > give_up)
    left = [worker for worker in workers if is_running(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert left == []


def test_impossible_settings_are_refused(videos: list[VideoSource]) -> None:
    with pytest.raises(ValueError, match="num_processes -1 is negative"):
        DecodePool(-1)
    with pytest.raises(ValueError, match="seconds_per_video 0 is not between"):
        DecodePool(1, seconds_per_video=0)
    with pytest.raises(ValueError, match="memory_bytes 0 is not positive"):
        DecodePool(1, memory_bytes=0)
    with DecodePool(0) as pool, pytest.raises(ValueError, match="at least one"):
        pool.submit(videos[0], SMALL, [])
