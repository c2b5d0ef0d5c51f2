"""Checkpoints of the released TA2N code, made here with their real names and shapes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contracts import golden
from contracts.compared import Compared
from contracts.published_files import as_training_file, filled, ta2n_shapes
from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs
from episodes.heads.ta2n import TA2NHead, TA2NOptions
from episodes.heads.ta2n_checkpoint import TA2NCheckpointError, load_ta2n_head

CHANNELS = 2048


def published_state(channels: int = CHANNELS, gpus: int = 1) -> dict[str, Tensor]:
    """A state dict with the names and shapes of the released code."""
    wrapped = "module." if gpus > 1 else ""
    backbone = {f"resnet.{wrapped}conv1.weight": (64, 3, 7, 7), f"resnet.{wrapped}bn1.running_mean": (64,)}
    return filled({**backbone, **ta2n_shapes(channels)})


def head(channels: int = CHANNELS, **options: Any) -> TA2NHead:
    return TA2NHead(TA2NOptions.model_validate(options), HeadInputs((channels, 8, 7, 7)))


@pytest.mark.parametrize("gpus", [1, 2])
def test_file_of_the_released_code_is_read(tmp_path: Path, gpus: int) -> None:
    torch.save({**as_training_file(published_state(gpus=gpus)), "iteration": "best"}, tmp_path / "checkpoint.pt")
    ours = head()
    load_ta2n_head(ours, torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    loaded, state = ours.alignment.state_dict(), published_state()
    pairs = {
        "temporal.network.first.weight": "firststage.locnet.0.weight",
        "temporal.network.second_norm.running_var": "firststage.locnet.5.running_var",
        "temporal.network.out.bias": "firststage.locnet.12.bias",
        "coordination.network.second.bias": "secondstage.mvnet.4.bias",
        "coordination.network.hidden.weight": "secondstage.mvnet.10.weight",
        "coordination.network.first_norm.num_batches_tracked": "secondstage.mvnet.1.num_batches_tracked",
        "coordination.query.weight": "secondstage.querynet.weight",
        "fusion.value.weight": "valuenet_multi.weight",
    }
    for name, theirs in pairs.items():
        expected = state[f"align.{theirs}"]
        assert torch.equal(loaded[name], expected.reshape(loaded[name].shape)), name
    # Every tensor has a number of its own, so that none was mistaken for another.
    assert len({float(value.flatten()[0]) for value in loaded.values()}) == len(loaded) == len(ta2n_shapes())


@golden.each_file("ta2n_full_")
@pytest.mark.parametrize("gpus", [1, 2])
def test_imported_head_gives_the_golden_logits_parity(golden_file: Path, gpus: int) -> None:
    file = Compared(golden_file, torch.float32)
    state: dict[str, Tensor] = {}
    for source, stage in (("ttm", "firststage."), ("acm", "secondstage."), ("", "")):
        stage_file = Compared(golden_file.parent / f"ta2n_{source}.npz", torch.float32) if source else file
        tensors = {**stage_file.group("param"), **stage_file.group("buffer")}
        state |= {f"{'module.' if gpus > 1 else ''}align.{stage}{name}": value for name, value in tensors.items()}
    channels, steps, height, width = file.arrays["in/query"].shape[1:]
    ours = TA2NHead(TA2NOptions(), HeadInputs((channels, steps, height, width)))
    load_ta2n_head(ours, {"model_state_dict": state})
    way, shot = int(file.number("const/way")), int(file.number("const/shot"))
    labels = torch.arange(way).repeat_interleave(shot)[None]
    batch = EpisodeBatch(file.tensor("in/support")[None], labels, file.tensor("in/query")[None], None, way)
    file.matches("out_eval/logits", ours.eval()(batch).logits)


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (head(9), r"8 channels.*\(9, 8, 7, 7\); use its backbone"),
        (head(8, temporal_channels=(64, 128, 16)), r"set head\.temporal_channels = \[64, 128, 32\]"),
        (head(8, offset_channels=(64, 128, 64)), r"set head\.offset_channels = \[128, 128, 64\]"),
    ],
    ids=["channels", "temporal", "offset"],
)
def test_another_shape_is_one_clear_error_and_copies_nothing(ours: TA2NHead, message: str) -> None:
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(TA2NCheckpointError, match=message):
        load_ta2n_head(ours, published_state(8))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cam.conv2.weight": torch.zeros(1)}, r"a tensor 'cam\.conv2\.weight'.*resnet\.\*, align\.\*"),
        ({"align.firststage.locnet.7.weight": torch.zeros(1)}, r"a tensor 'align\.firststage\.locnet\.7\.weight'"),
        ({"align.firststage.locnet.12.rate": torch.zeros(1)}, r"holds temporal\.network\.out\.rate"),
        (
            {"align.firststage.locnet.5.bias": torch.zeros(7)},
            r"second_norm\.bias is \(7,\) in the checkpoint, \(128,\)",
        ),
        ({"epoch": 3}, "'epoch' is a int"),
        ({"model_state_dict": [1]}, "model_state_dict is a list"),
        (
            {"protypicalNet.norm_layer.weight": torch.full((5,), 1.1)},
            r"trained protypicalNet.*--dist_norm.*its 5 classes",
        ),
        ({"protypicalNet.norm_layer.bias": torch.full((5,), 0.1)}, r"trained protypicalNet"),
    ],
)
def test_another_checkpoint_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TA2NCheckpointError, match=message):
        load_ta2n_head(head(8), {**published_state(8), **change})


def test_missing_tensors_are_named() -> None:
    state = published_state(8)
    del state["align.keynet_multi.weight"]
    with pytest.raises(TA2NCheckpointError, match=r"lacks fusion\.key\.weight"):
        load_ta2n_head(head(8), state)


def test_unused_norm_and_uncounted_batches_do_not_matter() -> None:
    state = {name: value for name, value in published_state(8).items() if not name.endswith("num_batches_tracked")}
    norm = {"protypicalNet.norm_layer.weight": torch.ones(5), "protypicalNet.norm_layer.bias": torch.zeros(5)}
    load_ta2n_head(head(8), {**state, **norm})
