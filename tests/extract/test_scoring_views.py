"""Several clips and crops of a video, whose scores are averaged: where they lie, and that one of one is view 0."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from extract import decode
from extract.clips import POLICIES, ScoringView, scoring_views
from extract.config import SamplingConfig
from extract.decode import VideoError, VideoSource, read_views
from extract.pool import DecodePool

WriteVideo = Callable[..., Path]


def sampling(**changes: object) -> SamplingConfig:
    return SamplingConfig.model_validate(
        {"num_frames": 4, "policy": "even", "resize_size": 48, "crop_size": 32, "crop": "random", "flip": True}
        | changes
    )


def slope(height: int, width: int, num_frames: int) -> NDArray[np.uint8]:
    """(F, H, W, 3): the grey rises along the longer side, the same in all frames."""
    along = np.linspace(20, 235, max(height, width)).astype(np.uint8)
    frame = np.broadcast_to(along[None, :] if width >= height else along[:, None], (height, width))
    return np.ascontiguousarray(np.broadcast_to(frame[None, ..., None], (num_frames, height, width, 3)))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("axis", ["index", "time"])
def test_one_clip_with_the_centre_crop_is_view_0(write_video: WriteVideo, policy: str, axis: str) -> None:
    for num_frames in (3, 4, 21):
        video = VideoSource(f"v{num_frames}", write_video(f"{num_frames}.mp4", num_frames=num_frames))
        for num_clip_frames in (1, 4):
            config = sampling(policy=policy, axis=axis, num_frames=num_clip_frames)
            found, wanted = read_views(video, config, scoring_views(1, 1)), read_views(video, config, [0])
            assert np.array_equal(found.clips, wanted.clips)
            assert np.array_equal(found.frame_indices, wanted.frame_indices)
            assert (found.status, found.reason) == (wanted.status, wanted.reason)
            assert np.array_equal(read_views(video, config, scoring_views(1, 3)).clips[1], wanted.clips[0])


def test_clips_lie_at_even_offsets_and_spread_over_the_whole_video(write_video: WriteVideo) -> None:
    video = VideoSource("video", write_video("video.mp4", num_frames=36))
    found = read_views(video, sampling(), scoring_views(3, 1)).frame_indices
    # 12 places from 0 to 35, by hand: 35 / 11 = 3.18 apart.
    assert found.tolist() == [[0, 9, 19, 28], [3, 12, 22, 31], [6, 15, 25, 35]]
    trx = read_views(video, sampling(policy="trx"), scoring_views(3, 1)).frame_indices
    assert (trx.min(), trx.max()) == (1, 34)  # without the first and the last frame, as in view 0


def test_clips_may_be_more_than_the_frames(write_video: WriteVideo) -> None:
    video = VideoSource("video", write_video("video.mp4", num_frames=5))
    found = read_views(video, sampling(), scoring_views(10, 1)).frame_indices
    assert found.shape == (10, 4)
    assert (np.diff(found, axis=1) >= 0).all()
    assert (found.min(), found.max()) == (0, 4)


@pytest.mark.parametrize(("height", "width"), [(64, 128), (128, 64)])
def test_three_crops_are_the_ends_and_the_centre_of_the_longer_side(
    write_video: WriteVideo, height: int, width: int
) -> None:
    video = VideoSource("video", write_video("video.mp4", pictures=slope(height, width, 6)))
    first, centre, last = read_views(video, sampling(), scoring_views(1, 3)).clips.astype(float)
    # 96 pixels after resizing: the crops begin at 0, 32 and 64, so each begins where the one before it ends.
    greys = [clip[0, ..., 0].mean(axis=0 if width > height else 1) for clip in (first, centre, last)]
    rise = np.concatenate(greys)
    np.testing.assert_allclose(rise, np.linspace(20, 235, 96), atol=6)  # lossy, and full range is not kept to the bit
    across = [clip[0, ..., 0].std(axis=1 if width < height else 0).max() for clip in (first, centre, last)]
    assert max(across) < 6


def test_all_crops_of_a_clip_come_first_and_the_video_is_decoded_once(
    write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = VideoSource("video", write_video("video.mp4", num_frames=30, width=128))
    views = scoring_views(2, 3)
    assert [(view.clip_index, view.along) for view in views] == [
        (clip, along) for clip in (0, 1) for along in (0.0, None, 1.0)
    ]
    alone = [read_views(video, sampling(), [view]) for view in views]
    opened = []
    open_reader = decode._open_reader
    monkeypatch.setattr(
        decode,
        "_open_reader",
        lambda path, root: opened.append(path) or open_reader(path, root),  # type: ignore[func-returns-value]
    )
    found = read_views(video, sampling(), views)
    assert len(opened) == 1
    assert found.clips.shape == (6, 4, 32, 32, 3)
    assert all(np.array_equal(found.clips[place], alone[place].clips[0]) for place in range(6))
    with DecodePool(1) as pool:
        assert np.array_equal(pool.result(pool.submit(video, sampling(), views)).clips, found.clips)


def test_short_video_follows_the_policy(write_video: WriteVideo) -> None:
    video = VideoSource("short", write_video("short.mp4", num_frames=3))
    found = read_views(video, sampling(), scoring_views(2, 3))
    assert found.frame_indices.tolist() == [[0, 1, 2, 2]] * 6
    assert (found.status, found.reason) == ("degraded", "short_video")
    with pytest.raises(VideoError, match="short_video"):
        read_views(video, sampling(short_policy="drop"), scoring_views(2, 3))


def test_impossible_views_are_refused(write_video: WriteVideo) -> None:
    with pytest.raises(ValueError, match="num_clips 0 and num_crops 1"):
        scoring_views(0, 1)
    with pytest.raises(ValueError, match="num_clips 2 and num_crops 2"):
        scoring_views(2, 2)
    with pytest.raises(ValueError, match="clip_index 2 is not one of num_clips 2"):
        ScoringView(2, 2, None)
    with pytest.raises(ValueError, match="views must be numbers from 0 on"):
        read_views(VideoSource("video", write_video("video.mp4")), sampling(), [*scoring_views(1, 1), -1])
