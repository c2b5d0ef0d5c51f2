"""Files that end too early: known by their counts, their declared sizes or their durations, and no whole file is suspected."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from extract.config import SamplingConfig
from extract.decode import VideoError, VideoSource, ViewClips, read_views

SMALL = SamplingConfig(num_frames=8, resize_size=32, crop_size=32)
WriteVideo = Callable[..., Path]


def read(path: Path) -> ViewClips:
    return read_views(VideoSource("video", path), SMALL, [0])


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9, 0.97])
def test_file_with_its_index_in_front_that_is_cut_is_degraded(share: float, write_video: WriteVideo) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 64, 3), dtype=np.uint8)
    path = write_video("cut.mp4", pictures=noise, container_options={"movflags": "+faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    result = read(path)
    assert (result.status, result.reason) == ("degraded", "truncated")
    assert 0.3 * share * 48 < result.num_frames < 48
    assert result.frame_indices.max() == result.num_frames - 1


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_file_with_its_index_at_the_end_that_is_cut_is_refused(share: float, write_video: WriteVideo) -> None:
    path = write_video("cut.mp4")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(VideoError, match="truncated: "):
        read(path)


@pytest.mark.parametrize(("name", "codec"), [("cut.mkv", "libx264"), ("cut.webm", "libvpx-vp9"), ("cut.avi", "mpeg4")])
def test_cut_file_without_frame_count_is_known_by_its_duration(
    name: str, codec: str, write_video: WriteVideo, encoders: frozenset[str]
) -> None:
    if codec not in encoders:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 64, 3), dtype=np.uint8)
    path = write_video(name, pictures=noise, codec=codec)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert read(path).reason == "truncated"


LONG: dict[str, dict[str, Any]] = {
    "long.mkv": {"codec": "libx264"},
    "long.webm": {"codec": "libvpx"},
    "long.gif": {"codec": "gif", "pixel_format": "rgb8"},
    "long.flv": {"codec": "flv"},
    "long.wmv": {"codec": "wmv2"},
    "fragmented.mp4": {"container_options": {"movflags": "+frag_keyframe+empty_moov"}},
}


@pytest.mark.parametrize("name", LONG)
def test_file_of_500_frames_is_whole_at_full_length_only(
    name: str, write_video: WriteVideo, encoders: frozenset[str]
) -> None:
    if LONG[name].get("codec", "libx264") not in encoders:
        pytest.skip(f"this FFmpeg has no encoder {LONG[name]['codec']}")
    noise = np.random.default_rng(0).integers(0, 256, (500, 32, 32, 3), dtype=np.uint8)
    path = write_video(name, pictures=noise, **LONG[name])
    content = path.read_bytes()
    whole = read(path)
    assert (whole.status, whole.num_frames) == ("ok", 500)
    for share in (0.5, 0.9, 0.955, 0.97, 0.99):
        path.write_bytes(content[: int(len(content) * share)])
        result = read(path)
        # FFmpeg's reader of wmv meets a half packet first in some places.
        expected = {"truncated", "damaged"} if name.endswith("wmv") else {"truncated"}
        assert (result.status, result.reason in expected) == ("degraded", True), (share, result.reason)
        assert result.num_frames < 500, share


@pytest.mark.parametrize("name", ["short.mkv", "short.webm", "short.gif"])
def test_file_that_lacks_its_last_byte_is_truncated_and_one_with_bytes_behind_is_whole(
    name: str, write_video: WriteVideo, encoders: frozenset[str]
) -> None:
    codec = {"short.mkv": "libx264", "short.webm": "libvpx", "short.gif": "gif"}[name]
    if codec not in encoders:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    path = write_video(name, codec=codec, pixel_format="rgb8" if codec == "gif" else "yuv420p")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert read(path).reason == "truncated"
    path.write_bytes(content + bytes(7))
    assert read(path).status == "ok"


def test_gif_that_is_cut_behind_a_byte_like_its_trailer_is_truncated(
    write_video: WriteVideo, encoders: frozenset[str]
) -> None:
    if "gif" not in encoders:
        pytest.skip("this FFmpeg has no encoder gif")
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    path = write_video("cut.gif", codec="gif", pixel_format="rgb8", pictures=noise)
    content = path.read_bytes()
    place = content.index(b";", len(content) // 2)
    assert place + 1 < len(content)
    path.write_bytes(content[: place + 1])
    assert read(path).reason == "truncated"


@pytest.mark.parametrize("share", [0.5, 0.9, 0.955, 0.97, 0.99])
def test_matroska_of_unknown_size_is_known_by_its_duration(share: float, write_video: WriteVideo) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (500, 32, 32, 3), dtype=np.uint8)
    path = write_video("unknown.mkv", pictures=noise)
    content = bytearray(path.read_bytes())
    place = content.index(bytes.fromhex("18538067")) + 4
    assert content[place] == 1  # a size of eight bytes
    content[place : place + 8] = b"\x01" + b"\xff" * 7
    path.write_bytes(content)
    assert read(path).status == "ok"
    path.write_bytes(content[: int(len(content) * share)])
    assert read(path).reason == "truncated"


def test_fragments_with_frames_of_unequal_length_are_whole(write_video: WriteVideo) -> None:
    times = [0, 3000, *range(3040, 4000, 40)]
    fragments = {"movflags": "+frag_keyframe+empty_moov"}
    path = write_video("unequal.mp4", num_frames=len(times), times_ms=times, container_options=fragments)
    assert read(path).status == "ok"


def write_avi(path: Path, codec: str, dropped: tuple[int, ...]) -> Path:
    """40 frames at 25 per second, with an empty one before each of the numbers of `dropped`."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for index in range(41):
            frame = None
            if index < 40:
                picture = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 25)
            for packet in stream.encode(frame):
                assert packet.dts is not None
                packet.pts = packet.dts = packet.dts + sum(packet.dts >= place for place in dropped)
                file.mux(packet)
    return path


@pytest.mark.parametrize("dropped", [(1,), (1, 5, 5, 5, 20), (39,)])
def test_avi_with_dropped_frames_is_whole_unless_it_is_cut(dropped: tuple[int, ...], tmp_path: Path) -> None:
    path = write_avi(tmp_path / "dropped.avi", "mpeg4", dropped)
    with av.open(str(path)) as file:
        assert file.streams.video[0].frames == 40 + len(dropped)
    whole = read(path)
    assert (whole.status, whole.num_frames) == ("ok", 40)
    content = path.read_bytes()
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        assert read(path).reason == "truncated", share


def test_avi_whose_last_frame_is_shown_for_long_is_whole(write_video: WriteVideo) -> None:
    # Its clock ticks a thousand times a second, so that 39 empty frames follow each real one.
    assert read(write_video("slow.avi", codec="mpeg4", times_ms=range(0, 1600, 40))).status == "ok"
