"""An episode batch is checked at birth."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from episodes.batch import EpisodeBatch


def batch() -> EpisodeBatch:
    return EpisodeBatch(
        support=torch.zeros(2, 3, 4, 1, 1, 1),
        support_labels=torch.tensor([[0, 1, -1], [1, 0, 1]]),
        query=torch.zeros(2, 2, 4, 1, 1, 1),
        query_labels=torch.tensor([[1, 0], [1, 1]]),
        n_way=2,
        class_global_labels=torch.tensor([[7, 3], [5, 9]]),
    )


def test_global_labels_follow_the_query_labels() -> None:
    labels = batch().global_labels
    assert labels is not None
    assert labels.tolist() == [[3, 7], [9, 9]]


def test_global_labels_are_absent_without_their_parts() -> None:
    assert replace(batch(), query_labels=None).global_labels is None
    assert replace(batch(), class_global_labels=None).global_labels is None


def test_moving_keeps_every_field() -> None:
    seeds, order = torch.tensor([3, 4]), torch.tensor([[2, 0, 1], [0, 1, 2]])
    moved = replace(batch(), seeds=seeds, support_order=order).to("cpu")
    assert moved.seeds is seeds
    assert moved.support_order is not None
    assert torch.equal(moved.support_order, order)
    assert moved.n_way == 2
    assert torch.equal(moved.support_labels, batch().support_labels)
    assert moved.class_global_labels is not None
    # The meta device holds no values, as an accelerator holds none that may be read for free.
    assert batch().to("meta").support.device.type == "meta"


def test_supports_in_order_of_their_ids_come_with_their_labels() -> None:
    videos = torch.arange(6.0).reshape(2, 3, 1, 1, 1, 1).expand(2, 3, 4, 1, 1, 1)
    ordered = replace(batch(), support=videos, support_order=torch.tensor([[2, 0, 1], [0, 1, 2]])).in_order()
    assert ordered.support[:, :, 0, 0, 0, 0].tolist() == [[1, 2, 0], [3, 4, 5]]
    assert ordered.support_labels.tolist() == [[1, -1, 0], [1, 0, 1]]
    assert ordered.support_order is not None
    assert ordered.support_order.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch().in_order().support_labels.tolist() == batch().support_labels.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_way": 0}, "n_way is 0"),
        ({"support": torch.zeros(2)}, "need axes"),
        ({"support": torch.zeros(1, 3, 4, 1, 1, 1)}, "support has 1 episodes but query has 2"),
        ({"query": torch.zeros(2, 2, 5, 1, 1, 1)}, r"a support is \(4, 1, 1, 1\) but a query is \(5, 1, 1, 1\)"),
        ({"support_labels": torch.zeros(2, 2, dtype=torch.int64)}, "support_labels has shape"),
        ({"support_labels": torch.zeros(2, 3)}, "support_labels is torch.float32"),
        ({"support_labels": torch.tensor([[0, 1, 2], [0, 1, 1]])}, "reaches from 0 to 2, but -1 to 1 is allowed"),
        ({"support_labels": torch.tensor([[0, 1, -2], [0, 1, 1]])}, "reaches from -2"),
        ({"support_labels": torch.tensor([[0, 1, 1], [0, -1, 0]])}, "episode 1 of the batch has no support of class 1"),
        ({"query_labels": torch.tensor([[0, -1], [0, 1]])}, "query_labels reaches from -1"),
        ({"query_labels": torch.tensor([[0], [0]])}, "query_labels has shape"),
        ({"class_global_labels": torch.tensor([[0, 1, 2], [0, 1, 2]])}, "class_global_labels has shape"),
        ({"class_global_labels": torch.tensor([[0, -1], [0, 1]])}, "class_global_labels reaches from -1"),
        ({"seeds": torch.tensor([1])}, "seeds has shape"),
        ({"support_order": torch.tensor([[0, 1], [0, 1]])}, "support_order has shape"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(batch(), **change)
