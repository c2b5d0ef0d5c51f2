"""The classifiers trained per episode, beside torch's own optimiser."""

# E episodes, S supports, Q queries, N classes; C channels

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contracts.head_cases import HeadCase, make_batch, make_head, with_padding
from contracts.uneven_episodes import PlainEpisode, plain_episode, uneven_batch
from episodes.batch import EpisodeBatch
from episodes.build import head_config
from episodes.heads.baseline import BaselineHead, BaselineOptions, shuffles
from episodes.noise import EpisodeNoise

LONG = 10.0
"""Length of the features, so that the classifiers move."""


def baseline_head(name: str, **options: Any) -> BaselineHead:
    head = make_head(HeadCase(name, options))
    assert isinstance(head, BaselineHead)
    return head


def long_features(batch: EpisodeBatch) -> EpisodeBatch:
    return replace(batch, support=LONG * (batch.support - 1.0), query=LONG * (batch.query - 1.0))


def reference_draws(seed: int, episode: PlainEpisode, epochs: int) -> tuple[Tensor, list[Tensor]]:
    """First weights (N, C+1), rows by class, and the order of the supports in each epoch, from the stream of a seed."""
    source = torch.Generator().manual_seed(seed)
    channels = episode.support.shape[1]
    drawn = torch.rand(3, channels + 1, generator=source)
    keys = torch.stack([torch.rand(epochs, generator=source) for _ in episode.labels])  # (S, epochs)
    first_seen = list(dict.fromkeys(episode.labels.tolist()))
    rows = torch.stack([drawn[first_seen.index(label)] for label in range(3)])
    return (2.0 * rows.double() - 1.0) / math.sqrt(channels), [keys[:, epoch].argsort() for epoch in range(epochs)]


def reference_scores(seed: int, episode: PlainEpisode, config: BaselineOptions) -> Tensor:
    """The published training of one episode with torch's optimiser: logits (Q, N)."""
    rows, orders = reference_draws(seed, episode, config.epochs)
    weight, bias = rows[:, :-1].clone().requires_grad_(), rows[:, -1].clone().requires_grad_()
    norm = weight.detach().norm(dim=1, keepdim=True).requires_grad_()

    def scores(features: Tensor) -> Tensor:
        if config.classifier == "linear":
            return F.linear(features, weight, bias)
        unit = features / (features.norm(dim=1, keepdim=True) + 1e-5)
        return config.scale * F.linear(unit, norm * weight / weight.norm(dim=1, keepdim=True))

    optimizer = torch.optim.SGD(
        [weight, bias if config.classifier == "linear" else norm],
        lr=config.learning_rate,
        momentum=config.momentum,
        dampening=config.dampening,
        weight_decay=config.weight_decay,
    )
    for order in orders:
        for start in range(0, len(order), config.batch_size):
            chosen = order[start : start + config.batch_size]
            optimizer.zero_grad()
            loss = F.cross_entropy(scores(episode.support[chosen]), episode.labels[chosen])
            torch.autograd.backward(loss)
            optimizer.step()
    return scores(episode.query).detach()


@pytest.mark.parametrize("name", ["baseline", "baseline++"])
@pytest.mark.parametrize(
    "options",
    [{}, {"epochs": 7, "batch_size": 3, "learning_rate": 0.1, "momentum": 0.5, "dampening": 0.2, "weight_decay": 0.02}],
    ids=["published", "other"],
)
def test_training_agrees_with_the_optimiser_of_torch(name: str, options: dict[str, Any]) -> None:
    batch = long_features(uneven_batch())
    assert batch.seeds is not None
    head = baseline_head(name, **options)
    output = head.eval()(batch)
    for index in range(2):
        expected = reference_scores(int(batch.seeds[index]), plain_episode(batch, index), head.config)
        torch.testing.assert_close(output.logits[index], expected, rtol=1e-9, atol=1e-9)


def test_an_episode_does_not_notice_a_longer_neighbour() -> None:
    batch = long_features(uneven_batch())
    assert batch.seeds is not None
    # 7 supports beside 6 with batches of 2: four steps an epoch beside three.
    head = baseline_head("baseline", batch_size=2, epochs=5).eval()
    for index in range(2):
        expected = reference_scores(int(batch.seeds[index]), plain_episode(batch, index), head.config)
        torch.testing.assert_close(head(batch).logits[index], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["baseline", "baseline++"])
def test_training_fits_the_supports(name: str) -> None:
    batch = make_batch(k_shot=2, noise=0.2)
    # Features that all point the same way would need more than the published number of steps.
    support = LONG * (batch.support - batch.support.mean(dim=(0, 1), keepdim=True))
    same = replace(batch, support=support, query=support, query_labels=batch.support_labels)
    untrained, trained = baseline_head(name, epochs=0)(same), baseline_head(name)(same)
    assert trained.losses["few_shot"].mean() < untrained.losses["few_shot"].mean()
    assert (trained.logits.argmax(dim=-1) == same.query_labels).all()
    assert not (untrained.logits.argmax(dim=-1) == same.query_labels).all()


@pytest.mark.parametrize("name", ["baseline", "baseline++"])
def test_it_trains_without_gradients_around_it(name: str) -> None:
    batch, head = long_features(make_batch()), baseline_head(name, epochs=3)
    expected = head(batch).logits
    with torch.no_grad():
        assert torch.equal(head(batch).logits, expected)
    with torch.inference_mode():
        assert torch.equal(head(batch).logits, expected)


def test_gradients_reach_the_queries_and_not_the_supports() -> None:
    batch = make_batch()
    batch.support.requires_grad_()
    batch.query.requires_grad_()
    torch.autograd.backward(baseline_head("baseline", epochs=2)(batch).losses["few_shot"].sum())
    assert batch.support.grad is None
    assert batch.query.grad is not None
    assert batch.query.grad.any()


def test_another_seed_gives_another_classifier() -> None:
    batch, head = make_batch(), baseline_head("baseline", epochs=2)
    assert batch.seeds is not None
    assert not torch.allclose(head(replace(batch, seeds=batch.seeds + 1)).logits, head(batch).logits)


def test_without_seeds_it_says_so() -> None:
    with pytest.raises(ValueError, match="has no seeds"):
        baseline_head("baseline")(replace(make_batch(), seeds=None))


def test_every_epoch_takes_each_support_once_and_padding_last() -> None:
    batch = with_padding(make_batch())
    is_real = (batch.support_labels >= 0).sort(dim=1, descending=True).values
    orders = shuffles(EpisodeNoise(batch.seeds), is_real, epochs=5)
    assert orders.shape == (5, 2, 8)
    assert torch.equal(orders.sort(dim=-1).values, torch.arange(8).expand(5, 2, 8))
    assert (orders[..., 6:] >= 6).all()
    assert len({tuple(order.tolist()) for order in orders[:, 0]}) > 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("baseline", {"scale": 2.0}, "the classifier is linear"),
        ("baseline", {"classifier": "cosine"}, "by definition"),
        ("baseline++", {"epochs": 0, "momentum": 0.5}, "there are no epochs"),
        ("baseline++", {"batch_size": 0}, "batch_size"),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_config(name, options)


def test_it_has_no_parameters() -> None:
    assert not baseline_head("baseline").state_dict()
