"""MASTAF compared with the golden arrays, number by number."""

# E episodes (1 here), Q queries, N classes, Z global classes; C channels, L positions

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contracts import golden
from contracts.compared import Compared, both_modes, both_precisions, head_batch
from contracts.head_cases import make_batch, mastaf_head
from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs
from episodes.heads.mastaf import MastafHead
from episodes.heads.mastaf_attention import Kernel, MetaLearner, Relation, RelationRule, cross_relation, self_relation
from episodes.heads.mastaf_config import MastafConfig
from episodes.heads.mastaf_scores import pooled_cosine
from episodes.heads.staf_checkpoint import load_staf_head, split_staf_state
from episodes.losses import combine


class JointMetaLearner(MetaLearner):
    """One batch of maps over the axis b of the golden arrays, which is a joint group and not our episodes."""

    def forward(self, relation_mean: Tensor, normalize: bool) -> Kernel:
        joint = super().forward(relation_mean.reshape(1, -1, relation_mean.shape[-1]), normalize)
        return Kernel(joint.values.reshape(relation_mean.shape), joint.moments)


def load_cam(cam: MetaLearner, file: Compared, prefix: str = "") -> None:
    """Move the published tensors into a meta-learner."""
    names = {"reduce": "conv1.conv", "norm": "conv1.bn", "expand": "conv2"}
    tensors = {**file.group("param"), **file.group("buffer")}
    state = {}
    for name, current in cam.state_dict().items():
        part, _, kind = name.partition(".")
        if kind != "num_batches_tracked":
            current = tensors[f"{prefix}{names[part]}.{kind}"].reshape(current.shape)
        state[name] = current
    cam.load_state_dict(state)
    assert cam.norm is not None
    cam.norm.eps = file.number("const/bn_eps")
    cam.norm.momentum = file.number("const/bn_momentum")


def attention_uses(cam: MetaLearner, first: Tensor, second: Tensor, tau: float) -> dict[str, Relation]:
    unit_first, unit_second = (torch.nn.functional.normalize(cubes.flatten(3), dim=2) for cubes in (first, second))
    rule = RelationRule("mean", tau)
    several = first.shape[1] > 1
    return {
        "f1_self": self_relation(unit_first, cam, rule, normalize=several),
        "f2_self": self_relation(unit_second, cam, rule, normalize=second.shape[1] > 1),
        "f1_cross": cross_relation(unit_first, unit_second, cam, rule, normalize=several),
        "f2_cross": cross_relation(unit_second, unit_first, cam, rule, normalize=several),
    }


@golden.each_file("mastaf_attention_")
@both_precisions
@both_modes
def test_attention_parity_with_the_released_code(golden_file: Path, dtype: torch.dtype, mode: str) -> None:
    file = Compared(golden_file, dtype)
    first, second = file.tensor("in/f1"), file.tensor("in/f2")
    cam = JointMetaLearner(first[0, 0, 0].numel(), int(file.number("const/l")), with_norm=True).to(dtype)
    load_cam(cam, file)
    cam.train(mode == "train")
    uses = attention_uses(cam, first, second, file.number("const/tau"))
    weights = {use: 1.0 + relation.attention for use, relation in uses.items()}
    grid = first.shape[3:]
    for use, cubes in (("f1_self", first), ("f2_self", second)):
        file.matches(f"out_{mode}/att_{use}", weights[use])
        file.matches(f"out_{mode}/{use}", cubes * weights[use].reshape(*cubes.shape[:2], 1, *grid))
    by_query = {"f1_cross": weights["f1_cross"].transpose(1, 2), "f2_cross": weights["f2_cross"]}  # (b, Q, N, L)
    for use, cubes in (("f1_cross", first[:, None]), ("f2_cross", second[:, :, None])):
        file.matches(f"out_{mode}/att_{use}", by_query[use].transpose(1, 2))
        file.matches(f"out_{mode}/{use}", cubes * by_query[use].reshape(*by_query[use].shape[:3], 1, *grid))
    file.assert_all_seen(f"out_{mode}")
    if mode == "train":
        cam.update([relation.kernel for relation in uses.values()])
        assert cam.norm is not None
        for name, value in cam.norm.named_buffers():
            file.matches(f"buffer_after_train/conv1.bn.{name}", value)
        file.assert_all_seen("buffer_after_train")


def released_head(file: Compared, batch: EpisodeBatch, mode: str, **options: Any) -> MastafHead:
    config = MastafConfig(
        hidden=int(file.number("const/l")),
        tau=file.number("const/tau"),
        scale=file.number("const/scale_cls"),
        alpha=file.number("const/alpha"),
        lambda_few=file.number("const/lamda"),
        meta_bn_query=batch.query.shape[1] > 1,
        **options,
    )
    channels, steps, height, width = batch.query.shape[2:]
    num_classes = int(file.number("const/Z"))
    head = MastafHead(config, HeadInputs((channels, steps, height, width), num_classes)).to(file.dtype)
    load_staf_head(head, split_staf_state({**file.group("param"), **file.group("buffer")}))
    assert isinstance(head.cam, MetaLearner)
    assert head.cam.norm is not None
    head.cam.norm.eps = file.number("const/bn_eps")
    head.cam.norm.momentum = file.number("const/bn_momentum")
    # The golden losses of both modes have the global term, which we give in training only: "eval" there means the
    # running statistics.
    head.train()
    head.cam.norm.train(mode == "train")
    return head


def published_gradients(head: MastafHead, batch: EpisodeBatch) -> dict[str, Tensor]:
    """By the published names; zero for what the loss does not use (with one class, the batch normalisation)."""
    assert isinstance(head.cam, MetaLearner)
    assert head.cam.norm is not None
    assert head.classifier is not None
    layers = {
        "cam.conv1.conv": head.cam.reduce,
        "cam.conv1.bn": head.cam.norm,
        "cam.conv2": head.cam.expand,
        "classifier": head.classifier,
    }
    owners = {
        f"{layer}.{kind}": getattr(module, kind) for layer, module in layers.items() for kind in ("weight", "bias")
    }
    tensors = {**owners, "support": batch.support, "query": batch.query}
    return {name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in tensors.items()}


def test_with_one_class_the_unused_normalisation_has_a_zero_gradient() -> None:
    batch = make_batch(n_way=1, n_query=3, num_episodes=1)
    batch.support.requires_grad_()
    batch.query.requires_grad_()
    head = mastaf_head().train()
    torch.autograd.backward(combine(head(batch).losses, head.loss_weights, "mean").sum())
    gradients = published_gradients(head, batch)
    assert {name for name, gradient in gradients.items() if not gradient.any()} >= {
        "cam.conv1.bn.weight",
        "cam.conv1.bn.bias",
    }
    assert gradients["classifier.weight"].any()
    assert gradients["query"].any()


@golden.each_file("mastaf_head_")
@both_precisions
@both_modes
def test_head_parity_with_the_released_code(golden_file: Path, dtype: torch.dtype, mode: str) -> None:
    file = Compared(golden_file, dtype)
    batch = head_batch(file)
    head = released_head(file, batch, mode)
    cubes = head.cubes(batch)
    branches = head.branches(cubes, head.relations(cubes))
    output = head(batch)
    assert batch.query_labels is not None

    file.matches(f"out_{mode}/prototypes", cubes.prototypes)
    file.matches(f"out_{mode}/accuracy_scores", output.logits)
    for name, branch in zip(("cross", "self"), branches, strict=True):
        file.matches(f"out_{mode}/score_{name}", head.config.scale * pooled_cosine(cubes, branch))
    file.matches(f"out_{mode}/class_scores", head.scores(cubes, branches, "per_position"))
    file.matches(f"out_{mode}/global_logits", head.global_logits(cubes, branches, batch.query_labels))
    if mode == "eval":
        file.matches("out_eval/pred", output.logits.argmax(dim=-1))
    file.matches(f"out_{mode}/loss_fewshot", output.losses["few_shot"].mean())
    file.matches(f"out_{mode}/loss_global", output.losses["global"].mean())
    total = combine(output.losses, head.loss_weights, "mean").sum()
    file.matches(f"out_{mode}/loss_total", total)
    torch.autograd.backward(total)
    for name, gradient in published_gradients(head, batch).items():
        file.matches(f"grad_{mode}/{name}", gradient)
    file.assert_all_seen(f"out_{mode}", f"grad_{mode}")


@golden.each_file("mastaf_head_")
@both_precisions
def test_head_parity_of_the_running_statistics(golden_file: Path, dtype: torch.dtype) -> None:
    file = Compared(golden_file, dtype)
    batch = head_batch(file)
    head = released_head(file, batch, "train")
    head(batch)
    assert isinstance(head.cam, MetaLearner)
    assert head.cam.norm is not None
    for name, value in head.cam.norm.named_buffers():
        file.matches(f"buffer_after_train/cam.conv1.bn.{name}", value)
    file.assert_all_seen("buffer_after_train")


@golden.each_file("mastaf_head_")
@both_precisions
def test_head_parity_in_evaluation_is_the_module_in_eval_mode(golden_file: Path, dtype: torch.dtype) -> None:
    file = Compared(golden_file, dtype)
    batch = head_batch(file)
    head = released_head(file, batch, "eval").eval()
    output = head(batch)
    assert set(output.losses) == {"few_shot"}
    file.matches("out_eval/accuracy_scores", output.logits)
    file.matches("out_eval/loss_fewshot", output.losses["few_shot"].mean())
    file.matches("out_eval/pred", output.logits.argmax(dim=-1))


@golden.each_file("mastaf_head_")
@both_precisions
@both_modes
def test_head_parity_does_not_depend_on_the_order_of_supports(golden_file: Path, dtype: torch.dtype, mode: str) -> None:
    file = Compared(golden_file, dtype)
    batch = head_batch(file)
    order = torch.randperm(batch.support.shape[1], generator=torch.Generator().manual_seed(3))
    shuffled = EpisodeBatch(
        batch.support[:, order],
        batch.support_labels[:, order],
        batch.query,
        batch.query_labels,
        batch.n_way,
        batch.class_global_labels,
    )
    head = released_head(file, batch, mode)
    output = head(shuffled)
    file.matches(f"out_{mode}/accuracy_scores", output.logits)
    torch.autograd.backward(combine(output.losses, head.loss_weights, "mean").sum())
    assert batch.support.grad is not None
    file.matches(f"grad_{mode}/support", batch.support.grad)
