"""Geometry and scaling of frames, against the published pipeline written out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from extract.backbone import IMAGENET, KINETICS_HARA, Preprocessing
from extract.config import SamplingConfig
from extract.draws import ViewDraws
from extract.transform import (
    CENTRE,
    CropPlace,
    FrameSize,
    crop_frame,
    crop_offset,
    draw_crop,
    resize_frame,
    resized_size,
    to_input,
)


@pytest.mark.parametrize(
    ("size", "shorter", "expected"),
    [
        ((320, 240), 256, (341, 256)),  # int(341.33)
        ((240, 320), 256, (256, 341)),
        ((1920, 1080), 256, (455, 256)),  # int(455.11)
        ((256, 500), 256, (256, 500)),
        ((500, 256), 256, (500, 256)),
        ((100, 100), 96, (96, 96)),
        ((2, 2048), 256, (256, 262144)),
    ],
)
def test_shorter_side_is_exact_and_the_longer_one_truncated(
    size: tuple[int, int], shorter: int, expected: tuple[int, int]
) -> None:
    assert resized_size(FrameSize(*size), shorter) == FrameSize(*expected)


@pytest.mark.parametrize(
    ("length", "expected"), [(224, 0), (225, 0), (226, 1), (227, 2), (229, 2), (231, 4), (341, 58), (256, 16)]
)
def test_centre_crop_rounds_half_to_even(length: int, expected: int) -> None:
    assert crop_offset(length, 224, None) == expected


def test_random_crop_reaches_every_offset_equally() -> None:
    draws = ViewDraws(0, "video", 1)
    offsets = [crop_offset(228, 224, draws.random()) for _ in range(20_000)]
    counts = np.bincount(offsets, minlength=5)
    assert counts.shape == (5,)
    assert (np.abs(counts - 4000) < 300).all()  # five standard deviations are 283
    assert crop_offset(224, 224, 0.999) == 0


def test_resize_is_pillows_antialiased_bilinear_and_skipped_when_it_fits() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (90, 121, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(frame).resize((int(32 * 121 / 90), 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize_frame(frame, 32), expected)
    assert resize_frame(frame, 90) is frame


def test_flip_mirrors_the_crop() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    plain = crop_frame(frame, 6, CropPlace(0.0, 0.999, False))
    np.testing.assert_array_equal(plain, frame[4:, :6])
    np.testing.assert_array_equal(crop_frame(frame, 6, CropPlace(0.0, 0.999, True)), plain[:, ::-1])


def test_view_zero_is_centred_and_never_mirrored() -> None:
    sampling = SamplingConfig(crop="random", flip=True, num_views=50)
    assert draw_crop(sampling, 0, ViewDraws(0, "video", 0)) == CENTRE
    places = [draw_crop(sampling, view, ViewDraws(0, "video", view)) for view in range(1, 50)]
    assert len({place.across for place in places}) == 49
    assert 10 < sum(place.is_flipped for place in places) < 39


def test_switching_one_knob_leaves_the_other_draws_alone() -> None:
    def place(**fields: object) -> CropPlace:
        return draw_crop(SamplingConfig.model_validate({"num_views": 9, **fields}), 3, ViewDraws(0, "video", 3))

    both, no_flip = place(crop="random", flip=True), place(crop="random")
    assert (both.across, both.down) == (no_flip.across, no_flip.down)
    assert place(flip=True).is_flipped == both.is_flipped
    assert place(flip=True).across is None


@pytest.mark.parametrize("preprocessing", [KINETICS_HARA, IMAGENET])
def test_input_is_channels_first_and_scaled(preprocessing: Preprocessing) -> None:
    clips = torch.randint(0, 256, (2, 3, 4, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    unit = to_input(clips, preprocessing, "unit")
    assert unit.shape == (2, 3, 3, 4, 5)
    assert unit.dtype == torch.float32
    assert unit.is_contiguous()
    assert torch.equal(unit[1, 2, 0], clips[1, 0, :, :, 2] / 255)
    scaled = to_input(clips, preprocessing, "backbone")
    for colour in range(3):
        expected = (unit[:, colour] - preprocessing.mean[colour]) / preprocessing.std[colour]
        torch.testing.assert_close(scaled[:, colour], expected, rtol=1e-6, atol=1e-6)  # one rounding of float32


def test_input_of_another_layout_is_refused() -> None:
    for clips in (
        torch.zeros(1, 2, 4, 4, 3),
        torch.zeros(1, 3, 2, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match=r"clips must be \(B, F, H, W, 3\) uint8"):
            to_input(clips, IMAGENET, "unit")


def test_deviation_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="every deviation must be positive"):
        Preprocessing((0, 0, 0), (1, 0, 1))
