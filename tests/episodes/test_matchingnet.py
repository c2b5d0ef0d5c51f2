"""Matching networks beside plain loops: the published forms, and the full context embedding."""

# E episodes, S supports, Q queries, N classes; C channels

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contracts.head_cases import CUBE_SHAPE, HeadCase, make_batch, make_head
from contracts.uneven_episodes import PlainEpisode, plain_episode, uneven_batch
from episodes.build import HEADS, build_head
from episodes.heads.matchingnet import FullContext, MatchingnetHead


def reference_scores(episode: PlainEpisode, form: str, temperature: float) -> Tensor:
    """Votes of the supports, one query and one support at a time."""
    rows = []
    for query in episode.query:
        if form == "feat":
            said = torch.stack([query @ each / each.norm() / temperature for each in episode.support])
            rows.append(torch.stack([said[episode.labels == label].sum() for label in range(3)]))
            continue
        epsilon = 1e-5 if form == "closer_look" else 0.0
        cosines = [query @ each / ((query.norm() + epsilon) * (each.norm() + epsilon)) for each in episode.support]
        similarity = torch.stack(cosines).relu() if form == "closer_look" else torch.stack(cosines)
        share = (similarity / temperature).softmax(dim=0)
        sums = torch.stack([share[episode.labels == label].sum() for label in range(3)])
        rows.append((sums + (1e-6 if form == "closer_look" else 0.0)).log())
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("form", "published", "given"), [("paper", 1.0, 0.2), ("closer_look", 0.01, 0.05), ("feat", 1.0, 64.0)]
)
def test_scores_are_the_summed_votes_of_the_supports(form: str, published: float, given: float) -> None:
    # Around zero some cosines are negative, which one of the forms sets to zero.
    batch = uneven_batch()
    batch = replace(batch, support=batch.support - 1.0, query=batch.query - 1.0)
    for options, temperature in (({"form": form}, published), ({"form": form, "temperature": given}, given)):
        output = make_head(HeadCase("matchingnet", options)).eval()(batch)
        for index in range(2):
            expected = reference_scores(plain_episode(batch, index), form, temperature)
            torch.testing.assert_close(output.logits[index], expected)


@pytest.mark.parametrize("form", ["paper", "closer_look"])
def test_loss_is_minus_the_logarithm_of_the_probability(form: str) -> None:
    batch = uneven_batch()
    output = make_head(HeadCase("matchingnet", {"form": form}))(batch)
    assert batch.query_labels is not None
    expected = -output.logits.gather(2, batch.query_labels[..., None])[..., 0]
    torch.testing.assert_close(output.losses["few_shot"], expected)


def test_loss_of_the_feat_form_is_the_cross_entropy() -> None:
    batch = uneven_batch()
    output = make_head(HeadCase("matchingnet", {"form": "feat"}))(batch)
    assert batch.query_labels is not None
    expected = -output.logits.log_softmax(dim=-1).gather(2, batch.query_labels[..., None])[..., 0]
    torch.testing.assert_close(output.losses["few_shot"], expected)


@pytest.mark.parametrize("form", ["paper", "closer_look"])
def test_weights_of_the_supports_explain_the_scores_and_padding_has_none(form: str) -> None:
    batch = uneven_batch()
    output = make_head(HeadCase("matchingnet", {"form": form})).eval()(batch, with_maps=True)
    weights = output.maps["support_weights"]
    assert weights.shape == (2, 4, 9)
    assert weights.min() >= 0.0
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    assert not weights.transpose(1, 2)[batch.support_labels < 0].any()
    for label in range(3):
        sums = (weights * (batch.support_labels == label)[:, None]).sum(dim=-1)
        # One form adds 1e-6 to the probabilities.
        torch.testing.assert_close(sums, output.logits[..., label].exp(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"full_context": True}], ids=str)
def test_the_feat_form_has_no_weights_to_show(options: dict[str, bool]) -> None:
    head = make_head(HeadCase("matchingnet", {"form": "feat", **options})).eval()
    assert head(uneven_batch(), with_maps=True).maps == {}


def test_probabilities_far_below_the_smallest_number_have_finite_logarithms() -> None:
    batch = make_batch(dtype=torch.float32, num_episodes=1)
    batch.query.requires_grad_()
    output = make_head(HeadCase("matchingnet", {"temperature": 1e-5}), dtype=torch.float32)(batch)
    torch.autograd.backward(output.losses["few_shot"].sum())
    assert output.logits.isfinite().all()
    assert output.logits.min() < -200.0
    assert batch.query.grad is not None
    assert batch.query.grad.isfinite().all()


def in_full_context(context: FullContext, episode: PlainEpisode) -> PlainEpisode:
    """The context embedding of one episode, one query and one step at a time."""
    channels, num_supports = episode.support.shape[1], len(episode.support)
    outputs = context.support_lstm(episode.support[None])[0][0]
    support = episode.support + outputs[:, :channels] + outputs[:, channels:]
    queries = []
    for query in episode.query:
        hidden, cell = query, torch.zeros_like(query)
        for _ in range(num_supports):
            attention = (support @ hidden).softmax(dim=0)
            step = torch.cat([query, attention @ support])[None]
            hidden, cell = (state[0] for state in context.query_cell(step, (hidden[None], cell[None])))
            hidden = hidden + query
        queries.append(hidden)
    return replace(episode, support=support, query=torch.stack(queries))


@pytest.mark.parametrize("form", ["paper", "closer_look"])
def test_full_context_agrees_with_a_plain_loop(form: str) -> None:
    batch = uneven_batch()
    head = make_head(HeadCase("matchingnet", {"form": form, "full_context": True})).eval()
    assert isinstance(head, MatchingnetHead)
    assert head.context is not None
    output = head(batch, with_maps=True)
    for index in range(2):
        expected = in_full_context(head.context, plain_episode(batch, index))
        scores = reference_scores(expected, form, 0.01 if form == "closer_look" else 1.0)
        torch.testing.assert_close(output.logits[index], scores)
    assert not output.maps["support_weights"].transpose(1, 2)[batch.support_labels < 0].any()


def test_full_context_reads_the_supports_by_video_id() -> None:
    batch = make_batch()
    assert batch.support_order is not None
    head = make_head(HeadCase("matchingnet", {"full_context": True})).eval()
    other = head(replace(batch, support_order=batch.support_order.flip(1)))
    assert not torch.allclose(other.logits, head(batch).logits)
    assert HEADS["matchingnet"].order_reason
    without_ids, already_sorted = replace(batch, support_order=None), batch.in_order()
    assert not torch.allclose(head(without_ids).logits, head(batch).logits)
    torch.testing.assert_close(head(replace(already_sorted, support_order=None)).logits, head(batch).logits)


def test_first_weights_are_torchs_and_come_from_the_generator() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(seed)
        return build_head("matchingnet", {"full_context": True}, CUBE_SHAPE, None, True, source).state_dict()

    before = torch.get_rng_state()
    first, again, other = weights(1), weights(1), weights(2)
    assert torch.equal(torch.get_rng_state(), before)
    bound = 1.0 / math.sqrt(CUBE_SHAPE[0])
    for name, values in first.items():
        assert torch.equal(values, again[name])
        assert not torch.equal(values, other[name])
        assert 0.8 * bound < values.abs().max() <= bound, name


def test_without_context_it_has_no_parameters() -> None:
    assert not build_head("matchingnet", {}, CUBE_SHAPE, None, True).state_dict()
