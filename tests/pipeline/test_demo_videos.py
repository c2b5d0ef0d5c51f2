"""The demo's videos: real H.264 files, the same every time, in which only the motion tells the class."""

from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.demo_classes import MOTION_CLASSES, Track, classes_of
from pipeline.demo_videos import (
    FRAME_SIZE,
    FRAMES_PER_SECOND,
    NUM_FRAMES,
    encoder_name,
    render_frames,
    write_demo_videos,
    write_video,
)

PROGRESS = np.linspace(0.0, 1.0, 25)
DIRECTIONS = ("move_right", "move_left", "move_up", "move_down")
SEEN = (*DIRECTIONS, "grow", "orbit_clockwise")
NUM_FITTED, NUM_HELD_OUT = 20, 20
NUM_GUESSES = len(SEEN) * NUM_HELD_OUT
CHANCE = 1.0 / len(SEEN)
AT_MOST_BY_GUESSING = CHANCE + 3.0 * (CHANCE * (1.0 - CHANCE) / NUM_GUESSES) ** 0.5
"""Three standard deviations above chance."""


def tracks_of(class_name: str, progress: np.ndarray, seed: int = 3) -> list[Track]:
    return MOTION_CLASSES[class_name].motion(progress, np.random.Generator(np.random.Philox(key=seed)))


@pytest.fixture(scope="module")
def videos() -> np.ndarray:
    """(classes, videos, F, H, W, 3) of `SEEN`."""
    numbers = range(NUM_FITTED + NUM_HELD_OUT)
    return np.stack([[render_frames(name, number, seed=0) for number in numbers] for name in SEEN])


def nearest_mean_accuracy(features: np.ndarray) -> float:
    """Fit a mean per class on the first videos, classify the others; (classes, videos, dimensions), each standardised."""
    fitted, held_out = features[:, :NUM_FITTED], features[:, NUM_FITTED:]
    centre, spread = fitted.mean(axis=(0, 1)), fitted.std(axis=(0, 1)) + 1e-9
    means = ((fitted - centre) / spread).mean(axis=1)
    distances = np.linalg.norm(((held_out - centre) / spread)[:, :, None] - means, axis=-1)
    return float((distances.argmin(axis=-1) == np.arange(len(features))[:, None]).mean())


def test_classes_are_few_dozen_and_the_splits_are_large_enough() -> None:
    sizes = [len(classes_of(split)) for split in ("train", "val", "test")]
    assert sizes == [20, 6, 10]
    assert sum(sizes) == len(MOTION_CLASSES)  # a dict: no class can be in two splits


def test_reversed_classes_share_a_split_and_name_each_other() -> None:
    for name, motion_class in MOTION_CLASSES.items():
        if motion_class.reversed_by is not None:
            other = MOTION_CLASSES[motion_class.reversed_by]
            assert other.reversed_by == name
            assert other.split == motion_class.split


@pytest.mark.parametrize("name", [name for name, motion_class in MOTION_CLASSES.items() if motion_class.reversed_by])
def test_reversed_class_is_the_film_run_backwards(name: str) -> None:
    other = MOTION_CLASSES[name].reversed_by
    assert other is not None
    for forward, reverse in zip(tracks_of(name, PROGRESS[::-1]), tracks_of(other, PROGRESS), strict=True):
        # Where the path lies and how the object is turned at first are drawn elsewhere, so they do not count.
        apart = forward.position - reverse.position
        np.testing.assert_allclose(apart, np.broadcast_to(apart[0], apart.shape), atol=1e-12)
        np.testing.assert_allclose(forward.scale, reverse.scale, atol=1e-12)
        np.testing.assert_allclose(np.diff(forward.angle), np.diff(reverse.angle), atol=1e-12)


def test_every_class_moves_and_no_two_move_alike() -> None:
    drawn = {}
    for name in MOTION_CLASSES:
        tracks = tracks_of(name, PROGRESS)
        moved = sum(
            np.ptp(track.position, axis=0).sum() + np.ptp(track.scale) + np.ptp(track.angle) for track in tracks
        )
        assert moved > 0.5, name
        drawn[name] = np.concatenate(
            [np.c_[track.position - track.position[0], track.scale, track.angle] for track in tracks]
        )
    names = list(drawn)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            same_shape = drawn[first].shape == drawn[second].shape
            assert not (same_shape and np.allclose(drawn[first], drawn[second])), (first, second)


def test_directions_are_those_of_the_screen() -> None:
    for name, axis, sign in (("move_right", 0, 1), ("move_left", 0, -1), ("move_up", 1, -1), ("move_down", 1, 1)):
        steps = np.diff(tracks_of(name, PROGRESS)[0].position, axis=0)
        assert (sign * steps[:, axis] > 0).all()
        assert (steps[:, 1 - axis] == 0).all()


def test_clockwise_is_clockwise_on_the_screen() -> None:
    x, y = tracks_of("circle_clockwise", PROGRESS)[0].position.T
    assert (x[:-1] * y[1:] - y[:-1] * x[1:] > 0).all()  # y points down, so a positive cross product turns clockwise


def test_same_key_gives_the_same_frames_and_any_other_key_does_not() -> None:
    frames = render_frames("hop", 3, seed=5)
    assert frames.shape == (NUM_FRAMES, FRAME_SIZE, FRAME_SIZE, 3)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, render_frames("hop", 3, seed=5))
    for other in (render_frames("hop", 4, seed=5), render_frames("hop", 3, seed=6), render_frames("zigzag", 3, seed=5)):
        assert (frames != other).mean() > 0.5


def test_rendering_leaves_global_randomness_alone() -> None:
    np.random.seed(7)
    expected = np.random.random(4)
    np.random.seed(7)
    render_frames("grow", 0, seed=0)
    np.testing.assert_array_equal(np.random.random(4), expected)


def test_unknown_class_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"unknown motion class 'jump'.*move_right"):
        render_frames("jump", 0, seed=0)


def looks(frames: np.ndarray) -> np.ndarray:
    """Colour and texture of single frames, (classes, videos, H, W, 3) -> (classes, videos, 9)."""
    values = frames.astype(np.float64)
    texture = np.abs(np.diff(values, axis=2)).mean(axis=(2, 3))
    return np.concatenate([values.mean(axis=(2, 3)), values.std(axis=(2, 3)), texture], axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, NUM_FRAMES // 2, NUM_FRAMES - 1])
def test_single_frames_do_not_tell_the_class(videos: np.ndarray, index: int) -> None:
    assert nearest_mean_accuracy(looks(videos[:, :, index])) <= AT_MOST_BY_GUESSING


@pytest.mark.slow
def test_average_frame_does_not_tell_the_class(videos: np.ndarray) -> None:
    blocks = videos.mean(axis=2).reshape(len(SEEN), -1, 8, FRAME_SIZE // 8, 8, FRAME_SIZE // 8, 3).mean(axis=(3, 5))
    assert nearest_mean_accuracy(blocks.reshape(*videos.shape[:2], -1)) <= AT_MOST_BY_GUESSING


@pytest.mark.slow
def test_a_tint_of_each_class_would_be_noticed(videos: np.ndarray) -> None:
    """The control of the two tests above: were the classes coloured, they would fail."""
    tint = np.linspace(-40.0, 40.0, len(SEEN)).reshape(-1, 1, 1, 1, 1) * np.array([1.0, 0.0, -1.0])
    assert nearest_mean_accuracy(looks(videos[:, :, 0] + tint)) > AT_MOST_BY_GUESSING


@pytest.mark.slow
def test_motion_does_tell_the_class(videos: np.ndarray) -> None:
    """The same classifier on where things change tells directions apart."""
    moving = videos[: len(DIRECTIONS)].astype(np.float64)
    change = np.abs(moving - np.median(moving, axis=2, keepdims=True)).sum(axis=-1) ** 3
    pixels = np.arange(FRAME_SIZE)
    centres = np.stack(
        [(change.sum(axis=3 + axis) * pixels).sum(-1) / change.sum(axis=(-2, -1)) for axis in (0, 1)], axis=-1
    )
    shift = centres[:, :, -6:].mean(axis=2) - centres[:, :, :6].mean(axis=2)
    assert nearest_mean_accuracy(shift) >= 0.6


def test_files_are_h264_with_the_declared_frames(tmp_path: Path) -> None:
    frames = render_frames("spiral_out", 0, seed=0)
    write_video(tmp_path / "video.mp4", frames)
    with av.open(str(tmp_path / "video.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.frames == NUM_FRAMES
        assert stream.average_rate == FRAMES_PER_SECOND
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert decoded.shape == frames.shape
    # Lossy, so it is not equal; the wrong frame or wrong colours would be off by 20 levels and more.
    assert np.abs(decoded.astype(int) - frames).mean() < 12.0


def test_whole_set_is_written_with_its_rows(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    rows = write_demo_videos(
        tmp_path, videos_per_class=1, seed=1, on_progress=lambda done, total: calls.append((done, total))
    )
    assert [row.class_name for row in rows] == list(MOTION_CLASSES)
    assert all((tmp_path / row.path).is_file() for row in rows)
    assert all(row.split == MOTION_CLASSES[row.class_name].split for row in rows)
    assert len({row.video_id for row in rows}) == len(rows)
    assert calls == [(done, len(rows)) for done in range(1, len(rows) + 1)]


def test_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first.mp4", "second.mp4"):
        write_video(tmp_path / name, render_frames("grow", 0, seed=2))
    assert (tmp_path / "first.mp4").read_bytes() == (tmp_path / "second.mp4").read_bytes()


def test_an_encoder_is_found() -> None:
    assert encoder_name() in av.codecs_available


def test_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    frames = [render_frames("move_right", number, 0) for number in range(8)]
    contents = []
    for attempt in range(3):
        paths = [tmp_path / f"{attempt}_{number}.mp4" for number in range(8)]
        for path, shown in zip(paths, frames, strict=True):
            write_video(path, shown)
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1] == contents[2]
