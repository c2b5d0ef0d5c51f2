"""The backbones by name. A new one is a file in extract/backbones/ and a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

from torch import nn

from extract.backbones.r3d import build_r3d
from extract.backbones.small3d import build_small3d
from extract.backbones.torchvision3d import build_torchvision3d
from extract.backbones.tsn import build_tsn
from extract.backbones.vivit import build_vivit
from extract.config import BackboneConfig, SamplingConfig
from extract.weights import BackboneError, own_randomness, random_seed, weights_digest

__all__ = ["BACKBONES", "BackboneEntry", "BackboneError", "build_backbone", "weights_digest"]


@dataclass(frozen=True, slots=True)
class BackboneEntry:
    """One line of `mastaf list backbones`, and how to make it."""

    description: str
    """A few words for a person."""
    build: Callable[[BackboneConfig, SamplingConfig], nn.Module]
    """Called under `own_randomness`; gives a module that follows extract.backbone.Backbone, weights loaded."""


BACKBONES: dict[str, BackboneEntry] = {
    "r3d18": BackboneEntry("Hara's 3-D ResNet-18", partial(build_r3d, depth=18)),
    "r3d34": BackboneEntry("Hara's 3-D ResNet-34", partial(build_r3d, depth=34)),
    "r3d50": BackboneEntry("Hara's 3-D ResNet-50, the backbone of the published MASTAF", partial(build_r3d, depth=50)),
    "r3d101": BackboneEntry("Hara's 3-D ResNet-101", partial(build_r3d, depth=101)),
    "tv_r3d_18": BackboneEntry("torchvision's 3-D ResNet-18", partial(build_torchvision3d, model="r3d_18")),
    "tv_mc3_18": BackboneEntry("torchvision's mixed 3-D/2-D ResNet-18", partial(build_torchvision3d, model="mc3_18")),
    "tv_r2plus1d_18": BackboneEntry("torchvision's R(2+1)D-18", partial(build_torchvision3d, model="r2plus1d_18")),
    "tsn_resnet18": BackboneEntry("image ResNet-18 on every frame (TSN)", partial(build_tsn, depth=18)),
    "tsn_resnet34": BackboneEntry("image ResNet-34 on every frame (TSN)", partial(build_tsn, depth=34)),
    "tsn_resnet50": BackboneEntry("image ResNet-50 on every frame (TSN)", partial(build_tsn, depth=50)),
    "tsn_resnet101": BackboneEntry("image ResNet-101 on every frame (TSN)", partial(build_tsn, depth=101)),
    "vivit": BackboneEntry("video transformer with joint attention; needs mastaf[vivit]", build_vivit),
    "small3d": BackboneEntry("small 3-D residual network for the demo and tests", build_small3d),
}


def build_backbone(config: BackboneConfig, sampling: SamplingConfig) -> nn.Module:
    """The network of a config with its weights, in evaluation mode, on the CPU. No global random state is touched."""
    if config.name not in BACKBONES:
        close = get_close_matches(config.name, BACKBONES, n=1)
        guess = f" Did you mean {close[0]}?" if close else ""
        raise BackboneError(f"there is no backbone {config.name!r}.{guess} Known: {', '.join(BACKBONES)}")
    with own_randomness(random_seed(config.weights) or 0):
        module = BACKBONES[config.name].build(config, sampling)
    return module.eval()
