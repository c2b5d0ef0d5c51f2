"""Files that cannot be read, or not wholly: each has its reason, none hangs, none is read by halves in silence."""

import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from extract import container
from extract.config import SamplingConfig
from extract.decode import REASONS, VideoError, VideoSource, ViewClips, read_views

SMALL = SamplingConfig(num_frames=8, resize_size=32, crop_size=32)
WriteVideo = Callable[..., Path]


def read(path: Path, sampling: SamplingConfig = SMALL) -> ViewClips:
    return read_views(VideoSource("video", path), sampling, [0])


def reason_of(path: Path, sampling: SamplingConfig = SMALL) -> str:
    with pytest.raises(VideoError) as caught:
        read(path, sampling)
    assert caught.value.reason in REASONS
    assert caught.value.detail
    assert "\n" not in caught.value.detail
    return caught.value.reason


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=44100, layout="mono")
        for index in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * index
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


CONTENTS = {
    "random": np.random.default_rng(0).bytes(20_000),
    "zeros": bytes(5_000),
    "one_byte": b"x",
    "text": b"not a video " * 200,
    "page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20,
    "zip": b"PK\x03\x04" + bytes(3_000),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_content_that_is_no_video_is_named_so(content: str, tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(CONTENTS[content])
    assert reason_of(path) == "not_a_video"


def test_empty_file_has_its_own_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    assert reason_of(tmp_path / "empty.mp4") == "empty_file"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
def test_picture_that_is_called_a_video_is_a_single_image(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    Image.new("RGB", (64, 64)).save(path, format=kind)
    assert reason_of(path) == "single_image"


def test_sound_without_pictures_has_no_video_stream(tmp_path: Path) -> None:
    assert reason_of(write_sound(tmp_path / "sound.m4a")) == "no_video_stream"


def test_missing_file_dangling_link_and_loop_are_told_apart_from_videos(tmp_path: Path) -> None:
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nothing.mp4")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    assert reason_of(tmp_path / "absent.mp4") == "missing"
    assert reason_of(tmp_path / "dangling.mp4") == "missing"
    assert reason_of(tmp_path / "loop.mp4") == "not_a_file"
    assert reason_of(tmp_path / ("n" * 5000)) == "not_a_file"
    assert reason_of(tmp_path / "a\0b.mp4") == "not_a_file"


@pytest.mark.timeout(20)
def test_pipe_and_device_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    assert reason_of(tmp_path / "pipe.mp4") == "not_a_file"
    assert reason_of(tmp_path / "zero.mp4") == "not_a_file"


def test_unreadable_file_has_its_own_reason(write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video("secret.mp4")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything, so the answer of the system is played
        monkeypatch.setattr("extract.decode.os.access", lambda *_: False)
    assert reason_of(path) == "permission"


def test_folder_without_frames_has_its_own_reason(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert reason_of(tmp_path) == "no_frames"


def test_damaged_picture_in_a_frame_folder_is_corrupt(tmp_path: Path) -> None:
    for index in range(8):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{index}.png")
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:60])
    assert reason_of(tmp_path) == "corrupt"
    (tmp_path / "5.png").write_bytes(b"nothing of the kind")
    assert reason_of(tmp_path) == "corrupt"


def test_playlists_never_open_their_neighbours(write_video: WriteVideo, tmp_path: Path) -> None:
    write_video("secret.ts")
    write_video("secret.mp4")
    lists = {
        "list.ffconcat": "ffconcat version 1.0\nfile secret.mp4\n",
        "list.mp4": "ffconcat version 1.0\nfile secret.mp4\n",
        "list.m3u8": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.6,\nsecret.ts\n#EXT-X-ENDLIST\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        assert reason_of(tmp_path / name) == "not_a_video"


def test_names_that_look_like_protocols_are_plain_files(
    write_video: WriteVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_video("plain.mp4")
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b.mp4", "http:x.mp4", "-leading.mp4", "%s%d.mp4", "new\nline.mp4", "ümlaut 'quote\".mp4"):
        Path(name).write_bytes(source.read_bytes())
        assert read(Path(name)).status == "ok"


def test_damaged_packets_are_counted_as_damage(write_video: WriteVideo) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 64, 3), dtype=np.uint8)
    path = write_video("damaged.mp4", pictures=noise)
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, len(content) // 2, 50):
        content[place] ^= 0xFF
    path.write_bytes(content)
    result = read(path)
    assert (result.status, result.reason) == ("degraded", "damaged")
    assert result.num_frames > 8


def test_no_mutation_of_a_file_escapes_the_list_of_reasons(write_video: WriteVideo, tmp_path: Path) -> None:
    draws = np.random.default_rng(1)
    originals = [write_video("a.mp4"), write_video("a.mkv"), write_video("a.avi", codec="mpeg4")]
    outcomes = []
    for original in originals:
        for mutation in range(40):
            content = bytearray(original.read_bytes())
            first = 0 if mutation % 2 else len(content) // 2
            for place in draws.integers(first, len(content), 8):
                content[place] = draws.integers(256)
            path = tmp_path / f"mutant{original.suffix}"
            path.write_bytes(content[: draws.integers(len(content) // 2, len(content) + 1)])
            try:
                result = read(path)
            except VideoError as error:
                outcomes.append(error.reason)
            else:
                outcomes.append(result.reason or "ok")
                assert result.frame_indices.max() < result.num_frames
    assert set(outcomes) <= set(REASONS) | {"ok"}
    assert len(outcomes) == 120


def test_drop_policy_refuses_short_videos(write_video: WriteVideo) -> None:
    path = write_video("three.mp4", num_frames=3)
    assert reason_of(path, SMALL.model_copy(update={"short_policy": "drop"})) == "short_video"


def test_empty_segment_is_refused(write_video: WriteVideo) -> None:
    with pytest.raises(VideoError, match="empty_segment"):
        read_views(VideoSource("v", write_video("v.mp4"), start_seconds=60.0), SMALL, [0])
    with pytest.raises(ValueError, match=r"start_seconds 2\.0 is not before end_seconds 1\.0"):
        VideoSource("v", Path("v.mp4"), 2.0, 1.0)


def test_frames_beyond_the_pixel_cap_are_refused(write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video("large.mp4", width=128, height=128)
    monkeypatch.setattr(container, "MAX_PIXELS", 128 * 128 - 1)
    assert reason_of(path) == "too_large"


def test_thin_frames_that_would_grow_beyond_the_cap_are_refused(tmp_path: Path) -> None:
    for index in range(8):
        Image.new("RGB", (30_000, 2)).save(tmp_path / f"{index}.png")
    assert reason_of(tmp_path, SamplingConfig(num_frames=8, resize_size=256, crop_size=224)) == "too_large"


@pytest.mark.parametrize(("width", "height"), [(20_000, 10_000), (12_000, 10_000), (9_000, 9_000)])
def test_picture_of_a_frame_folder_beyond_the_cap_is_too_large(width: int, height: int, tmp_path: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    # The size is judged by the header; the pixels are never there.
    picture = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    for index in range(8):
        (tmp_path / f"{index}.png").write_bytes(picture)
    assert reason_of(tmp_path) == "too_large"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("2^32 entries"), "out_of_memory"),
        (IndexError("tuple index"), "unexpected"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "unexpected"),
        (av.error.DecoderNotFoundError(1, "no decoder"), "no_decoder"),
        (av.error.InvalidDataError(1, "bad data"), "corrupt"),
    ],
)
def test_every_exception_around_a_video_becomes_a_reason(
    error: Exception, reason: str, write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video("video.mp4")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(container, "_timeline", fail)
    assert reason_of(path) == reason


def test_video_error_survives_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(VideoError("truncated", "cut")))
    assert (error.reason, error.detail, str(error)) == ("truncated", "cut", "truncated: cut")
    with pytest.raises(ValueError, match="reason 'other' is not one of"):
        VideoError("other", "")


def test_list_of_reasons_stays_short() -> None:
    assert len(REASONS) <= 20


def test_files_are_closed_again(write_video: WriteVideo) -> None:
    path = write_video("open.mp4")
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("this system does not list open files under /proc")
    read(path)
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        read(path)
    assert len(list(descriptors.iterdir())) == before
