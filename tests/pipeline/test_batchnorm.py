"""BatchNorm of a learning backbone: each policy against a few plain lines with torch's own modules, on one rank and on two."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.training import TrainingConfig
from contracts.learning_ranks import LEARNINGS, SAMPLING, learn, learn_on_ranks, made_batch, made_model
from episodes.build import HEADS
from episodes.episode_norm import EpisodeBatchNorm
from extract.build import build_backbone
from extract.config import BackboneConfig
from extract.transform import to_input
from pipeline.batchnorm import (
    BackboneBatchNorm,
    BatchStatistics,
    batch_statistics,
    convert_batchnorm,
    is_batchnorm,
    noted_moments,
    running_statistics,
)
from pipeline.model import BackboneLearning, ClipEncoder, preprocessing_of

POLICIES: tuple[BatchStatistics, ...] = ("frozen", "episode", "supports_then_queries", "synchronised")
NUM_SUPPORTS = 2


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    return build_backbone(BackboneConfig(name="small3d", weights="random:3", options={"width": 4}), SAMPLING)


def clips_of(num_episodes: int) -> Tensor:
    batch = made_batch(num_episodes)
    return torch.cat([batch.support, batch.query], dim=1)


def weights_for(cubes: Tensor) -> Tensor:
    return torch.randn(cubes.shape, generator=torch.Generator().manual_seed(5))


def plain_cubes(backbone: nn.Module, clips: Tensor, policy: str) -> Tensor:
    """With torch's own BatchNorm, which adds to its running statistics call by call."""
    backbone.train()
    if policy == "frozen":
        for module in backbone.modules():
            if is_batchnorm(module):
                module.eval()
    if policy == "synchronised":
        calls = [clips.flatten(0, 1)]
    elif policy == "supports_then_queries":
        calls = [call for one in clips for call in (one[:NUM_SUPPORTS], one[NUM_SUPPORTS:])]
    else:
        calls = list(clips)
    cubes = [backbone(to_input(call, preprocessing_of(backbone), SAMPLING.normalization))["cube"] for call in calls]
    return torch.cat(cubes).reshape(*clips.shape[:2], *cubes[0].shape[1:])


@pytest.mark.parametrize("policy", POLICIES)
def test_policy_is_torchs_own_batchnorm_called_as_it_says(backbone: nn.Module, policy: BatchStatistics) -> None:
    theirs, clips = deepcopy(backbone), clips_of(6)
    encoder = ClipEncoder(deepcopy(backbone), SAMPLING, learning=BackboneLearning(batchnorm=policy)).train()
    for step in (clips[:3], clips[3:]):
        expected, found = plain_cubes(theirs, step, policy), encoder(step, NUM_SUPPORTS)
        # The same kernels on the same numbers.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        for cubes in (expected, found):
            (cubes * weights_for(cubes)).sum().backward()
    ours = encoder.backbone
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        # Sums of float32 over 6 episodes in another order.
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    counts = {"frozen": 0, "episode": 6, "supports_then_queries": 12, "synchronised": 2}
    assert int(ours.get_buffer("stem.1.num_batches_tracked")) == counts[policy]


@pytest.mark.parametrize("policy", POLICIES)
def test_evaluation_is_torchs_to_the_bit(backbone: nn.Module, policy: BatchStatistics) -> None:
    clips = clips_of(2)
    encoder = ClipEncoder(deepcopy(backbone), SAMPLING, learning=BackboneLearning(batchnorm=policy)).eval()
    plain = ClipEncoder(deepcopy(backbone), SAMPLING, is_trained=False)
    assert torch.equal(encoder(clips, NUM_SUPPORTS), plain(clips))


def test_statistics_that_wait_move_nothing_until_they_are_applied(backbone: nn.Module) -> None:
    clips = clips_of(3)
    learning = BackboneLearning(batchnorm="supports_then_queries")
    at_once, later = (ClipEncoder(deepcopy(backbone), SAMPLING, learning=learning).train() for _ in range(2))
    norms = running_statistics(later)
    assert [type(norm) for norm in norms] == [BackboneBatchNorm] * 7
    for norm in norms:
        norm.waiting = []
    before = {name: value.clone() for name, value in later.named_buffers()}
    for encoder in (at_once, later):
        encoder(clips[:2], NUM_SUPPORTS)
        encoder(clips[2:], NUM_SUPPORTS)
    assert all(torch.equal(value, before[name]) for name, value in later.named_buffers())
    for norm in norms:
        assert norm.waiting is not None
        moments = torch.cat(norm.waiting)
        assert moments.shape[:3] == (3, 2, 2)
        assert not norm.is_shared
        # As they come from other ranks.
        norm.apply_moments(moments.double())
    for name, value in at_once.named_buffers():
        assert torch.equal(later.get_buffer(name), value), name


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("kind", [EpisodeBatchNorm, BackboneBatchNorm])
def test_running_statistics_are_torchs_with_any_momentum(
    kind: type[EpisodeBatchNorm | BackboneBatchNorm], momentum: float | None
) -> None:
    values = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))  # (E, uses, M, U)
    theirs, ours = nn.BatchNorm1d(4, momentum=momentum), kind(4, momentum=momentum)
    for use in values.flatten(0, 1):
        theirs(use)
    moments = torch.stack([values.mean(dim=2), values.var(dim=2)], dim=2)
    ours.waiting = []
    ours.note_moments(moments[:1])
    ours.note_moments(moments[1:])
    assert int(ours.get_buffer("num_batches_tracked")) == 0
    for waiting in ours.waiting:
        ours.apply_moments(waiting)
    for name, value in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), value, msg=name)


def test_statistics_of_a_head_wait_too() -> None:
    values = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    norm = EpisodeBatchNorm(4)
    norm.waiting = []
    norm.update([norm.normalize(values)[1], None, norm.normalize(values)[1]])
    (moments,) = norm.waiting
    assert moments.shape == (2, 2, 2, 4)
    assert int(norm.num_batches_tracked) == 0
    norm.apply_moments(moments)
    assert int(norm.num_batches_tracked) == 4


def test_a_pass_that_fails_leaves_no_statistics(backbone: nn.Module) -> None:
    encoder = ClipEncoder(deepcopy(backbone), SAMPLING, learning=BackboneLearning(batchnorm="episode")).train()
    with pytest.raises(KeyError), noted_moments(encoder.backbone):
        encoder.backbone(torch.zeros(2, 3, 4, 24, 24))["other"]
    assert int(encoder.backbone.get_buffer("stem.1.num_batches_tracked")) == 0
    # Outside, a training pass is not counted either: so does the second pass of gradient checkpointing.
    encoder.backbone(torch.zeros(2, 3, 4, 24, 24))
    assert int(encoder.backbone.get_buffer("stem.1.num_batches_tracked")) == 0


def test_a_frozen_stem_keeps_its_statistics(backbone: nn.Module) -> None:
    encoder = ClipEncoder(deepcopy(backbone), SAMPLING, learning=BackboneLearning(batchnorm="episode"))
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(not name.startswith("backbone.stem."))
    encoder.train()(clips_of(1), NUM_SUPPORTS)
    counts = {name: int(value) for name, value in encoder.named_buffers() if name.endswith("num_batches_tracked")}
    assert len(counts) == 7
    assert all(count == (0 if ".stem." in name else 1) for name, count in counts.items())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """Two processes, three and two of the five episodes."""
    return learn_on_ranks(tmp_path_factory.mktemp("ranks"), [slice(0, 3), slice(3, 5)])


@pytest.mark.parametrize("name", LEARNINGS)
def test_two_ranks_learn_what_one_learns_from_all_clips(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    alone = learn(LEARNINGS[name], slice(0, 5))
    first, second = (rank[name] for rank in ranks)
    # Another order of float32 sums.
    torch.testing.assert_close(torch.cat([first["losses"], second["losses"]]), alone["losses"], rtol=1e-5, atol=1e-6)
    for gradients in (first["gradients"], second["gradients"]):
        assert gradients.keys() == alone["gradients"].keys()
        largest = max(float(gradient.abs().max()) for gradient in alone["gradients"].values())
        for parameter, gradient in alone["gradients"].items():
            # Of a bias before a BatchNorm nothing but rounding is left, so what counts is the largest of all.
            torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=1e-6 * largest, msg=parameter)
    model = made_model(LEARNINGS[name])
    for norm, all_of_them, *parts in zip(
        running_statistics(model), alone["moments"], first["moments"], second["moments"], strict=True
    ):
        if all_of_them is None:
            assert parts == [None, None]
        elif norm.is_shared:
            for part in parts:
                torch.testing.assert_close(part, all_of_them, rtol=1e-5, atol=1e-6)
        else:
            torch.testing.assert_close(torch.cat(parts), all_of_them, rtol=1e-5, atol=1e-6)


def test_policy_follows_mode_and_head() -> None:
    def resolved(head: str = "mastaf", **knobs: object) -> str:
        return batch_statistics(TrainingConfig.model_validate(knobs), head)

    assert resolved(mode="end_to_end") == "frozen"
    assert resolved(mode="classify") == "synchronised"
    assert resolved(mode="classify", backbone_batchnorm="frozen") == "frozen"
    assert resolved(mode="end_to_end", backbone_batchnorm="episode") == "episode"
    twice = {
        name
        for name in HEADS
        if resolved(name, mode="end_to_end", backbone_batchnorm="published") == "supports_then_queries"
    }
    assert twice == {"trx", "strm", "ta2n", "otam", "pal", "tsn_mean", "bi_mhm"}
    assert resolved(mode="end_to_end", backbone_batchnorm="published") == "episode"


def test_clips_cannot_pass_in_parts_where_they_share_statistics(backbone: nn.Module) -> None:
    # In classification the config leaves the policy open, and it becomes synchronised.
    with pytest.raises(ValueError, match=r"clips_per_forward = 2 splits .*\(synchronised\)"):
        ClipEncoder(
            deepcopy(backbone), SAMPLING, learning=BackboneLearning(batchnorm="synchronised", clips_per_forward=2)
        )
    without = nn.Sequential(nn.Conv3d(3, 4, 1))
    ClipEncoder(without, SAMPLING, learning=BackboneLearning(batchnorm="synchronised", clips_per_forward=2))


def test_a_norm_that_is_more_than_torchs_is_refused() -> None:
    class Activated(nn.BatchNorm3d):
        pass

    for norm in (Activated(4), nn.BatchNorm3d(4, track_running_stats=False)):
        with pytest.raises(ValueError, match='backbone_batchnorm = "frozen"'):
            convert_batchnorm(nn.Sequential(norm), is_shared=False)


def test_one_value_per_channel_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 1\), one value per channel.*frozen"):
        BackboneBatchNorm(4)(torch.zeros(1, 4, 1))


def test_a_norm_used_in_two_places_stays_one() -> None:
    norm = nn.BatchNorm1d(4)
    network = nn.Sequential(norm, nn.ReLU(), norm)
    convert_batchnorm(network, is_shared=False)
    assert network[0] is network[2]
    network.train()
    with noted_moments(network):
        network(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    assert int(network.get_buffer("0.num_batches_tracked")) == 2
