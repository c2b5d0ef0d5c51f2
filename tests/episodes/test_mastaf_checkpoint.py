"""Checkpoints of the released code, made here with their real names and shapes."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contracts import golden
from contracts.compared import Compared, head_batch
from episodes.head import HeadInputs
from episodes.heads.mastaf import MastafHead
from episodes.heads.mastaf_attention import MetaLearner
from episodes.heads.mastaf_config import MastafConfig
from episodes.heads.staf_checkpoint import StafCheckpointError, load_staf_head, split_staf_state

CHANNELS = 8


def published_state(gpus: int = 1, hidden: int = 6, positions: int = 49, num_classes: int = 51) -> dict[str, Tensor]:
    """A state dict with the names of the released code."""
    source = torch.Generator().manual_seed(4)
    wrapped = ".module" if gpus > 1 else ""
    shapes: dict[str, tuple[int, ...]] = {
        f"base{wrapped}.conv1.weight": (4, 3, 7, 7, 7),
        f"base{wrapped}.layer1.0.bn1.running_mean": (4,),
        f"base{wrapped}.fc.weight": (5, CHANNELS),
        f"cam{wrapped}.conv1.conv.weight": (hidden, positions, 1, 1),
        f"cam{wrapped}.conv1.conv.bias": (hidden,),
        f"cam{wrapped}.conv1.bn.weight": (hidden,),
        f"cam{wrapped}.conv1.bn.bias": (hidden,),
        f"cam{wrapped}.conv1.bn.running_mean": (hidden,),
        f"cam{wrapped}.conv1.bn.running_var": (hidden,),
        f"cam{wrapped}.conv2.weight": (positions, hidden, 1, 1),
        f"cam{wrapped}.conv2.bias": (positions,),
        f"classifier{wrapped}.weight": (num_classes, CHANNELS, 1, 1, 1),
        f"classifier{wrapped}.bias": (num_classes,),
    }
    state = {name: torch.rand(shape, generator=source) for name, shape in shapes.items()}
    state[f"cam{wrapped}.conv1.bn.num_batches_tracked"] = torch.tensor(1234)
    return state


def head(num_classes: int | None = 51, grid: tuple[int, int, int] = (1, 7, 7), **options: Any) -> MastafHead:
    return MastafHead(MastafConfig(**options), HeadInputs((CHANNELS, *grid), num_classes))


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("is_wrapped", [False, True], ids=["bare", "training"])
def test_file_of_the_released_code_is_read(tmp_path: Path, gpus: int, is_wrapped: bool) -> None:
    state = published_state(gpus)
    content: dict[str, Any] = OrderedDict(state)
    if is_wrapped:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.001)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [100])
        content = {
            "iteration": 5,
            "model_state_dict": content,
            "optimizer_state_dict": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
    torch.save(content, tmp_path / "checkpoint.pt")
    checkpoint = split_staf_state(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert set(checkpoint.backbone) == {"conv1.weight", "layer1.0.bn1.running_mean", "fc.weight"}
    ours = head()
    load_staf_head(ours, checkpoint)
    assert isinstance(ours.cam, MetaLearner)
    assert ours.cam.norm is not None
    assert ours.classifier is not None
    plain = published_state(1)
    assert torch.equal(ours.cam.reduce.weight, plain["cam.conv1.conv.weight"][:, :, 0, 0])
    assert torch.equal(ours.cam.expand.bias, plain["cam.conv2.bias"])
    assert torch.equal(ours.cam.norm.running_var, plain["cam.conv1.bn.running_var"])
    assert int(ours.cam.norm.num_batches_tracked) == 1234
    assert torch.equal(ours.classifier.weight, plain["classifier.weight"][:, :, 0, 0, 0])


@golden.each_file("mastaf_head_")
def test_imported_head_gives_the_golden_scores_parity(golden_file: Path) -> None:
    file = Compared(golden_file, torch.float32)
    tensors = {**file.group("param"), **file.group("buffer")}
    state = {name.replace(".", ".module.", 1): value for name, value in tensors.items()}
    batch = head_batch(file)
    config = MastafConfig(
        hidden=int(file.number("const/l")),
        tau=file.number("const/tau"),
        scale=file.number("const/scale_cls"),
        alpha=file.number("const/alpha"),
    )
    channels, steps, height, width = batch.query.shape[2:]
    inputs = HeadInputs(
        (channels, steps, height, width), int(file.number("const/Z")), has_several_queries=batch.query.shape[1] > 1
    )
    ours = MastafHead(config, inputs)
    load_staf_head(ours, split_staf_state({"model_state_dict": state}))
    file.matches("out_eval/accuracy_scores", ours.eval()(batch).logits)


def test_separate_meta_learners_both_start_from_the_published_one() -> None:
    ours = head(share_cam=False)
    load_staf_head(ours, split_staf_state(published_state()))
    for cam in (ours.cam_self, ours.cam_cross):
        assert isinstance(cam, MetaLearner)
        assert torch.equal(cam.expand.weight, published_state()["cam.conv2.weight"][:, :, 0, 0])


def test_a_head_without_classifier_takes_the_meta_learner_alone() -> None:
    load_staf_head(head(num_classes=None), split_staf_state(published_state()))


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (head(num_classes=31), r'51 classes.*31 training classes.*data\.global_labels = "all"'),
        (head(grid=(2, 7, 7)), r"49 positions.*\(8, 2, 7, 7\) \(98 positions\)"),
        (head(hidden=4), r"6 hidden units.*head\.hidden = 4"),
        (head(meta_bn="none"), "this head has none"),
        (head(meta_learner=False), "this head has none"),
        (head(self_attention=False, cross_attention=False), "this head has none"),
        (MastafHead(MastafConfig(), HeadInputs((9, 1, 7, 7), 51)), r"8 channels.*\(9, 1, 7, 7\)"),
    ],
    ids=["classes", "positions", "hidden", "no norm", "no meta-learner", "neighbor", "channels"],
)
def test_another_shape_is_one_clear_error_and_copies_nothing(ours: MastafHead, message: str) -> None:
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(StafCheckpointError, match=message):
        load_staf_head(ours, split_staf_state(published_state()))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_a_damaged_shape_is_named() -> None:
    state = published_state()
    state["cam.conv1.bn.bias"] = torch.zeros(7)
    with pytest.raises(StafCheckpointError, match=r"meta-learner norm\.bias is \(7,\) in the checkpoint, \(6,\) here"):
        load_staf_head(head(), split_staf_state(state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer1.0.conv1.weight": torch.zeros(1)}, r"'layer1\.0\.conv1\.weight'.*base\.\*, cam\.\* and classifier"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({"model_state_dict": [1]}, "model_state_dict is a list"),
    ],
)
def test_another_checkpoint_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StafCheckpointError, match=message):
        split_staf_state({**published_state(), **change})


def test_missing_tensors_are_named() -> None:
    state = published_state()
    del state["cam.conv2.bias"]
    with pytest.raises(StafCheckpointError, match=r"lacks expand\.bias"):
        split_staf_state(state)


def test_batches_need_not_be_counted() -> None:
    state = published_state()
    del state["cam.conv1.bn.num_batches_tracked"]
    load_staf_head(head(), split_staf_state(state))
