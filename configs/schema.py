"""The knobs of a run: the rooms' own value types, put together, and the contradictions between them.

A run is one TOML file with the tables ``[data] [sampling] [backbone] [extraction] [store] [episodes] [head] [training]
[evaluation]``; every table may be left out where its defaults will do.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cache.config import StoreConfig
from episodes.config import DataConfig, EpisodesConfig, EvaluationConfig
from extract.config import BackboneConfig, SamplingConfig


class ExtractionConfig(BaseModel):
    """How stage 1 decodes and drives the backbone. The first two decide the numbers, so they are in the store's spec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    forward_batch: int = Field(default=8, ge=1)
    """Clips per forward pass. Always full: zeros stand in where a row is missing."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the backbone's arithmetic (autocast where it is not float32), end to end too; float16 in stage 1 only."""
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


class TrainingConfig(BaseModel):
    """The one loop, for heads on the cache and for the backbone with its head. Defaults: the MASTAF paper, section 4."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["cached", "end_to_end"] = "cached"
    """`cached` reads cubes from the store; `end_to_end` decodes clips and runs the backbone in the loop."""
    episodes: int = Field(default=20_000, ge=0)
    """Training episodes in all; 0 only saves the initial weights."""
    episodes_per_step: int = Field(default=16, ge=1)
    """Episodes whose mean loss makes one optimiser step (published flag: tasks_per_batch)."""
    episodes_per_forward: int | None = Field(default=None, ge=1)
    """Episodes in one forward pass; None: a whole step on the cache, one end to end. Does not change the result."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """As torch provides them."""
    learning_rate: float = Field(default=0.01, gt=0)
    """Of the head."""
    backbone_learning_rate: float | None = Field(default=None, ge=0)
    """Of the backbone; None: the head's; 0: the backbone is frozen and stays in evaluation mode."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Of SGD."""
    weight_decay: float = Field(default=0.0, ge=0)
    """On every parameter."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the run: constant as published, or a cosine to zero."""
    query_reduction: Literal["mean", "sum"] | None = None
    """Mean or sum of the loss over the queries of an episode; with the same learning rate the sum is a Q times larger step.
    None: as the head was published (sum for TRX, STRM and TA2N, mean for the others)."""
    backbone_batchnorm: Literal["episode", "frozen"] = "episode"
    """Statistics of the backbone's BatchNorm in training: all clips of one episode jointly, as published, or frozen."""
    validate_every: int = Field(default=2_000, ge=1)
    """Training episodes between two validations; the best checkpoint is chosen there."""
    validation_episodes: int = Field(default=1_000, ge=1)
    """Fixed episodes of the validation split."""
    track_test: bool = False
    """Also score the test split at every validation, only to print the published, test-selected number as its own line.
    The checkpoint is chosen on the validation split all the same."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of the head's initial weights."""
    initial_weights: str | None = None
    """A run's checkpoint or a published STAF checkpoint to start from."""
    decode_threads: int = Field(default=2, ge=1)
    """Videos decoded at the same time, end to end."""
    clip_cache_bytes: int = Field(default=1 << 30, ge=0)
    """Memory for decoded clips, end to end; a (video, view) that is in there is not decoded again."""
    cube_cache_bytes: int = Field(default=8 << 30, ge=0)
    """Memory for cubes; a store that fits is read from disk once."""


class RunConfig(BaseModel):
    """Everything that decides a run. `model_fields_set` of each table tells what the user wrote."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    backbone: BackboneConfig = BackboneConfig()
    extraction: ExtractionConfig = ExtractionConfig()
    store: StoreConfig = StoreConfig()
    episodes: EpisodesConfig = EpisodesConfig()
    head: HeadConfig = HeadConfig()
    training: TrainingConfig = TrainingConfig()
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
        if training.momentum and training.optimizer != "sgd":
            raise ValueError(
                f"training.momentum = {training.momentum} has no effect on {training.optimizer}; it is of sgd."
            )
        if training.mode == "cached" and training.backbone_learning_rate:
            raise ValueError(
                f"training.backbone_learning_rate = {training.backbone_learning_rate}, but on the cache there is no backbone to learn. "
                'Set training.mode = "end_to_end".'
            )
        if training.mode == "end_to_end" and self.extraction.compute_dtype == "float16":
            raise ValueError(
                'extraction.compute_dtype = "float16" would lose small gradients end to end. Use "bfloat16" or "float32".'
            )
        if (training.episodes_per_forward or 1) > training.episodes_per_step:
            raise ValueError(
                f"training.episodes_per_forward = {training.episodes_per_forward} is more than "
                f"training.episodes_per_step = {training.episodes_per_step}."
            )
        return self
