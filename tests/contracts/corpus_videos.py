"""Kinds of input that are videos: every container and format, odd clocks and sizes, cut, damaged and lying ones."""

from fractions import Fraction

import av
import numpy as np

from contracts.corpus_kind import DEGRADED, OK, REJECTED, Kind, Writer, first_part
from contracts.corpus_writers import (
    FASTSTART,
    FRAGMENTS,
    Clip,
    box_span,
    flipped,
    patched,
    without_sizes,
    write_blank,
)

CUT_REASONS = {
    "nut.nut": "damaged",
    "raw.h264": "damaged",
    "elementary.m2v": "damaged",
    "units.obu": "frame_count_mismatch",
    # Both cuts fall between two packs of 2 KiB.
    "program.mpg": "damaged",
}
"""Of streams that do not state where they end; the decoder meets half a frame."""


def containers(writer: Writer) -> None:
    clips = {
        "matroska.mkv": Clip(),
        "matroska called mp4.mp4": Clip(file_format="matroska"),
        "mp4 called mkv.mkv": Clip(file_format="mp4"),
        "quicktime.mov": Clip(),
        "faststart.mp4": Clip(container_options=FASTSTART),
        "fragments.mp4": Clip(container_options=FRAGMENTS),
        "live matroska.mkv": Clip(container_options={"live": "1"}),
        "transport stream.ts": Clip(),
        "flash.flv": Clip(codec="flv"),
        "flash with h264.flv": Clip(),
        "windows media.wmv": Clip(codec="wmv2"),
        "asf.asf": Clip(codec="msmpeg4v3"),
        "xvid.avi": Clip(codec="mpeg4"),
        "xvid with b-frames.avi": Clip(codec="mpeg4", options={"bf": "2"}),
        "mjpeg.avi": Clip(codec="mjpeg", pixel_format="yuvj420p"),
        "raw pixels.avi": Clip(codec="rawvideo", pixel_format="bgr24"),
        "huffyuv.avi": Clip(codec="huffyuv", pixel_format="rgb24"),
        "vp8.webm": Clip(codec="libvpx", options={"cpu-used": "8"}),
        "vp9.webm": Clip(codec="libvpx-vp9", options={"cpu-used": "8"}),
        "vp8 with alpha.webm": Clip(codec="libvpx", pixel_format="yuva420p", options={"auto-alt-ref": "0"}),
        "vp9 with alpha.webm": Clip(codec="libvpx-vp9", pixel_format="yuva420p", options={"cpu-used": "8"}),
        "av1.mp4": Clip(codec="libsvtav1", options={"preset": "12"}),
        "ffv1.mkv": Clip(codec="ffv1", pixel_format="bgr0"),
        "hevc.mp4": Clip(codec="libx265", options={"preset": "ultrafast", "x265-params": "log-level=none"}),
        "program stream.mpg": Clip(codec="mpeg2video"),
        "program stream of a disc.vob": Clip(codec="mpeg2video"),
        "mpeg1.mpg": Clip(codec="mpeg1video"),
        "phone.3gp": Clip(codec="h263", width=176, height=144),
        "dv.dv": Clip(num_frames=9, codec="dvvideo", width=720, height=576),
        "broadcast.mxf": Clip(codec="mpeg2video"),
        "nut.nut": Clip(),
        "vp8 in ivf.ivf": Clip(codec="libvpx", options={"cpu-used": "8"}),
        "uncompressed.y4m": Clip(codec="rawvideo"),
        "ogg.ogv": Clip(codec="libvpx", options={"cpu-used": "8"}),
        "real media.rm": Clip(codec="rv20", width=176, height=144),
        "television recording.wtv": Clip(codec="mpeg2video"),
        "elementary mpeg2.m2v": Clip(codec="mpeg2video"),
        "elementary mpeg4.m4v": Clip(codec="mpeg4", file_format="m4v"),
        "av1 units.obu": Clip(codec="libsvtav1", options={"preset": "12"}),
        "raw h264.h264": Clip(),
        "raw hevc.h265": Clip(codec="libx265", options={"preset": "ultrafast", "x265-params": "log-level=none"}),
        "prores.mov": Clip(codec="prores_ks", pixel_format="yuv422p10le"),
        "interlaced.mp4": Clip(options={"preset": "ultrafast", "flags": "+ildct+ilme", "x264-params": "tff=1"}),
        "b-frames.mp4": Clip(options={"preset": "veryfast", "bf": "3"}),
        "open groups of pictures.mp4": Clip(options={"preset": "veryfast", "x264-params": "open-gop=1:keyint=6"}),
        "only key frames.mp4": Clip(options={"preset": "ultrafast", "g": "1"}),
    }
    for name, clip in clips.items():
        writer.good(name.rsplit(".", 1)[0], writer.clip(name, clip), clip.num_frames)


def pixel_formats(writer: Writer) -> None:
    hdr = Clip(
        codec="libx265",
        pixel_format="yuv420p10le",
        options={"preset": "ultrafast", "x265-params": "log-level=none"},
        colour=(9, 16, 9),  # BT.2020, PQ, BT.2020
    )
    gbrp = Clip(codec="libx265", pixel_format="gbrp", options=hdr.options)
    writer.good("hdr10 in hevc", writer.clip("hdr10.mp4", hdr))
    writer.good("planes of green, blue and red", writer.clip("gbrp.mp4", gbrp))
    for name in ("yuv420p10le", "yuv422p", "yuv422p10le", "yuv444p", "gray", "nv12"):
        writer.good(name, writer.clip(f"{name}.mp4", Clip(pixel_format=name)))
    writer.good("five bits per colour", writer.clip("rgb555.avi", Clip(codec="rawvideo", pixel_format="rgb555le")))


def sizes(writer: Writer) -> None:
    sizes = {"odd": (127, 95), "tiny": (2, 2), "tall": (16, 2048), "wide": (2048, 16), "one pixel wide": (1, 64)}
    for name, (width, height) in sizes.items():
        pixel_format = "yuv444p" if width % 2 else "yuv420p"
        clip = Clip(num_frames=9, width=width, height=height, pixel_format=pixel_format)
        writer.good(f"{name} frames", writer.clip(f"{name}.mp4", clip), 9)
    for angle in (90, 180, 270):
        writer.good(f"turned by {angle}", writer.clip(f"turned_{angle}.mp4", Clip(rotation=angle)))
    writer.degraded("8k", write_blank(writer.root / "8k.avi", "mjpeg", 7680, 4320, 2), "short_video", 2)
    writer.rejected("72 million pixels", write_blank(writer.root / "large.mov", "png", 9000, 8000, 1), "too_large")
    sizes_in_turn = [writer.clip(f"{width}.h264", Clip(num_frames=12, width=width)) for width in (128, 64)]
    joined = writer.file("joined.h264", b"".join(path.read_bytes() for path in sizes_in_turn))
    writer.good("size that changes in the middle", joined)


def clocks(writer: Writer) -> None:
    uneven = [*range(0, 320, 40), *range(1000, 2600, 100)]
    for ending in ("mp4", "mkv", "flv", "wmv"):
        codec = {"flv": "flv", "wmv": "wmv2"}.get(ending, "libx264")
        clip = Clip(codec=codec, times_ms=uneven)
        writer.good(f"variable rate in {ending}", writer.clip(f"variable.{ending}", clip))
    for ending in ("flv", "avi", "wmv", "ts", "webm"):
        codec = {"flv": "flv", "avi": "mpeg4", "wmv": "wmv2", "webm": "libvpx"}.get(ending, "libx264")
        late = Clip(codec=codec, times_ms=range(9_000, 9_960, 40))
        writer.good(f"late start in {ending}", writer.clip(f"late.{ending}", late))
    for ending in ("mp4", "mkv"):
        hour = Clip(times_ms=[*range(0, 480, 40), *range(3_600_000, 3_600_480, 40)])
        late = Clip(times_ms=range(90_000, 90_960, 40))
        writer.good(f"gap of an hour in {ending}", writer.clip(f"gap.{ending}", hour))
        writer.good(f"late start in {ending}", writer.clip(f"late.{ending}", late))
    for ending in ("mp4", "ts"):
        early = Clip(times_ms=range(-400, 560, 40), container_options={"avoid_negative_ts": "disabled"})
        # An MP4 file has an edit list that leaves out what would be shown before the beginning.
        shown = 14 if ending == "mp4" else 24
        writer.good(f"negative start in {ending}", writer.clip(f"early.{ending}", early), shown)
    writer.good("one frame per ten seconds", writer.clip("slow.mp4", Clip(times_ms=range(0, 240_000, 10_000))))
    writer.good("240 frames per second", writer.clip("fast.mp4", Clip(frames_per_second=240)))
    for count in (1, 2, 7):
        short = writer.clip(f"{count}.mp4", Clip(num_frames=count))
        writer.degraded(f"video of {count} frames", short, "short_video", count)
    b_frames = Clip(num_frames=1, options={"preset": "veryfast", "bf": "3"})
    writer.degraded("one frame where b-frames were asked for", writer.clip("b.mp4", b_frames), "short_video", 1)
    writer.good("exactly as many frames as a clip", writer.clip("eight.mp4", Clip(num_frames=8)), 8)


def cuts(writer: Writer) -> None:
    for percent in (5, 25, 50, 75, 90, 99):
        cut = writer.file(f"behind_{percent}.mp4", first_part(writer.whole["mp4"], percent))
        writer.rejected(f"mp4 with its index behind, cut at {percent} %", cut, "truncated")
    for percent in (25, 50, 75, 90, 97, 99):
        cut = writer.file(f"front_{percent}.mp4", first_part(writer.whole["faststart"], percent))
        writer.degraded(f"mp4 with its index in front, cut at {percent} %", cut, "truncated")
    clips = {
        "fragments.mp4": Clip(container_options={**FRAGMENTS, "frag_duration": "100000"}),
        "matroska.mkv": Clip(),
        "vp9.webm": Clip(codec="libvpx-vp9", options={"cpu-used": "8"}),
        "xvid.avi": Clip(codec="mpeg4"),
        "flash.flv": Clip(codec="flv"),
        "animated.gif": Clip(codec="gif", pixel_format="rgb8"),
        "windows.wmv": Clip(codec="wmv2"),
        "broadcast.mxf": Clip(codec="mpeg2video"),
        "nut.nut": Clip(),
        "vp8.ivf": Clip(codec="libvpx", options={"cpu-used": "8"}),
        "vp8.ogv": Clip(codec="libvpx", options={"cpu-used": "8"}),
        "quicktime.mov": Clip(codec="prores_ks", pixel_format="yuv422p10le", container_options=FASTSTART),
        "real.rm": Clip(codec="rv20", width=176, height=144),
        "recorded.wtv": Clip(codec="mpeg2video"),
        "tape.dv": Clip(num_frames=9, codec="dvvideo", width=720, height=576),
        "units.obu": Clip(codec="libsvtav1", options={"preset": "12"}),
        "animated.apng": Clip(codec="apng", pixel_format="rgb24"),
        "elementary.m2v": Clip(codec="mpeg2video"),
        "elementary.h265": Clip(codec="libx265", options={"preset": "ultrafast", "x265-params": "log-level=none"}),
        "program.mpg": Clip(codec="mpeg2video"),
        "live.mkv": Clip(container_options={"live": "1"}),
        "transport.ts": Clip(),
        "raw.h264": Clip(),
        "uncompressed.y4m": Clip(codec="rawvideo"),
    }
    for name, clip in clips.items():
        whole = writer.clip(name, clip)
        for percent in (50, 90):
            path = writer.file(f"{percent}_{name}", first_part(whole, percent))
            if name == "elementary.h265":  # it states no end, and the decoder fills the last frame up in silence
                writer.good(f"{name}, cut at {percent} %: cannot be told", path, None)
            elif name == "recorded.wtv":  # its index is at the end
                writer.rejected(f"{name}, cut at {percent} %", path, "truncated")
            else:
                writer.degraded(f"{name}, cut at {percent} %", path, CUT_REASONS.get(name, "truncated"))
    stream = (writer.root / "transport.ts").read_bytes()
    packets = writer.file("packets.ts", stream[: len(stream) // 188 * 6 // 10 * 188])
    writer.degraded("transport stream, cut between two packets", packets, "damaged")
    packs = (writer.root / "program.mpg").read_bytes()
    writer.degraded("program stream, cut within a pack", writer.file("pack.mpg", packs[:-900]), "truncated")


def damage(writer: Writer) -> None:
    content = writer.whole["mp4"].read_bytes()
    media = box_span(content, b"mdat")
    index = box_span(content, b"moov")
    num_media, num_index = media.stop - media.start, index.stop - index.start
    noise = np.random.default_rng(3).bytes(num_index)
    mutants = {
        "index of noise": (content[: index.start] + noise + content[index.stop :], "corrupt"),
        "index of zeros": (content[: index.start] + bytes(num_index) + content[index.stop :], "corrupt"),
        "pictures of zeros": (content[: media.start] + bytes(num_media) + content[media.stop :], "corrupt"),
    }
    for name, (mutant, reason) in mutants.items():
        writer.rejected(name, writer.file(f"{name}.mp4", mutant), reason)
    many = flipped(content, slice(0, len(content)), 2000)
    writer.rejected("2000 bytes flipped anywhere", writer.file("many.mp4", many), "corrupt")
    flips = flipped(content, media, 200)
    writer.degraded("200 bytes of the pictures flipped", writer.file("flips.mp4", flips), "damaged")
    hole = slice(media.start + num_media // 3, media.start + num_media // 2)
    blank = content[: hole.start] + bytes(hole.stop - hole.start) + content[hole.stop :]
    writer.degraded("a sixth of the pictures zeroed", writer.file("hole.mp4", blank), "damaged")
    for ending, clip in {
        "mkv": Clip(),
        "ts": Clip(),
        "avi": Clip(codec="mpeg4"),
        "mpg": Clip(codec="mpeg2video"),
    }.items():
        whole = writer.clip(f"whole.{ending}", clip).read_bytes()
        middle = slice(len(whole) // 3, len(whole) // 2)
        mutant = whole[: middle.start] + bytes(middle.stop - middle.start) + whole[middle.stop :]
        writer.degraded(f"a sixth of a file of type {ending} zeroed", writer.file(f"hole.{ending}", mutant), "damaged")
    writer.good("mp4 with bytes behind its end", writer.file("tail.mp4", content + b"\0tail of another program"))
    writer.good("mp4 with a video behind its end", writer.file("twice.mp4", content + content))


def false_numbers(writer: Writer) -> None:
    content = writer.whole["mp4"].read_bytes()
    most = b"\xff\xff\xff\xff"
    cases: dict[str, tuple[bytes, int, bytes, frozenset[str], str | None]] = {
        "clock of 0 ticks per second": (b"mdhd", 12, bytes(4), DEGRADED, "damaged"),
        "duration of 0": (b"mdhd", 16, bytes(4), OK, None),
        "duration of 2^32 - 1": (b"mdhd", 16, most, OK, None),  # "unknown" in the standard
        "2^32 - 1 sizes": (b"stsz", 8, most, REJECTED, "corrupt"),
        "2^32 - 1 times": (b"stts", 4, most, REJECTED, "corrupt"),
        "2^32 - 1 places": (b"stco", 4, most, OK, None),  # as many are read as there are, and they are right
        "2^32 - 1 chunks": (b"stsc", 4, most, REJECTED, "corrupt"),
        "2^32 - 1 descriptions": (b"stsd", 4, most, REJECTED, "corrupt"),
        "unknown codec": (b"stsd", 12, b"xyz9", REJECTED, "no_decoder"),
        "frames of 65535 by 65535 pixels": (b"avc1", 24, most, OK, None),
        "frames of 0 by 0 pixels": (b"avc1", 24, bytes(4), OK, None),
        "half of the sizes": (b"stsz", 8, (12).to_bytes(4, "big"), DEGRADED, "damaged"),
    }
    for name, (box, offset, value, statuses, reason) in cases.items():
        path = writer.file(f"{name}.mp4", patched(content, box, offset, value))
        writer.kinds.append(Kind(name, path, statuses, reason))
    with av.open(str(writer.root / "title.mp4"), "w") as container:  # a title that is no Unicode
        container.metadata["title"] = "?" * 40
        stream = container.add_stream("mpeg4", rate=25)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = 64, 48
        for index in range(24):
            frame = av.VideoFrame(64, 48, "yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    title = (writer.root / "title.mp4").read_bytes().replace(b"?" * 40, b"\xff\xc3" * 20)
    writer.good("title that is no unicode", writer.file("no_unicode.mp4", title))
    live = without_sizes(writer.clip("sizes.mkv", Clip()).read_bytes())
    writer.good("matroska without its size and duration", writer.file("without_sizes.mkv", live))
