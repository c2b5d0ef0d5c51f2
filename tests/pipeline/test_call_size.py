"""Heads that need much memory get few episodes in a call, and the numbers stay the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from contracts.head_cases import make_batch
from contracts.made_runs import CPU, NUM_EPISODES, MadeRuns
from pipeline import call_size
from pipeline.call_size import LargestTensor, parts_of
from pipeline.comparison import Asked, compare_runs
from pipeline.scoring import evaluate_run, load_run


def test_largest_tensor_is_the_largest_that_a_call_makes() -> None:
    inputs, layer = torch.ones(3, 8), nn.Linear(8, 1000, bias=False)
    with torch.no_grad(), LargestTensor() as largest:
        layer(inputs).sum()
    # Not the weights, which are there before, nor a view of them.
    assert largest.num_bytes == 3 * 1000 * 4
    assert largest.episodes_per_call == call_size.CALL_BYTES // 12_000


def test_call_holds_at_least_one_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_size, "CALL_BYTES", 1)
    with LargestTensor() as largest:
        torch.ones(100)
    assert largest.episodes_per_call == 1


@pytest.mark.parametrize(("size", "sizes"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_parts_hold_every_episode_once_in_order(size: int, sizes: list[int]) -> None:
    batch = make_batch(num_episodes=5)
    parts = parts_of(batch, size)
    assert [part.num_episodes for part in parts] == sizes
    for name in ("support", "support_labels", "query", "query_labels", "seeds"):
        whole = getattr(batch, name)
        if whole is not None:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)


@pytest.mark.usefixtures("one_thread")
def test_scores_do_not_depend_on_the_size_of_a_call(made: MadeRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(folder: Path) -> tuple[list[int], tuple[float, ...]]:
        run = load_run(folder, CPU)
        sizes: list[int] = []
        run.model.head.register_forward_hook(lambda _head, inputs, _output: sizes.append(inputs[0].num_episodes))
        _, score = evaluate_run(run, "test", NUM_EPISODES, CPU)
        return sizes, score.per_episode

    large_sizes, large = scored(made.heads[1])
    assert large_sizes == [1, NUM_EPISODES - 1]
    with torch.no_grad(), LargestTensor() as largest:
        run = load_run(made.heads[1], CPU)
        run.model.head.eval()(
            make_batch(num_episodes=1, n_way=2, cube_shape=run.model.head.cube_shape, dtype=torch.float32)
        )
    monkeypatch.setattr(call_size, "CALL_BYTES", 5 * largest.num_bytes)
    small_sizes, small = scored(made.heads[1])
    assert sum(small_sizes) == NUM_EPISODES
    assert 1 < max(small_sizes) < 20
    assert small == large
    monkeypatch.setattr(call_size, "CALL_BYTES", 1)
    compared = compare_runs(made.heads[1:2], Asked(), CPU).runs[0]
    assert compared.score.per_episode == large
    assert compared.cost.timed_episodes == 1
