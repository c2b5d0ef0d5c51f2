"""One discriminative region in clutter: the episodes, and the attention that MASTAF pays to the region."""

# E episodes, S supports, Q queries, N classes, V videos, M maps; C channels, L positions

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from contracts.meaning_episodes import NUM_EPISODES, Shape, draw_labels, make_batch
from episodes.batch import EpisodeBatch
from episodes.build import build_head
from episodes.head import HeadOutput
from episodes.heads.mastaf import MastafHead
from episodes.heads.mastaf_attention import MetaLearner


@dataclass(frozen=True, slots=True)
class ClutterEpisodes:
    """Videos that show their class at one position, which varies from video to video, among random others."""

    batch: EpisodeBatch
    support_position: Tensor
    """(E, S) int64, the planted position among the L of each support."""
    query_position: Tensor
    """(E, Q) int64, of each query."""


def clutter_episodes(
    seed: int, shape: Shape, k_shot: int = 1, noise: float = 0.2, num_classes: int | None = None
) -> ClutterEpisodes:
    """One discriminative region in clutter.

    Each class is a unit vector, planted at one position of a video and blurred by `noise` (its expected length); every
    other position holds a random vector of length about one. With enough channels the best pair of positions tells the
    class, so that the best accuracy is one.

    Args:
        seed: of everything.
        shape: of the cubes.
        k_shot: supports of each class.
        noise: length of what is added to the planted vector, video by video.
        num_classes: draws the classes from this many training ones, always the same; None: new ones in each episode.
    """
    channels, *grid = shape
    source = torch.Generator().manual_seed(seed)
    labels = draw_labels(source, n_way=4, k_shot=k_shot, n_query=4)
    drawn, indices = source, torch.arange(4 * NUM_EPISODES).reshape(NUM_EPISODES, 4)
    if num_classes is not None:
        drawn = torch.Generator().manual_seed(num_classes)
        indices = torch.rand(NUM_EPISODES, num_classes, generator=source).argsort(dim=1)[:, :4]
    vectors = torch.randn(num_classes or indices.numel(), channels, generator=drawn)
    classes = torch.nn.functional.normalize(vectors, dim=-1)[indices]  # (E, N, C)
    positions: list[Tensor] = []

    def videos(of: Tensor) -> Tensor:
        shown = classes[torch.arange(NUM_EPISODES)[:, None], of]  # (E, V, C)
        shown = shown + noise / math.sqrt(channels) * torch.randn(shown.shape, generator=source)
        cubes = torch.randn(*of.shape, channels, math.prod(grid), generator=source) / math.sqrt(channels)
        place = torch.randint(cubes.shape[-1], of.shape, generator=source)
        positions.append(place)
        index = place[..., None, None].expand(*of.shape, channels, 1)
        return cubes.scatter(-1, index, shown[..., None]).reshape(*of.shape, *shape)

    batch = replace(make_batch(labels, videos, seed), class_global_labels=indices if num_classes else None)
    return ClutterEpisodes(batch, *positions)


def peaking_mastaf(shape: Shape, **options: Any) -> MastafHead:
    """MASTAF's cross attention with hand-set weights: the kernel is the positive part of the averaged relation map, magnified.

    A partner's position that matches anything in the attended video then decides, and the position that matches it peaks.
    """
    num_positions = math.prod(shape[1:])
    fixed = {"meta_bn": "none", "hidden": num_positions, **options}
    head = build_head("cross", fixed, shape, None, True, torch.Generator().manual_seed(0)).eval()
    assert isinstance(head, MastafHead)
    assert isinstance(head.cam, MetaLearner)
    with torch.no_grad():
        for layer, factor in ((head.cam.reduce, 1.0), (head.cam.expand, 1000.0)):
            layer.weight.copy_(factor * torch.eye(num_positions))
            layer.bias.zero_()
    return head


@dataclass(frozen=True, slots=True)
class PlantedAttention:
    """Attention maps of pairs of the same class, and where their videos show the class."""

    maps: Tensor
    """(M, L), each sums to one."""
    positions: Tensor
    """(M,) int64."""

    @property
    def mass(self) -> float:
        """Mean attention on the planted positions; even attention has 1 / L."""
        return float(self.maps.detach().gather(1, self.positions[:, None]).mean())

    @property
    def share_of_peaks(self) -> float:
        """Share of maps that are highest at the planted position."""
        return float((self.maps.argmax(dim=1) == self.positions).double().mean())


def planted_attention(output: HeadOutput, episodes: ClutterEpisodes, name: str) -> PlantedAttention:
    """The attention "cross_query" or "cross_support" of each query with its class (one shot per class)."""
    batch = episodes.batch
    labels = batch.query_labels
    assert labels is not None
    maps = output.maps[name].flatten(3)  # (E, Q, N, L)
    of_class = maps.gather(2, labels[:, :, None, None].expand(-1, -1, 1, maps.shape[-1])).squeeze(2)
    positions = episodes.query_position
    if name == "cross_support":
        support = (batch.support_labels[:, None] == labels[:, :, None]).int().argmax(dim=2)  # (E, Q)
        positions = episodes.support_position.gather(1, support)
    return PlantedAttention(of_class.flatten(0, 1), positions.flatten())
