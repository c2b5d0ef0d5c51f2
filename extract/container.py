"""Video files through PyAV: the times of all frames, and the pixels of those that are wanted."""

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.error import DecoderNotFoundError, FFmpegError
from av.error import EOFError as EndOfFile
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from extract.clips import Seconds
from extract.container_times import FrameTimes, Span
from extract.endings import file_end
from extract.errors import VideoError
from extract.transform import MAX_PIXELS, Pixels

# Playlists (concat, hls, dash) are absent on purpose: they would open other files than the one named.
CONTAINERS = (
    "3g2,3gp,apng,asf,av1,avi,dv,flv,gif,h264,hevc,ivf,m4a,m4v,matroska,mj2,mov,mp4,mpeg,mpegts,mpegtsraw,mpegvideo,"
    "mxf,nut,obu,ogg,rm,vc1,webm,wtv,yuv4mpegpipe"
)
OPEN_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
STILL_BRANDS = {b"avif", b"heic", b"heix", b"mif1"}
"""Kinds of MP4 file that hold a picture, which FFmpeg reads as a video of one frame."""
IMAGE_BEGINNINGS = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6", b"\0\0\x01\0")

WTV_BEGINNING = bytes.fromhex("b7d800203749da11a64e0007e95ead8d")

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
    is_timed: bool = True
    """The times are the file's own; otherwise they are frame numbers over a rate."""


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
            return _timeline(survey.times, stream, _problem(self.path, container, stream, survey))

    def frames(self, wanted: Collection[int], stop: int | None = None) -> Iterator[Decoded]:
        """Decode from the start, converting only the wanted frame numbers; `stop` frames suffice, None is all."""
        self.num_damaged = 0
        times = FrameTimes()
        with _opened(self.path) as container:
            stream = _video_stream(container, self.path)
            for index, frame in enumerate(self._decode(container, stream)):
                times.add(frame.pts, frame.time_base)
                self.num_damaged += frame.is_corrupt
                if index in wanted:
                    yield Decoded(index, _pixels(frame, self.path))
                if index + 1 == stop:
                    break
            self._observed = _timeline(times, stream, "damaged" if self.num_damaged else None)

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
            except MemoryError:  # no damage of the file: a row must not depend on the machine
                raise
            except FFmpegError:  # the container cannot be read on; the decoder may still hold frames
                self.num_damaged += 1
                packet = None
            is_whole = packet is not None
            try:
                yield from stream.decode(packet)
            except (DecoderNotFoundError, MemoryError):
                raise
            except EndOfFile:  # the container's last packet had emptied the decoder already
                return
            except FFmpegError:  # a bad packet costs its frames; it is counted and marks the clip as degraded
                self.num_damaged += 1


@dataclass(slots=True)
class _Survey:
    times: FrameTimes = field(default_factory=FrameTimes)
    num_packets: int = 0
    """Of the video stream, with the frames that an AVI file marks as dropped."""
    spans: dict[int, Span] = field(default_factory=dict)
    """Of each stream by its index, sound included."""
    is_unreadable: bool = False
    """Reading ended with an error in place of the end of the file."""
    is_damaged: bool = False
    """The container itself marks a packet as damaged."""


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    with ExitStack() as stack:
        # FFmpeg takes a name with a percent sign for a row of pictures, unless it never hears the name.
        source = stack.enter_context(_unnamed(path)) if "%" in str(path) else str(path)
        try:
            container = av.open(source, "r", options=OPEN_OPTIONS, metadata_errors="replace")
        except FFmpegError as error:
            detail = f"{path.name}: {error.strerror or type(error).__name__}"
            raise VideoError(_refusal(path), detail) from error
        with container:
            yield container


def _unnamed(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "rb")


def _refusal(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(16)
    is_image = start.startswith(IMAGE_BEGINNINGS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
    # A container that is known by its start but cannot be opened has lost its index, mostly by a cut.
    is_container = (
        start[4:8] in (b"ftyp", b"moov", b"mdat")
        or start.startswith((b"\x1aE\xdf\xa3", b"FLV", b"OggS", WTV_BEGINNING))
        or start[8:12] == b"AVI "
    )
    if is_image:
        return "single_image"
    return "not_a_video" if not is_container else "corrupt" if file_end(path) in ("whole", "broken") else "truncated"


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    if container.metadata.get("major_brand", "").encode() in STILL_BRANDS:
        raise VideoError("single_image", f"{path.name} is a picture in an MP4 container")
    # Cover art of a sound file counts as a video stream in FFmpeg.
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        # A garbled index yields no stream at all, or streams of no known type.
        is_something_else = container.streams.audio or container.streams.subtitles
        reason = _unless_cut("no_video_stream" if is_something_else else "corrupt", path)
        raise VideoError(reason, f"{path.name} holds {len(container.streams)} streams, none with moving pictures")
    stream = streams[0]
    context: Any = stream.codec_context
    if context is None:
        reason = _unless_cut("no_decoder", path)
        raise VideoError(reason, f"{path.name}: the codec of the video stream is not known to this FFmpeg")
    if context.width * context.height > MAX_PIXELS:
        raise VideoError(
            "too_large", f"{path.name}: {context.width} x {context.height} pixels, at most {MAX_PIXELS} are accepted"
        )
    return stream


def _unless_cut(reason: str, path: Path) -> str:
    """A file that ends too early may lack what it seems never to have had."""
    return "truncated" if file_end(path) == "cut" else reason


def _survey(container: InputContainer, stream: VideoStream) -> _Survey:
    survey = _Survey()
    is_avi = container.format.name == "avi"
    try:
        for packet in container.demux():
            pts, dts, index = packet.pts, packet.dts, packet.stream_index
            if packet.size == 0 or packet.time_base is None:
                # AVI files mark a dropped frame so; the empty packets at the very end have no time at all.
                survey.num_packets += index == stream.index and dts is not None
                continue
            span = survey.spans.get(index)
            if span is None:
                span = survey.spans[index] = Span(packet.time_base)
            span.add(pts, dts, packet.duration or 0)
            if index != stream.index:
                continue
            survey.num_packets += 1
            if is_avi and dts is not None:  # it counts frames, also dropped ones that FFmpeg passes over
                survey.num_packets = max(survey.num_packets, dts + 1)
            survey.is_damaged |= packet.is_corrupt
            if not packet.is_discard:
                survey.times.add(pts, span.clock)
    except MemoryError:
        raise
    except FFmpegError:  # the file ends inside a packet, or cannot be read on
        survey.is_unreadable = True
    return survey


def _problem(path: Path, container: InputContainer, stream: VideoStream, survey: _Survey) -> str | None:
    """Why the file is not whole: it ends too early, or something within it is gone."""
    end = file_end(path)
    if end == "cut":
        return "truncated"
    if survey.is_unreadable or _lacks_frames(container, stream, survey, end == "whole"):
        return "truncated" if end is None else "damaged"
    return "damaged" if survey.is_damaged or end == "broken" else None


def _lacks_frames(container: InputContainer, stream: VideoStream, survey: _Survey, is_whole_file: bool) -> bool:
    # In AVI files a frame that is shown for long is followed by empty ones, and FFmpeg passes over the last of them.
    mean_places = survey.num_packets / max(len(survey.times), 1) if container.format.name == "avi" else 1
    if stream.frames - survey.num_packets >= mean_places:
        return True
    if container.duration is None or not DECLARED_DURATIONS & set(container.format.name.split(",")):
        return False
    begin = (container.start_time or 0) / av.time_base
    duration = container.duration / av.time_base
    # The last packet may lack a duration of its own, so one mean frame is forgiven.
    spans = survey.spans.values()
    last_end = max((span.shown_until() for span in spans), default=0.0)
    decoded = max((span.decoded_until() for span in spans), default=0.0) - min(
        (span.decoded_from() for span in spans), default=0.0
    )
    mean_frame = (last_end - begin) / max(survey.num_packets - 1, 1)
    # Matroska counts its duration from time 0, however late the first frame is. Fragmented MP4 files count theirs in the order
    # of decoding, which differs where B-frames are of unequal length.
    shown = max(last_end, last_end - begin, decoded)
    slack = DURATION_SLACK_SECONDS
    if is_whole_file or stream.frames > 0:
        slack += WHOLE_FILE_TOLERANCE * duration
    return shown + mean_frame + slack < duration


def _timeline(times: FrameTimes, stream: VideoStream, problem: str | None) -> Timeline:
    # Raw streams and old AVI files carry no presentation times: the index at the declared rate stands in.
    rate = stream.average_rate or stream.guessed_rate or Fraction(1)
    return Timeline(times.seconds(rate), problem, is_timed=times.num_unknown == 0)


def _pixels(frame: VideoFrame, path: Path) -> Pixels:
    if frame.width * frame.height > MAX_PIXELS:
        raise VideoError(
            "too_large", f"{path.name}: {frame.width} x {frame.height} pixels, at most {MAX_PIXELS} are accepted"
        )
    pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    # FFmpeg's libraries leave the pixels as stored; the angle is counter-clockwise, as in rot90.
    return np.ascontiguousarray(np.rot90(pixels, k=round(frame.rotation / 90) % 4))
