"""The contract over every backbone, and torchvision's networks against torchvision itself."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from contracts.backbone_contract import BackboneContract
from extract.backbones.small3d import Small3DOptions
from extract.build import BACKBONES, build_backbone
from extract.config import BackboneConfig, SamplingConfig

SAMPLING = SamplingConfig(num_frames=8, resize_size=32, crop_size=32)
SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    "vivit": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48},
    "small3d": {"width": 8},
}
DEFAULT_OPTIONS: dict[str, dict[str, Any]] = {
    "vivit": {"tubelet_size": (2, 16, 16), "inflation": "central", "min_frames": 8},
    "small3d": {"depth": 1, "subtract_mean": False},
}
OTHER_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "vivit": [
        {"hidden_size": 36},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 4},
        {"intermediate_size": 40},
        {"tubelet_size": (4, 16, 16)},
    ],
    "small3d": [{"width": 12}, {"depth": 2}, {"subtract_mean": True}],
}
LARGER = {"r3d34", "r3d101", "tsn_resnet34", "tsn_resnet101"}
"""Of families whose smaller members, with both kinds of blocks, are tried as well."""
TORCHVISION_VIDEO = ["r3d_18", "mc3_18", "r2plus1d_18"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LARGER else name for name in BACKBONES],
    scope="class",
)
class TestEveryBackbone(BackboneContract):
    @pytest.fixture
    def config(self, name: str) -> BackboneConfig:
        return BackboneConfig(name=name, weights="random:1", options=SMALL_OPTIONS.get(name, {}))

    @pytest.fixture
    def sampling(self) -> SamplingConfig:
        return SAMPLING

    @pytest.fixture
    def default_options(self, name: str) -> dict[str, Any]:
        return DEFAULT_OPTIONS.get(name, {})

    @pytest.fixture
    def other_options(self, name: str) -> list[dict[str, Any]]:
        return OTHER_OPTIONS.get(name, [])


def test_no_two_backbones_state_the_same_architecture_within_a_family() -> None:
    stated: dict[str, str] = {}
    with torch.device("meta"):
        for name in BACKBONES:
            module: Any = build_backbone(BackboneConfig(name=name, options=SMALL_OPTIONS.get(name, {})), SAMPLING)
            stated[name] = f"{type(module).__name__} {json.dumps(module.architecture, sort_keys=True)}"
    assert len(set(stated.values())) == len(BACKBONES), stated
    assert stated["r3d50"] == 'R3D {"depth": 50, "shortcut": "B"}'
    assert stated["tsn_resnet50"] == 'FrameResNet {"depth": 50}'
    assert stated["tv_mc3_18"] == 'VideoTrunk {"model": "mc3_18"}'
    assert stated["small3d"] == 'Small3D {"depth": 1, "subtract_mean": false, "width": 8}'


def give_random_statistics(network: nn.Module, seed: int) -> None:
    """Batch normalisation with statistics that are no identity by accident."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)


@pytest.mark.parametrize("model", TORCHVISION_VIDEO)
def test_torchvision_video_parity(model: str, tmp_path: Any) -> None:
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = models.get_model(model, weights=None, num_classes=11).eval()
    give_random_statistics(network, 4)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    ours = build_backbone(BackboneConfig(name=f"tv_{model}", weights=str(tmp_path / "weights.pth")), SAMPLING)
    (tmp_path / "weights.pth").unlink()  # pytest keeps its folders
    clips = torch.randn((2, 3, 8, 48, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cube = ours(clips)["cube"]
        logits = network.fc(cube.mean((2, 3, 4)))
        assert (logits - network(clips)).abs().max() <= 1e-5 * logits.abs().max()  # the parity bound of the style guide
    assert cube.shape == (2, 512, 8 if model == "mc3_18" else 1, 3, 3)


@pytest.mark.parametrize("depth", [18, 50])
def test_tsn_parity_with_torchvision_frame_by_frame(depth: int, tmp_path: Any) -> None:
    from torchvision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = models.get_model(f"resnet{depth}", weights=None, num_classes=7).eval()
    give_random_statistics(network, 4)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    ours = build_backbone(BackboneConfig(name=f"tsn_resnet{depth}", weights=str(tmp_path / "weights.pth")), SAMPLING)
    (tmp_path / "weights.pth").unlink()  # pytest keeps its folders
    clips = torch.randn((2, 3, 5, 64, 96), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        cube = ours(clips)["cube"]
        assert cube.shape == (2, 512 if depth == 18 else 2048, 5, 2, 3)
        for clip in range(2):
            for frame in range(5):
                logits = network(clips[clip : clip + 1, :, frame])[0]
                found = network.fc(cube[clip, :, frame].mean((1, 2)))
                assert (found - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_tsn_keeps_every_frame_at_224() -> None:
    with torch.device("meta"):
        from torchvision import models

        from extract.backbones.tsn import FrameResNet

        backbone = FrameResNet(models.get_model("resnet50", weights=None), 50)
        assert backbone(torch.empty(2, 3, 8, 224, 224))["cube"].shape == (2, 2048, 8, 7, 7)


def test_small3d_is_small_and_keeps_time() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from extract.backbones.small3d import Small3D

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        assert Small3D(Small3DOptions())(torch.empty(1, 3, 8, 64, 64))["cube"].shape == (1, 96, 4, 4, 4)
    assert counter.get_total_flops() / 2 <= 120e6  # multiply-adds
    deeper = build_backbone(BackboneConfig(name="small3d", options={"width": 16, "depth": 2}), SAMPLING)
    assert deeper.channels == 64


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no backbone 'r3d52'. Did you mean r3d50\?"):
        build_backbone(BackboneConfig(name="r3d52"), SAMPLING)


def test_list_of_backbones_and_training_on_cubes_need_neither_torchvision_nor_transformers() -> None:
    """They cost more than a second and 200 MB of each process."""
    modules = "extract.build, pipeline.train_command, pipeline.train_heads, pipeline.reproduce_command"
    code = f"import sys, {modules}; print([n for n in ('torchvision', 'transformers') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert all(entry.description for entry in BACKBONES.values())


def test_none_means_random_zero() -> None:
    from extract.build import weights_digest

    digests = [
        weights_digest(build_backbone(BackboneConfig(name="small3d", weights=w), SAMPLING))
        for w in ("none", "random:0")
    ]
    assert digests[0] == digests[1]
