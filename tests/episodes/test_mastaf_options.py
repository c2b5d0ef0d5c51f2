"""What the options and ablations of MASTAF change."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contracts.head_cases import HeadCase, make_batch, make_head, mastaf_head

from episodes.batch import EpisodeBatch
from episodes.build import build_head
from episodes.heads.mastaf import MastafHead
from episodes.heads.mastaf_attention import MetaLearner


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
