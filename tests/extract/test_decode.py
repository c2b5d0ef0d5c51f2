"""Reading real video files: which frames come back, when they are shown, and how they are cut."""

import errno
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from extract import container
from extract.config import SamplingConfig
from extract.container_times import FrameTimes
from extract.decode import VideoError, VideoSource, VideoTooShortError, ViewClips, read_views
from extract.folder import FrameFolderReader

WriteVideo = Callable[..., Path]

SMALL = SamplingConfig(num_frames=8, resize_size=32, crop_size=32)
VARIABLE_TIMES = [*range(0, 320, 40), *range(1000, 4200, 100)]


def read(path: Path, sampling: SamplingConfig = SMALL, views: tuple[int, ...] = (0,), **segment: Any) -> ViewClips:
    return read_views(VideoSource(path.name, path, **segment), sampling, views)


def seen_frames(clips: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Frame numbers told by the grey in the lower half of each frame, as conftest paints it."""
    side = clips.shape[-2]
    greys = clips[..., side * 3 // 4, side // 4 : side * 3 // 4, :].mean((-1, -2))
    numbers: NDArray[np.int64] = np.rint((greys - 20) / 5).astype(np.int64)
    return numbers


FILES: dict[str, dict[str, Any]] = {
    "h264.mp4": {"codec": "libx264"},
    "h264.mkv": {"codec": "libx264"},
    "h264.ts": {"codec": "libx264"},
    "faststart.mp4": {"codec": "libx264", "container_options": {"movflags": "+faststart"}},
    "variable.mp4": {"times_ms": VARIABLE_TIMES},
    "variable.mkv": {"times_ms": VARIABLE_TIMES},
    "odd.mp4": {"width": 127, "height": 95, "pixel_format": "yuv444p"},
    "xvid.avi": {"codec": "mpeg4", "codec_options": {"b": "5M"}},
    "bframes.avi": {"codec": "mpeg4", "codec_options": {"bf": "2", "b": "5M"}},
    "mjpeg.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
    "wmv.wmv": {"codec": "wmv2"},
    "flash.flv": {"codec": "flv"},
    "variable.flv": {"codec": "flv", "times_ms": VARIABLE_TIMES},
    "variable.wmv": {"codec": "wmv2", "times_ms": VARIABLE_TIMES},
    "fragmented.mp4": {"container_options": {"movflags": "+frag_keyframe+empty_moov"}},
    "live.mkv": {"container_options": {"live": "1"}},
    "raw.h264": {"codec": "libx264"},
    "mpeg.mpg": {"codec": "mpeg2video"},
    "animated.gif": {"codec": "gif", "pixel_format": "rgb8"},
    "lossless.mkv": {"codec": "ffv1"},
}


@pytest.mark.parametrize("name", FILES)
def test_every_container_gives_the_chosen_frames(name: str, write_video: WriteVideo, encoders: frozenset[str]) -> None:
    fields = FILES[name]
    codec = str(fields.get("codec", "libx264"))
    if codec not in encoders:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    result = read(write_video(name, **fields))
    assert (result.status, result.reason, result.num_frames) == ("ok", None, 40)
    assert result.clips.shape == (1, 8, 32, 32, 3)
    assert result.frame_indices.tolist() == [[0, 5, 11, 16, 22, 27, 33, 39]]
    np.testing.assert_array_equal(seen_frames(result.clips), result.frame_indices)
    times = np.array(VARIABLE_TIMES if name.startswith("variable") else np.arange(40) * 40) / 1000
    np.testing.assert_allclose(result.frame_seconds, times[result.frame_indices], atol=1e-3)  # ticks of a millisecond


def test_frames_are_exactly_the_decoded_ones_resized(write_video: WriteVideo) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (12, 50, 70, 3), dtype=np.uint8)
    result = read(write_video("exact.mkv", codec="ffv1", pixel_format="bgr0", pictures=noise))
    left = round((int(32 * 70 / 50) - 32) / 2)
    for frame, index in zip(result.clips[0], result.frame_indices[0], strict=True):
        resized = np.asarray(Image.fromarray(noise[index]).resize((int(32 * 70 / 50), 32), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(frame, resized[:, left : left + 32])


def test_time_axis_equals_index_axis_on_a_constant_rate(write_video: WriteVideo) -> None:
    for name in ("constant.mp4", "constant.mkv"):
        path = write_video(name, frames_per_second=30)
        by_time = read(path, SMALL.model_copy(update={"axis": "time"}))
        np.testing.assert_array_equal(by_time.frame_indices, read(path).frame_indices)


def test_time_axis_differs_on_a_variable_rate(write_video: WriteVideo) -> None:
    result = read(write_video("variable.mp4", times_ms=VARIABLE_TIMES), SMALL.model_copy(update={"axis": "time"}))
    moments = np.array([0, 5, 11, 16, 22, 27, 33, 39]) * 4.1 / 39
    expected = [int(np.argmin(np.abs(np.array(VARIABLE_TIMES) / 1000 - moment))) for moment in moments]
    assert result.frame_indices.tolist() == [expected]
    assert expected != [0, 5, 11, 16, 22, 27, 33, 39]
    np.testing.assert_array_equal(seen_frames(result.clips)[0], expected)


def test_views_in_one_decode_equal_views_decoded_alone(write_video: WriteVideo) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 60, 3), dtype=np.uint8)
    path = write_video("views.mkv", codec="ffv1", pixel_format="bgr0", pictures=noise)
    sampling = SamplingConfig(
        num_frames=8, resize_size=40, crop_size=24, policy="reference", num_views=6, crop="random", flip=True
    )
    together = read(path, sampling, (0, 1, 2, 5))
    for position, view in enumerate((0, 1, 2, 5)):
        alone = read(path, sampling, (view,))
        np.testing.assert_array_equal(together.clips[position], alone.clips[0])
        np.testing.assert_array_equal(together.frame_indices[position], alone.frame_indices[0])
    assert len({clip.tobytes() for clip in together.clips}) == 4


def test_random_crop_is_one_place_per_clip_and_flip_mirrors_all_of_it(write_video: WriteVideo) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1, 40, 60, 3), dtype=np.uint8)
    path = write_video("still.mkv", codec="ffv1", pixel_format="bgr0", pictures=np.repeat(picture, 20, axis=0))
    sampling = SamplingConfig(num_frames=8, resize_size=40, crop_size=24, num_views=40, crop="random", flip=True)
    result = read(path, sampling, tuple(range(40)))
    assert (result.clips == result.clips[:, :1]).all()
    windows = {picture[0, top : top + 24, left : left + 24].tobytes() for top in range(17) for left in range(37)}
    mirrored = {
        picture[0, top : top + 24, left : left + 24][:, ::-1].tobytes() for top in range(17) for left in range(37)
    }
    kinds = [
        "plain" if clip[0].tobytes() in windows else "mirrored"
        for clip in result.clips
        if clip[0].tobytes() in windows | mirrored
    ]
    assert len(kinds) == 40
    assert 5 < kinds.count("mirrored") < 35
    assert kinds[0] == "plain"
    np.testing.assert_array_equal(result.clips[0, 0], picture[0, 8:32, 18:42])
    assert len({clip[0].tobytes() for clip in result.clips}) > 30


@pytest.mark.parametrize(("rotation", "quarters"), [(90, 1), (180, 2), (-90, 3)])
def test_rotated_video_is_turned_upright(rotation: int, quarters: int, write_video: WriteVideo) -> None:
    path = write_video("rotated.mp4", rotation=rotation, width=96, height=64)
    result = read(path, SMALL)
    upright = np.rot90(read(write_video("plain.mp4", width=96, height=64)).clips[0, 0], quarters)
    # The white quarter of the picture moves with the rotation; crops of the two may differ by its width.
    means = [
        float(part.mean())
        for part in (
            result.clips[0, 0, :4],
            result.clips[0, 0, -4:],
            result.clips[0, 0, :, :4],
            result.clips[0, 0, :, -4:],
        )
    ]
    expected = [float(part.mean()) for part in (upright[:4], upright[-4:], upright[:, :4], upright[:, -4:])]
    assert int(np.argmax(means)) == int(np.argmax(expected))
    assert max(means) > 240


def test_short_video_is_padded_and_says_so(write_video: WriteVideo) -> None:
    path = write_video("three.mp4", num_frames=3)
    for policy, expected in (("pad", [0, 1, 2, 2, 2, 2, 2, 2]), ("loop", [0, 1, 2, 0, 1, 2, 0, 1])):
        result = read(path, SMALL.model_copy(update={"short_policy": policy}))
        assert (result.status, result.reason, result.num_frames) == ("degraded", "short_video", 3)
        np.testing.assert_array_equal(seen_frames(result.clips)[0], expected)


def test_short_video_under_fail_stops_with_its_name(write_video: WriteVideo) -> None:
    path = write_video("three.mp4", num_frames=3)
    with pytest.raises(
        VideoTooShortError, match=r"three\.mp4 has 3 frames, fewer than num_frames = 8.*short_policy is 'fail'"
    ):
        read(path, SMALL.model_copy(update={"short_policy": "fail"}))


def test_segment_is_cut_by_presentation_time(write_video: WriteVideo) -> None:
    path = write_video("segment.ts")  # transport streams begin at 1.4 s; times count from the first frame
    result = read(path, SMALL, start_seconds=0.4, end_seconds=1.2)
    assert result.frame_indices.min() == 10
    assert result.frame_indices.max() == 29
    assert result.num_frames == 40
    np.testing.assert_array_equal(seen_frames(result.clips), result.frame_indices)
    np.testing.assert_allclose(result.frame_seconds, result.frame_indices / 25, atol=1e-3)  # ticks of 1/90000 s


def test_segment_shorter_than_the_clip_is_padded(write_video: WriteVideo) -> None:
    result = read(write_video("segment.mp4"), SMALL, start_seconds=0.4, end_seconds=0.5)
    assert result.frame_indices.tolist() == [[10, 11, 12, 12, 12, 12, 12, 12]]
    assert result.reason == "short_video"


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of frames that each later pass of decoding goes through."""
    passes: list[int] = []
    decode = container.VideoFileReader._decode

    def counted(self: container.VideoFileReader, *arguments: Any) -> Iterator[Any]:
        passes.append(0)
        for frame in decode(self, *arguments):
            passes[-1] += 1
            yield frame

    monkeypatch.setattr(container.VideoFileReader, "_decode", counted)
    return passes


SEGMENT_FILES = ["h264.mp4", "h264.mkv", "h264.ts", "variable.mkv", "bframes.avi", "raw.h264", "fragmented.mp4"]


@pytest.mark.parametrize("name", SEGMENT_FILES)
def test_segment_is_decoded_no_further_than_its_end_and_gives_the_same_numbers(
    name: str, write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(name, **FILES[name])
    passes = count_decoded(monkeypatch)
    short = read(path, start_seconds=0.1, end_seconds=0.6)
    assert len(passes) == 1
    monkeypatch.setattr("extract.decode._enough_frames", lambda *_: None)
    full = read(path, start_seconds=0.1, end_seconds=0.6)
    assert passes[1] == 40
    assert (passes[0] < 25) == (name != "raw.h264")  # which carries no times of its own
    for field in ("clips", "frame_indices", "frame_seconds"):
        np.testing.assert_array_equal(getattr(short, field), getattr(full, field))
    assert (short.status, short.reason, short.num_frames) == (full.status, full.reason, full.num_frames)


def test_segment_behind_missing_frames_is_told_by_decoding_to_the_end(
    write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video("holes.mp4", codec_options={"preset": "ultrafast", "g": "1"})
    decode = container.VideoFileReader._decode

    def with_a_hole(self: container.VideoFileReader, *arguments: Any) -> Iterator[Any]:
        yield from (frame for index, frame in enumerate(decode(self, *arguments)) if index != 5)

    monkeypatch.setattr(container.VideoFileReader, "_decode", with_a_hole)
    result = read(path, start_seconds=0.4, end_seconds=0.8)
    assert (result.status, result.reason, result.num_frames) == ("degraded", "frame_count_mismatch", 39)
    assert seen_frames(result.clips)[0].tolist() == (result.frame_indices[0] + 1).tolist()


def test_whole_video_is_decoded_to_its_end(write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = count_decoded(monkeypatch)
    path = write_video("whole.mp4")
    read(path)
    read(path, start_seconds=0.4)
    read(path, start_seconds=0.4, end_seconds=60.0)
    assert passes == [40, 40, 40]


@pytest.mark.parametrize(
    "clock", [Fraction(1, 12800), Fraction(1, 90000), Fraction(1001, 30000), Fraction(1, 10**9), Fraction(2**40, 3)]
)
def test_times_are_those_of_exact_fractions(clock: Fraction) -> None:
    ticks = np.random.default_rng(0).integers(-(2**40), 2**40, 500).tolist()
    times = FrameTimes()
    for tick in ticks:
        times.add(tick, clock)
    expected = [float((tick - min(ticks)) * clock) for tick in sorted(ticks)]
    assert times.seconds(Fraction(25)).tolist() == expected
    times.add(None, clock)
    assert times.seconds(Fraction(25)).tolist() == (np.arange(501) / 25).tolist()
    with pytest.raises(ValueError, match="after others at"):
        times.add(1, Fraction(1, 7))


def test_times_at_the_ends_of_the_number_range_do_not_overflow() -> None:
    times = FrameTimes()
    for tick in (2**63 - 1, -(2**63)):
        times.add(tick, Fraction(1, 3))
    assert times.seconds(Fraction(25)).tolist() == [0.0, (2**64 - 1) / 3]


def test_frame_folder_reads_like_a_video(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (20, 30, 44, 3), dtype=np.uint8)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{index:08d}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    result = read(tmp_path, SamplingConfig(num_frames=8, resize_size=30, crop_size=30, num_views=2), (0, 1))
    assert (result.status, result.num_frames) == ("ok", 20)
    np.testing.assert_array_equal(result.clips[0], pictures[result.frame_indices[0], :, 7:37])
    np.testing.assert_array_equal(result.frame_seconds, result.frame_indices)


def test_frame_files_are_sorted_by_name_and_grey_or_jpeg_ones_are_fine(tmp_path: Path) -> None:
    for name, grey in (("b.jpg", 100), ("a.png", 50), ("c.jpeg", 150), (".hidden.png", 250)):
        Image.new("L", (40, 40), grey).save(tmp_path / name)
    result = read(tmp_path, SamplingConfig(num_frames=3, resize_size=32, crop_size=32))
    assert result.clips.mean((0, 2, 3, 4)).round().tolist() == [50, 100, 150]


def paint_frames(folder: Path, greys: dict[str, int]) -> Path:
    folder.mkdir()
    for name, grey in greys.items():
        Image.new("L", (40, 40), grey).save(folder / name)
    return folder


def greys_of(folder: Path, num_frames: int) -> list[int]:
    clips = read(folder, SamplingConfig(num_frames=num_frames, resize_size=32, crop_size=32)).clips
    greys: list[int] = clips.mean((0, 2, 3, 4)).round().astype(int).tolist()
    return greys


@pytest.mark.parametrize("pattern", ["{}.png", "img_{}.png", "clip7_{}_x.png", "{:05d}.png", "image_{:05d}.png"])
def test_frames_are_in_the_order_of_their_numbers_padded_or_not(pattern: str, tmp_path: Path) -> None:
    names = {pattern.format(number): 10 * number for number in range(1, 13)}
    folder = paint_frames(tmp_path / "frames", names)
    assert greys_of(folder, 12) == list(range(10, 130, 10))
    if "05d" in pattern:
        found = [file.name for file in FrameFolderReader(folder).files()]
        assert found == sorted(found) == list(names)  # the published order


def test_frames_of_one_number_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    greys = {"01.png": 10, "1.jpg": 40, "1.png": 70, "2.png": 100}
    folder = paint_frames(tmp_path / "frames", greys)
    assert [file.name for file in FrameFolderReader(folder).files()] == ["1.jpg", "01.png", "1.png", "2.png"]


def test_size_change_in_mid_stream_is_resized_frame_by_frame(write_video: WriteVideo, tmp_path: Path) -> None:
    joined = tmp_path / "joined.h264"
    large = write_video("large.h264", num_frames=10, width=128, height=64)
    small = write_video("small.h264", num_frames=10, width=64, height=64)
    joined.write_bytes(large.read_bytes() + small.read_bytes())
    result = read(joined)
    assert result.num_frames == 20
    assert (seen_frames(result.clips)[0] == result.frame_indices[0] % 10).all()


def test_wrong_frame_count_is_sampled_again_from_the_decoded_frames(
    write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video("count.mp4", num_frames=20)
    survey = container._survey

    def too_many(*arguments: Any) -> object:
        found = survey(*arguments)
        assert found.times.clock is not None
        for index in (20, 21, 22):
            found.times.add(int(Fraction(index, 25) / found.times.clock), found.times.clock)
        return found

    monkeypatch.setattr(container, "_survey", too_many)
    result = read(path)
    assert (result.status, result.reason, result.num_frames) == ("degraded", "frame_count_mismatch", 20)
    assert result.frame_indices[0, -1] == 19
    np.testing.assert_array_equal(seen_frames(result.clips), result.frame_indices)


def test_reading_neither_uses_nor_changes_global_random_state(write_video: WriteVideo) -> None:
    path = write_video("random.mp4")
    sampling = SamplingConfig(
        num_frames=8, resize_size=32, crop_size=24, policy="reference", num_views=3, crop="random", flip=True
    )
    before = (random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist())
    first = read(path, sampling, (0, 1, 2))
    assert (random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist()) == before
    random.seed(1)
    np.random.seed(1)
    np.testing.assert_array_equal(first.clips, read(path, sampling, (0, 1, 2)).clips)


def test_draws_belong_to_the_video_id_and_not_to_the_file(write_video: WriteVideo) -> None:
    path = write_video("ids.mp4")
    sampling = SMALL.model_copy(update={"policy": "reference", "num_views": 9})
    first, second = (read_views(VideoSource(name, path), sampling, range(1, 9)).frame_indices for name in ("a", "b"))
    assert (first != second).any()


def test_views_must_be_named() -> None:
    for views in ((), (-1,)):
        with pytest.raises(ValueError, match="views must be numbers from 0 on"):
            read(Path("absent.mp4"), SMALL, views)


def test_pictures_that_are_links_out_of_the_root_are_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    folder = tmp_path / "root" / "video"
    folder.mkdir(parents=True)
    for index in range(8):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(tmp_path / "outside" / f"{index}.png")
        (folder / f"{index}.png").symlink_to(tmp_path / "outside" / f"{index}.png")
    sampling = SamplingConfig(num_frames=8, resize_size=32, crop_size=32)
    with pytest.raises(VideoError, match=r"not_a_file: 0\.png is a link out of the manifest's root"):
        read_views(VideoSource("video", folder, root=tmp_path / "root"), sampling, [0])
    for root in (tmp_path, None):
        assert read_views(VideoSource("video", folder, root=root), sampling, [0]).status == "ok"


def test_trouble_of_the_disk_is_not_called_a_bad_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sick(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "stat", sick)
    with pytest.raises(VideoError, match=r"unexpected: .*Input/output error"):
        read_views(VideoSource("video", tmp_path / "a.mp4"), SamplingConfig(), [0])
