"""MASTAF as printed (preset "paper") compared with the golden arrays, number by number."""

# E episodes (1 here), Q queries, N classes; C channels, L positions

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contracts import golden
from contracts.compared import Compared, both_precisions, head_batch
from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs
from episodes.heads.mastaf import USES, MastafHead
from episodes.heads.mastaf_attention import MetaLearner
from episodes.heads.mastaf_config import MastafConfig
from episodes.heads.mastaf_scores import whole_cube_cosine
from episodes.losses import combine, position_cross_entropy

_PAPER_USES = {
    "self_support": "self_support",
    "self_query": "self_query",
    "cross_query": "cross_query_from_support",
    "cross_support": "cross_support_from_query",
}


def paper_head(file: Compared, batch: EpisodeBatch, **options: Any) -> MastafHead:
    hidden = file.arrays["param/f_delta_weight"].shape[0]
    lambda_global = file.number("const/lambda")
    settings = {"preset": "paper", "hidden": hidden, "tau": file.number("const/tau"), "lambda_global": lambda_global}
    channels, steps, height, width = batch.query.shape[2:]
    num_classes = file.arrays["param/fc_weight"].shape[0]
    config = MastafConfig(**{**settings, **options})
    head = MastafHead(config, HeadInputs((channels, steps, height, width), num_classes)).to(file.dtype)
    with torch.no_grad():
        for name, parameter in paper_parameters(head).items():
            parameter.copy_(file.tensor(f"param/{name}"))
    return head.train()


def paper_parameters(head: MastafHead) -> dict[str, Tensor]:
    assert isinstance(head.cam, MetaLearner)
    assert head.classifier is not None
    layers = {"f_delta": head.cam.reduce, "f_gamma": head.cam.expand, "fc": head.classifier}
    return {f"{name}_{kind}": getattr(layer, kind) for name, layer in layers.items() for kind in ("weight", "bias")}


def by_query_first(use: str, cross_support: Tensor) -> Tensor:
    """The golden arrays have queries before classes."""
    return cross_support.transpose(1, 2) if use == "cross_support" else cross_support


def partner_first(use: str, values: Tensor) -> Tensor:
    """Means and kernels have the partner first: the query for the support's map (as stored), not for the query's."""
    return values.transpose(1, 2) if use == "cross_query" else values


@golden.each_file("mastaf_paper_")
@both_precisions
def test_paper_parity_of_the_attention(golden_file: Path, dtype: torch.dtype) -> None:
    file = Compared(golden_file, dtype)
    batch = head_batch(file)
    head = paper_head(file, batch)
    cubes = head.cubes(batch)
    relations = head.relations(cubes)
    branches = head.branches(cubes, relations)
    file.matches("out/prototypes", cubes.prototypes)
    for use in USES:
        name = _PAPER_USES[use]
        file.matches(f"out/Mbar_{name}", partner_first(use, relations[use].relation_mean))
        file.matches(f"out/d_{name}", partner_first(use, relations[use].kernel.values))
        file.matches(f"out/A_{name}", by_query_first(use, relations[use].attention))
    cross, own = branches
    attended = {
        "R_cross_query": cubes.queries[:, :, None] * cross.query_weights[:, :, :, None],
        "R_cross_support": (cubes.prototypes[:, :, None] * cross.prototype_weights[:, :, :, None]).transpose(1, 2),
        "R_self_query": cubes.queries * own.query_weights,
        "R_self_support": cubes.prototypes * own.prototype_weights,
    }
    for name, cube in attended.items():
        file.matches(f"out/{name}", cube)


@golden.each_file("mastaf_paper_")
@both_precisions
def test_paper_parity_of_scores_losses_and_gradients(golden_file: Path, dtype: torch.dtype) -> None:
    file = Compared(golden_file, dtype)
    batch = head_batch(file)
    assert batch.query_labels is not None
    assert batch.class_global_labels is not None
    head = paper_head(file, batch)
    output = head(batch)
    cubes = head.cubes(batch)
    branches = head.branches(cubes, head.relations(cubes))
    for name, branch in zip(("cross", "self"), branches, strict=True):
        cosine = whole_cube_cosine(cubes, branch)
        file.matches(f"out/D_{name}", 1.0 - cosine)
        file.matches(f"out/P_{name}", cosine.softmax(dim=-1))
    file.matches("out/P", output.logits.exp())
    file.matches("out/pred", output.logits.argmax(dim=-1))
    file.matches("out/L1", output.losses["few_shot"])
    file.matches("out/L1_literal_sum_over_classes", -output.logits.sum(dim=-1))
    global_logits = head.global_logits(cubes, branches, batch.query_labels)
    file.matches("out/global_logits_support", global_logits)
    file.matches("out/P_global", global_logits.softmax(dim=-2))
    targets = batch.class_global_labels[:, None].expand(global_logits.shape[:3])
    file.matches("out/L2_per_class", position_cross_entropy(global_logits, targets))
    file.matches("out/L2", output.losses["global"])
    totals = combine(output.losses, head.loss_weights, "mean")
    weighted = sum(head.loss_weights[name] * term for name, term in output.losses.items())
    assert isinstance(weighted, Tensor)
    file.matches("out/L", weighted)
    file.matches("out/L_mean", totals)
    torch.autograd.backward(totals.sum())
    for name, owner in {**paper_parameters(head), "support": batch.support, "query": batch.query}.items():
        assert owner.grad is not None
        file.matches(f"grad/{name}", owner.grad)
    file.assert_all_seen("grad")


@golden.each_file("mastaf_paper_")
@both_precisions
def test_paper_parity_of_the_variants_of_the_global_loss(golden_file: Path, dtype: torch.dtype) -> None:
    file = Compared(golden_file, dtype)
    batch = head_batch(file)
    assert batch.query_labels is not None
    from_query = paper_head(file, batch, global_input="query_true_cross")
    cubes = from_query.cubes(batch)
    branches = from_query.branches(cubes, from_query.relations(cubes))
    file.matches("out/global_logits_query", from_query.global_logits(cubes, branches, batch.query_labels))
    file.matches("out/L2_query_variant", from_query(batch).losses["global"])
    per_position = paper_head(file, batch, global_pooling="per_position")
    file.matches("out/L2_per_position_variant", per_position(batch).losses["global"])


@golden.each_file("mastaf_paper_")
def test_paper_parity_of_the_relation_maps_that_are_never_built(golden_file: Path) -> None:
    """The stored maps, averaged as the equations say, are the averages that the head computes without them."""
    file = Compared(golden_file, torch.float64)
    batch = head_batch(file)
    head = paper_head(file, batch)
    relations = head.relations(head.cubes(batch))
    for use in USES:
        maps = file.tensor(f"out/M_{_PAPER_USES[use]}")
        assert maps.shape[-1] == maps.shape[-2] == head.num_positions
        found = partner_first(use, relations[use].relation_mean)[0]
        torch.testing.assert_close(found.detach(), maps.mean(dim=-1), rtol=1e-9, atol=1e-12)
