"""Runs that start from published TRX, STRM and TA2N checkpoints of the real names and shapes: ResNet-50, 2048 channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts.published_files import as_training_file, filled, resnet_shapes, strm_shapes, ta2n_shapes, trx_shapes
from episodes.build import build_head
from extract.build import build_backbone
from extract.config import BackboneConfig, SamplingConfig
from extract.weights import WeightsError, weights_digest
from pipeline.checkpoint import CheckpointError
from pipeline.initial_weights import FORMATS, load_initial_weights
from pipeline.model import ClipEncoder, FewShotModel

SAMPLING = SamplingConfig(num_frames=8, resize_size=64, crop_size=64, normalization="unit")
SHAPES = {"trx": (2048, 8, 7, 7), "strm": (2048, 8, 7, 7), "ta2n": (2048, 8, 7, 7)}
OPTIONS: dict[str, dict[str, Any]] = {"trx": {}, "strm": {"aux_head": "frozen_random"}, "ta2n": {}}


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return build_backbone(BackboneConfig(name="tsn_resnet50", weights="random:4"), SAMPLING)


def published_state(trunk: nn.Module, head: str, inner: str) -> dict[str, Tensor]:
    shapes = trx_shapes() if head == "trx" else strm_shapes(inner=inner)
    return filled({**resnet_shapes(trunk, inner), **shapes})


def model_with(encoder: nn.Module, head: str) -> FewShotModel:
    return FewShotModel(encoder, build_head(head, OPTIONS[head], SHAPES[head], None, True))


@pytest.mark.parametrize("inner", ["", ".module"], ids=["one GPU", "several GPUs"])
@pytest.mark.parametrize("head", ["trx", "strm"])
def test_published_checkpoint_fills_head_and_backbone(
    tmp_path: Path, resnet50: nn.Module, head: str, inner: str
) -> None:
    state = published_state(resnet50, head, inner)
    torch.save(as_training_file(state), tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").stat().st_size < 2**20
    model = model_with(ClipEncoder(resnet50, SAMPLING), head)
    load_initial_weights(model, tmp_path / "checkpoint.pt")
    loaded = model.state_dict()
    for ours, theirs in {
        "encoder.backbone.conv1.weight": f"resnet{inner}.0.weight",
        "encoder.backbone.bn1.running_var": f"resnet{inner}.1.running_var",
        "encoder.backbone.layer1.0.conv1.weight": f"resnet{inner}.4.0.conv1.weight",
        "encoder.backbone.layer4.2.bn3.num_batches_tracked": f"resnet{inner}.7.2.bn3.num_batches_tracked",
        "head.transformers.0.key.weight": "transformers.0.k_linear.weight",
    }.items():
        assert torch.equal(loaded[ours], state[theirs]), ours
    if head == "strm":
        assert torch.equal(loaded["head.patches.mixer.4.weight"], state[f"attn_pat{inner}.Bot_MLP.out_fc.weight"])


@pytest.mark.parametrize("inner", ["", ".module"], ids=["one GPU", "several GPUs"])
def test_published_ta2n_checkpoint_fills_head_and_backbone(tmp_path: Path, resnet50: nn.Module, inner: str) -> None:
    # Its network keeps torchvision's names.
    state = filled({**resnet_shapes(resnet50, inner, is_numbered=False), **ta2n_shapes()})
    torch.save(as_training_file(state), tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").stat().st_size < 2**20
    model = model_with(ClipEncoder(resnet50, SAMPLING), "ta2n")
    load_initial_weights(model, tmp_path / "checkpoint.pt")
    loaded = model.state_dict()
    for ours, theirs in {
        "encoder.backbone.conv1.weight": f"resnet{inner}.conv1.weight",
        "encoder.backbone.layer4.2.bn3.running_var": f"resnet{inner}.layer4.2.bn3.running_var",
        "head.alignment.temporal.network.first.weight": "align.firststage.locnet.0.weight",
        "head.alignment.coordination.network.second_norm.running_mean": "align.secondstage.mvnet.5.running_mean",
    }.items():
        assert torch.equal(loaded[ours], state[theirs]), ours
    assert torch.equal(loaded["head.alignment.fusion.key.weight"], state["align.keynet_multi.weight"][:, :, 0])


def test_head_on_the_cache_takes_its_part_alone(tmp_path: Path, resnet50: nn.Module) -> None:
    state = published_state(resnet50, "trx", "")
    torch.save(state, tmp_path / "bare.pt")
    model = model_with(nn.Identity(), "trx")
    load_initial_weights(model, tmp_path / "bare.pt")
    assert torch.equal(model.state_dict()["head.transformers.1.value.weight"], state["transformers.1.v_linear.weight"])


def test_another_head_is_told_its_name(tmp_path: Path, resnet50: nn.Module) -> None:
    torch.save(published_state(resnet50, "strm", ".module"), tmp_path / "strm.pt")
    with pytest.raises(CheckpointError, match=r'STRM checkpoint, but the head is TrxHead; set head\.name = "strm"'):
        load_initial_weights(model_with(nn.Identity(), "trx"), tmp_path / "strm.pt")


def test_file_of_no_known_kind_names_the_known_ones(tmp_path: Path, resnet50: nn.Module) -> None:
    torch.save(resnet50.state_dict(), tmp_path / "resnet50.pt")
    known = ", ".join(kind.name for kind in FORMATS)
    with pytest.raises(CheckpointError, match=rf"conv1\.weight.*{known}.*\[backbone\] weights"):
        load_initial_weights(model_with(nn.Identity(), "trx"), tmp_path / "resnet50.pt")


@pytest.mark.parametrize("inner", ["", ".module"], ids=["one GPU", "several GPUs"])
@pytest.mark.parametrize("is_numbered", [True, False])
def test_extraction_takes_the_backbone_of_a_published_checkpoint(tmp_path: Path, inner: str, is_numbered: bool) -> None:
    trunk = build_backbone(BackboneConfig(name="tsn_resnet18", weights="random:4"), SAMPLING)
    names = list(resnet_shapes(trunk, inner, is_numbered))
    state = dict(zip(names, trunk.state_dict().values(), strict=True))
    state |= filled(
        {**strm_shapes(inner=inner), "align.keynet_multi.weight": (4, 4, 1), f"resnet{inner}.fc.bias": (9,)}
    )
    torch.save(as_training_file(state), tmp_path / "checkpoint.pt")
    config = BackboneConfig(name="tsn_resnet18", weights=str(tmp_path / "checkpoint.pt"))
    assert weights_digest(build_backbone(config, SAMPLING)) == weights_digest(trunk)


def test_extraction_with_another_depth_is_refused(tmp_path: Path, resnet50: nn.Module) -> None:
    torch.save(published_state(resnet50, "trx", ""), tmp_path / "checkpoint.pt")
    config = BackboneConfig(name="tsn_resnet18", weights=str(tmp_path / "checkpoint.pt"))
    with pytest.raises(WeightsError, match="does not fit this network"):
        build_backbone(config, SAMPLING)
