"""What every head must hold: a line in `HEADS` brings all of these tests.

Use: `class TestEveryHead(HeadContract): ...` in a test module.
"""

# E episodes, S supports, Q queries, N classes, K shots, Z global classes; C channels, T time steps, H W grid

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from contracts.head_cases import (
    CASES,
    HeadCase,
    make_batch,
    make_head,
    part,
    reordered,
    total_loss,
    with_padding,
)
from episodes.batch import EpisodeBatch
from episodes.head import HeadModule, HeadOutput
from episodes.losses import combine
from episodes.maps import axes_of


def assert_same(found: HeadOutput, expected: HeadOutput, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found.logits, expected.logits, rtol=tolerance, atol=tolerance)
    assert set(found.losses) == set(expected.losses)
    for name, term in expected.losses.items():
        torch.testing.assert_close(found.losses[name], term, rtol=tolerance, atol=tolerance)


def batch_for(case: HeadCase, **options: Any) -> EpisodeBatch:
    return make_batch(**{"cube_shape": case.cube_shape, **options})


both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


class HeadContract:
    """The laws of the `Head` protocol."""

    @pytest.fixture(
        params=[pytest.param(each, marks=[pytest.mark.slow] if each.is_slow else []) for each in CASES], ids=str
    )
    def case(self, request: pytest.FixtureRequest) -> HeadCase:
        case = request.param
        assert isinstance(case, HeadCase)
        return case

    @both_modes
    def test_logits_and_losses_have_their_shapes(self, case: HeadCase, training: bool) -> None:
        output: HeadOutput = make_head(case).train(training)(batch_for(case))
        assert output.logits.shape == (2, 4, 3)
        assert output.logits.isfinite().all()
        assert set(output.losses) <= set(make_head(case).loss_weights)
        assert "few_shot" in output.losses
        for term in output.losses.values():
            assert term.shape == (2, 4)
            assert term.isfinite().all()

    def test_prediction_needs_no_labels(self, case: HeadCase) -> None:
        batch = batch_for(case)
        head = make_head(case).eval()
        output: HeadOutput = head(replace(batch, query_labels=None, class_global_labels=None))
        assert output.losses == {}
        torch.testing.assert_close(output.logits, head(batch).logits)

    def test_maps_come_on_request_only_and_change_nothing(self, case: HeadCase) -> None:
        batch, head = batch_for(case), make_head(case).eval()
        plain, shown = head(batch), head(batch, with_maps=True)
        assert plain.maps == {}
        assert_same(shown, plain, tolerance=0.0)
        assert all(values.shape[0] == 2 and values.isfinite().all() for values in shown.maps.values())

    @both_modes
    def test_order_of_supports_does_not_matter(self, case: HeadCase, training: bool) -> None:
        batch, head = batch_for(case), make_head(case).train(training and not case.is_noisy)
        assert_same(head(reordered(batch, torch.tensor([3, 0, 5, 1, 4, 2]))), head(batch))

    @both_modes
    def test_permuted_classes_permute_the_columns(self, case: HeadCase, training: bool) -> None:
        batch, head = batch_for(case), make_head(case).train(training and not case.is_noisy)
        assert batch.query_labels is not None
        assert batch.class_global_labels is not None
        old_of_new = torch.tensor([2, 0, 1])
        new_of_old = old_of_new.argsort()
        renamed = replace(
            batch,
            support_labels=new_of_old[batch.support_labels],
            query_labels=new_of_old[batch.query_labels],
            class_global_labels=batch.class_global_labels[:, old_of_new],
        )
        found, expected = head(renamed), head(batch)
        assert_same(found, replace(expected, logits=expected.logits[:, :, old_of_new]))

    def test_a_query_does_not_see_another_query_in_evaluation(self, case: HeadCase) -> None:
        batch, head = batch_for(case), make_head(case).eval()
        together: HeadOutput = head(batch)
        for index in range(4):
            alone: HeadOutput = head(part(batch, queries=slice(index, index + 1)))
            torch.testing.assert_close(alone.logits, together.logits[:, index : index + 1], rtol=1e-9, atol=1e-9)

    @both_modes
    def test_episodes_in_one_call_equal_single_calls(self, case: HeadCase, training: bool) -> None:
        batch = batch_for(case, num_episodes=3)
        together, single = make_head(case).train(training), make_head(case).train(training)
        output: HeadOutput = together(batch)
        singles: list[HeadOutput] = [single(part(batch, episodes=slice(index, index + 1))) for index in range(3)]
        joined = HeadOutput(
            torch.cat([each.logits for each in singles]),
            {name: torch.cat([each.losses[name] for each in singles]) for name in output.losses},
        )
        assert_same(output, joined)
        for name, value in together.state_dict().items():
            torch.testing.assert_close(value, single.state_dict()[name], rtol=1e-12, atol=1e-12, msg=name)

    def test_evaluation_keeps_nothing(self, case: HeadCase) -> None:
        batch, head = batch_for(case), make_head(case).eval()
        before = copy.deepcopy(head.state_dict())
        first, second = head(batch), head(batch)
        assert_same(second, first, tolerance=0.0)
        for name, value in head.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_every_parameter_learns(self, case: HeadCase) -> None:
        head, batch = make_head(case).train(), batch_for(case)
        # A head without parameters still trains the backbone in front of it.
        batch.query.requires_grad_()
        torch.autograd.backward(total_loss(head, batch))
        names = dict(head.named_parameters())
        assert set(case.without_gradient) <= set(names)
        for name, parameter in names.items():
            assert parameter.grad is not None, f"{name} is not part of the loss"
            largest = float(parameter.grad.abs().max())
            if name in case.without_gradient:
                assert largest < 1e-12, f"{name} was listed as without gradient"
            else:
                assert largest > 1e-9, f"{name} has no gradient"

    def test_gradients_reach_the_cubes(self, case: HeadCase) -> None:
        batch = batch_for(case)
        batch.support.requires_grad_()
        batch.query.requires_grad_()
        torch.autograd.backward(total_loss(make_head(case).train(), batch))
        if case.support_without_gradient:
            assert batch.support.grad is None or not batch.support.grad.any()
        for cubes in [batch.query] if case.support_without_gradient else [batch.support, batch.query]:
            assert cubes.grad is not None
            # For each video of the batch.
            assert (cubes.grad.flatten(2).abs().amax(dim=-1) > 0.0).all()

    @both_modes
    def test_padding_changes_nothing(self, case: HeadCase, training: bool) -> None:
        batch, head = batch_for(case), make_head(case).train(training and not case.is_noisy)
        assert_same(head(with_padding(batch)), head(batch))

    def test_classes_may_have_unequal_shots(self, case: HeadCase) -> None:
        batch, head = batch_for(case, num_episodes=1, k_shot=1), make_head(case).eval()
        assert batch.support_order is not None
        doubled = replace(
            batch,
            support=torch.cat([batch.support, batch.support[:, 1:2]], dim=1),
            support_labels=torch.cat([batch.support_labels, batch.support_labels[:, 1:2]], dim=1),
            support_order=torch.cat([batch.support_order, torch.tensor([[3]])], dim=1),
        )
        if case.repeats_matter:
            found: HeadOutput = head(doubled)
            assert found.logits.isfinite().all()
            assert not torch.allclose(found.logits, head(batch).logits), "listed as changed by a repeated support"
        else:
            assert_same(head(doubled), head(batch))

    def test_single_precision_agrees_with_double(self, case: HeadCase) -> None:
        expected: HeadOutput = make_head(case).eval()(batch_for(case))
        found: HeadOutput = make_head(case, dtype=torch.float32).eval()(batch_for(case, dtype=torch.float32))
        # Single precision carries about 1e-7; the attention's temperature multiplies it by forty.
        torch.testing.assert_close(found.logits.double(), expected.logits, rtol=1e-4, atol=case.single_precision)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_trains_under_automatic_mixed_precision(self, case: HeadCase, dtype: torch.dtype) -> None:
        head, batch = make_head(case, dtype=torch.float32).train(), batch_for(case, dtype=dtype)
        batch.query.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = total_loss(head, batch)
        torch.autograd.backward(loss)
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name

    def test_learns_a_separable_toy(self, case: HeadCase) -> None:
        head = make_head(case, dtype=torch.float32).train()
        batch = batch_for(case, num_episodes=4, dtype=torch.float32, noise=0.5)
        # Positive features all point the same way: without their mean, classes lie apart.
        batch = replace(batch, support=batch.support - 0.75, query=batch.query - 0.75)
        if list(head.parameters()):
            train_toy(head, batch, case)
        output: HeadOutput = head.eval()(batch)
        assert batch.query_labels is not None
        assert output.logits.argmax(dim=-1).eq(batch.query_labels).float().mean() > 0.9

    @pytest.mark.parametrize("grid", [(2, 3, 3), (8, 1, 1), (1, 1, 1)], ids=str)
    @both_modes
    def test_takes_cubes_of_any_size(self, case: HeadCase, grid: tuple[int, int, int], training: bool) -> None:
        shape = (5, *grid)
        if grid in case.refused_grids:
            with pytest.raises(ValueError, match=case.refused_grids[grid]):
                make_head(case, shape)
            return
        head, batch = make_head(case, shape).train(training), make_batch(cube_shape=shape)
        batch.query.requires_grad_(training)
        output: HeadOutput = head(batch, with_maps=True)
        assert output.logits.shape == (2, 4, 3)
        assert all(term.isfinite().all() for term in output.losses.values())
        if training:
            torch.autograd.backward(combine(output.losses, head.loss_weights, "mean").sum())

    def test_another_cube_shape_is_refused(self, case: HeadCase) -> None:
        channels, *grid = case.cube_shape
        other = (channels + 1, *grid)
        with pytest.raises(ValueError, match=rf"{re.escape(str(other))}.*{re.escape(str(case.cube_shape))}"):
            make_head(case)(make_batch(cube_shape=other))

    def test_maps_have_the_axes_of_their_names(self, case: HeadCase) -> None:
        # Sizes that differ from one another, so that no axis passes for another.
        shape = (case.cube_shape[0], 5, 7, 8)
        batch = make_batch(cube_shape=shape)
        output: HeadOutput = make_head(case, shape).eval()(batch, with_maps=True)
        sizes = {"E": 2, "S": 6, "Q": 4, "N": 3, "T": 5, "U": 5, "H": 7, "W": 8, "2": 2, **case.map_sizes}
        for name, values in output.maps.items():
            number = name.rpartition("_")[2]
            members = {"K": int(number)} if number.isdigit() else {}
            expected = [{**sizes, **members}[letter] for letter in axes_of(name).split()]
            assert list(values.shape) == expected, name


def train_toy(head: HeadModule, batch: EpisodeBatch, case: HeadCase) -> None:
    """Train on one batch until its loss is clearly lower; heads that train their parts in turns take turns."""
    optimizer = torch.optim.Adam(head.parameters(), lr=case.learning_rate)
    first = last = 0.0
    for step in range(case.num_steps):
        output: HeadOutput = head(batch)
        phase = head.phases[step % len(head.phases)] if head.phases else None
        losses = {name: term for name, term in output.losses.items() if phase is None or name in phase.losses}
        optimizer.zero_grad()
        total = combine(losses, head.loss_weights, "mean").sum()
        torch.autograd.backward(total)
        for name, parameter in head.named_parameters():
            if phase is not None and not name.startswith(phase.parameters):
                parameter.grad = None
        optimizer.step()
        # The parts of an adversarial head pull in different directions; what it is for must fall all the same.
        last = (total if phase is None else output.losses["few_shot"].mean()).item()
        first = first if step else last
    assert last < 0.75 * first, (first, last)
