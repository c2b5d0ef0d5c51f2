"""Hara's 3-D ResNets: golden numbers, and the counts and shapes of reference 9.1."""

import json
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from contracts.golden import DEFAULT_DIRECTORY, assert_matches, each_file, family, golden_directory, load
from extract.backbones.r3d import R3D
from extract.build import build_backbone
from extract.config import BackboneConfig, SamplingConfig

SAMPLING = SamplingConfig(num_frames=8, resize_size=32, crop_size=32)
STAGES = {"stat_maxpool": "maxpool", **{f"stat_layer{index}": f"layer{index}" for index in range(1, 5)}}


def generated_entry(key: str, shape: tuple[int, ...], salt: str) -> Tensor:
    """One entry of the state dictionary, drawn from its own name as the golden README says."""
    rng = np.random.default_rng(zlib.crc32((salt + key).encode()))
    values: NDArray[np.float64]
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    if key.endswith("running_var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif key == "fc.weight":
        values = rng.standard_normal(shape) * np.sqrt(1 / 2048)
    elif key.endswith(".weight") and len(shape) == 5:
        values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif key.endswith(".weight"):
        values = rng.uniform(0.5, 0.9, shape)
    else:  # running means and every bias
        values = rng.standard_normal(shape) * 0.1
    return torch.from_numpy(values.astype(np.float32))


def published_shapes(num_classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file; the classifier has as many rows as the golden file says."""
    name = "r3d50_hara_state_dict.json"
    path = golden_directory() / name
    path = path if path.exists() else DEFAULT_DIRECTORY / name  # the names are the same for every set of arrays
    entries: list[tuple[str, list[int]]] = json.loads(path.read_text())["state_dict"]
    shapes = {key: tuple(shape) for key, shape in entries}
    return {key: (num_classes, *shape[1:]) if key.startswith("fc.") else shape for key, shape in shapes.items()}


def make_state(num_classes: int, salt: str) -> dict[str, Tensor]:
    return {key: generated_entry(key, shape, salt) for key, shape in published_shapes(num_classes).items()}


def record_statistics(backbone: Any) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}

    def remember(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            values = output.double()
            found[name] = [
                values.mean().item(),
                values.std(correction=0).item(),
                values.max().item(),
                values.abs().mean().item(),
            ]

        return hook

    for name, module in STAGES.items():
        backbone.get_submodule(module).register_forward_hook(remember(name))
    return found


@each_file("r3d50_hara_")
def test_r3d50_parity_with_golden(golden_file: Path, tmp_path: Path) -> None:
    golden = load(golden_file)
    state = make_state(int(golden["const/n_classes"]), str(golden["const/salt"]))
    weight, bias = state["conv1.weight"], state["fc.bias"]
    checksum = [weight.double().sum().item(), weight.flatten()[0].item(), bias.double().sum().item()]
    np.testing.assert_allclose(checksum, golden["const/weight_checksum_conv1"], rtol=1e-5)  # stored as float32 sums

    # Through a file in the published form, so that the loader is part of what is compared.
    torch.save(
        {"epoch": 200, "arch": "resnet-50", "state_dict": {f"module.{k}": v for k, v in state.items()}},
        tmp_path / "r3d50.pth",
    )
    backbone: Any = build_backbone(BackboneConfig(name="r3d50", weights=str(tmp_path / "r3d50.pth")), SAMPLING)
    (tmp_path / "r3d50.pth").unlink()  # pytest keeps its folders, and this file has 190 MB
    statistics = record_statistics(backbone)
    clips = np.random.default_rng(int(golden["in/rng_seed"])).standard_normal(golden["in/shape"]).astype(np.float32)
    np.testing.assert_allclose([clips.flat[0], clips.flat[-1]], golden["in/checksum"][1:], rtol=1e-6)
    with torch.inference_mode():
        cube = backbone(torch.from_numpy(clips))["cube"]
        pooled = cube.mean((2, 3, 4))
        logits = nn.functional.linear(pooled, state["fc.weight"], state["fc.bias"])

    assert_matches(golden_file, "out/features", cube, double=False)
    assert_matches(golden_file, "out/pooled", pooled, double=False)
    assert_matches(golden_file, "out/logits", logits, double=False)
    for name, values in statistics.items():
        assert_matches(golden_file, f"out/{name}", values, double=False)
    covered = {"features", "pooled", "logits", *statistics}
    assert covered == {name.removeprefix("out/") for name in golden if name.startswith("out/")}


@each_file("r3d50_hara_state_dict", ".json")
def test_state_dict_names_parity_with_the_published_file(golden_file: Path) -> None:
    if not golden_file.exists():
        family("r3d50_hara_state_dict", ".json")  # reports the absence
    published = json.loads(golden_file.read_text())
    wanted = {key: tuple(shape) for key, shape in published["state_dict"] if not key.startswith("fc.")}
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in R3D(50).state_dict().items()}
    assert ours == wanted
    assert list(ours) == list(wanted)


def test_parameter_counts_are_those_of_the_published_networks() -> None:
    def count(depth: int) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in R3D(depth).parameters())

    assert count(50) == 46_198_976
    for num_classes, total in (
        (700, 47_633_276),
        (1039, 48_327_887),
        (1139, 48_532_787),
        (339, 46_893_587),
        (100, 46_403_876),
    ):
        assert count(50) + 2048 * num_classes + num_classes == total
    # 17 more bottlenecks in stage 3: 1024 -> 256, 256 -> 256 with 27 taps, 256 -> 1024, and their normalisations.
    assert count(101) - count(50) == 17 * (1024 * 256 + 27 * 256 * 256 + 256 * 1024 + 2 * (256 + 256 + 1024))
    basic = {64: 0, 128: 0, 256: 0, 512: 0}
    for width in basic:
        basic[width] = 2 * 27 * width * width + 4 * width
    added = basic[64] + 2 * basic[128] + 4 * basic[256] + basic[512]
    assert count(34) - count(18) == added
    shortcuts = sum(width * 2 * width + 2 * 2 * width for width in (64, 128, 256))
    first_blocks = sum(27 * width * 2 * width + 27 * 4 * width * width + 8 * width for width in (64, 128, 256))
    stem = 3 * 64 * 343 + 128
    assert count(18) == stem + 2 * basic[64] + first_blocks + basic[128] + basic[256] + basic[512] + shortcuts


@pytest.mark.parametrize(
    ("frames", "side", "cube"),
    [(16, 224, (1, 7, 7)), (8, 224, (1, 7, 7)), (32, 224, (2, 7, 7)), (16, 112, (1, 4, 4)), (64, 224, (4, 7, 7))],
)
def test_cube_shapes_are_those_of_the_reference(frames: int, side: int, cube: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        for depth in (18, 34, 50, 101):
            channels = 2048 if depth >= 50 else 512
            assert R3D(depth)(torch.empty(1, 3, frames, side, side))["cube"].shape == (1, channels, *cube)


def test_stage_shapes_are_those_of_the_reference() -> None:
    shapes: dict[str, tuple[int, ...]] = {}

    def remember(name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        shapes[name] = tuple(output.shape[1:])

    with torch.device("meta"):
        backbone = R3D(50)
        for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            backbone.get_submodule(name).register_forward_hook(partial(remember, name))
        backbone(torch.empty(1, 3, 16, 224, 224))
    assert shapes == {
        "conv1": (64, 16, 112, 112),
        "maxpool": (64, 8, 56, 56),
        "layer1": (256, 8, 56, 56),
        "layer2": (512, 4, 28, 28),
        "layer3": (1024, 2, 14, 14),
        "layer4": (2048, 1, 7, 7),
    }
