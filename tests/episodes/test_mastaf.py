"""The laws of MASTAF: exact identities, batch normalisation, losses. (Parity with golden arrays: its own file.)"""

# E episodes, Q queries, N classes; C channels, L positions, U hidden units

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contracts.head_cases import make_batch, mastaf_head
from episodes.batch import EpisodeBatch
from episodes.heads.mastaf import USES, MastafHead
from episodes.heads.mastaf_attention import MetaLearner
from episodes.losses import combine

AnyOptions = dict[str, Any]


def dense_attention(maps: Tensor, cam: MetaLearner, head: MastafHead, training: bool, normalize: bool) -> Tensor:
    """Attention from built relation maps (M, L attended, L partner) of one episode, as the method is described."""
    hidden = F.linear(maps.mean(dim=1), cam.reduce.weight, cam.reduce.bias)
    if normalize and cam.norm is not None:
        # A copy: torch's function updates the statistics in place.
        mean, variance = cam.norm.running_mean.clone(), cam.norm.running_var.clone()
        hidden = F.batch_norm(hidden, mean, variance, cam.norm.weight, cam.norm.bias, training)
    kernel = F.linear(hidden.relu(), cam.expand.weight, cam.expand.bias)
    scores = torch.einsum("mpk,mk->mp", maps, kernel)
    if head.config.kernel_reduce == "mean":
        scores = scores / maps.shape[-1]
    return (scores / head.config.tau).softmax(dim=-1)


def dense_head(head: MastafHead, batch: EpisodeBatch, training: bool) -> dict[str, Tensor]:
    """Attention maps and predicting scores of one episode, everything built in full."""
    cubes = head.cubes(batch)
    support, query = cubes.prototypes[0], cubes.queries[0]  # (N, C, L), (Q, C, L)
    f, g = support, query
    if head.config.normalize_corr:
        f, g = F.normalize(support, dim=1), F.normalize(query, dim=1)
    own, cross = head.cam or head.cam_self, head.cam or head.cam_cross
    assert isinstance(own, MetaLearner)
    assert isinstance(cross, MetaLearner)
    cross_maps = torch.einsum("qcp,ncs->qnps", g, f)  # query positions by support positions
    attention = {
        "self_support": dense_attention(torch.einsum("ncp,ncs->nps", f, f), own, head, training, True),
        "self_query": dense_attention(torch.einsum("qcp,qcs->qps", g, g), own, head, training, head.meta_bn_query),
        "cross_support": dense_attention(cross_maps.mT.flatten(0, 1), cross, head, training, True),
        "cross_query": dense_attention(cross_maps.flatten(0, 1), cross, head, training, True),
    }
    weights = {use: 1.0 + head.gain * values for use, values in attention.items()}
    grid = cross_maps.shape[:3]
    cross_support = support[None] * weights["cross_support"].reshape(*grid)[:, :, None]  # (Q, N, C, L)
    cross_query = query[:, None] * weights["cross_query"].reshape(*grid)[:, :, None]
    self_support, self_query = support * weights["self_support"][:, None], query * weights["self_query"][:, None]
    cosine_cross = F.cosine_similarity(cross_query.mean(-1), cross_support.mean(-1), dim=-1)
    cosine_self = F.cosine_similarity(self_query.mean(-1)[:, None], self_support.mean(-1)[None], dim=-1)
    return {**attention, "logits": head.config.scale * (cosine_cross + head.config.alpha * cosine_self)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"meta_bn": "none"},
        {"meta_bn_query": False},
        {"share_cam": False},
        {"share_cam": False, "meta_bn": "none"},
        {"attention_gain": "L", "alpha": 0.3},
        {"normalize_corr": False, "kernel_reduce": "sum", "tau": 1.0},
    ],
    ids=str,
)
def test_relation_maps_need_not_be_built(options: AnyOptions, training: bool, dtype: torch.dtype) -> None:
    head, batch = mastaf_head(dtype, **options).train(training), make_batch(num_episodes=1, dtype=dtype)
    expected = dense_head(head, batch, training)
    found = head(batch, with_maps=True)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for use in USES:
        torch.testing.assert_close(
            found.maps[use].reshape(expected[use].shape), expected[use], rtol=tolerance, atol=tolerance, msg=use
        )
    torch.testing.assert_close(found.logits[0], expected["logits"], rtol=tolerance, atol=tolerance)


def test_maps_sum_to_one_on_the_grid_of_the_cube() -> None:
    maps = mastaf_head()(make_batch(), with_maps=True).maps
    assert {use: tuple(values.shape) for use, values in maps.items()} == {
        "self_support": (2, 3, 2, 3, 2),
        "self_query": (2, 4, 2, 3, 2),
        "cross_support": (2, 4, 3, 2, 3, 2),
        "cross_query": (2, 4, 3, 2, 3, 2),
    }
    for values in maps.values():
        torch.testing.assert_close(values.flatten(-3).sum(dim=-1), torch.ones(values.shape[:-3], dtype=values.dtype))


# TorchDispatchMode has no type information.
class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        # As above.
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.num_elements = max([self.num_elements, *(value.numel() for value in tensors)])
        return result


@pytest.mark.parametrize("preset", ["reference", "paper", "paper_stable"])
def test_nothing_is_built_that_is_larger_than_the_cubes(preset: str) -> None:
    head = mastaf_head(preset=preset, global_pooling="averaged", cube_shape=(16, 4, 8, 2)).train()
    batch = make_batch(n_way=5, n_query=6, k_shot=1, cube_shape=(16, 4, 8, 2))
    with LargestTensor() as largest:
        torch.autograd.backward(combine(head(batch).losses, head.loss_weights, "mean").sum())
    # One relation map of every prototype would be 64 / 16 times as large, the attended queries 5 times.
    assert largest.num_elements <= batch.query.numel()


def test_whole_cube_cosine_is_that_of_the_attended_cubes() -> None:
    head, batch = mastaf_head(eval_similarity="whole_cube", fusion="logit_sum", scale=1.0).eval(), make_batch()
    cubes = head.cubes(batch)
    cross, own = head.branches(cubes, head.relations(cubes))
    query = cubes.queries[:, :, None] * cross.query_weights[:, :, :, None]  # (E, Q, N, C, L)
    support = (cubes.prototypes[:, :, None] * cross.prototype_weights[:, :, :, None]).transpose(1, 2)
    expected = F.cosine_similarity(query.flatten(3), support.flatten(3), dim=-1)
    query, support = cubes.queries * own.query_weights, cubes.prototypes * own.prototype_weights
    expected = expected + F.cosine_similarity(query.flatten(2)[:, :, None], support.flatten(2)[:, None], dim=-1)
    torch.testing.assert_close(head(batch).logits, expected)


def test_query_attention_does_not_touch_the_training_logits() -> None:
    head, batch = mastaf_head().train(), make_batch()
    cubes = head.cubes(batch)
    branches = head.branches(cubes, head.relations(cubes))
    watched = [replace(branch, query_weights=branch.query_weights.detach().requires_grad_()) for branch in branches]
    source = torch.Generator().manual_seed(1)
    other = [
        replace(branch, query_weights=1.0 + torch.rand(branch.query_weights.shape, generator=source).double())
        for branch in branches
    ]
    scores = head.scores(cubes, watched, "per_position")
    torch.testing.assert_close(head.scores(cubes, other, "per_position"), scores, rtol=0.0, atol=0.0)
    # The same law through the attended cubes, so that it is the description that holds and not only the shortcut.
    attended = cubes.queries[:, :, None] * other[0].query_weights[:, :, :, None]
    torch.testing.assert_close(
        F.normalize(attended, dim=3), F.normalize(cubes.queries, dim=2)[:, :, None].expand_as(attended)
    )
    gradients = torch.autograd.grad(
        scores.square().sum(), [branch.query_weights for branch in watched], allow_unused=True
    )
    assert all(gradient is None or not gradient.any() for gradient in gradients)
    # In evaluation, where positions are averaged before they are compared, it does matter.
    assert not torch.allclose(head.scores(cubes, other, "pooled"), head.scores(cubes, branches, "pooled"))


def test_query_self_map_has_no_gradient_in_the_total_loss() -> None:
    head, batch = mastaf_head(share_cam=False).train(), make_batch()
    cubes = head.cubes(batch)
    cross, own = branches = head.branches(cubes, head.relations(cubes))
    losses = head._losses(batch, cubes, branches)
    assert set(losses) == {"few_shot", "global"}

    def moves(term: str, weights: Tensor) -> bool:
        (gradient,) = torch.autograd.grad(losses[term].sum(), [weights], allow_unused=True, retain_graph=True)
        return gradient is not None and bool(gradient.any())

    assert not moves("few_shot", own.query_weights)
    assert not moves("global", own.query_weights)
    # What does learn, so that the absence above is not that of the whole graph.
    assert moves("few_shot", own.prototype_weights)
    assert moves("few_shot", cross.prototype_weights)
    assert moves("global", cross.query_weights)
    assert not moves("few_shot", cross.query_weights)


def test_reference_loss_is_half_the_loss_with_the_papers_weights() -> None:
    batch = make_batch()
    reference, paper = mastaf_head(), mastaf_head(lambda_global=2.0, lambda_few=1.0)
    losses = reference.train()(batch).losses
    half = combine(losses, reference.loss_weights, "mean")
    torch.testing.assert_close(half, 0.5 * combine(losses, paper.loss_weights, "mean"))
    assert reference.loss_weights == {"few_shot": 0.5, "global": 1.0}
    assert mastaf_head(preset="paper").loss_weights == {"few_shot": 1.0, "global": 2.0}


def test_global_loss_is_given_in_training_with_its_labels_only() -> None:
    batch, head = make_batch(), mastaf_head()
    assert set(head.train()(batch).losses) == {"few_shot", "global"}
    assert set(head(replace(batch, class_global_labels=None)).losses) == {"few_shot"}
    assert set(head.eval()(batch).losses) == {"few_shot"}
