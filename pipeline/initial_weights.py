"""Where a run starts from when it does not start from scratch: a checkpoint of ours, or a published STAF one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from episodes.heads.mastaf import MastafHead
from episodes.heads.staf_checkpoint import load_staf_head, split_staf_state
from extract.weights import copy_weights
from pipeline.checkpoint import FORMAT, CheckpointError, load_weights
from pipeline.model import ClipEncoder, FewShotModel


def load_initial_weights(model: FewShotModel, path: Path) -> None:
    """Copy a checkpoint into a model.

    A checkpoint of ours gives the parts that the model has: an end-to-end run's checkpoint also starts a head on the cache. A
    published STAF checkpoint (reference 1.5) gives the head, and the backbone where the model has one.

    Raises:
        CheckpointError: unreadable, or a part of the model is missing in it or has another shape.
        ValueError: a STAF checkpoint that does not fit the head or the backbone.
    """
    content = load_weights(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint.")
    if content.get("format") == FORMAT and "model" in content:
        _load_ours(model, content["model"], path)
    else:
        _load_staf(model, content, path)


def _load_ours(model: FewShotModel, state: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
    if missing or wrong:
        raise CheckpointError(
            f"{path} does not fit this model: it lacks {missing[:3] or 'nothing'}, other shapes in {wrong[:3] or 'nothing'}. "
            "Start from a run with the same head, cubes and classes."
        )
    model.load_state_dict({name: state[name] for name in own})


def _load_staf(model: FewShotModel, content: Mapping[str, Any], path: Path) -> None:
    checkpoint = split_staf_state(content)
    if not isinstance(model.head, MastafHead):
        raise CheckpointError(f"{path} is a STAF checkpoint, but the head is {type(model.head).__name__}, not mastaf.")
    load_staf_head(model.head, checkpoint)
    if isinstance(model.encoder, ClipEncoder):
        # The published file carries the backbone's unused classifier along.
        trunk = {name: value for name, value in checkpoint.backbone.items() if not name.startswith("fc.")}
        copy_weights(model.encoder.backbone, trunk, str(path), ". The published backbone is r3d50.")
