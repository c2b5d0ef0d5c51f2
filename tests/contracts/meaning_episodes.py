"""Synthetic episodes whose best possible accuracy is known, and what each head can see of them."""

# E episodes, S supports, Q queries, N classes, V videos; C channels, T time steps, H W grid, L = THW positions

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from episodes.batch import EpisodeBatch
from episodes.build import build_head
from episodes.head import HeadModule, HeadOutput
from episodes.losses import combine

Shape = tuple[int, int, int, int]
MakeBatch = Callable[[int, Shape], EpisodeBatch]
"""A batch of episodes of a seed, with cubes of a shape."""

NUM_EPISODES = 8
"""In a batch."""


def order_episodes(seed: int, shape: Shape, noise: float = 0.2) -> EpisodeBatch:
    """Classes that differ in the order of the same frames: the best accuracy is one, without order it is 1 / N.

    An episode draws T frames, and N = 4 orders of them; a video is the frames in its class's order, each the same over the
    grid, plus noise that knows nothing of the class.
    """
    channels, num_steps, *_ = shape
    source = torch.Generator().manual_seed(seed)
    labels = draw_labels(source, n_way=4, k_shot=1, n_query=4)
    frames = torch.randn(NUM_EPISODES, num_steps, channels, generator=source)
    orders = torch.stack([_distinct_orders(num_steps, 4, source) for _ in range(NUM_EPISODES)])  # (E, N, T)

    def videos(of: Tensor) -> Tensor:
        wanted = orders[torch.arange(NUM_EPISODES)[:, None], of]  # (E, V, T)
        ordered = frames[torch.arange(NUM_EPISODES)[:, None, None], wanted].transpose(-1, -2)  # (E, V, C, T)
        return _noisy(ordered[..., None, None].expand(*ordered.shape, *shape[2:]), noise, source)

    return make_batch(labels, videos, seed)


def appearance_episodes(seed: int, shape: Shape, noise: float = 0.5) -> EpisodeBatch:
    """Classes that differ in what all of their frames show, plus noise: every head must tell them apart."""
    source = torch.Generator().manual_seed(seed)
    labels = draw_labels(source, n_way=4, k_shot=2, n_query=4)
    classes = torch.randn(NUM_EPISODES, 4, shape[0], generator=source)

    def videos(of: Tensor) -> Tensor:
        shown = classes[torch.arange(NUM_EPISODES)[:, None], of]  # (E, V, C)
        return _noisy(shown[..., None, None, None].expand(*shown.shape, *shape[1:]), noise, source)

    return make_batch(labels, videos, seed)


@dataclass(frozen=True, slots=True)
class Sight:
    """What a head can see, and how it is built and trained for the meaning tests."""

    order: Literal["solves", "weak", "blind"]
    """Of order-only classes: whether it must solve them, sees a little of them, or nothing at all."""
    reason: str
    """Why."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its options; small ones, where the defaults are for wide features."""
    shape: Shape = (16, 4, 1, 1)
    """Of the cubes."""
    learning_rate: float = 0.003
    """Of Adam."""
    num_steps: int = 20
    """Batches that it trains on."""

    @property
    def sees_order(self) -> bool:
        """Whether its logits change with the order of frames."""
        return self.order != "blind"


_POOLED = "it averages the frames first"
_SETS = "each frame finds its partner wherever it is"
_WEIGHTS = "each position has a weight of its own in the meta-learner, of which 1 / L reaches the average"
_TUPLES = "tuples keep the order of their frames"

SIGHTS: dict[str, Sight] = {
    "mastaf": Sight("weak", _WEIGHTS),
    "self": Sight("weak", _WEIGHTS),
    "cross": Sight("weak", _WEIGHTS),
    "neighbor": Sight("blind", _POOLED),
    "protonet": Sight("blind", _POOLED),
    "tsn_mean": Sight("blind", _POOLED),
    "matchingnet": Sight("blind", _POOLED),
    "baseline": Sight("blind", _POOLED),
    "baseline++": Sight("blind", _POOLED),
    "feat": Sight("blind", _POOLED),
    "pal": Sight("blind", _POOLED),
    "arn": Sight(
        "weak",
        "its attention is a convolution over time; the pooling forgets the rest",
        {"channels": 16},
        (16, 4, 2, 2),
        0.01,
        5,
    ),
    "cmn": Sight("blind", "saliencies are sums over the frames", {"abstract_size": 32}),
    "protogan": Sight("blind", _POOLED, {"hidden": 64}),
    "trx": Sight("solves", _TUPLES, {"cardinalities": [2], "hidden": 64}),
    "strm": Sight("solves", _TUPLES, {"hidden": 64}),
    "ta2n": Sight("solves", "warped frames are compared at the same time step", {}, (16, 4, 4, 4), num_steps=3),
    "otam": Sight("solves", "an alignment keeps the order"),
    "bi_mhm": Sight("blind", _SETS),
    "chamfer": Sight("solves", _TUPLES, {"projection": 64}),
    "max": Sight("blind", _SETS, {"projection": 64}),
    "diagonal": Sight("solves", "frames are compared at the same time step", {"projection": 64}),
}
"""Every head of `HEADS`, with its defaults but for sizes."""

VARIANTS: tuple[tuple[str, Sight], ...] = (
    ("chamfer", Sight("blind", _SETS, {"projection": 64, "tuple_length": 1})),
    ("bi_mhm", Sight("weak", "the relation of frames adds positions to them", {"relation": True, "heads": 2})),
    ("trx", Sight("weak", "positions are added to the frames", {"cardinalities": [1], "hidden": 64})),
)
"""Options that change what a head sees."""


def build_trained(name: str, sight: Sight, make: MakeBatch, num_classes: int | None = None) -> HeadModule:
    """A head of float32, trained on fresh batches (a head without parameters is as it was built), in evaluation mode."""
    head = build_head(name, sight.options, sight.shape, num_classes, True, torch.Generator().manual_seed(0))
    parameters = list(head.parameters())
    if not parameters:
        return head.eval()
    optimizer = torch.optim.Adam(parameters, lr=sight.learning_rate)
    head.train()
    for step in range(sight.num_steps):
        output: HeadOutput = head(make(step, sight.shape))
        phase = head.phases[step % len(head.phases)] if head.phases else None
        losses = {term: value for term, value in output.losses.items() if phase is None or term in phase.losses}
        optimizer.zero_grad()
        torch.autograd.backward(combine(losses, head.loss_weights, "mean").mean())
        for key, parameter in head.named_parameters():
            if phase is not None and not key.startswith(phase.parameters):
                parameter.grad = None
        optimizer.step()
    return head.eval()


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of a head on fresh episodes."""

    mean: float
    num_queries: int

    def is_chance(self, chance: float, deviations: float) -> bool:
        """Whether it lies within some standard deviations of what guessing gives."""
        return abs(self.mean - chance) <= deviations * math.sqrt(chance * (1.0 - chance) / self.num_queries)


@torch.no_grad()
def accuracy(head: HeadModule, make: MakeBatch, shape: Shape, num_batches: int) -> Accuracy:
    """Accuracy on batches that training has not seen."""
    right = []
    for index in range(num_batches):
        batch = make(1_000_000 + index, shape)
        assert batch.query_labels is not None
        output: HeadOutput = head(batch)
        right.append(output.logits.argmax(dim=-1) == batch.query_labels)
    found = torch.cat(right)
    return Accuracy(float(found.double().mean()), found.numel())


def in_double_precision(batch: EpisodeBatch) -> EpisodeBatch:
    """The same episodes in float64."""
    return replace(batch, support=batch.support.double(), query=batch.query.double())


def frames_shuffled(batch: EpisodeBatch, seed: int) -> EpisodeBatch:
    """The same videos, the frames of each in an order of its own."""
    source = torch.Generator().manual_seed(seed)

    def shuffled(cubes: Tensor) -> Tensor:
        order = torch.rand(*cubes.shape[:2], cubes.shape[3], generator=source).argsort(dim=-1)
        return cubes.gather(3, order[:, :, None, :, None, None].expand(cubes.shape))

    return replace(batch, support=shuffled(batch.support), query=shuffled(batch.query))


@dataclass(frozen=True, slots=True)
class DrawnLabels:
    """Classes within each episode."""

    support: Tensor
    query: Tensor
    n_way: int


def draw_labels(source: torch.Generator, n_way: int, k_shot: int, n_query: int) -> DrawnLabels:
    """Labels (E, N k_shot) in random order, and (E, N n_query) drawn at random, so that a guess is right one time in N."""
    each = torch.arange(n_way).repeat(k_shot)
    support = torch.stack([each[torch.randperm(len(each), generator=source)] for _ in range(NUM_EPISODES)])
    return DrawnLabels(support, torch.randint(n_way, (NUM_EPISODES, n_way * n_query), generator=source), n_way)


def make_batch(labels: DrawnLabels, videos: Callable[[Tensor], Tensor], seed: int) -> EpisodeBatch:
    """A batch whose cubes come from `videos`, called with the labels of the supports, then with those of the queries."""
    seeds = seed * NUM_EPISODES + torch.arange(NUM_EPISODES)
    support, query = videos(labels.support), videos(labels.query)
    return EpisodeBatch(support, labels.support, query, labels.query, labels.n_way, seeds=seeds)


def _noisy(cubes: Tensor, noise: float, source: torch.Generator) -> Tensor:
    return cubes + noise * torch.randn(cubes.shape, generator=source)


def _distinct_orders(length: int, count: int, source: torch.Generator) -> Tensor:
    """`count` different orders of `length` things, (count, length) int64."""
    found: list[list[int]] = []
    while len(found) < count:
        order = torch.randperm(length, generator=source).tolist()
        if order not in found:
            found.append(order)
    return torch.tensor(found)
