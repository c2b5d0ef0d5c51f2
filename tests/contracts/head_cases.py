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
FAMILY = ("mastaf", "neighbor", "self", "cross")
"""MASTAF and its ablations, which share their options."""
CUBE_SHAPE = (8, 2, 3, 2)
LONG_FEATURES = (64, 2, 1, 1)
"""Cubes for heads whose published learning rate or temperature is for features of some length: their averages have one."""
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
    map_sizes: Mapping[str, int] = field(default_factory=dict)
    """Axes of its maps (`episodes.maps`) whose size is not that of the cube -> their size."""
    single_precision: float = 1e-5
    """Largest difference of logits between float32 and float64."""
    perturbation: float = 0.2
    """How far parameters and buffers are moved off their initial values; less where a tanh would saturate."""
    learning_rate: float = 0.05
    """Of Adam on the toy."""
    num_steps: int = 30
    """On the toy."""
    is_slow: bool = False
    """Whether its tests are marked slow; a smaller version of the head is then among the cases."""

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


_EXACT_ZERO = {
    "mastaf": {"cam.reduce.bias": SHIFT_REASON},
    "self": {"cam.reduce.bias": SHIFT_REASON},
    "cross": {"cam.reduce.bias": SHIFT_REASON},
}


def _ta2n(options: Mapping[str, Any], is_noisy: bool) -> HeadCase:
    convolutions = [
        f"alignment.{stage}.network.{layer}.bias"
        for stage in ("temporal", "coordination")
        for layer in ("first", "second")
    ]
    too_small = dict.fromkeys(((2, 3, 3), (8, 1, 1), (1, 1, 1)), "4 or more time steps, rows and columns")
    return HeadCase(
        "ta2n",
        options,
        dict.fromkeys(convolutions, SHIFT_REASON),
        cube_shape=(8, 4, 4, 4),
        refused_grids=too_small,
        is_noisy=is_noisy,
        repeats_matter="with a second shot all videos pass the fusion's value map, which single shots do not",
        perturbation=0.02,
        learning_rate=0.005,
        num_steps=12,
    )


_NARROW = {"dropout": 0.0, "temporal_channels": (6, 8, 4), "offset_channels": (6, 8, 4)}


_TUPLE_ZERO = {"transformers.0.value.bias": "it shifts query values and their prototypes alike"}


def _trx(name: str, options: Mapping[str, Any], cannot: Mapping[str, str] = _TUPLE_ZERO, **others: Any) -> HeadCase:
    """A head on tuples of frames: it needs as many time steps as a tuple has frames."""
    return HeadCase(
        name,
        options,
        cannot,
        cube_shape=(8, 4, 3, 2),
        refused_grids={(1, 1, 1): r"1 time step; set head\.cardinalities = \[1\]", **others.pop("refused_grids", {})},
        is_noisy=True,
        learning_rate=0.003,
        num_steps=30 if options else 12,
        **others,
    )


_TRX = _trx(
    "trx",
    {},
    {**_TUPLE_ZERO, "transformers.1.value.bias": _TUPLE_ZERO["transformers.0.value.bias"]},
    refused_grids={(2, 3, 3): r"2 time steps; set head\.cardinalities = \[1\] .*up to 2"},
)
# Moved far, all units of the auxiliary projections fire and their bias cancels too.
_STRM_ZERO = {**_TUPLE_ZERO, "patches.key.bias": "the softmax takes away what shifts all scores of a patch"}
_STRM_ZERO_TWICE = {**_STRM_ZERO, "transformers.1.value.bias": _TUPLE_ZERO["transformers.0.value.bias"]}


def _matchingnet(**options: Any) -> HeadCase:
    return HeadCase("matchingnet", options, repeats_matter="the votes of the supports of a class are summed")


def _baseline(name: str, cube_shape: tuple[int, int, int, int] = CUBE_SHAPE) -> HeadCase:
    return HeadCase(
        name,
        cube_shape=cube_shape,
        support_without_gradient="the classifier's own training sees the supports, and is not part of the graph",
        repeats_matter="each support is a sample of the classifier's training",
    )


def _pal(**options: Any) -> HeadCase:
    return HeadCase(
        "pal",
        options,
        {"attention.key.bias": "the softmax takes away what it adds to every similarity"},
        repeats_matter="the attention sees each support on its own",
    )


_RELATION_ZERO = {
    f"{part}.convs.{index}.bias": SHIFT_REASON
    for part, count in (("attention", 2), ("relation", 4))
    for index in range(count)
}


def _arn(exact_zero: Mapping[str, str] = _RELATION_ZERO, is_slow: bool = False, **options: Any) -> HeadCase:
    return HeadCase(
        "arn",
        options,
        exact_zero,
        map_sizes={"T": 1},
        perturbation=0.02,
        learning_rate=0.005,
        num_steps=10,
        is_slow=is_slow,
    )


def _protogan(**options: Any) -> HeadCase:
    return HeadCase("protogan", options, perturbation=0.02, learning_rate=0.005)


_EXPERIMENTAL_DEFAULTS = {
    # Its relation images are 64 x 64 with 64 channels.
    "arn": _arn(is_slow=True),
    "protogan": _protogan(),
}


_METRIC_DEFAULTS = {
    "matchingnet": _matchingnet(),
    "baseline": _baseline("baseline", LONG_FEATURES),
    "baseline++": _baseline("baseline++"),
    "feat": HeadCase("feat", cube_shape=LONG_FEATURES, is_noisy=True, learning_rate=0.003),
    "pal": _pal(),
}

_NO_DROPOUT = dict.fromkeys(("position_dropout", "intra_dropout", "attention_dropout", "inter_dropout"), 0.0)

_DEFAULTS = {
    **_EXPERIMENTAL_DEFAULTS,
    **_METRIC_DEFAULTS,
    "trx": _TRX,
    "strm": _trx("strm", {}, _STRM_ZERO, map_sizes={"H": 4, "W": 4}, perturbation=0.02),
    "ta2n": _ta2n({}, is_noisy=True),
}

CASES = [_DEFAULTS.get(name, HeadCase(name, {}, _EXACT_ZERO.get(name, {}))) for name in HEADS] + [
    HeadCase("mastaf", {"preset": "paper"}),
    HeadCase("mastaf", {"preset": "paper_stable"}, _EXACT_ZERO["mastaf"]),
    HeadCase(
        "mastaf",
        {"share_cam": False, "residual": False, "attention_gain": "L", "train_similarity": "pooled"},
        {"cam_self.reduce.bias": SHIFT_REASON, "cam_cross.reduce.bias": SHIFT_REASON},
    ),
    HeadCase("mastaf", {"average_time": True}, _EXACT_ZERO["mastaf"], map_sizes={"T": 1}),
    HeadCase("mastaf", {"meta_learner": False, "global_pooling": "averaged", "fusion": "prob_mean"}),
    HeadCase("neighbor", {"preset": "paper_stable", "global_input": "query_true_cross"}),
    HeadCase("protonet", {"distance": "cosine"}),
    HeadCase("protonet", {"average": False}),
    HeadCase("tsn_mean", {"similarity": "euclidean"}),
    _matchingnet(form="closer_look"),
    _matchingnet(form="feat"),
    _matchingnet(full_context=True),
    HeadCase(
        "feat",
        {
            "distance": "cosine",
            "temperature": 0.1,
            "balance": 1.0,
            "temperature2": 0.1,
            "attention_dropout": 0.0,
            "output_dropout": 0.0,
        },
    ),
    _pal(contrast_weight=0.0),
    _arn(channels=16),
    _arn(
        {
            **{name: reason for name, reason in _RELATION_ZERO.items() if name.startswith("relation")},
            "relation.last.bias": "it shifts all scores alike, which the softmax takes away",
            "relation.hidden.bias": "with all hidden units firing, so does this one",
        },
        channels=16,
        attention=False,
        loss="cross_entropy",
        norm_momentum=0.1,
    ),
    HeadCase("cmn", {"writing": "merge", "abstract_size": 16}),
    HeadCase("cmn", {"reading": "constituent", "frames": "positions", "num_saliencies": 3}),
    _protogan(num_generated=2, hidden=16, prototype_size=4, noise_size=3),
    HeadCase("trx", {"cardinalities": [1], "hidden": 16, "dropout": 0.0}, _TUPLE_ZERO),
    _trx("trx", {"cardinalities": [2], "hidden": 16, "factored": False}),
    _trx(
        "strm",
        {"aux_head": "frozen_random", "hidden": 16, "patches": 2},
        _STRM_ZERO,
        map_sizes={"H": 2, "W": 2},
        repeats_matter="each support has dropout of its own, in evaluation too",
    ),
    _trx(
        "strm",
        {"aux_head": "frozen_random", "cardinalities": [1, 2], "hidden": 8, "patches": 2},
        _STRM_ZERO_TWICE,
        map_sizes={"H": 2, "W": 2},
        repeats_matter="each support has dropout of its own, in evaluation too",
    ),
    _ta2n({**_NARROW, "factored": False, "perturb_in_evaluation": False}, is_noisy=False),
    _ta2n({**_NARROW, "distance": "soft_dtw"}, is_noisy=False),
    HeadCase("otam", {"smoothing": 0.0, "directions": "mean", "projection": 6}),
    HeadCase("bi_mhm", {"shots": "mean", "frame_reduction": "mean", "projection": 6}),
    HeadCase("bi_mhm", {"relation": True, "heads": 2, **_NO_DROPOUT}, learning_rate=0.01),
    HeadCase(
        "bi_mhm",
        {"relation": True, "heads": 2, "shots": "mean", "global_classifier": False},
        cube_shape=(32, 2, 3, 2),
        is_noisy=True,
        repeats_matter="it is one more video in the group that the inter-relation attends over",
        perturbation=0.02,
        learning_rate=0.01,
    ),
    HeadCase("chamfer", {"tuple_length": 1, "shots": "mean", "projection": 0}),
    HeadCase("max", {"projection": 0, "learn_scale": False}),
    HeadCase("diagonal", {"projection": 0}),
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
                tensor.add_(torch.rand(tensor.shape, generator=source), alpha=case.perturbation)
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
