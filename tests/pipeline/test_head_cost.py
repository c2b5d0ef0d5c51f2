"""What a head costs: counted as by hand, measured without touching the head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from contracts.head_cases import CASES, HeadCase, make_batch, make_head
from episodes.batch import EpisodeBatch
from episodes.head import HeadModule, HeadOutput
from pipeline.head_cost import count_flops, measure_heads

CPU = torch.device("cpu")


class CountedHead(HeadModule):
    """A matrix product, a recurrent layer and an attention whose multiplications are counted by hand below."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_weights = {}
        self.cube_shape = (6, 1, 1, 1)
        self.linear = nn.Linear(6, 8, bias=False)
        self.recurrent = nn.LSTM(8, 5, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.frozen = nn.Parameter(torch.zeros(7), requires_grad=False)
        self.calls: list[tuple[int, torch.dtype, bool, bool]] = []

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:  # noqa: ARG002  part of the protocol
        query = batch.query.flatten(2)
        self.calls.append(
            (batch.num_episodes, query.dtype, batch.query_labels is None, torch.is_grad_enabled() or self.training)
        )
        mapped = self.linear(query)
        self.recurrent(mapped)
        attended: Tensor = self.attention(mapped, mapped, mapped, need_weights=False)[0]
        return HeadOutput(attended[..., : batch.n_way])


def example_batch(num_episodes: int) -> EpisodeBatch:
    return EpisodeBatch(
        support=torch.ones(num_episodes, 2, 6, 1, 1, 1, dtype=torch.float16),
        support_labels=torch.tensor([[0, 1]] * num_episodes),
        query=torch.ones(num_episodes, 4, 6, 1, 1, 1, dtype=torch.float16),
        query_labels=torch.zeros(num_episodes, 4, dtype=torch.int64),
        n_way=2,
    )


def test_flops_are_those_counted_by_hand_fused_layers_too() -> None:
    linear = 4 * 6 * 8
    recurrent = 2 * 4 * 4 * 5 * (8 + 5)  # directions, steps, gates, units, inputs and state
    attention = 4 * 8 * 8 * 4 + 2 * 4 * 4 * 8  # three maps in and one out; scores and sums of the values
    assert count_flops(CountedHead().eval(), example_batch(3)) == 2 * (linear + recurrent + attention)
    assert torch.backends.mha.get_fastpath_enabled()


def test_heads_are_timed_in_evaluation_without_labels_and_the_first_call_warms_up() -> None:
    heads = [CountedHead().eval(), CountedHead().eval()]
    costs = measure_heads(heads, [example_batch(3)] * 4, CPU)
    for head, cost in zip(heads, costs, strict=True):
        assert cost.parameters == cost.trainable_parameters + 7
        assert cost.timed_episodes == 3
        assert cost.milliseconds > 0.0
        # Four timed calls; counting is done on a copy.
        assert head.calls[-4:] == [(3, torch.float32, True, False)] * 4


@pytest.mark.parametrize("case", [case for case in CASES if not case.options], ids=str)
def test_every_head_can_be_counted_and_is_left_as_it_was(case: HeadCase) -> None:
    head = make_head(case).eval()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    state = torch.get_rng_state()
    assert count_flops(head, make_batch(cube_shape=case.cube_shape)) > 0
    assert torch.equal(state, torch.get_rng_state())
    after = head.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not head.training
