"""Classification on the one loop: its clips, and the head that tells how its features serve unseen classes.

An episode is one labelled clip, so `episodes` counts clips and `episodes_per_step` is the batch size over all ranks.
"""

# C channels, T time steps, H W grid

from __future__ import annotations

import torch

from configs.schema import HeadConfig, RunConfig
from episodes.build import build_head
from episodes.clip_sampler import ClipSampler
from episodes.datasets import Manifest
from episodes.head import HeadModule
from pipeline.settings import SetupError

SCORER = {"name": "protonet", "distance": "cosine"}
"""The head that few-shot accuracy is measured with where the config names none: cosine to the mean of each class."""


def clip_sampler(config: RunConfig, manifest: Manifest) -> ClipSampler:
    """The labelled clips of a classification run; their order comes from ``episodes.seed``.

    Raises:
        SamplerError: there is nothing to learn, or a class has too few videos for the holdout.
    """
    return ClipSampler(manifest, config.classify.holdout, config.episodes.seed)


def resolved_classification(config: RunConfig) -> RunConfig:
    """The config with what classification does where nothing is said.

    BatchNorm of a backbone that learns is synchronised; few-shot accuracy is measured by `SCORER`.

    Raises:
        SetupError: options of a head, but no head.
    """
    training = config.training
    if training.backbone_batchnorm is None and training.backbone_learning_rate != 0:
        config = config.model_copy(
            update={"training": training.model_copy(update={"backbone_batchnorm": "synchronised"})}
        )
    if "name" in config.head.model_fields_set:
        return config
    if config.head.options:
        raise SetupError(
            f"head.{sorted(config.head.options)[0]} is an option of a few-shot head, but classification trains a linear classifier. "
            "Leave it out, or name the head without weights that shall measure few-shot accuracy."
        )
    return config.model_copy(update={"head": HeadConfig(array=config.head.array, **SCORER)})


def build_scorer(config: RunConfig, shape: tuple[int, int, int, int]) -> HeadModule:
    """The head that few-shot accuracy is measured with, for cubes of this shape (C, T, H, W).

    Raises:
        SetupError: it would have to be trained.
    """
    # Without training classes, heads leave their classifier over them out.
    scorer = build_head(
        config.head.name, config.head.options, shape, None, True, torch.Generator().manual_seed(config.training.seed)
    )
    if any(True for _ in scorer.parameters()):
        raise SetupError(
            f'head.name = "{config.head.name}" has weights to learn, but classification trains a linear classifier; a few-shot head '
            'only measures. Leave head.name out (cosine to prototypes), or use "protonet", "neighbor" or another one without weights.'
        )
    return scorer
