"""The knobs of a run: the rooms' own value types, put together, and the contradictions between them.

A run is one TOML file with the tables ``[data] [sampling] [backbone] [extraction] [store] [episodes] [head] [training]
[augmentation] [classify] [evaluation]``; every table may be left out where its defaults will do.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cache.config import StoreConfig
from configs.training import AugmentationConfig, ClassifyConfig, TrainingConfig
from episodes.config import DataConfig, EpisodesConfig, EvaluationConfig
from extract.config import BackboneConfig, SamplingConfig


class ExtractionConfig(BaseModel):
    """How stage 1 decodes and drives the backbone. The first two decide the numbers, so they are in the store's spec."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    forward_batch: int = Field(default=8, ge=1)
    """Clips per forward pass. Always full: zeros stand in where a row is missing."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the backbone's arithmetic (autocast where it is not float32); of a learning one `training.compute_dtype` may say
    otherwise."""
    decode_workers: int | None = Field(default=None, ge=0, le=1024)
    """Processes that decode; None: one less than the cores, at most 16. 0 decodes in this process, without the limits below."""
    seconds_per_video: float = Field(default=120.0, gt=0, le=1e6)
    """A video that takes longer to decode is rejected ("stopped")."""
    decode_memory_bytes: int = Field(default=8 << 30, ge=1 << 28)
    """Memory of each decoding process; a video that needs more is rejected ("out_of_memory")."""


class HeadConfig(BaseModel):
    """Which head scores the queries, and the head's own options (checked by the head's own config type)."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = "mastaf"
    """A key of `episodes.build.HEADS`."""
    array: str = "cube"
    """Which named array of the store (or of the backbone's output) the head reads."""

    @property
    def options(self) -> dict[str, Any]:
        """The head's own options."""
        return dict(self.__pydantic_extra__ or {})


class RunConfig(BaseModel):
    """Everything that decides a run. `model_fields_set` of each table tells what the user wrote."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    backbone: BackboneConfig = BackboneConfig()
    extraction: ExtractionConfig = ExtractionConfig()
    store: StoreConfig = StoreConfig()
    episodes: EpisodesConfig = EpisodesConfig()
    head: HeadConfig = HeadConfig()
    training: TrainingConfig = TrainingConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    classify: ClassifyConfig = ClassifyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> RunConfig:
        views = self.episodes.train_views
        if (
            self.training.mode == "cached"
            and views > self.sampling.num_views
            and "num_views" in self.sampling.model_fields_set
        ):
            raise ValueError(
                f"episodes.train_views = {views}, but sampling.num_views = {self.sampling.num_views} views are cached. "
                "Raise sampling.num_views and extract again, or lower episodes.train_views."
            )
        if self.store.shard_rows % self.extraction.forward_batch:
            raise ValueError(
                f"store.shard_rows = {self.store.shard_rows} is not a multiple of "
                f"extraction.forward_batch = {self.extraction.forward_batch}; batches must not cross shards."
            )
        training = self.training
        if training.mode != "classify" and self.classify != ClassifyConfig():
            raise ValueError(
                '[classify] has options, but training.mode is not "classify". Set it, or leave the table out.'
            )
        if training.mode == "classify" and self.data.global_labels == "all":
            raise ValueError(
                'data.global_labels = "all" counts classes that classification never sees. Leave it out: labels are those of the '
                "training classes."
            )
        clips_at_a_time = training.episodes_per_forward or training.episodes_per_step
        if (self.classify.mixup_alpha or self.classify.cutmix_alpha) and clips_at_a_time == 1:
            raise ValueError(
                "classify.mixup_alpha and cutmix_alpha mix clips of one forward pass, and a single one passes at a time. Raise "
                "training.episodes_per_forward or episodes_per_step, or leave them out."
            )
        if training.mode == "cached" and self.augmentation != AugmentationConfig():
            raise ValueError(
                "[augmentation] changes pixels, but cubes are read from the cache. Leave the table out, or train end to end."
            )
        if views == 1 and self.augmentation != AugmentationConfig():
            raise ValueError(
                "[augmentation] is drawn anew for each view, and view 0 stays as it is, but episodes.train_views = 1 leaves training only "
                "that. Raise episodes.train_views (1000, say, for hardly ever the same view twice)."
            )
        return self
