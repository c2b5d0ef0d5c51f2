"""From frames of any size to the square, scaled tensors that a backbone takes.

Letters: B clips; F frames; H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from extract.config import Normalization, SamplingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from extract.backbone import Preprocessing

Pixels = NDArray[np.uint8]

MAX_PIXELS = 2**26
"""Largest accepted frame, before and after resizing: twice 8K. A decoded RGB frame of this size takes 200 MB."""


@dataclass(frozen=True, slots=True)
class FrameSize:
    """Size of a picture in pixels."""

    width: int
    """Columns."""
    height: int
    """Rows."""


@dataclass(frozen=True, slots=True)
class CropPlace:
    """Where the crop sits within the free room, the same for all frames of a clip, and whether the clip is mirrored."""

    across: float | None
    """Share of the horizontal room left of the crop, [0, 1); None is the centre."""
    down: float | None
    """Share of the vertical room above the crop, [0, 1); None is the centre."""
    is_flipped: bool
    """Mirror left and right."""
    along: float | None = None
    """Share of the room along the frame's longer side (across where both are equal), [0, 1]; None leaves it to the first two."""


CENTRE = CropPlace(None, None, False)


class Shares(Protocol):
    """The one method of extract.draws.ViewDraws that the crop uses."""

    def random(self) -> float:
        """A number of [0, 1)."""
        ...


def draw_crop(sampling: SamplingConfig, view: int, draws: Shares) -> CropPlace:
    """Crop and flip of a view. Three numbers are always drawn, so that one knob leaves the others' draws alone."""
    across, down, flip = draws.random(), draws.random(), draws.random()
    if view == 0:
        return CENTRE
    is_random = sampling.crop == "random"
    return CropPlace(across if is_random else None, down if is_random else None, sampling.flip and flip < 0.5)


def resized_size(size: FrameSize, shorter_side: int) -> FrameSize:
    """Shorter side exactly `shorter_side`, the other one truncated; a frame that fits already keeps its size."""
    shortest = min(size.width, size.height)
    if shortest == shorter_side:
        return size
    if size.width < size.height:
        return FrameSize(shorter_side, int(shorter_side * size.height / size.width))
    return FrameSize(int(shorter_side * size.width / size.height), shorter_side)


def crop_offset(length: int, crop_size: int, share: float | None) -> int:
    """First pixel of the crop along one side; the centre is rounded half to even, as published."""
    room = length - crop_size
    # Python's round is half to even; the product stays below room + 1 because share < 1.
    return round(room / 2) if share is None else min(int(share * (room + 1)), room)


def resize_frame(frame: Pixels, shorter_side: int) -> Pixels:
    """Antialiased bilinear resize: (H, W, 3) uint8 -> (H', W', 3) uint8 with min(H', W') = shorter_side."""
    size = FrameSize(frame.shape[1], frame.shape[0])
    wanted = resized_size(size, shorter_side)
    if wanted == size:
        return frame
    resized = Image.fromarray(frame).resize((wanted.width, wanted.height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def crop_frame(frame: Pixels, crop_size: int, place: CropPlace) -> Pixels:
    """Square part of a resized frame: (H, W, 3) -> (crop_size, crop_size, 3) uint8."""
    across, down = place.across, place.down
    if place.along is not None:
        across, down = (across, place.along) if frame.shape[0] > frame.shape[1] else (place.along, down)
    top = crop_offset(frame.shape[0], crop_size, down)
    left = crop_offset(frame.shape[1], crop_size, across)
    square = frame[top : top + crop_size, left : left + crop_size]
    return square[:, ::-1] if place.is_flipped else square


def to_input(clips: Tensor, preprocessing: Preprocessing, normalization: Normalization) -> Tensor:
    """Scale clips for a backbone, on whatever device they are.

    Args:
        clips: (B, F, H, W, 3) uint8.
        preprocessing: of the backbone.
        normalization: "backbone" also subtracts the mean and divides by the deviation; "unit" stops at [0, 1].

    Returns:
        (B, 3, F, H, W) float32.
    """
    import torch  # here, so that a decoding process does without

    if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[-1] != 3:
        raise ValueError(f"clips must be (B, F, H, W, 3) uint8, not {tuple(clips.shape)} {clips.dtype}")
    values = clips.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format) / 255
    if normalization == "unit":
        return values
    mean = values.new_tensor(preprocessing.mean).view(3, 1, 1, 1)
    std = values.new_tensor(preprocessing.std).view(3, 1, 1, 1)
    return (values - mean) / std
