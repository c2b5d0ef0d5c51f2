"""FEAT beside plain loops: the contrastive loss, dropout, first weights, options."""

# E episodes, S supports, Q queries, M videos, N classes; C channels

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contracts.head_cases import HeadCase, make_batch, make_head
from contracts.uneven_episodes import plain_episode, uneven_batch
from episodes.build import build_head, head_config
from episodes.heads.feat import FeatHead, SetAttention

NO_DROPOUT = {"attention_dropout": 0.0, "output_dropout": 0.0}


def feat_head(**options: object) -> FeatHead:
    head = make_head(HeadCase("feat", options))
    assert isinstance(head, FeatHead)
    return head


def adapted(attention: SetAttention, tokens: Tensor) -> Tensor:
    """The self-attention of one set, token by token."""
    rows = []
    for token in tokens:
        similarity = torch.stack([attention.query(token) @ attention.key(other) for other in tokens])
        weights = (similarity / tokens.shape[1] ** 0.5).softmax(dim=0)
        read = torch.stack([w * attention.value(other) for w, other in zip(weights, tokens, strict=True)]).sum(dim=0)
        rows.append(attention.norm(attention.output(read) + token))
    return torch.stack(rows)


def scores(videos: Tensor, prototypes: Tensor, distance: str, temperature: float) -> Tensor:
    if distance == "cosine":
        return videos @ F.normalize(prototypes, dim=1).T / temperature
    distances = torch.stack([(videos - each).square().sum(dim=1) for each in prototypes], dim=1)
    return -distances / temperature


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_scores_and_contrast_agree_with_a_plain_loop(distance: str) -> None:
    batch = uneven_batch()
    head = feat_head(distance=distance, temperature=2.0, temperature2=3.0, **NO_DROPOUT).train()
    output = head(batch)
    for index in range(2):
        episode = plain_episode(batch, index)
        means = torch.stack([episode.support[episode.labels == label].mean(dim=0) for label in range(3)])
        logits = scores(episode.query, adapted(head.attention, means), distance, 2.0)
        torch.testing.assert_close(output.logits[index], logits)
        videos, labels = torch.cat([episode.support, episode.query]), torch.cat([episode.labels, episode.query_labels])
        centres = [adapted(head.attention, videos[labels == label]).mean(dim=0) for label in range(3)]
        expected = F.cross_entropy(scores(videos, torch.stack(centres), distance, 3.0), labels)
        torch.testing.assert_close(output.losses["contrast"][index].mean(), expected)


def test_contrast_is_of_training_only() -> None:
    head = feat_head()
    assert set(head.train()(make_batch()).losses) == {"few_shot", "contrast"}
    assert set(head.eval()(make_batch()).losses) == {"few_shot"}
    assert head.loss_weights == {"few_shot": 1.0, "contrast": 0.01}


def test_balance_zero_leaves_the_contrast_out() -> None:
    head = feat_head(balance=0.0).train()
    assert set(head(make_batch()).losses) == set(head.loss_weights) == {"few_shot"}
    with pytest.raises(ValueError, match=r"temperature2 = 2\.0 has no effect, since balance is 0"):
        head_config("feat", {"balance": 0.0, "temperature2": 2.0})


def test_dropout_follows_the_seeds_and_sleeps_in_evaluation() -> None:
    batch, head = make_batch(), feat_head()
    assert batch.seeds is not None
    other = replace(batch, seeds=batch.seeds + 1)
    assert torch.equal(head.train()(batch).logits, head(batch).logits)
    assert not torch.allclose(head(other).logits, head(batch).logits)
    assert torch.equal(head.eval()(other).logits, head(batch).logits)
    assert torch.equal(head(replace(batch, seeds=None)).logits, head(batch).logits)


def test_training_with_dropout_needs_seeds_and_without_needs_none() -> None:
    batch = replace(make_batch(), seeds=None)
    with pytest.raises(ValueError, match="has no seeds"):
        feat_head().train()(batch)
    assert feat_head(**NO_DROPOUT).train()(batch).logits.isfinite().all()


def test_first_weights_are_xaviers_and_come_from_the_generator() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        return build_head("feat", {}, (64, 1, 1, 1), None, True, torch.Generator().manual_seed(seed)).state_dict()

    before = torch.get_rng_state()
    first, again = weights(1), weights(1)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("query", "key", "value", "output"):
        values = first[f"attention.{name}.weight"]
        assert torch.equal(values, again[f"attention.{name}.weight"])
        # 4096 normal numbers: their standard deviation is known to about one percent.
        torch.testing.assert_close(values.std(), torch.tensor(2.0 / 128.0).sqrt(), rtol=0.05, atol=0.0)
    assert sorted(first) == sorted(
        f"attention.{name}"
        for name in (
            *("query.weight", "key.weight", "value.weight", "output.weight", "output.bias"),
            *("norm.weight", "norm.bias"),
        )
    )
