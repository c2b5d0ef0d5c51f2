"""torchvision's 18-layer video networks: r3d_18, mc3_18 and r2plus1d_18.

Paper: "A Closer Look at Spatiotemporal Convolutions for Action Recognition", CVPR 2018, https://arxiv.org/abs/1711.11248.
The networks are torchvision's, so no code was consulted. Deviation: no average pooling and no fc at the end.

Letters: B clips; F frames; H W pixels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from extract.backbone import KINETICS_TORCHVISION
from extract.config import BackboneConfig, SamplingConfig
from extract.weights import NoOptions, StateDict, checked_options, load_weights, trunk_state_dict


class VideoTrunk(nn.Module):
    """Stem and stages under torchvision's own parameter names."""

    preprocessing = KINETICS_TORCHVISION

    def __init__(self, network: nn.Module, model: str) -> None:
        super().__init__()
        for name in ("stem", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, network.get_submodule(name))
        classifier = network.get_submodule("fc")
        assert isinstance(classifier, nn.Linear)
        self.channels = classifier.in_features
        self.architecture: dict[str, Any] = {"model": model}

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """Embed clips: (B, 3, F, H, W) float32 -> {"cube": (B, 512, F/8, H/16, W/16)}; mc3_18 keeps all F frames."""
        hidden = frames
        for module in self.children():
            hidden = module(hidden)
        return {"cube": hidden}


def build_torchvision3d(config: BackboneConfig, sampling: SamplingConfig, *, model: str) -> nn.Module:
    """The trunk of one torchvision model with its weights."""
    del sampling  # any clip size will do
    checked_options(NoOptions, config.options, config.name)
    from torchvision import models

    def convert(content: Mapping[str, Any], path: Path) -> StateDict:
        return trunk_state_dict(content, path, dropped=("fc.",))

    def pretrained() -> StateDict:
        weights = models.get_model_weights(model).KINETICS400_V1
        return trunk_state_dict(
            weights.get_state_dict(progress=False, check_hash=True), Path(weights.url), dropped=("fc.",)
        )

    module = VideoTrunk(models.get_model(model, weights=None), model)
    load_weights(module, config, convert, pretrained)
    return module
