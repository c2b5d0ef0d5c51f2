"""Per-frame ResNets: the image network of a temporal segment network (TSN), keeping every frame's last map.

Papers: "Temporal Segment Networks", ECCV 2016, https://arxiv.org/abs/1608.00859; "Deep Residual Learning", CVPR 2016,
https://arxiv.org/abs/1512.03385. The network itself is torchvision's, so no code was consulted; the names in the checkpoints
of TRX (https://github.com/tobyperrett/trx, commit 390c20a) and its kin are from theirs.
Deviation: no consensus over frames; a head that wants one map averages over T.

Letters: B clips; F frames; H W pixels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from extract.backbone import IMAGENET
from extract.config import BackboneConfig, SamplingConfig
from extract.weights import NoOptions, StateDict, checked_options, load_weights, trunk_state_dict

# TRX and STRM number the parts of torchvision's ResNet; 2 and 3 have no weights.
PUBLISHED_PARTS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


class FrameResNet(nn.Module):
    """A torchvision ResNet without pooling and fc, under torchvision's own parameter names."""

    preprocessing = IMAGENET

    def __init__(self, resnet: nn.Module, depth: int) -> None:
        super().__init__()
        # Everything but avgpool and fc, in the order in which torchvision applies it.
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, resnet.get_submodule(name))
        classifier = resnet.get_submodule("fc")
        assert isinstance(classifier, nn.Linear)
        self.channels = classifier.in_features
        self.architecture: dict[str, Any] = {"depth": depth}

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """Embed clips: (B, 3, F, H, W) float32 -> {"cube": (B, C, F, H/32, W/32)}, sizes rounded up."""
        num_clips, _, num_frames = frames.shape[:3]
        hidden = frames.transpose(1, 2).flatten(0, 1)  # (B F, 3, H, W)
        for module in self.children():
            hidden = module(hidden)
        return {"cube": hidden.reshape(num_clips, num_frames, *hidden.shape[1:]).transpose(1, 2).contiguous()}


def published_state_dict(content: Mapping[str, Any], path: Path) -> StateDict:
    """Trunk weights out of any file with such a network.

    Takes torchvision's files and our own trunks, and the training checkpoints of TRX, STRM and TA2N (bare, or under
    "model_state_dict"), whose network is `resnet.*` with numbered or named parts; `module.` is removed wherever it
    occurs, and fc and the parts of a head are left out.
    """
    inner = content.get("model_state_dict")
    state = trunk_state_dict(inner if isinstance(inner, Mapping) else content, path, dropped=("fc.",))
    if not any(key.startswith("resnet.") for key in state):
        return state
    trunk: StateDict = {}
    for key, value in state.items():
        network, _, name = key.partition(".")
        part, _, rest = name.partition(".")
        if network == "resnet" and part != "fc":
            trunk[f"{PUBLISHED_PARTS.get(part, part)}.{rest}"] = value
    return trunk


def build_tsn(config: BackboneConfig, sampling: SamplingConfig, *, depth: int) -> nn.Module:
    """The trunk of one depth with its weights."""
    del sampling  # any clip size will do
    checked_options(NoOptions, config.options, config.name)
    from torchvision import models

    def pretrained() -> StateDict:
        weights = models.get_model_weights(f"resnet{depth}").IMAGENET1K_V1
        return trunk_state_dict(
            weights.get_state_dict(progress=False, check_hash=True), Path(weights.url), dropped=("fc.",)
        )

    module = FrameResNet(models.get_model(f"resnet{depth}", weights=None), depth)
    load_weights(module, config, published_state_dict, pretrained)
    return module
