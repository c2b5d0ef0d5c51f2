"""Every head of `HEADS` keeps the contract; the values that heads hand back are checked."""

import pytest
import torch

from contracts.head_cases import CASES
from contracts.head_contract import HeadContract
from episodes.build import HEADS
from episodes.head import HeadOutput


class TestEveryHead(HeadContract):
    """The contract over all heads and the options that change their shape."""


def test_contract_covers_every_head_with_its_defaults() -> None:
    assert {case.name for case in CASES if not case.options} == set(HEADS)


def test_output_refuses_a_loss_of_another_shape() -> None:
    with pytest.raises(ValueError, match="few_shot"):
        HeadOutput(torch.zeros(2, 3, 5), {"few_shot": torch.zeros(2)})


def test_output_refuses_logits_without_episodes() -> None:
    with pytest.raises(ValueError, match="logits"):
        HeadOutput(torch.zeros(3, 5))
