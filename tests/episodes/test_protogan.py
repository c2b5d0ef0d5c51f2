"""ProtoGAN: the classifier and the critic's loss compared with plain forms, the noise, the turns of training."""

# E episodes, S supports, Q queries, N classes, G made features per class; C channels

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from contracts.head_cases import HeadCase, make_batch, make_head, reordered
from episodes.build import HEADS, build_head
from episodes.head import HeadOutput
from episodes.heads.protogan import SLOPE, ProtoganHead, first_places, weighted_ridge
from episodes.losses import combine
from episodes.noise import EpisodeNoise

SMALL = {"num_generated": 3, "hidden": 12, "prototype_size": 4, "noise_size": 5}


def protogan(dtype: torch.dtype = torch.float64, **options: Any) -> ProtoganHead:
    head = make_head(HeadCase("protogan", {**SMALL, **options}, perturbation=0.02), dtype=dtype)
    assert isinstance(head, ProtoganHead)
    return head


def test_classifier_is_ridge_regression_with_a_free_bias() -> None:
    source = torch.Generator().manual_seed(0)
    rows, targets, queries = (
        torch.randn(1, *shape, generator=source, dtype=torch.float64) for shape in ((7, 4), (7, 3), (5, 4))
    )
    weights = torch.rand(1, 7, 1, generator=source, dtype=torch.float64)
    weights[0, 2] = 0.0
    found = weighted_ridge(rows, targets, weights, queries, 0.3)
    # The textbook form: a column of ones that is not penalised, and the normal equations.
    inputs = np.concatenate([rows[0].numpy(), np.ones((7, 1))], axis=1)
    balance = np.diag(weights[0, :, 0].numpy())
    penalty = np.diag([0.3] * 4 + [0.0])
    solution = np.linalg.solve(inputs.T @ balance @ inputs + penalty, inputs.T @ balance @ targets[0].numpy())
    expected = np.concatenate([queries[0].numpy(), np.ones((5, 1))], axis=1) @ solution
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_critic_loss_is_that_of_a_plain_loop_over_queries() -> None:
    head = protogan()
    source = torch.Generator().manual_seed(1)
    real, made = (torch.randn(1, 4, 8, generator=source, dtype=torch.float64) for _ in range(2))
    wanted = torch.randn(1, 4, 4, generator=source, dtype=torch.float64)
    between = torch.rand(1, 4, 1, generator=source, dtype=torch.float64)
    found = head._critic_loss(real, made, wanted, between)
    for query in range(4):
        point = between[0, query] * real[0, query] + (1.0 - between[0, query]) * made[0, query]
        # Between the kinks of the leaky ReLU the critic is linear: its slope is a product of two matrices.
        inputs = torch.cat([point, wanted[0, query]])
        active = torch.where(head.critic.first(inputs) > 0.0, 1.0, SLOPE)
        slope = ((head.critic.second.weight * active) @ head.critic.first.weight)[0, :8]
        ends = torch.stack([made[0, query], real[0, query]])
        high, low = head.critic(torch.cat([ends, wanted[0, [query, query]]], dim=1))[:, 0]
        expected = high - low + 10.0 * (slope.norm() - 1.0) ** 2
        torch.testing.assert_close(found[0, query], expected)


def test_noise_of_a_class_follows_its_first_video_not_its_label() -> None:
    head, batch = protogan().eval(), make_batch()
    assert batch.support_order is not None
    rank = first_places(batch).argsort(dim=1).argsort(dim=1)
    for episode in range(2):
        firsts = [batch.support_order[episode][batch.support_labels[episode] == label].min() for label in range(3)]
        assert rank[episode].tolist() == torch.stack(firsts).argsort().argsort().tolist()
    prototypes = torch.ones(2, 3, 4, dtype=torch.float64)
    made = head.generate(batch, prototypes, EpisodeNoise(batch.seeds))
    drawn = EpisodeNoise(batch.seeds).normal((3, 3, 5)).double()
    for episode in range(2):
        for label in range(3):
            inputs = torch.cat([drawn[episode, rank[episode, label]], prototypes[episode, [label] * 3]], dim=1)
            torch.testing.assert_close(made[episode, label], head.generator(inputs))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(head.generate(reordered(batch, order), prototypes, EpisodeNoise(batch.seeds)), made)


def test_evaluation_is_reproducible_and_moves_with_the_seeds() -> None:
    head, batch = protogan(generated_share=0.9).eval(), make_batch()
    assert batch.seeds is not None
    with torch.no_grad():
        first, again = head(batch), head(batch)
        other = head(replace(batch, seeds=batch.seeds + 1))
    assert torch.equal(first.logits, again.logits)
    assert not torch.allclose(first.logits, other.logits)
    assert set(first.losses) == {"few_shot"}


def test_without_made_features_seeds_change_nothing() -> None:
    head, batch = protogan(generated_share=0.0).eval(), make_batch()
    assert batch.seeds is not None
    torch.testing.assert_close(head(batch).logits, head(replace(batch, seeds=batch.seeds + 1)).logits)


def test_missing_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="no seeds"):
        protogan().eval()(replace(make_batch(), seeds=None))


def test_training_without_gradients_leaves_the_adversarial_terms_out() -> None:
    head = protogan().train()
    with torch.no_grad():
        output: HeadOutput = head(make_batch())
    assert set(output.losses) == {"few_shot", "made", "prototype"}


def test_phases_cover_every_term_and_every_parameter_once() -> None:
    head = protogan().train()
    names = set(head(make_batch()).losses)
    assert sorted(name for phase in head.phases for name in phase.losses) == sorted(names)
    for name, _ in head.named_parameters():
        assert sum(name.startswith(phase.parameters) for phase in head.phases) == 1, name


def test_loss_of_each_phase_reaches_all_of_its_parameters() -> None:
    for phase in ProtoganHead.phases:
        head = protogan().train()
        losses = {name: term for name, term in head(make_batch()).losses.items() if name in phase.losses}
        torch.autograd.backward(combine(losses, head.loss_weights, "mean").sum())
        for name, parameter in head.named_parameters():
            if name.startswith(phase.parameters):
                assert parameter.grad is not None, name
                assert parameter.grad.abs().max() > 1e-9, name


def test_the_critic_sees_features_as_data() -> None:
    head, batch = protogan().train(), make_batch()
    batch.query.requires_grad_()
    torch.autograd.backward(head(batch).losses["critic"].sum())
    assert batch.query.grad is None
    assert all(parameter.grad is None for name, parameter in head.named_parameters() if not name.startswith("critic."))


def test_turns_teach_the_generator_to_make_features_of_the_class() -> None:
    head = protogan(torch.float32, num_generated=10, hidden=32).train()
    batch = make_batch(num_episodes=8, n_query=8, dtype=torch.float32, noise=0.3)
    batch = replace(batch, support=batch.support - 0.65, query=batch.query - 0.65)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.005)
    for step in range(60):
        phase = head.phases[step % 2]
        losses = {name: term for name, term in head(batch).losses.items() if name in phase.losses}
        optimizer.zero_grad()
        torch.autograd.backward(combine(losses, head.loss_weights, "mean").sum())
        for name, parameter in head.named_parameters():
            parameter.grad = parameter.grad if name.startswith(phase.parameters) else None
        optimizer.step()
    head.eval()
    # The made features alone, without the supports, tell the classes apart.
    head.config = head.config.model_copy(update={"generated_share": 1.0})
    output: HeadOutput = head(batch)
    assert batch.query_labels is not None
    assert output.logits.argmax(dim=-1).eq(batch.query_labels).float().mean() > 0.9


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"generated_share = 1\.5"):
        build_head("protogan", {"generated_share": 1.5}, (8, 2, 3, 2), None, True)


def test_is_marked_experimental() -> None:
    assert HEADS["protogan"].is_experimental
