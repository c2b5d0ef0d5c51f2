"""The heads that the contract builds, and the episodes that it gives them."""

# E episodes, S supports, Q queries, N classes, K shots; C channels, T time steps, H W grid

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from episodes.batch import EpisodeBatch
from episodes.build import HEADS, build_head
from episodes.head import HeadModule, HeadOutput
from episodes.heads.mastaf import MastafHead
from episodes.losses import combine

NUM_GLOBAL_CLASSES = 11
CUBE_SHAPE = (8, 2, 3, 2)
SHIFT_REASON = "batch statistics take away any shift in front of them"


@dataclass(frozen=True, slots=True)
class HeadCase:
    """A head with options, as the contract builds it."""

    name: str
    """A key of `HEADS`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its options."""
    without_gradient: Mapping[str, str] = field(default_factory=dict)
    """Parameters whose gradient is exactly zero in training, and why."""
    cube_shape: tuple[int, int, int, int] = CUBE_SHAPE
    """(C, T, H, W) of the contract's cubes, where the head needs larger ones."""
    refused_grids: Mapping[tuple[int, int, int], str] = field(default_factory=dict)
    """(T, H, W) that make no sense for the head -> what its error says when it is built."""
    is_noisy: bool = False
    """Whether it draws in training; laws about order and padding then hold in evaluation."""
    support_without_gradient: str = ""
    """Why no gradient reaches the supports; empty: it does."""
    repeats_matter: str = ""
    """Why a support given twice changes the logits; empty: it does not."""
    single_precision: float = 1e-5
    """Largest difference of logits between float32 and float64."""
    learning_rate: float = 0.05
    """Of Adam on the toy."""
    num_steps: int = 30
    """On the toy."""

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


_EXACT_ZERO = {
    "mastaf": {"cam.reduce.bias": SHIFT_REASON},
    "self": {"cam.reduce.bias": SHIFT_REASON},
    "cross": {"cam.reduce.bias": SHIFT_REASON},
}

CASES = [HeadCase(name, {}, _EXACT_ZERO.get(name, {})) for name in HEADS] + [
    HeadCase("mastaf", {"preset": "paper"}),
    HeadCase("mastaf", {"preset": "paper_stable"}, _EXACT_ZERO["mastaf"]),
    HeadCase(
        "mastaf",
        {"share_cam": False, "residual": False, "attention_gain": "L", "train_similarity": "pooled"},
        {"cam_self.reduce.bias": SHIFT_REASON, "cam_cross.reduce.bias": SHIFT_REASON},
    ),
    HeadCase("mastaf", {"meta_learner": False, "global_pooling": "averaged", "fusion": "prob_mean"}),
    HeadCase("neighbor", {"preset": "paper_stable", "global_input": "query_true_cross"}),
]


def make_batch(
    *,
    num_episodes: int = 2,
    n_way: int = 3,
    k_shot: int = 2,
    n_query: int = 4,
    cube_shape: tuple[int, ...] = CUBE_SHAPE,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    noise: float = 1.0,
) -> EpisodeBatch:
    """Random episodes: each global class has a mean cube, each video noise around it."""
    source = torch.Generator().manual_seed(seed)
    means = torch.rand(NUM_GLOBAL_CLASSES, *cube_shape, generator=source, dtype=torch.float64)
    drawn = [torch.randperm(NUM_GLOBAL_CLASSES, generator=source)[:n_way] for _ in range(num_episodes)]
    classes = torch.stack(drawn)
    support_labels = torch.stack(
        [torch.arange(n_way).repeat(k_shot)[torch.randperm(n_way * k_shot, generator=source)] for _ in drawn]
    )
    query_labels = torch.randint(n_way, (num_episodes, n_query), generator=source)

    def videos(labels: Tensor) -> Tensor:
        cubes = means[classes.gather(1, labels)]
        return (cubes + noise * torch.rand(cubes.shape, generator=source, dtype=torch.float64)).to(dtype)

    batch = EpisodeBatch(videos(support_labels), support_labels, videos(query_labels), query_labels, n_way, classes)
    order = torch.stack([torch.randperm(n_way * k_shot, generator=source) for _ in drawn])
    return replace(batch, seeds=torch.arange(num_episodes) + 40, support_order=order)


def reordered(batch: EpisodeBatch, order: Tensor) -> EpisodeBatch:
    """The same episodes, their supports in another order."""
    assert batch.support_order is not None
    return replace(
        batch,
        support=batch.support[:, order],
        support_labels=batch.support_labels[:, order],
        support_order=batch.support_order[:, order],
    )


def with_padding(batch: EpisodeBatch) -> EpisodeBatch:
    """The same episodes with two rows of padding behind the first support."""
    assert batch.support_order is not None

    def padded(values: Tensor, padding: Tensor) -> Tensor:
        return torch.cat([values[:, :1], padding, values[:, 1:]], dim=1)

    last = torch.tensor([[90, 91]]).expand(len(batch.support), 2)
    return replace(
        batch,
        support=padded(batch.support, torch.full_like(batch.support[:, :2], 1e3)),
        support_labels=padded(batch.support_labels, torch.full_like(last, -1)),
        support_order=padded(batch.support_order, last),
    )


def part(batch: EpisodeBatch, episodes: slice = slice(None), queries: slice = slice(None)) -> EpisodeBatch:
    """Some of the episodes, some of the queries."""
    assert batch.query_labels is not None
    assert batch.class_global_labels is not None
    return EpisodeBatch(
        batch.support[episodes],
        batch.support_labels[episodes],
        batch.query[episodes, queries],
        batch.query_labels[episodes, queries],
        batch.n_way,
        batch.class_global_labels[episodes],
        None if batch.seeds is None else batch.seeds[episodes],
        None if batch.support_order is None else batch.support_order[episodes],
    )


def make_head(
    case: HeadCase, cube_shape: tuple[int, int, int, int] | None = None, dtype: torch.dtype = torch.float64
) -> HeadModule:
    """The head of a case, its parameters and buffers moved off their initial values."""
    source = torch.Generator().manual_seed(7)
    head = build_head(case.name, case.options, cube_shape or case.cube_shape, NUM_GLOBAL_CLASSES, True, source)
    with torch.no_grad():
        for tensor in [*head.parameters(), *head.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=source), alpha=0.2)
    return head.to(dtype)


def total_loss(head: HeadModule, batch: EpisodeBatch) -> Tensor:
    """What a training loop minimises, summed over the episodes."""
    output: HeadOutput = head(batch)
    return combine(output.losses, head.loss_weights, "mean").sum()


def mastaf_head(
    dtype: torch.dtype = torch.float64, cube_shape: tuple[int, int, int, int] = CUBE_SHAPE, **options: Any
) -> MastafHead:
    """A MASTAF head with options, its parameters and buffers moved off their initial values."""
    head = make_head(HeadCase("mastaf", options), cube_shape, dtype)
    assert isinstance(head, MastafHead)
    return head
