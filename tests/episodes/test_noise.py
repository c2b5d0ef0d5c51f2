"""Random numbers of a head belong to the episode: not to the batch, and not to what was drawn elsewhere."""

import pytest
import torch

from episodes.noise import EpisodeNoise

SEEDS = torch.tensor([3, 4, 5])


def test_an_episode_draws_the_same_numbers_alone() -> None:
    together, alone = EpisodeNoise(SEEDS), EpisodeNoise(SEEDS[1:2])
    for draw in ("uniform", "normal"):
        assert torch.equal(getattr(together, draw)((2, 5))[1], getattr(alone, draw)((2, 5))[0])
    assert torch.equal(together.permutation(9)[1], alone.permutation(9)[0])
    values = torch.ones(3, 7, 11)
    assert torch.equal(together.dropout(values, 0.3, is_on=True)[1], alone.dropout(values[:1], 0.3, is_on=True)[0])


def test_each_draw_and_each_episode_is_new() -> None:
    noise = EpisodeNoise(SEEDS)
    first, second = noise.uniform((100,)), noise.uniform((100,))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_torchs_own_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    EpisodeNoise(SEEDS).dropout(torch.ones(3, 50), 0.5, is_on=True)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(share: float) -> None:
    values = torch.ones(3, 100_001, dtype=torch.float64)
    dropped = EpisodeNoise(SEEDS).dropout(values, share, is_on=True)
    # Four standard deviations of a share of 300,003 draws, and the steps of 1 / 65,536.
    slack = 4.0 * (share * (1.0 - share) / 300_003) ** 0.5 + 1.0 / 65_536
    assert float((dropped == 0.0).double().mean()) == pytest.approx(share, abs=slack)
    assert float(dropped.max()) == pytest.approx(1.0 / (1.0 - share), rel=2e-4)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=slack / (1.0 - share) + 1e-4)


def test_neighbouring_elements_are_dropped_independently() -> None:
    # Four elements share a word of the generator.
    kept = (EpisodeNoise(SEEDS).dropout(torch.ones(3, 100_000), 0.5, is_on=True) > 0.0).double()
    for distance in (1, 2, 3, 4):
        both = (kept[:, distance:] * kept[:, :-distance]).mean()
        assert float(both) == pytest.approx(0.25, abs=0.004)


def test_dropout_is_for_training_and_needs_no_seeds_otherwise() -> None:
    values = torch.ones(1, 4)
    assert EpisodeNoise(None).dropout(values, 0.5, is_on=False) is values
    assert EpisodeNoise(None).dropout(values, 0.0, is_on=True) is values
    with pytest.raises(ValueError, match=r"has no seeds for them; give EpisodeBatch\.seeds"):
        EpisodeNoise(None).dropout(values, 0.5, is_on=True)
