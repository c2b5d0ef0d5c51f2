"""The knobs of the first stage: which frames, how they are cropped, and which network embeds them."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Policy = Literal["even", "reference", "reference_test_jitter", "trx", "ta2n"]
Axis = Literal["index", "time"]
ShortPolicy = Literal["pad", "loop", "drop", "fail"]
Crop = Literal["centre", "random"]
Normalization = Literal["backbone", "unit"]


class SamplingConfig(BaseModel):
    """Which frames of a video are taken, and how each becomes a square."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_frames: int = Field(default=16, ge=1, le=1024)
    """Frames per clip. 16 as in the published MASTAF, whose per-frame networks take 8."""
    policy: Policy = "even"
    """Index formula. even never jitters; the others do from view 1 on, reference_test_jitter in view 0 too."""
    axis: Axis = "index"
    """Spread positions over frame numbers (as published), or over presentation time for variable frame rates."""
    short_policy: ShortPolicy = "pad"
    """Video with fewer frames than num_frames: repeat the last, start over, reject the video, or stop the run."""
    num_views: int = Field(default=1, ge=1, le=10_000)
    """Views that exist of each video. View 0 is the evaluation view, the others serve training only."""
    resize_size: int = Field(default=256, ge=1, le=8192)
    """Length in pixels of the shorter side after resizing."""
    crop_size: int = Field(default=224, ge=1, le=8192)
    """Side in pixels of the square crop."""
    crop: Crop = "centre"
    """Crop of the views from 1 on; random is one place per clip. View 0 is always cropped at the centre."""
    flip: bool = False
    """Mirror the whole clip with probability 0.5 in the views from 1 on. Leave it off where left and right matter."""
    normalization: Normalization = "backbone"
    """backbone: mean and deviation the weights were trained with. unit: [0, 1] only, as all published heads did."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random views; each view's draws depend on this seed, the video id and the view number alone."""

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if self.crop_size > self.resize_size:
            raise ValueError(
                f"crop_size {self.crop_size} is larger than resize_size {self.resize_size}: the crop is too large. "
                "Lower crop_size or raise resize_size."
            )
        return self


class BackboneConfig(BaseModel):
    """The network that turns clips into cubes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = "r3d50"
    """One of the names in extract.build.BACKBONES."""
    weights: str = "none"
    """A file (vivit: or a directory), "random:SEED", "none" (as random:0), or "pretrained" (torchvision's own)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The network's own knobs, for example {"width": 32} for small3d."""
