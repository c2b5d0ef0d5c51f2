"""Video files through PyAV: the times of all frames, and the pixels of those that are wanted."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import DecoderNotFoundError, FFmpegError
from av.error import EOFError as EndOfFile
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from extract.clips import Seconds
from extract.endings import ends_early
from extract.errors import VideoError
from extract.transform import MAX_PIXELS, Pixels

# Playlists (concat, hls, dash) are absent on purpose: they would open other files than the one named.
CONTAINERS = (
    "3g2,3gp,apng,asf,av1,avi,dv,flv,gif,h264,hevc,ivf,m4a,m4v,matroska,mj2,mov,mp4,mpeg,mpegts,mpegtsraw,mpegvideo,"
    "mxf,nut,obu,ogg,rm,vc1,webm,wtv,yuv4mpegpipe"
)
OPEN_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
IMAGE_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6", b"\0\0\x01\0")

DECLARED_DURATIONS = {"mov", "mp4", "matroska", "webm", "avi", "flv", "asf"}
"""Containers that state their duration; for the others FFmpeg guesses it from the bit rate."""
DURATION_SLACK_SECONDS = 0.1
"""What may be missing of the declared duration beside one mean frame, as containers round."""
WHOLE_FILE_TOLERANCE = 0.05
"""Share of the declared duration that may be missing besides, where sizes or counts show the file to be whole."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each frame of a video is shown."""

    seconds: Seconds
    """(n,) float64 ascending, 0 at the first frame."""
    problem: str | None
    """A key of extract.errors.REASONS, where the file is not whole."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """One frame that was asked for."""

    index: int
    """Frame number in presentation order."""
    pixels: Pixels
    """(H, W, 3) uint8, upright."""


@dataclass(slots=True)
class VideoFileReader:
    """Reads one regular file; each pass opens it anew and decodes it from the start in order."""

    path: Path
    """Absolute."""
    num_damaged: int = 0
    """Filled by `frames`: packets and frames of the last pass that were not decoded properly."""
    _observed: Timeline | None = None

    def announced(self) -> Timeline:
        """What the container says, without decoding."""
        with _opened(self.path) as container:
            stream = _video_stream(container, self.path)
            survey = _survey(container, stream)
            problem = "truncated" if survey.is_cut or _is_truncated(self.path, container, stream, survey) else None
            return Timeline(_timeline(survey.times, stream), problem)

    def frames(self, wanted: Collection[int]) -> Iterator[Decoded]:
        """Decode everything, converting only the wanted frame numbers."""
        self.num_damaged = 0
        times: list[Fraction | None] = []
        with _opened(self.path) as container:
            stream = _video_stream(container, self.path)
            for index, frame in enumerate(self._decode(container, stream)):
                times.append(None if frame.pts is None or frame.time_base is None else frame.pts * frame.time_base)
                self.num_damaged += frame.is_corrupt
                if index in wanted:
                    yield Decoded(index, _pixels(frame, self.path))
            self._observed = Timeline(_timeline(times, stream), "damaged" if self.num_damaged else None)

    def observed(self) -> Timeline:
        """What the last complete pass of `frames` found."""
        if self._observed is None:
            raise RuntimeError("observed() was asked for before frames() had run to its end")
        return self._observed

    def _decode(self, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        packets = container.demux(stream)
        is_whole = True
        while is_whole:
            try:
                packet = next(packets, None)
            except FFmpegError:  # the container cannot be read on; the decoder may still hold frames
                self.num_damaged += 1
                packet = None
            is_whole = packet is not None
            try:
                yield from stream.decode(packet)
            except DecoderNotFoundError:
                raise
            except EndOfFile:  # the container's last packet had emptied the decoder already
                return
            except FFmpegError:  # a bad packet costs its frames; it is counted and marks the clip as degraded
                self.num_damaged += 1


@dataclass(slots=True)
class _Survey:
    times: list[Fraction | None] = field(default_factory=list)
    num_packets: int = 0
    """Of the video stream, with the frames that an AVI file marks as dropped."""
    first_decode: float = math.inf
    last_decode_end: float = -math.inf
    last_end: float = 0.0
    is_cut: bool = False


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    try:
        container = av.open(str(path), "r", options=OPEN_OPTIONS, metadata_errors="replace")
    except FFmpegError as error:
        raise VideoError(_refusal(path), f"{path.name}: {error.strerror or type(error).__name__}") from error
    with container:
        yield container


def _refusal(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(16)
    is_image = start.startswith(IMAGE_BEGINNINGS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
    # A container that is known by its start but cannot be opened has lost its index, mostly by a cut.
    is_container = (
        start[4:8] in (b"ftyp", b"moov", b"mdat")
        or start.startswith((b"\x1aE\xdf\xa3", b"FLV", b"OggS"))
        or start[8:12] == b"AVI "
    )
    return "single_image" if is_image else "truncated" if is_container else "not_a_video"


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    # Cover art of a sound file counts as a video stream in FFmpeg.
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise VideoError(
            "no_video_stream", f"{path.name} holds {len(container.streams)} streams, none with moving pictures"
        )
    stream = streams[0]
    context: Any = stream.codec_context
    if context is None:
        raise VideoError("no_decoder", f"{path.name}: the codec of the video stream is not known to this FFmpeg")
    if context.width * context.height > MAX_PIXELS:
        raise VideoError(
            "too_large", f"{path.name}: {context.width} x {context.height} pixels, at most {MAX_PIXELS} are accepted"
        )
    return stream


def _survey(container: InputContainer, stream: VideoStream) -> _Survey:
    survey = _Survey()
    is_avi = container.format.name == "avi"
    try:
        for packet in container.demux():
            if packet.size == 0 or packet.time_base is None:
                # AVI files mark a dropped frame so; the empty packets at the very end have no time at all.
                survey.num_packets += packet.stream_index == stream.index and packet.dts is not None
                continue
            start = packet.pts if packet.pts is not None else packet.dts
            if start is not None:
                survey.last_end = max(survey.last_end, float((start + (packet.duration or 0)) * packet.time_base))
            if packet.dts is not None:
                survey.first_decode = min(survey.first_decode, float(packet.dts * packet.time_base))
                end = float((packet.dts + (packet.duration or 0)) * packet.time_base)
                survey.last_decode_end = max(survey.last_decode_end, end)
            if packet.stream_index != stream.index:
                continue
            survey.num_packets += 1
            if is_avi and packet.dts is not None:  # it counts frames, also dropped ones that FFmpeg passes over
                survey.num_packets = max(survey.num_packets, packet.dts + 1)
            survey.is_cut |= packet.is_corrupt
            if not packet.is_discard:
                survey.times.append(None if packet.pts is None else packet.pts * packet.time_base)
    except FFmpegError:  # the file ends inside a packet: counted as truncated
        survey.is_cut = True
    return survey


def _is_truncated(path: Path, container: InputContainer, stream: VideoStream, survey: _Survey) -> bool:
    is_cut = ends_early(path)
    # In AVI files a frame that is shown for long is followed by empty ones, and FFmpeg passes over the last of them.
    mean_places = survey.num_packets / max(len(survey.times), 1) if container.format.name == "avi" else 1
    if is_cut or stream.frames - survey.num_packets >= mean_places:
        return True
    if container.duration is None or not DECLARED_DURATIONS & set(container.format.name.split(",")):
        return False
    begin = (container.start_time or 0) / av.time_base
    duration = container.duration / av.time_base
    # The last packet may lack a duration of its own, so one mean frame is forgiven.
    mean_frame = (survey.last_end - begin) / max(survey.num_packets - 1, 1)
    # Fragmented MP4 files count their duration in the order of decoding, which differs where B-frames are of unequal length.
    shown = max(survey.last_end - begin, survey.last_decode_end - survey.first_decode)
    is_shown_whole = is_cut is False or stream.frames > 0
    slack = DURATION_SLACK_SECONDS + (WHOLE_FILE_TOLERANCE * duration if is_shown_whole else 0.0)
    return shown + mean_frame + slack < duration


def _timeline(times: list[Fraction | None], stream: VideoStream) -> Seconds:
    known = sorted(time for time in times if time is not None)
    if len(known) < len(times):
        # Raw streams and old AVI files carry no presentation times: the index at the declared rate stands in.
        rate = stream.average_rate or stream.guessed_rate or Fraction(1)
        return np.arange(len(times), dtype=np.float64) / float(rate)
    # Exact until the end: 1.8 - 1.4 in floating point would miss a segment that begins at 0.4.
    return np.array([float(time - known[0]) for time in known], dtype=np.float64)


def _pixels(frame: VideoFrame, path: Path) -> Pixels:
    if frame.width * frame.height > MAX_PIXELS:
        raise VideoError(
            "too_large", f"{path.name}: {frame.width} x {frame.height} pixels, at most {MAX_PIXELS} are accepted"
        )
    pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    # FFmpeg's libraries leave the pixels as stored; the angle is counter-clockwise, as in rot90.
    return np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90) % 4))
