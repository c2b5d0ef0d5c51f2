"""Kinds of input that are no videos or not plain files: contents, paths, names, playlists and folders of pictures."""

import gzip
import io
import os
import socket
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from contracts.corpus_kind import Writer, first_part
from contracts.corpus_writers import (
    Clip,
    write_frames,
    write_sound,
    write_sound_with_cover,
    write_subtitles,
)


def no_videos(writer: Writer) -> None:
    archive, tar = io.BytesIO(), io.BytesIO()
    video = writer.whole["mp4"].read_bytes()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("video.mp4", video)
    with tarfile.open(fileobj=tar, mode="w") as file_list:
        file_list.add(writer.whole["mp4"], "video.mp4")
    writer.rejected("empty file", writer.file("empty.mp4", b""), "empty_file")
    contents = {
        "one byte": b"x",
        "random bytes": np.random.default_rng(0).bytes(20_000),
        "zeros": bytes(20_000),
        "text": b"not a video " * 200,
        "web page of an error": b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20,
        "json": b'{"error": "rate limit", "code": 429}',
        "table of comma-separated values": b"path,label\na.mp4,1\n" * 50,
        "text in two-byte characters": ("not a video " * 200).encode("utf-16"),
        "zip archive that holds a video": archive.getvalue(),
        "tar archive that holds a video": tar.getvalue(),
        "gzip of a video": gzip.compress(video, 1),
        "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n" * 40,
        "program": b"\x7fELF" + bytes(12) + b"\x02\x00\x3e\x00" + bytes(4_000),
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00" + b"cposix\nsystem\n" * 30,
        "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(4_000),
        "pointer file of a large-file store": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "sound of type wav": b"RIFF\x24\x20\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\0\x20\0\0"
        + bytes(8_192),
        "subtitles as text": b"1\n00:00:00,000 --> 00:00:01,000\nHello\n",
    }
    for name, content in contents.items():
        writer.rejected(name, writer.file(f"{name}.mp4", content), "not_a_video")
    writer.rejected("mp4 of its first box alone", writer.file("first.mp4", video[:32]), "truncated")


def pictures(writer: Writer) -> None:
    for kind in ("png", "jpeg", "webp", "bmp", "tiff", "ppm", "ico", "avif"):
        if kind.upper() not in {*Image.registered_extensions().values()}:
            continue  # avif is missing in older Pillow
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), (9, 90, 200)).save(picture, format=kind)
        writer.rejected(f"{kind} that is called mp4", writer.file(f"{kind}.mp4", picture.getvalue()), "single_image")
    frames = [Image.new("RGB", (64, 64), (index, 90, 200)) for index in range(3)]
    animation = io.BytesIO()
    frames[0].save(animation, format="webp", save_all=True, append_images=frames[1:])
    # FFmpeg has no decoder of animated WebP; it begins like a picture and is named as one.
    writer.rejected("animated webp", writer.file("animated.webp", animation.getvalue()), "single_image")
    # A row of JPEGs without a container begins like a picture and is named as one.
    jpegs = writer.clip("raw.mjpeg", Clip(codec="mjpeg", pixel_format="yuvj420p"))
    writer.rejected("jpegs in a row", jpegs, "single_image")
    still = writer.clip("still.gif", Clip(num_frames=1, codec="gif", pixel_format="rgb8"))
    writer.degraded("gif of one picture", still, "short_video", 1)
    writer.good("gif", writer.clip("animated.gif", Clip(codec="gif", pixel_format="rgb8")))
    writer.good("animated png", writer.clip("animated.apng", Clip(codec="apng", pixel_format="rgb24")))


def no_moving_pictures(writer: Writer) -> None:
    jpeg = io.BytesIO()
    Image.new("RGB", (32, 32)).save(jpeg, format="jpeg")
    text = writer.file("text.srt", b"1\n00:00:00,000 --> 00:00:01,000\nA\n\n2\n00:00:01,000 --> 00:00:02,000\nB\n")
    root = writer.root
    writer.rejected("sound alone in mp4", write_sound(root / "sound.m4a"), "no_video_stream")
    writer.rejected("sound alone in matroska", write_sound(root / "sound.mka"), "no_video_stream")
    cover = write_sound_with_cover(root / "cover.m4a", jpeg.getvalue())
    writer.rejected("sound with cover art", cover, "no_video_stream")
    writer.rejected("subtitles alone in matroska", write_subtitles(root / "text.mkv", text), "no_video_stream")
    writer.good("video with sound", writer.clip("both.mp4", Clip(with_sound=True)))


def odd_paths(writer: Writer) -> None:
    root, video = writer.root, writer.whole["mp4"]
    links = {
        "link to a video": (video, None),
        "link that dangles": (root / "nothing.mp4", "missing"),
        "link to itself": (root / "link to itself.mp4", "not_a_file"),
        "link to an endless device": (Path("/dev/zero"), "not_a_file"),
        "link to a random device": (Path("/dev/urandom"), "not_a_file"),
        "link to an empty device": (Path("/dev/null"), "not_a_file"),
    }
    for name, (target, reason) in links.items():
        link = root / f"{name}.mp4"
        link.symlink_to(target)
        if reason is None:
            writer.good(name, link)
        else:
            writer.rejected(name, link, reason)
    os.mkfifo(root / "pipe.mp4")
    (root / "to_pipe.mp4").symlink_to(root / "pipe.mp4")
    writer.rejected("pipe", root / "pipe.mp4", "not_a_file")
    writer.rejected("link to a pipe", root / "to_pipe.mp4", "not_a_file")
    _make_socket(root / "socket.mp4")
    writer.rejected("socket", root / "socket.mp4", "not_a_file")
    writer.rejected("missing file", root / "absent.mp4", "missing")
    writer.rejected("file below a file", video / "inside.mp4", "missing")
    writer.rejected("name that is too long", root / ("n" * 5000), "not_a_file")
    writer.rejected("name with a zero byte", root / "a\0b.mp4", "not_a_file")
    (root / "hard.mp4").hardlink_to(video)
    writer.good("hard link", root / "hard.mp4")
    closed = writer.file("closed.mp4", video.read_bytes())
    closed.chmod(0)
    writer.rejected("file without permission", closed, "permission", is_closed_to_others=True)
    below = write_frames(root / "closed_folder", 12)
    below.chmod(0)
    writer.rejected("folder without permission", below, "permission", is_closed_to_others=True)
    writer.rejected("frame below a folder without permission", below / "0.mp4", "permission", is_closed_to_others=True)


def _make_socket(path: Path) -> None:
    """Bound by its short name, as the system allows paths of about a hundred bytes only."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{descriptor}/{path.name}")
    finally:
        os.close(descriptor)


def playlists(writer: Writer) -> None:
    video = writer.whole["mp4"]
    stream = writer.clip("neighbour.ts", Clip())
    head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.0,\n"
    lists = {
        "sibling.ffconcat": f"ffconcat version 1.0\nfile {video.name}\n",
        "absolute.ffconcat": f"ffconcat version 1.0\nfile '{video}'\n",
        "ffconcat called mp4.mp4": f"ffconcat version 1.0\nfile {video.name}\n",
        "sibling.m3u8": f"{head}{stream.name}\n#EXT-X-ENDLIST\n",
        "file address.m3u8": f"{head}file://{stream}\n#EXT-X-ENDLIST\n",
        "web address.m3u8": f"{head}http://127.0.0.1:9/video.ts\n#EXT-X-ENDLIST\n",
        "playlist called mp4.mp4": f"{head}{stream.name}\n#EXT-X-ENDLIST\n",
        "manifest.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>\n',
        "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "picture pattern.txt": "%05d.png\n",
    }
    for name, text in lists.items():
        writer.rejected(f"playlist {name}", writer.file(name, text.encode()), "not_a_video")


def odd_names(writer: Writer) -> None:
    content = writer.whole["mp4"].read_bytes()
    names = {
        "unicode": "ümläut_日本_🎬.mp4",
        "decomposed unicode": "u\u0308mlaut.mp4",
        "right-to-left mark": "\u202egpj.mp4",
        "space": "a video.mp4",
        "space at the end": "video.mp4 ",
        "newline": "two\nlines.mp4",
        "tab and bell": "tab\tbell\a.mp4",
        "quotes": 'it\'s "quoted".mp4',
        "leading dash": "-i.mp4",
        "percent signs": "%s%d%n.mp4",
        "picture pattern": "%05d.png",
        "wildcards": "*?[a-z].mp4",
        "backslash": "back\\slash.mp4",
        "concat protocol": "concat:a|b.mp4",
        "http protocol": "http:x.mp4",
        "file protocol": "file:x.mp4",
        "pipe protocol": "pipe:0",
        "shell characters": "$(touch x);`y` & z.mp4",
        "leading dot": ".hidden.mp4",
        "250 characters": "n" * 246 + ".mp4",
        "bytes that are no unicode": os.fsdecode(b"\xff\xfe\x80.mp4"),
        "comma and equals sign": "a=1,b=2.mp4",
        "no ending": "video",
        "wrong ending": "video.avi",
        "ending of a picture": "video.png",
        "ending of text": "video.txt",
    }
    for name, file_name in names.items():
        writer.good(f"name with {name}" if "ending" not in name else name, writer.file(file_name, content))


def frame_folders(writer: Writer) -> None:
    root = writer.root
    writer.good("folder of png", write_frames(root / "png", 12), 12)
    writer.good("folder of jpeg", write_frames(root / "jpeg", 12, "jpg"), 12)
    writer.good("folder of mixed sizes", write_frames(root / "mixed", 12, sizes=[(40, 32), (32, 40), (64, 33)]), 12)
    writer.degraded("folder of three pictures", write_frames(root / "three", 3), "short_video", 3)
    noted = write_frames(root / "noted", 12)
    (noted / "notes.txt").write_text("no frame")
    (noted / ".hidden.png").write_bytes(b"no frame")
    (noted / "00001b.png").mkdir()
    writer.good("folder with other files beside", noted, 12)
    (root / "linked").symlink_to(root / "png")
    writer.good("link to a folder of pictures", root / "linked", 12)
    (root / "empty").mkdir()
    writer.rejected("empty folder", root / "empty", "no_frames")
    (root / "videos").mkdir()
    (root / "videos/video.mp4").write_bytes(writer.whole["mp4"].read_bytes())
    writer.rejected("folder of videos", root / "videos", "no_frames")
    broken = {
        "cut": first_part(root / "png/00003.png", 60),
        "empty": b"",
        "text": b"nothing of the kind",
    }
    for name, content in broken.items():
        folder = write_frames(root / name if name != "empty" else root / "hollow", 8)
        (folder / "00003.png").write_bytes(content)
        writer.rejected(f"folder with a picture that is {name}", folder, "corrupt")
    large = write_frames(root / "large", 8)
    Image.new("1", (9_000, 9_000)).save(large / "00003.png")
    writer.rejected("folder with a picture of 81 million pixels", large, "too_large")
    tubes = write_frames(root / "tubes", 9)
    (tubes / "00003.png").unlink()
    os.mkfifo(tubes / "00003.png")
    writer.good("folder with a pipe among the pictures", tubes, 8)
    grey = write_frames(root / "grey", 0)
    for index in range(9):
        Image.new("L", (40, 32), 20 * index).save(grey / f"{index}.png")
    writer.good("folder of grey pictures", grey, 9)
