"""ARN compared with a plain loop over videos and pairs; its options and what they refuse."""

# E episodes, S supports, Q queries, N classes; U channels after projection

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contracts.head_cases import HeadCase, make_batch, make_head, part
from episodes.batch import EpisodeBatch
from episodes.build import HEADS, build_head
from episodes.episode_norm import EpisodeBatchNorm
from episodes.head import HeadModule, HeadOutput
from episodes.heads.arn import ArnHead

SHAPE = (6, 5, 4, 3)


def arn(cube_shape: tuple[int, int, int, int] = SHAPE, **options: Any) -> ArnHead:
    head = make_head(HeadCase("arn", {"channels": 16, **options}, perturbation=0.05), cube_shape)
    assert isinstance(head, ArnHead)
    return head


class PlainNetworks:
    """The networks of a head on one episode, with torch's own batch normalisation."""

    def __init__(self, head: ArnHead) -> None:
        self.head = head
        self.norms = {name: self._norm(module) for name, module in head.named_modules() if "norms." in name}

    def describe(self, videos: Tensor) -> Tensor:
        """Matrices (V, U, U) of the videos (V, C, T, H, W)."""
        head = self.head
        assert head.attention is not None
        features = F.conv3d(videos, head.project.weight, head.project.bias)
        hidden = features
        for index, conv in enumerate(head.attention.convs):
            hidden = torch.relu(self.norms[f"attention.norms.{index}"](conv(hidden)))
            if hidden.shape[2] > 1:
                hidden = F.max_pool3d(hidden, (2, 1, 1))
        weights = torch.sigmoid(head.attention.last(hidden)).amax(dim=2, keepdim=True)
        found = []
        for video in features * (1.0 + weights):
            flat = video.reshape(len(video), -1)
            matrix = flat @ flat.T / flat.shape[1]
            found.append(2.0 * torch.sigmoid(head.config.power * matrix / matrix.trace()) - 1.0)
        return torch.stack(found)

    def relate(self, images: Tensor) -> Tensor:
        """Sigmoid scores (P,) of pairs (P, 2, U, U)."""
        relation, values = self.head.relation, images
        for index, conv in enumerate(relation.convs):
            found = torch.relu(self.norms[f"relation.norms.{index}"](conv(values)))
            values = F.max_pool2d(found if index == 0 else found + values, 2)
        hidden = torch.relu(relation.hidden(values.flatten(1)))
        return torch.sigmoid(relation.last(hidden)).squeeze(1)

    def _norm(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, EpisodeBatchNorm)
        kind = nn.BatchNorm3d if module in self._attention_norms() else nn.BatchNorm2d
        norm = kind(module.weight.numel(), momentum=module.momentum).double()
        norm.load_state_dict(module.state_dict())
        return norm.train(self.head.training)

    def _attention_norms(self) -> list[nn.Module]:
        return [] if self.head.attention is None else list(self.head.attention.norms)


def plain_scores(networks: PlainNetworks, batch: EpisodeBatch) -> Tensor:
    """Sigmoid scores (Q, N) of one episode."""
    support, query = networks.describe(batch.support[0]), networks.describe(batch.query[0])
    prototypes = [support[batch.support_labels[0] == label].mean(dim=0) for label in range(batch.n_way)]
    pairs = [torch.stack([prototype, matrix]) for matrix in query for prototype in prototypes]
    return networks.relate(torch.stack(pairs)).reshape(len(query), batch.n_way)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 9])
def test_equals_a_plain_loop_over_videos_and_pairs(num_steps: int, training: bool) -> None:
    shape = (6, num_steps, 4, 3)
    head = arn(shape).train(training)
    batch = make_batch(num_episodes=1, cube_shape=shape)
    networks = PlainNetworks(head)
    expected = plain_scores(networks, batch)
    output: HeadOutput = head(batch)
    torch.testing.assert_close(torch.sigmoid(output.logits[0]), expected)
    assert batch.query_labels is not None
    targets = F.one_hot(batch.query_labels[0], 3).double()
    torch.testing.assert_close(output.losses["few_shot"][0], (expected - targets).square().mean(dim=1))
    for name, norm in networks.norms.items():
        running = dict(head.named_modules())[name].state_dict()
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(running[key], value, msg=f"{name}.{key}")


def test_attention_of_five_steps_is_pooled_as_published() -> None:
    head = arn().eval()
    assert head.attention is not None
    output: HeadOutput = head(make_batch(cube_shape=SHAPE), with_maps=True)
    assert output.maps["patch_support"].shape == (2, 6, 1, 4, 3)
    assert output.maps["patch_query"].shape == (2, 4, 1, 4, 3)
    assert (output.maps["patch_query"] > 0.0).all()
    assert (output.maps["patch_query"] < 1.0).all()


def test_matrices_are_symmetric_and_do_not_depend_on_the_scale_of_the_features() -> None:
    head, features = arn(), torch.randn(1, 2, 16, 2, 3, 3, dtype=torch.float64)
    matrices = head.second_order(features)
    torch.testing.assert_close(matrices, matrices.transpose(-1, -2))
    torch.testing.assert_close(head.second_order(1e3 * features), matrices)
    assert not head.second_order(0.0 * features).any()


def test_first_weights_are_drawn_as_released() -> None:
    head = build_head("arn", {}, (32, 2, 3, 3), None, True, torch.Generator().manual_seed(0))
    state = head.state_dict()
    assert state["relation.hidden.weight"].shape == (8, 1024)
    for name, values in state.items():
        if "convs" in name and name.endswith("weight"):
            assert float(values.std()) == pytest.approx(math.sqrt(2.0 / (9 * len(values))), rel=0.1), name
    assert float(state["relation.hidden.weight"].std()) == pytest.approx(0.01, rel=0.1)
    assert state["relation.hidden.bias"].eq(1.0).all()
    assert state["relation.convs.0.bias"].eq(0.0).all()


def test_running_statistics_are_those_of_the_last_training_episode() -> None:
    both, last = arn().train(), arn().train()
    batch = make_batch(cube_shape=SHAPE)
    both(batch)
    last(part(batch, episodes=slice(1, 2)))
    for name, value in both.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, last.state_dict()[name], msg=name)


def test_unequal_shots_are_averaged_class_by_class() -> None:
    head = arn().eval()
    batch = make_batch(num_episodes=1, k_shot=3, cube_shape=SHAPE)
    labels = batch.support_labels.clone()
    labels[0, labels[0].eq(1).nonzero()[0]] = -1
    expected = plain_scores(PlainNetworks(head), replace(batch, support_labels=labels))
    output: HeadOutput = head(replace(batch, support_labels=labels))
    torch.testing.assert_close(torch.sigmoid(output.logits[0]), expected)


def test_fewer_than_sixteen_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"channels = 8: .*16"):
        build_head("arn", {"channels": 8}, SHAPE, None, True)


def test_cross_entropy_is_of_the_scores_before_the_sigmoid() -> None:
    head: HeadModule = arn(loss="cross_entropy").eval()
    batch = make_batch(cube_shape=SHAPE)
    output: HeadOutput = head(batch)
    assert batch.query_labels is not None
    expected = F.cross_entropy(output.logits.flatten(0, 1), batch.query_labels.flatten(), reduction="none")
    torch.testing.assert_close(output.losses["few_shot"].flatten(), expected)


def test_is_marked_experimental() -> None:
    assert HEADS["arn"].is_experimental
