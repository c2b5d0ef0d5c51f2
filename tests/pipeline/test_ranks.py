"""What ranks tell each other."""

from __future__ import annotations

import pytest
import torch

from contracts.rank_processes import gather_things, run_ranks
from pipeline.ranks import ALONE, joined_ranks


def test_ranks_sum_gather_and_share() -> None:
    answers = run_ranks(3, gather_things)
    assert [answer[0] for answer in answers] == [[3.0, 3.0]] * 3
    assert [answer[1] for answer in answers] == [["rank 0", "rank 1", "rank 2"]] * 3
    assert [answer[2] for answer in answers] == [[[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]] * 3
    assert [answer[3] for answer in answers] == [range(3), range(3, 6), range(6, 10)]


def test_a_process_alone_is_rank_0_of_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with joined_ranks(torch.device("cpu")) as (ranks, device):
        assert ranks == ALONE
        assert device == torch.device("cpu")
    assert gather_things(ALONE) == [[1.0, 0.0], ["rank 0"], [], range(10)]
