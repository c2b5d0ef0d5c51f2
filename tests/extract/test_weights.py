"""Weights: every kind of file that Hara's networks come in, and the refusal of everything else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from extract.backbones import r3d
from extract.build import build_backbone, weights_digest
from extract.config import BackboneConfig, SamplingConfig
from extract.weights import WeightsError, copy_weights

SAMPLING = SamplingConfig(num_frames=8, resize_size=32, crop_size=32)


@pytest.fixture(scope="module", autouse=True)
def narrow_networks() -> Iterator[None]:
    """Few channels in every stage, so that files are small; names and depths are the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r3d, "STAGE_WIDTHS", (8, 16, 24, 32))
        yield


@pytest.fixture(scope="module")
def trunk(narrow_networks: None) -> nn.Module:
    del narrow_networks  # it only has to come first
    return build_backbone(BackboneConfig(name="r3d18", weights="random:4"), SAMPLING)


def load_r3d18(content: object, path: Path, name: str = "r3d18") -> nn.Module:
    torch.save(content, path)
    return build_backbone(BackboneConfig(name=name, weights=str(path)), SAMPLING)


def with_classifier(trunk: nn.Module, num_classes: int = 700) -> dict[str, Tensor]:
    return {**trunk.state_dict(), "fc.weight": torch.zeros(num_classes, 512), "fc.bias": torch.zeros(num_classes)}


@pytest.mark.parametrize("num_prefixes", [0, 1, 2])
@pytest.mark.parametrize("entry", ["state_dict", None])
def test_published_files_load_with_any_number_of_prefixes(
    num_prefixes: int, entry: str | None, trunk: nn.Module, tmp_path: Path
) -> None:
    state = {"module." * num_prefixes + key: value for key, value in with_classifier(trunk).items()}
    loaded = load_r3d18({"epoch": 200, "arch": "resnet-18", entry: state} if entry else state, tmp_path / "r3d18.pth")
    assert weights_digest(loaded) == weights_digest(trunk)


@pytest.mark.parametrize("prefix", ["base.", "base.module."])
@pytest.mark.parametrize("is_final", [False, True])
def test_trunk_of_a_staf_checkpoint_loads(prefix: str, is_final: bool, trunk: nn.Module, tmp_path: Path) -> None:
    state = {prefix + key: value for key, value in with_classifier(trunk).items()}
    state |= {"cam.conv1.conv.weight": torch.zeros(6, 49, 1, 1), "classifier.weight": torch.zeros(64, 512, 1, 1, 1)}
    content = (
        state if is_final else {"iteration": 5, "model_state_dict": state, "optimizer_state_dict": {}, "scheduler": {}}
    )
    loaded = load_r3d18(content, tmp_path / "fully_trained.pt")
    assert weights_digest(loaded) == weights_digest(trunk)


def test_file_without_batch_counters_loads(trunk: nn.Module, tmp_path: Path) -> None:
    state = {key: value for key, value in trunk.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert weights_digest(load_r3d18(state, tmp_path / "old.pth")) == weights_digest(trunk)


def test_safetensors_file_loads(trunk: nn.Module, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(trunk.state_dict(), tmp_path / "r3d18.safetensors")
    loaded = build_backbone(BackboneConfig(name="r3d18", weights=str(tmp_path / "r3d18.safetensors")), SAMPLING)
    assert weights_digest(loaded) == weights_digest(trunk)


def refusal(content: object, path: Path, name: str = "r3d18") -> str:
    with pytest.raises(WeightsError) as caught:
        load_r3d18(content, path, name)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_file_of_another_depth_names_the_right_backbone(trunk: nn.Module, tmp_path: Path) -> None:
    message = refusal(with_classifier(trunk), tmp_path / "r3d18.pth", "r3d34")
    assert "depth 18, not 34. Use --backbone r3d18" in message


def test_file_of_shortcut_type_a_is_explained(trunk: nn.Module, tmp_path: Path) -> None:
    state = {key: value for key, value in trunk.state_dict().items() if "downsample" not in key}
    assert "shortcut type A" in refusal(state, tmp_path / "old.pth")


def test_missing_unknown_and_misshapen_entries_are_listed(trunk: nn.Module, tmp_path: Path) -> None:
    state = with_classifier(trunk)
    state["layer9.weight"] = state.pop("conv1.weight")
    state["bn1.weight"] = torch.zeros(3)
    message = refusal(state, tmp_path / "odd.pth")
    for part in ("1 missing (conv1.weight)", "1 unknown (layer9.weight)", "bn1.weight (3,) instead of (64,)"):
        assert part in message


def test_nothing_is_copied_from_a_file_that_does_not_fit(trunk: nn.Module) -> None:
    before = weights_digest(trunk)
    state = {key: torch.zeros_like(value) for key, value in trunk.state_dict().items()}
    state["bn1.weight"] = torch.zeros(3)
    with pytest.raises(WeightsError):
        copy_weights(trunk, state, "file")
    assert weights_digest(trunk) == before


def test_enormous_expanded_tensor_is_refused_before_it_is_copied(trunk: nn.Module, tmp_path: Path) -> None:
    state = dict(trunk.state_dict())
    state["bn1.weight"] = torch.zeros(1).expand(2**34)
    assert "bn1.weight (17179869184,) instead of (64,)" in refusal(state, tmp_path / "bomb.pth")


def test_numbers_that_are_not_finite_are_refused_and_the_first_is_named(trunk: nn.Module, tmp_path: Path) -> None:
    before = weights_digest(trunk)
    for number in (float("nan"), float("inf"), -float("inf")):
        state = {key: value.clone() for key, value in trunk.state_dict().items()}
        for key in ("layer1.0.conv1.weight", "bn1.running_var"):
            state[key].view(-1)[-1] = number
        with pytest.raises(WeightsError, match=r"file holds numbers that are not finite, first in bn1\.running_var;"):
            copy_weights(trunk, state, "file")
    assert weights_digest(trunk) == before
    assert "first in layer4.1.bn2.bias" in refusal(
        {**trunk.state_dict(), "layer4.1.bn2.bias": torch.full((32,), float("nan"))}, tmp_path / "diverged.pth"
    )


def test_number_that_overflows_the_type_of_the_network_is_refused() -> None:
    module = nn.Linear(2, 1, bias=False)
    copy_weights(module, {"weight": torch.tensor([[1e30, 2.0]], dtype=torch.float64)}, "file")
    with pytest.raises(WeightsError, match="not finite, first in weight"):
        copy_weights(module, {"weight": torch.tensor([[1e300, 2.0]], dtype=torch.float64)}, "file")


def holder(name: str, value: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer(name, value)
    return module


def test_digest_holds_name_dtype_shape_and_bytes() -> None:
    plain = holder("weight", torch.zeros(2, 3))
    assert weights_digest(plain) == weights_digest(holder("weight", torch.zeros(2, 3)))
    others = {
        "name": holder("bias", torch.zeros(2, 3)),
        "dtype": holder("weight", torch.zeros(2, 3, dtype=torch.int32)),  # the same 24 bytes
        "shape": holder("weight", torch.zeros(3, 2)),
        "number of axes": holder("weight", torch.zeros(6)),
        "bytes": holder("weight", torch.ones(2, 3)),
    }
    for part, module in others.items():
        assert weights_digest(module) != weights_digest(plain), part


def test_digest_does_not_depend_on_the_order_of_the_entries_or_of_the_memory() -> None:
    first, second = holder("a", torch.zeros(2)), holder("b", torch.ones(2))
    first.register_buffer("b", torch.ones(2))
    second.register_buffer("a", torch.zeros(2))
    assert weights_digest(first) == weights_digest(second)
    matrix = torch.arange(6.0).reshape(2, 3)
    assert weights_digest(holder("a", matrix)) == weights_digest(holder("a", matrix.T.contiguous().T))


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("payload_ran"),))


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "was refused" in refusal({"state_dict": {"a": Payload()}}, tmp_path / "evil.pth")
    assert not (tmp_path / "payload_ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {}}, {"epoch": 3}, {"state_dict": {"conv1.weight": 3}}])
def test_content_that_is_no_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    assert "state dict" in refusal(content, tmp_path / "odd.pth")


@pytest.mark.parametrize("name", ["text.pth", "empty.pth", "text.safetensors"])
def test_file_that_is_no_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("" if name.startswith("empty") else "hello, this is no checkpoint")
    with pytest.raises(WeightsError, match=name):
        build_backbone(BackboneConfig(name="r3d18", weights=str(tmp_path / name)), SAMPLING)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("absent.pth", "'absent.pth' are not a file"),
        ("random:", "a whole number"),
        ("random:-1", "a whole number"),
        ("pretrained", "give it with --weights FILE"),
    ],
)
def test_weights_that_cannot_be_had_say_what_to_give(weights: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        build_backbone(BackboneConfig(name="r3d18", weights=weights), SAMPLING)


def test_published_weights_without_a_network_name_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    for name in ("tsn_resnet18", "tv_mc3_18"):
        with pytest.raises(WeightsError, match=rf"published weights of {name} .*no route to host.*--weights FILE"):
            build_backbone(BackboneConfig(name=name, weights="pretrained"), SAMPLING)
