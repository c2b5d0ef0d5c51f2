"""PAL beside torch's own attention and plain loops."""

# E episodes, S supports, Q queries, N classes; C channels

import math

import pytest
import torch
from torch import Tensor, nn

from contracts.head_cases import CUBE_SHAPE, HeadCase, make_batch, make_head
from contracts.uneven_episodes import plain_episode, uneven_batch
from episodes.build import build_head, head_config
from episodes.heads.pal import PalHead, SupportAttention, prototype_contrast
from episodes.losses import combine


def pal_head(**options: float) -> PalHead:
    head = make_head(HeadCase("pal", options))
    assert isinstance(head, PalHead)
    return head


def torch_attention(ours: SupportAttention) -> nn.MultiheadAttention:
    """Torch's attention with the same weights."""
    channels = ours.query.in_features
    theirs = nn.MultiheadAttention(channels, num_heads=1, batch_first=True, dtype=torch.float64)
    projections = (ours.query, ours.key, ours.value)
    state = {
        "in_proj_weight": torch.cat([each.weight for each in projections]),
        "in_proj_bias": torch.cat([each.bias for each in projections]),
        "out_proj.weight": ours.output.weight,
        "out_proj.bias": ours.output.bias,
    }
    theirs.load_state_dict(state)
    return theirs


def test_scores_and_attention_agree_with_torchs_attention() -> None:
    batch, head = uneven_batch(), pal_head(norm_epsilon=0.3).eval()
    attend = torch_attention(head.attention)
    assert batch.support_order is not None
    output = head(batch, with_maps=True)
    for index in range(2):
        episode = plain_episode(batch, index)
        support, query = episode.support[None], episode.query[None]
        support = support + attend(support, support, support)[0]
        read, weights = attend(query, support, support)
        query = (query + read)[0]
        prototypes = torch.stack([support[0, episode.labels == label].mean(dim=0) for label in range(3)])
        for number, each in enumerate(query):
            for label, prototype in enumerate(prototypes):
                expected = each @ prototype / (each.norm() * prototype.norm() + 0.3)
                torch.testing.assert_close(output.logits[index, number, label], expected)
        order = batch.support_order[index].argsort()
        by_id = output.maps["support_weights"][index][:, order]
        is_real = batch.support_labels[index, order] >= 0
        torch.testing.assert_close(by_id[:, is_real], weights[0])
        assert not by_id[:, ~is_real].any()


def contrast_of(logits: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    terms = []
    for label in sorted(set(labels.tolist())):
        similarity = logits[:, label].sigmoid()
        terms.append(-(similarity[labels == label].sum() / (similarity.sum() + epsilon)).log())
    return torch.stack(terms).mean()


def test_contrast_agrees_with_a_plain_loop_also_where_a_class_has_no_query() -> None:
    logits = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    labels = torch.tensor([[0, 1, 2, 1, 0], [2, 2, 0, 2, 0]])
    found = prototype_contrast(logits, labels, 0.1)
    for index in range(2):
        torch.testing.assert_close(found[index], contrast_of(logits[index], labels[index], 0.1))
    (ours,) = torch.autograd.grad(found.sum(), logits, retain_graph=True)
    plain = sum(contrast_of(logits[index], labels[index], 0.1) for index in range(2))
    assert isinstance(plain, Tensor)
    (theirs,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(ours, theirs)


def test_mean_over_queries_gives_the_published_loss() -> None:
    batch, head = make_batch(), pal_head(contrast_weight=0.5, contrast_epsilon=0.2).train()
    output = head(batch)
    assert batch.query_labels is not None
    total = combine(output.losses, head.loss_weights, "mean")
    for index in range(2):
        labels = batch.query_labels[index]
        expected = nn.functional.cross_entropy(output.logits[index], labels)
        expected = expected + 0.5 * contrast_of(output.logits[index], labels, 0.2)
        torch.testing.assert_close(total[index], expected)


def test_contrast_is_of_training_only_and_can_be_left_out() -> None:
    assert set(pal_head().train()(make_batch()).losses) == {"few_shot", "contrast"}
    assert set(pal_head().eval()(make_batch()).losses) == {"few_shot"}
    assert set(pal_head(contrast_weight=0.0).train()(make_batch()).losses) == {"few_shot"}
    with pytest.raises(ValueError, match=r"contrast_epsilon = 0\.1 has no effect, since contrast_weight is 0"):
        head_config("pal", {"contrast_weight": 0.0, "contrast_epsilon": 0.1})


def test_first_weights_are_those_of_torchs_attention_and_come_from_the_generator() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        return build_head(
            "pal", {}, (64, *CUBE_SHAPE[1:]), None, True, torch.Generator().manual_seed(seed)
        ).state_dict()

    before = torch.get_rng_state()
    first, again = weights(1), weights(1)
    assert torch.equal(torch.get_rng_state(), before)
    bounds = dict.fromkeys(("query", "key", "value"), math.sqrt(6.0 / 256.0)) | {"output": 1.0 / 8.0}
    for name, bound in bounds.items():
        values = first[f"attention.{name}.weight"]
        assert torch.equal(values, again[f"attention.{name}.weight"])
        assert 0.99 * bound < values.abs().max() <= bound
        assert not first[f"attention.{name}.bias"].any()
