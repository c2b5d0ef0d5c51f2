"""One small network of every family of backbones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from configs.schema import RunConfig
from contracts.world import World

FAMILIES = {
    "r3d": ["backbone.name=r3d18"],
    "torchvision": ["backbone.name=tv_r3d_18"],
    "tsn": ["backbone.name=tsn_resnet18", "head.average_time=true"],
    "small3d": [],
    "vivit": ["backbone.name=vivit"],
}
TINY_VIVIT: dict[str, Any] = {
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 24,
    "num_frames": 8,
    "tubelet_size": [2, 8, 8],
    "hidden_act": "relu",
}


def family_config(world: World, family: str, folder: Path, *overrides: str) -> RunConfig:
    """A config of 8 frames of 24 pixels for a family.

    Args:
        world: the files.
        family: a key of `FAMILIES`.
        folder: gets the weights of a network that has to be read from a directory.
        overrides: `table.key=value`.
    """
    config = world.config(*FAMILIES[family], "sampling.num_frames=8", *overrides)
    changes: dict[str, object] = {} if family == "small3d" else {"options": {}}
    if family == "vivit":
        changes["weights"] = str(tiny_vivit(folder / "vivit"))
    return config.model_copy(update={"backbone": config.backbone.model_copy(update=changes)})


def tiny_vivit(folder: Path, **changes: Any) -> Path:
    """A directory as transformers saves it, whose architecture is not the default one."""
    from transformers import VivitConfig, VivitModel

    torch.manual_seed(0)
    VivitModel(VivitConfig(**{**TINY_VIVIT, **changes})).save_pretrained(folder)
    return folder
