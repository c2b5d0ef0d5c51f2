"""The held-out videos of a classification run, classified once more by its best checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import load_checkpoint
from pipeline.classify_model import ClassifierModel, build_classifier
from pipeline.classify_score import HeldOutScore, score_held_out
from pipeline.extraction import video_sources
from pipeline.model import ClipEncoder
from pipeline.ranks import ALONE, Ranks
from pipeline.scoring import LoadedRun
from pipeline.setup import Workplace, encoder_cube_shape
from pipeline.sources import LiveClips


def num_parameters_of(run: LoadedRun, folder: Path, device: torch.device) -> int:
    """Of the model that was trained: that of a classification run has its classifier, which `load_run` leaves out."""
    model = run.model
    if run.config.training.mode == "classify":
        model = _classifier(run, load_checkpoint(folder / "best.pt", device), device)
    return sum(parameter.numel() for parameter in model.parameters())


def score_again(run: LoadedRun, folder: Path, device: torch.device, ranks: Ranks = ALONE) -> HeldOutScore | None:
    """Classify the videos that a run keeps out of its training; None where it keeps out none.

    Args:
        run: of `load_run`; its videos are decoded anew, also where it reads a store.
        folder: of the run.
        device: where the model runs.
        ranks: each scores its share.

    Raises:
        SourceError: a video cannot be had.
    """
    config = run.config
    if config.training.mode != "classify" or not config.classify.holdout:
        return None
    content = load_checkpoint(folder / "best.pt", device)
    model = _classifier(run, content, device)
    with LiveClips.of(config, video_sources(run.manifest, config.data.allow_outside), device) as clips:
        place = Workplace(config, run.manifest, model, clips, None, device, content["num_classes"])
        return score_held_out(place, ranks)


def _classifier(run: LoadedRun, content: Mapping[str, Any], device: torch.device) -> ClassifierModel:
    encoder = run.model.encoder
    assert isinstance(encoder, ClipEncoder)
    shape = encoder_cube_shape(run.config, encoder, device)
    model = build_classifier(run.config, encoder, shape, content["num_classes"], device)
    model.load_state_dict(content["model"])
    return model
