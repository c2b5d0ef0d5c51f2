"""Small real video files, written with PyAV."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.stream import VideoStream
from numpy.typing import NDArray


@dataclass(frozen=True)
class Recipe:
    """How a test video is encoded. The grey value of frame i is 5 i + 20; its top quarter is white."""

    num_frames: int = 40
    width: int = 96
    height: int = 64
    codec: str = "libx264"
    pixel_format: str = "yuv420p"
    frames_per_second: int = 25
    times_ms: Sequence[int] = ()
    rotation: int = 0
    codec_options: dict[str, str] = field(default_factory=dict)
    container_options: dict[str, str] = field(default_factory=dict)
    num_packets: int | None = None
    pictures: NDArray[np.uint8] | None = None


def grey_pictures(num_frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """(F, H, W, 3): each frame tells its number by its grey."""
    pictures = np.zeros((num_frames, height, width, 3), dtype=np.uint8)
    pictures[:] = (np.arange(num_frames) * 5 + 20).astype(np.uint8)[:, None, None, None]
    pictures[:, : height // 4] = 255
    return pictures


def encode(path: Path, recipe: Recipe) -> Path:
    pictures = recipe.pictures
    if pictures is None:
        pictures = grey_pictures(recipe.num_frames, recipe.height, recipe.width)
    with av.open(str(path), "w", options=dict(recipe.container_options)) as container:
        stream = container.add_stream(recipe.codec, rate=recipe.frames_per_second)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = recipe.pixel_format
        stream.options = dict(recipe.codec_options)
        clock = Fraction(1, 1000) if recipe.times_ms else Fraction(1, recipe.frames_per_second)
        stream.codec_context.time_base = clock
        if recipe.rotation:
            stream.set_display_rotation(recipe.rotation)
        num_muxed = 0
        for index in range(len(pictures) + 1):
            frame = None
            if index < len(pictures):
                frame = av.VideoFrame.from_ndarray(pictures[index], format="rgb24")
                frame.pts, frame.time_base = (recipe.times_ms[index] if recipe.times_ms else index), clock
            for packet in stream.encode(frame):
                if recipe.num_packets is None or num_muxed < recipe.num_packets:
                    container.mux(packet)
                    num_muxed += 1
    return path


WriteVideo = Callable[..., Path]


@pytest.fixture
def write_video(tmp_path: Path) -> WriteVideo:
    """write_video("name.mp4", num_frames=..., codec=...) -> path; the fields are those of Recipe."""

    def write(name: str, **fields: Any) -> Path:
        return encode(tmp_path / name, Recipe(**fields))

    return write


@pytest.fixture(scope="session")
def encoders() -> frozenset[str]:
    """Names of the video encoders of this FFmpeg that the tests ask for."""

    def is_there(name: str) -> bool:
        try:
            av.codec.Codec(name, "w")
        except ValueError:
            return False
        return True

    names = ("libx264", "mpeg4", "mjpeg", "libvpx-vp9", "libvpx", "wmv2", "flv", "mpeg2video", "gif", "ffv1")
    return frozenset(filter(is_there, names))
