"""What the attacks on training train: a short run of each mode, in which all that carries state from step to step has a part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cache.open import open_store
from contracts.equal_runs import differences
from contracts.world import World
from extract.build import build_backbone
from pipeline.extraction import build_spec, extract_videos, video_sources

CPU = torch.device("cpu")
EPISODES, STEP_EPISODES, VALIDATE_EVERY = 18, 2, 6
COMMON = (
    f"training.episodes={EPISODES}",
    f"training.episodes_per_step={STEP_EPISODES}",
    f"training.validate_every={VALIDATE_EVERY}",
    "training.save_seconds=1e-9",  # after every step
    "training.ema_decay=0.8",
    "training.schedule=cosine",
    'training.loggers=["csv","tensorboard"]',
)
LIVE = (
    "episodes.train_views=50",
    "sampling.crop=random",
    "augmentation.color_jitter=0.4",
    "augmentation.erasing_probability=0.5",
    "training.momentum=0.9",
    "training.nesterov=true",
    "training.clip_gradient_norm=5.0",
    "training.validation_episodes=6",
    "training.seed=2",
    "episodes.seed=2",
)
# Seeds and rates with which the best checkpoint is written more than once.
MODES = {
    "cached": (
        "training.optimizer=adamw",
        "training.learning_rate=0.5",
        "training.weight_decay=0.01",
        "training.warmup_episodes=4",
        "training.validation_episodes=20",
    ),
    "end_to_end": (
        *LIVE,
        "training.mode=end_to_end",
        "head.name=feat",
        "training.learning_rate=0.1",
        "training.backbone_batchnorm=episode",
    ),
    "heads": ("training.optimizer=adamw", "training.learning_rate=0.1", "training.validation_episodes=20"),
    "classify": (
        *LIVE,
        "training.mode=classify",
        "head.name=protonet",
        "classify.mixup_alpha=0.2",
        "classify.dropout=0.2",
    ),
}
"""What is trained in each of the modes: all that carries state from step to step, or draws, is in there. `heads` are two on the cache
in one pass, each with a folder of its own."""
HEADS_TOGETHER = ("mastaf", "feat")
VARIATIONS = ((), ("training.decode_workers=1",))
"""Settings that change no result, by turns."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained, and the run of it that nobody disturbed."""

    mode: str
    path: Path
    """The TOML file."""
    peaceful: Path
    """The folder of the run."""
    seconds: float = 0.0
    """That it took in a forked process."""

    def variation(self, number: int) -> tuple[str, ...]:
        """`--set` values of a trial."""
        return VARIATIONS[number % len(VARIATIONS)] if self.mode in ("end_to_end", "classify") else ()

    @property
    def words(self) -> list[str]:
        """Of the command, beside the recipe and the folder."""
        return ["--heads", ",".join(HEADS_TOGETHER)] if self.mode == "heads" else []

    def folders(self, run: Path) -> list[Path]:
        """Where checkpoints and logs are, in what was given as --out."""
        return [run / head for head in HEADS_TOGETHER] if self.mode == "heads" else [run]

    def differences(self, run: Path) -> list[str]:
        """What is not as in the run that nobody disturbed."""
        pairs = zip(self.folders(self.peaceful), self.folders(run), strict=True)
        return [
            f"{f'{folder.name}: ' if folder != run else ''}{line}"
            for peaceful, folder in pairs
            for line in differences(peaceful, folder)
        ]


def make_store(world: World, path: Path) -> None:
    """The cubes that `cached` trains on."""
    config = world.config()
    backbone = build_backbone(config.backbone, config.sampling)
    with open_store(path, spec=build_spec(config, backbone, CPU), mode="a", shard_rows=8) as store:
        extract_videos(store, list(video_sources(world.manifest).values()), backbone, config, CPU)
