"""Writers of the small videos, pictures and frame folders that the corpus of odd and hostile input is made of."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

FASTSTART = {"movflags": "+faststart"}
FRAGMENTS = {"movflags": "+frag_keyframe+empty_moov"}


@dataclass(frozen=True)
class Clip:
    """How a video of noise is encoded; noise gives every frame its own packet of some length."""

    num_frames: int = 24
    width: int = 64
    height: int = 48
    codec: str = "libx264"
    pixel_format: str = "yuv420p"
    frames_per_second: int = 25
    times_ms: Sequence[int] = ()
    """Presentation times in place of a constant rate."""
    rotation: int = 0
    """Display angle in degrees, counter-clockwise."""
    options: dict[str, str] = field(default_factory=dict)
    """Of the encoder; libx264 is set to its fastest where none are given."""
    container_options: dict[str, str] = field(default_factory=dict)
    file_format: str | None = None
    """Name of the container for FFmpeg; None takes it from the file's name."""
    colour: tuple[int, int, int] = ()  # type: ignore[assignment]
    """FFmpeg's numbers of primaries, transfer function and matrix."""
    with_sound: bool = False
    """Adds a quiet AAC stream of the same length."""


@lru_cache(maxsize=32)
def noise(num_frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """(F, H, W, 3), the same for the same arguments."""
    return np.random.default_rng(num_frames).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def write_clip(path: Path, clip: Clip = Clip()) -> Path:
    """Encode a clip of noise into `path`."""
    pictures = noise(clip.num_frames, clip.height, clip.width)
    with av.open(str(path), "w", format=clip.file_format, options=dict(clip.container_options)) as container:
        stream = container.add_stream(clip.codec, rate=clip.frames_per_second)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, clip.pixel_format
        stream.options = dict(clip.options or ({"preset": "ultrafast"} if clip.codec == "libx264" else {}))
        clock = Fraction(1, 1000) if clip.times_ms else Fraction(1, clip.frames_per_second)
        stream.codec_context.time_base = clock
        if clip.colour:
            context = stream.codec_context
            context.color_primaries, context.color_trc, context.colorspace = clip.colour
        if clip.rotation:
            stream.set_display_rotation(clip.rotation)
        sound = container.add_stream("aac", rate=8000, layout="mono") if clip.with_sound else None
        for index in range(clip.num_frames):
            frame = av.VideoFrame.from_ndarray(pictures[index], format="rgb24")
            frame.pts, frame.time_base = (clip.times_ms[index] if clip.times_ms else index), clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            write_silence(container, sound, round(8000 * clip.num_frames / clip.frames_per_second / 1024))
    return path


def write_silence(container: av.container.OutputContainer, stream: av.AudioStream, num_frames: int) -> None:
    """Mux some frames of silence of 1024 samples each."""
    for index in range(num_frames):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 1024 * index
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_sound(path: Path) -> Path:
    """A file with one second of silence and nothing else."""
    with av.open(str(path), "w") as container:
        write_silence(container, container.add_stream("aac", rate=8000, layout="mono"), 8)
    return path


def write_sound_with_cover(path: Path, picture: bytes) -> Path:
    """Sound with a JPEG as cover art, which FFmpeg counts as a video stream."""
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        assert isinstance(cover, VideoStream)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        packet = av.Packet(picture)
        packet.stream, packet.pts, packet.dts, packet.time_base = cover, 0, 0, Fraction(1)
        container.start_encoding()
        container.mux(packet)
        write_silence(container, sound, 8)
    return path


def write_subtitles(path: Path, text: Path) -> Path:
    """A Matroska file that holds the subtitles of an .srt file and nothing else."""
    with av.open(str(text)) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams[0])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return path


def write_blank(path: Path, codec: str, width: int, height: int, num_frames: int) -> Path:
    """A large video of one colour; its frames are never made as RGB here."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        assert isinstance(stream, VideoStream)
        pixel_format = "gray" if codec == "png" else "yuvj420p"
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        frame = av.VideoFrame(width, height, pixel_format)
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for index in range(num_frames):
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_frames(folder: Path, num_frames: int, ending: str = "png", sizes: Sequence[tuple[int, int]] = ()) -> Path:
    """A folder of numbered pictures; `sizes` (width, height) are taken in turns."""
    folder.mkdir()
    sizes = sizes or [(40, 32)]
    for index in range(num_frames):
        width, height = sizes[index % len(sizes)]
        Image.fromarray(noise(num_frames, height, width)[index]).save(folder / f"{index:05d}.{ending}")
    return folder


def patched(content: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """An MP4 file with bytes replaced at `offset` behind the name of the first such box."""
    place = content.index(box) + len(box) + offset
    return content[:place] + value + content[place + len(value) :]


def box_span(content: bytes, box: bytes) -> slice:
    """Where the payload of an MP4 box lies."""
    place = content.index(box)
    (length,) = struct.unpack(">I", content[place - 4 : place])
    return slice(place + 4, place - 4 + length)


def flipped(content: bytes, span: slice, num_flips: int, seed: int = 0) -> bytes:
    """As many bytes of the span inverted."""
    mutant = bytearray(content)
    for place in np.random.default_rng(seed).choice(range(*span.indices(len(content))), num_flips, replace=False):
        mutant[place] ^= 0xFF
    return bytes(mutant)


def without_sizes(content: bytes) -> bytes:
    """A Matroska file whose segment states no size and whose header states no duration, as a live recording."""
    place = content.index(bytes.fromhex("18538067")) + 4
    assert content[place] == 1  # a size of eight bytes
    content = content[:place] + b"\x01" + b"\xff" * 7 + content[place + 8 :]
    duration = content.index(bytes.fromhex("4489"), place)
    # An element that says "void" in place of the duration, of the same length.
    return content[:duration] + b"\xec" + bytes([0x80 | content[duration + 2] & 0x7F | 1]) + content[duration + 2 :]
