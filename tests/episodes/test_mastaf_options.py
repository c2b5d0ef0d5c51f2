"""What the options and ablations of MASTAF change."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contracts.head_cases import FAMILY, HeadCase, make_batch, make_head, mastaf_head
from episodes.batch import EpisodeBatch
from episodes.build import HEADS, build_head, head_config
from episodes.head import HeadInputs
from episodes.heads.mastaf import MastafHead
from episodes.heads.mastaf_attention import MetaLearner
from episodes.heads.mastaf_config import MastafConfig
from episodes.heads.mastaf_scores import pooled_cosine

AnyOptions = dict[str, Any]


def test_neighbor_is_the_cosine_of_averages() -> None:
    head, batch = make_head(HeadCase("neighbor")).eval(), make_batch()
    assert isinstance(head, MastafHead)
    prototypes = torch.stack(
        [
            torch.stack([cubes[labels == index].mean(dim=0) for index in range(3)])
            for cubes, labels in zip(batch.support, batch.support_labels, strict=True)
        ]
    )
    means = batch.query.mean(dim=(-1, -2, -3))[:, :, None], prototypes.mean(dim=(-1, -2, -3))[:, None]
    torch.testing.assert_close(head(batch).logits, 7.0 * F.cosine_similarity(*means, dim=-1))


OTHER_VALUES: AnyOptions = {
    "average_time": True,
    "normalize_corr": False,
    "kernel_reduce": "sum",
    "meta_learner": False,
    "hidden": 4,
    "tau": 0.1,
    "meta_bn": "none",
    "meta_bn_query": False,
    "share_cam": False,
    "residual": False,
    "attention_gain": 3.0,
    "scale": 2.0,
    "train_similarity": "pooled",
    "eval_similarity": "whole_cube",
    "fusion": "prob_mean",
    "alpha": 0.4,
    "global_classifier": False,
    "global_input": "support_cross",
    "global_pooling": "averaged",
    "lambda_global": 3.0,
    "lambda_few": 3.0,
}
"""Every option but the preset and the branches, with a value that is not its default."""


def numbers_of(name: str, options: AnyOptions) -> list[Tensor]:
    """Scores, losses and their weights, in evaluation and in training, whether or not the builder refuses the options."""
    config = MastafConfig(**HEADS[name].fixed, **options)
    head = MastafHead(config, HeadInputs((8, 2, 3, 2), 11, generator=torch.Generator().manual_seed(2))).double()
    batch = make_batch()
    outputs = [head.train(training)(batch) for training in (False, True)]
    losses = [outputs[1].losses[term] * weight for term, weight in head.loss_weights.items()]
    return [*(output.logits for output in outputs), *losses]


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("option", OTHER_VALUES)
def test_an_option_is_refused_if_and_only_if_it_changes_no_number(name: str, option: str) -> None:
    assert set(OTHER_VALUES) == set(MastafConfig.model_fields) - {"preset", "self_attention", "cross_attention"}
    options = {option: OTHER_VALUES[option]}
    if option == "global_input" and name in ("neighbor", "self"):
        with pytest.raises(ValueError, match="needs cross_attention"):
            head_config(name, options)
        return
    before, after = numbers_of(name, {}), numbers_of(name, options)
    if len(before) == len(after) and all(torch.equal(*pair) for pair in zip(before, after, strict=True)):
        with pytest.raises(ValueError, match=f"{option} = .* has no effect"):
            head_config(name, options)
    else:
        assert getattr(head_config(name, options), option) == OTHER_VALUES[option]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("fusion", ["logit_sum", "prob_mean"])
def test_a_branch_alone_has_weight_one_whatever_alpha_is(fusion: Any, alpha: float) -> None:
    batch = make_batch()
    for is_self in (True, False):
        config = MastafConfig(self_attention=is_self, cross_attention=not is_self, alpha=alpha, fusion=fusion)
        head = MastafHead(config, HeadInputs((8, 2, 3, 2), generator=torch.Generator().manual_seed(2))).double().eval()
        cubes = head.cubes(batch)
        (branch,) = head.branches(cubes, head.relations(cubes))
        expected = 7.0 * pooled_cosine(cubes, branch)
        if fusion == "prob_mean":
            expected = expected.log_softmax(dim=-1)
        assert branch.share == 1.0
        torch.testing.assert_close(head(batch).logits, expected, rtol=0.0, atol=1e-12)


def test_fusion_of_both_branches_is_the_sum_of_the_single_ones() -> None:
    batch = make_batch()
    both = mastaf_head(alpha=0.4).eval()
    own, cross = (make_head(HeadCase(name)).eval() for name in ("self", "cross"))
    own.load_state_dict(both.state_dict())
    cross.load_state_dict(both.state_dict())
    torch.testing.assert_close(both(batch).logits, cross(batch).logits + 0.4 * own(batch).logits)


def test_mean_of_probabilities_is_weighted_by_alpha() -> None:
    batch = make_batch()
    mean = mastaf_head(alpha=0.4, fusion="prob_mean").eval()
    own, cross = (make_head(HeadCase(name)).eval() for name in ("self", "cross"))
    own.load_state_dict(mean.state_dict())
    cross.load_state_dict(mean.state_dict())
    expected = (cross(batch).logits.softmax(-1) + 0.4 * own(batch).logits.softmax(-1)) / 1.4
    torch.testing.assert_close(mean(batch).logits.exp(), expected)


def test_without_meta_learner_attention_follows_the_averaged_correlation() -> None:
    head, batch = mastaf_head(meta_learner=False).eval(), make_batch(num_episodes=1)
    unit = F.normalize(batch.query[0].flatten(2), dim=1)
    correlation = torch.einsum("qcp,qcs->qps", unit, unit).mean(dim=-1)
    found = head(batch, with_maps=True).maps["self_query"][0].flatten(1)
    torch.testing.assert_close(found, (correlation / 0.025).softmax(dim=-1))
    assert not [name for name, _ in head.named_parameters() if name.startswith("cam")]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("gain", [1.0, 2.5, "L"])
def test_residual_and_gain_give_the_weights(residual: bool, gain: Any) -> None:
    head, batch = mastaf_head(residual=residual, attention_gain=gain), make_batch()
    cubes = head.cubes(batch)
    relations = head.relations(cubes)
    factor = 12.0 if gain == "L" else gain  # L = 2 * 3 * 2
    expected = float(residual) + factor * relations["cross_query"].attention
    torch.testing.assert_close(head.branches(cubes, relations)[0].query_weights, expected)


def test_separate_meta_learners_learn_apart() -> None:
    head, batch = mastaf_head(share_cam=False, train_similarity="pooled", global_classifier=False).train(), make_batch()
    assert head.cam is None
    assert set(head.state_dict()) == {f"cam_{kind}.{name}" for kind in ("self", "cross") for name in cam_names()}
    head(batch)
    for cam in (head.cam_self, head.cam_cross):
        assert isinstance(cam, MetaLearner)
        assert cam.norm is not None
        assert int(cam.norm.num_batches_tracked) == 4


def cam_names() -> set[str]:
    return set(MetaLearner(4, 2, with_norm=True).state_dict())


def test_initialisation_is_the_published_one_and_draws_from_the_given_generator_only() -> None:
    before = torch.random.get_rng_state()
    cam, twin = (MetaLearner(49, 600, with_norm=True, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(cam.reduce.weight, twin.reduce.weight)
    assert cam.reduce.weight.std().item() == pytest.approx((2 / 600) ** 0.5, rel=0.02)
    assert cam.expand.weight.std().item() == pytest.approx((2 / 49) ** 0.5, rel=0.02)
    assert cam.reduce.bias.abs().max().item() == pytest.approx(1 / 7, rel=0.02)
    assert cam.expand.bias.abs().max().item() <= 1 / 600**0.5


def test_averaged_time_equals_a_head_on_averaged_cubes() -> None:
    torch.manual_seed(0)
    support, query = torch.randn(2, 5, 6, 4, 3, 3), torch.randn(2, 3, 6, 4, 3, 3)
    labels, query_labels = torch.arange(5).expand(2, 5).contiguous(), torch.tensor([[0, 3, 4], [2, 1, 0]])
    heads = [
        build_head("mastaf", {"average_time": is_averaged}, shape, 0, True, torch.Generator().manual_seed(1)).eval()
        for is_averaged, shape in ((True, (6, 4, 3, 3)), (False, (6, 1, 3, 3)))
    ]
    whole = EpisodeBatch(support, labels, query, query_labels, n_way=5)
    averaged = EpisodeBatch(support.mean(3, keepdim=True), labels, query.mean(3, keepdim=True), query_labels, n_way=5)
    torch.testing.assert_close(heads[0](whole).logits, heads[1](averaged).logits)
    assert heads[0](whole, with_maps=True).maps["cross_query"].shape == (2, 3, 5, 1, 3, 3)
