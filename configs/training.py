"""The knobs of training: the one loop, augmentation, and what only classification has."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TrainingConfig(BaseModel):
    """The one loop: heads on the cache, the backbone with its head, the backbone by classification.

    Defaults: the MASTAF paper, section 4.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    mode: Literal["cached", "end_to_end", "classify"] = "cached"
    """`cached` reads cubes from the store; `end_to_end` decodes clips and runs the backbone in the loop; `classify` trains the
    backbone with a linear classifier over the training classes (an episode is then one labelled clip)."""
    episodes: int = Field(default=20_000, ge=0)
    """Training episodes in all; 0 only saves the initial weights."""
    episodes_per_step: int = Field(default=16, ge=1)
    """Episodes whose mean loss makes one optimiser step (published flag: tasks_per_batch), on all ranks together."""
    episodes_per_forward: int | None = Field(default=None, ge=1)
    """Episodes in one forward pass of a rank; None: a whole step on the cache and in classification, one end to end. Changes no result
    (in classification it changes which clips are mixed, and what a backbone with dropout draws)."""
    clips_per_forward: int | None = Field(default=None, ge=1)
    """Clips of an episode that pass the learning backbone at a time, each run again for its gradient; None: all. Changes no result;
    needs BatchNorm that is frozen (or none)."""
    gradient_checkpointing: bool = False
    """Keep only what passes between the backbone's blocks and compute the rest again for the gradient: less memory, about a third more
    time, same result."""
    published_first_step: bool = False
    """The released codes take their first optimiser step one episode early, still divided by `episodes_per_step` (reference 1.7)."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """As torch provides them."""
    learning_rate: float = Field(default=0.01, gt=0)
    """Of the head."""
    backbone_learning_rate: float | None = Field(default=None, ge=0)
    """Of the backbone; None: the head's; 0: the backbone is frozen and stays in evaluation mode."""
    rates: dict[str, float] = Field(default_factory=dict)
    """Learning rate by pattern of parameter names (`"encoder.backbone.layer4.*" = 0.001`); the first that fits counts, 0 freezes."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameter names that do not learn (`["encoder.backbone.conv1.*"]`); BatchNorm among them keeps its statistics."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer of the backbone (a stage of convolutions, a block of a transformer) learns this much slower than the one above it."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Of SGD."""
    nesterov: bool = False
    """Of SGD with momentum."""
    weight_decay: float = Field(default=0.0, ge=0)
    """On every parameter, or see `decay_norm_and_bias`."""
    decay_norm_and_bias: bool = True
    """Whether weight decay also pulls at biases, at the scales of normalisations, and at class and position tokens."""
    schedule: Literal["constant", "cosine", "multi_step"] = "constant"
    """Learning rate over the run: constant as published, a cosine to zero, or times `milestone_factor` at each milestone."""
    milestones: tuple[int, ...] = ()
    """Training episodes at which `multi_step` lowers the rate."""
    milestone_factor: float = Field(default=0.1, gt=0, lt=1)
    """By which it lowers it."""
    warmup_episodes: int = Field(default=0, ge=0)
    """Training episodes over which the rate rises from nothing to its value, before the schedule begins."""
    clip_gradient_norm: float | None = Field(default=None, gt=0, allow_inf_nan=True)
    """Largest norm of all gradients of a step together; longer ones are shortened to it."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Of the moving average of the weights, taken every step; with it, the average is validated, saved as best and exported."""
    query_reduction: Literal["mean", "sum"] | None = None
    """Mean or sum of the loss over the queries of an episode; with the same learning rate the sum is a Q times larger step.
    None: as the head was published (sum for TRX, STRM and TA2N, mean for the others)."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number format of the learning backbone (autocast where it is not float32; float16 with a gradient scaler). None:
    `extraction.compute_dtype`. Heads compute in float32."""
    backbone_batchnorm: Literal["frozen", "episode", "synchronised", "published"] | None = None
    """Statistics of the backbone's BatchNorm while it learns: frozen (running ones); of all clips of an episode; of all clips of a step, on
    all ranks; or as the head's released code calls its backbone. None: frozen, and synchronised in classification."""
    validate_every: int = Field(default=2_000, ge=1)
    """Training episodes between two validations; the best checkpoint is chosen there."""
    validation_episodes: int = Field(default=1_000, ge=1)
    """Fixed episodes of the validation split."""
    save_seconds: float = Field(default=600.0, gt=0, allow_inf_nan=True)
    """A checkpoint is written at least this often, beside those at validations; inf: there alone. Changes no result."""
    track_test: bool = False
    """Also score the test split at every validation, only to print the published, test-selected number as its own line.
    The checkpoint is chosen on the validation split all the same."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of the head's initial weights."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms, so that a run that is resumed on a GPU gives the bits of one that was not; slower there.
    A CPU is deterministic without it."""
    initial_weights: str | None = None
    """A run's checkpoint or a published one (`mastaf list heads` names the kinds) to start from."""
    decode_workers: int | None = Field(default=None, ge=0, le=1024)
    """Processes that decode clips ahead of the step; None: one less than the cores, at most 16. 0 decodes in this process."""
    batches_ahead: int = Field(default=4, ge=1, le=256)
    """Forward passes whose inputs are made ahead of the step. Changes no result."""
    check_videos: bool | None = None
    """Decode every training video once before the first step, so that all bad ones are named together, not one by one during the run,
    and every test video, whose faults are only told. None: where a run that decodes begins, not where it is resumed. Videos that a run
    is scored on while it trains are always tried. Changes no result."""
    clip_cache_bytes: int = Field(default=1 << 30, ge=0)
    """Memory for decoded clips, end to end; a (video, view) that is in there is not decoded again."""
    cube_cache_bytes: int = Field(default=8 << 30, ge=0)
    """Memory for cubes; a store that fits is read from disk once."""
    loggers: tuple[Literal["csv", "tensorboard", "wandb"], ...] = ("csv", "tensorboard")
    """What is written beside metrics.jsonl; wandb needs `pip install 'mastaf[wandb]'`."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> TrainingConfig:
        problem = self._problem_of_steps() or self._problem_of_rates() or self._problem_of_idle_knobs()
        if problem:
            raise ValueError(problem)
        return self

    def _problem_of_steps(self) -> str | None:
        if (self.episodes_per_forward or 1) > self.episodes_per_step:
            return (
                f"training.episodes_per_forward = {self.episodes_per_forward} is more than "
                f"training.episodes_per_step = {self.episodes_per_step}."
            )
        if self.clips_per_forward is not None and self.backbone_batchnorm not in (None, "frozen"):
            return (
                f"training.clips_per_forward = {self.clips_per_forward} splits the clips that training.backbone_batchnorm = "
                f'"{self.backbone_batchnorm}" takes statistics over. Use gradient_checkpointing, which does not, or "frozen".'
            )
        is_synchronised = self.backbone_batchnorm == "synchronised" or (
            self.backbone_batchnorm is None and self.mode == "classify" and self.backbone_learning_rate != 0
        )
        if is_synchronised and self.episodes_per_forward is not None:
            return (
                'training.backbone_batchnorm = "synchronised" (what classification does if nothing is said) takes statistics over all '
                'clips of a step, so they pass at once; leave episodes_per_forward out, lower episodes_per_step, or use "frozen".'
            )
        if self.published_first_step and self.episodes_per_step == 1:
            return (
                "training.published_first_step = true with episodes_per_step = 1 would be a first step of no episode."
            )
        if self.mode == "classify" and self.clips_per_forward is not None:
            return (
                f"training.clips_per_forward = {self.clips_per_forward} splits the clips of an episode, which is a single clip in "
                "classification. Use episodes_per_forward."
            )
        if self.mode == "classify" and self.backbone_batchnorm in ("episode", "published"):
            return (
                f'training.backbone_batchnorm = "{self.backbone_batchnorm}" in classification would be statistics of a single clip. '
                'Use "synchronised" or "frozen".'
            )
        return None

    def _problem_of_idle_knobs(self) -> str | None:
        """What says something that nothing in the run listens to."""
        of_backbone = {
            "gradient_checkpointing": self.gradient_checkpointing,
            "clips_per_forward": self.clips_per_forward,
            "compute_dtype": self.compute_dtype,
            "backbone_batchnorm": self.backbone_batchnorm if self.backbone_batchnorm != "frozen" else None,
        }
        given = [f"training.{name} = {value!r}" for name, value in of_backbone.items() if value]
        if given and (self.mode == "cached" or self.backbone_learning_rate == 0):
            why = "on the cache there is no backbone" if self.mode == "cached" else "the backbone is frozen"
            way_out = ' or set "frozen"' if "backbone_batchnorm" in given[0] else ""
            return f"{given[0]} is of a backbone that learns, but {why}. Leave it out{way_out}."
        if self.mode == "cached" and self.check_videos:
            return "training.check_videos = true tries videos, but cubes are read from the cache. Leave it out."
        if (
            self.schedule != "multi_step"
            and "milestone_factor" in self.model_fields_set
            and self.milestone_factor != 0.1
        ):
            return f'training.milestone_factor = {self.milestone_factor} is of schedule "multi_step". Set it, or leave the factor out.'
        if not self.decay_norm_and_bias and not self.weight_decay:
            return "training.decay_norm_and_bias = false changes nothing without training.weight_decay. Set it, or leave this out."
        return None

    def _problem_of_rates(self) -> str | None:
        if self.momentum and self.optimizer != "sgd":
            return f"training.momentum = {self.momentum} has no effect on {self.optimizer}; it is of sgd."
        if self.nesterov and not self.momentum:
            return "training.nesterov = true needs training.momentum above 0, and sgd."
        if self.mode == "cached" and self.backbone_learning_rate:
            return (
                f"training.backbone_learning_rate = {self.backbone_learning_rate}, but on the cache there is no backbone to learn. "
                'Set training.mode = "end_to_end".'
            )
        if (self.schedule == "multi_step") != bool(self.milestones):
            return (
                f'training.schedule = "{self.schedule}" with milestones {list(self.milestones)}: '
                'milestones and "multi_step" go together.'
            )
        if list(self.milestones) != sorted(set(self.milestones)) or any(each < 1 for each in self.milestones):
            return f"training.milestones = {list(self.milestones)} are not ascending numbers of episodes from 1 on."
        if self.milestones and self.milestones[0] < self.warmup_episodes:
            return (
                f"training.milestones: {self.milestones[0]} lies within training.warmup_episodes = {self.warmup_episodes}, while the rate "
                "still rises. Let the first milestone come later, or the warm-up be shorter."
            )
        if self.layer_decay < 1 and (self.mode == "cached" or self.backbone_learning_rate == 0):
            return (
                f"training.layer_decay = {self.layer_decay} has no effect, since no backbone learns. Leave it out, or set "
                'training.mode = "end_to_end" or "classify", with backbone_learning_rate above 0.'
            )
        if self.warmup_episodes and self.warmup_episodes >= max(1, self.episodes):
            return f"training.warmup_episodes = {self.warmup_episodes} is not less than training.episodes = {self.episodes}."
        bad = [name for name, rate in self.rates.items() if rate < 0]
        return f"training.rates: {bad[0]!r} has a negative rate {self.rates[bad[0]]}." if bad else None


class AugmentationConfig(BaseModel):
    """What becomes of the pixels of training clips, beside the views' crop, flip and jitter. Drawn per (seed, video, view, episode): the
    same for any number of workers and ranks. Everything is off by default, as published."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Strength of brightness, contrast and saturation; hue moves by a quarter of it. The same for all frames of a clip."""
    rand_augment: int = Field(default=0, ge=0, le=8)
    """Operations of torchvision's RandAugment per clip; 0: none."""
    rand_augment_magnitude: int = Field(default=9, ge=0, le=30)
    """Of these operations."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest share of the clip's area that torchvision's RandomResizedCrop keeps, above 0 and at most 1."""
    erasing_probability: float = Field(default=0.0, ge=0, le=1)
    """Of torchvision's RandomErasing."""

    @model_validator(mode="after")
    def _refuse_impossible_crops(self) -> AugmentationConfig:
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"augmentation.crop_scale = {list(self.crop_scale)} is no range of shares of the area; the smallest comes first, above 0, "
                "and the largest is at most 1: [0.5, 1.0], say."
            )
        return self


class ClassifyConfig(BaseModel):
    """What only classification has (`training.mode = "classify"`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread over all classes."""
    mixup_alpha: float = Field(default=0.0, ge=0)
    """Of torchvision's MixUp; 0: none. Partners are clips of the same forward pass."""
    cutmix_alpha: float = Field(default=0.0, ge=0)
    """Of torchvision's CutMix; with both, each forward pass draws one of them."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Before the linear layer."""
    holdout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the videos of each training class that are kept out to score classification on; at least one where it is above 0."""
    num_clips: int = Field(default=1, ge=1, le=100)
    """Clips of a held-out video, spread over its length, whose probabilities are averaged."""
    num_crops: Literal[1, 3] = 1
    """Crops of each of these clips: the centre, or the two ends and the centre of the longer side."""
