"""Chamfer, max and diagonal against plain loops; their options, maps and what they can see."""

# E episodes, Q queries, S supports, N classes; C channels, T U time steps of query and support

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contracts.head_cases import HeadCase, make_batch, make_head
from episodes.batch import EpisodeBatch
from episodes.build import build_head, head_config
from episodes.head import HeadModule

CUBE_SHAPE = (8, 4, 2, 1)
NAMES = ("chamfer", "max", "diagonal")
OPTIONS: list[tuple[str, dict[str, Any], int]] = [
    ("chamfer", {}, 3),
    ("chamfer", {"tuple_length": 1}, 1),
    ("chamfer", {"tuple_length": 2, "projection": 0, "shots": "mean"}, 2),
    ("chamfer", {"tuple_length": 4, "direction": "query", "eps": 0.0}, 4),
    ("chamfer", {"tuple_length": 1, "direction": "query", "shots": "mean", "projection": 6}, 1),
    ("chamfer", {"direction": "support", "scale": 3.0}, 3),
    ("max", {}, 1),
    ("max", {"shots": "joint", "projection": 0, "scale_weight": 0.1, "scale": 100.0}, 1),
    ("diagonal", {}, 1),
    ("diagonal", {"projection": 0, "learn_scale": False, "eps": 0.5}, 1),
]
"""Heads with options, and the frames in what they match."""


def unequal_batch() -> EpisodeBatch:
    """Three classes with one to three shots, and a row of padding."""
    labels = torch.tensor([[0, 1, 1, 2, 2, 2, -1], [2, 0, -1, 1, 1, 0, 0]])
    source = make_batch(cube_shape=CUBE_SHAPE, k_shot=3)
    return replace(source, support=source.support[:, :7], support_labels=labels, support_order=None)


def loop_vectors(head: HeadModule, cube: Tensor, tuple_length: int) -> Tensor:
    """What is matched, tuple by tuple: (M, P)."""
    frames, state = cube.mean(dim=(-1, -2)).T, head.state_dict()
    rows = []
    for members in combinations(range(len(frames)), tuple_length):
        row = torch.cat([frames[member] for member in members])
        if "frames.linear.weight" in state:
            row = F.linear(row, state["frames.linear.weight"], state["frames.linear.bias"])
            row = F.layer_norm(row, row.shape, state["frames.norm.weight"], state["frames.norm.bias"])
        rows.append(row)
    return torch.stack(rows)


def loop_similarity(name: str, options: dict[str, Any], query: Tensor, supports: list[Tensor]) -> Tensor:
    """Of a query to the shots of one class."""
    if options.get("shots") == "mean":
        joint = [loop_similarity(name, {**options, "shots": "joint"}, query, [support]) for support in supports]
        return torch.stack(joint).mean()
    if name == "diagonal":
        cosines = [loop_cosine(a, b, options) for support in supports for a, b in zip(query, support, strict=True)]
        return torch.stack(cosines).mean()
    together = torch.cat(supports)
    table = torch.stack([torch.stack([loop_cosine(a, b, options) for b in together]) for a in query])
    if name == "max":
        return table.max()
    of_query, of_support = table.max(dim=1).values.mean(), table.max(dim=0).values.mean()
    # Where the supports look for a match, each clip of each shot counts the same.
    of_direction: dict[str, Tensor] = {"query": of_query, "support": of_support, "both": (of_query + of_support) / 2.0}
    return of_direction[options["direction"]]


def loop_cosine(a: Tensor, b: Tensor, options: dict[str, Any]) -> Tensor:
    cosine: Tensor = a @ b / (a.norm() * b.norm() + options["eps"])
    return cosine


@pytest.mark.parametrize(("name", "options", "tuple_length"), OPTIONS, ids=str)
def test_logits_equal_plain_loops(name: str, options: dict[str, Any], tuple_length: int) -> None:
    batch, head = unequal_batch(), make_head(HeadCase(name, options), CUBE_SHAPE)
    values = head_config(name, options).model_dump()
    learnt = head.state_dict().get("scale_weight", torch.ones(()))
    found = head(batch).logits
    for episode in range(2):
        vectors = [loop_vectors(head, cube, tuple_length) for cube in batch.support[episode]]
        labels = batch.support_labels[episode].tolist()
        for index in range(4):
            query = loop_vectors(head, batch.query[episode, index], tuple_length)
            for label in range(3):
                shots = [row for row, own in zip(vectors, labels, strict=True) if own == label]
                expected = values["scale"] * learnt * loop_similarity(name, values, query, shots)
                torch.testing.assert_close(found[episode, index, label], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "options", "tuple_length"), OPTIONS, ids=str)
def test_weights_of_the_pairs_of_a_class_sum_to_one(name: str, options: dict[str, Any], tuple_length: int) -> None:
    del tuple_length
    batch = unequal_batch()
    alignment = make_head(HeadCase(name, options), CUBE_SHAPE)(batch, with_maps=True).maps["alignment"]
    assert alignment.shape == (2, 4, 7, 4, 4)
    assert not alignment.requires_grad
    assert alignment.min() >= 0.0
    for episode, labels in enumerate(batch.support_labels):
        of_class = torch.stack([alignment[episode, :, labels == label].sum(dim=(1, 2, 3)) for label in range(3)])
        torch.testing.assert_close(of_class, torch.ones_like(of_class))
        assert not alignment[episode, :, labels == -1].any()


@pytest.mark.parametrize(("name", "options", "tuple_length"), OPTIONS[:3] + OPTIONS[6:7] + OPTIONS[8:9], ids=str)
def test_alignment_of_a_video_with_itself_is_the_diagonal(
    name: str, options: dict[str, Any], tuple_length: int
) -> None:
    del tuple_length
    batch = make_batch(cube_shape=CUBE_SHAPE, n_way=1, k_shot=1, n_query=1, num_episodes=1)
    head = make_head(HeadCase(name, options), CUBE_SHAPE)
    alignment = head(replace(batch, query=batch.support), with_maps=True).maps["alignment"][0, 0, 0]
    off_diagonal = alignment - torch.diag(alignment.diagonal())
    assert off_diagonal.abs().max() < 1e-12
    assert alignment.sum().item() == pytest.approx(1.0)


def test_joint_shots_are_one_set_of_frames() -> None:
    """A query made of frames of two shots fits the joint class perfectly, and neither shot alone."""
    batch = make_batch(cube_shape=CUBE_SHAPE, n_way=1, k_shot=2, n_query=1, num_episodes=1)
    mixed = torch.cat([batch.support[:, :1, :, :2], batch.support[:, 1:, :, 2:]], dim=3)
    options = {"tuple_length": 1, "projection": 0, "direction": "query", "eps": 0.0, "learn_scale": False, "scale": 1.0}
    for shots, is_perfect in (("joint", True), ("mean", False)):
        logits = make_head(HeadCase("chamfer", {**options, "shots": shots}), CUBE_SHAPE)(
            replace(batch, query=mixed)
        ).logits
        assert (logits.item() > 1.0 - 1e-12) == is_perfect


@pytest.mark.parametrize(
    ("name", "options", "sees_order"),
    [
        ("chamfer", {}, True),
        ("chamfer", {"tuple_length": 1}, False),
        ("max", {}, False),
        ("diagonal", {}, True),
        ("bi_mhm", {}, False),
        ("bi_mhm", {"shots": "mean", "projection": 6}, False),
        ("bi_mhm", {"relation": True}, True),
        ("otam", {}, True),
    ],
    ids=str,
)
def test_what_sees_the_order_of_frames(name: str, options: dict[str, Any], sees_order: bool) -> None:
    batch, head = make_batch(cube_shape=CUBE_SHAPE), make_head(HeadCase(name, options), CUBE_SHAPE).eval()
    change = (head(replace(batch, query=batch.query.flip(3))).logits - head(batch).logits).abs().max()
    assert change > 1e-4 if sees_order else change < 1e-12


def test_tuple_length_follows_the_cubes_unless_given() -> None:
    for num_steps, expected in ((1, 1), (2, 2), (3, 3), (8, 3)):
        head = make_head(HeadCase("chamfer", {"projection": 5}), (8, num_steps, 1, 1))
        assert head.state_dict()["frames.linear.weight"].shape == (5, 8 * expected)
    with pytest.raises(ValueError, match=r"head\.tuple_length = 3, but the cubes have 2 time step.*1 to 2"):
        make_head(HeadCase("chamfer", {"tuple_length": 3}), (8, 2, 1, 1))


def test_parameters_are_the_published_ones() -> None:
    sizes = {
        name: tuple(value.shape) for name, value in make_head(HeadCase("chamfer"), CUBE_SHAPE).state_dict().items()
    }
    assert sizes == {
        "scale_weight": (),
        "frames.linear.weight": (1152, 24),
        "frames.linear.bias": (1152,),
        "frames.norm.weight": (1152,),
        "frames.norm.bias": (1152,),
    }
    options = {"projection": 0, "learn_scale": False}
    assert all(not make_head(HeadCase(name, options), CUBE_SHAPE).state_dict() for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_first_weights_come_from_the_generator(name: str) -> None:
    heads = []
    for _ in range(2):
        before = torch.random.get_rng_state()
        heads.append(build_head(name, {}, CUBE_SHAPE, None, True, torch.Generator().manual_seed(5)).state_dict())
        assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, heads[1][key]) for key, value in heads[0].items())
    assert heads[0]["scale_weight"] == 1.0


def test_an_option_without_effect_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale_weight.*learn_scale is off"):
        head_config("max", {"learn_scale": False, "scale_weight": 2.0})


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("chamfer", {"shots": "sum"}),
        ("chamfer", {"direction": "none"}),
        ("chamfer", {"tuple_length": 0}),
        ("max", {"scale": 0.0}),
        ("max", {"direction": "both"}),
        ("diagonal", {"shots": "joint"}),
        ("diagonal", {"eps": -0.1}),
    ],
    ids=str,
)
def test_bad_options_are_refused(name: str, option: dict[str, Any]) -> None:
    (key,) = option
    with pytest.raises(ValueError, match=key):
        head_config(name, option)
