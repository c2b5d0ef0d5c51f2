"""The set matching of HyRSM and its hybrid relation module against plain loops; options, draws and losses."""

# E episodes, Q queries, S supports, N classes, Z training classes; C channels, T U time steps of query and support

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contracts.head_cases import NUM_GLOBAL_CLASSES, HeadCase, make_batch, make_head, part
from episodes.batch import EpisodeBatch
from episodes.build import head_config
from episodes.head import HeadModule
from episodes.heads.bi_mhm import BiMhmHead

CUBE_SHAPE = (8, 4, 2, 1)
NO_DROPOUT = {"position_dropout": 0.0, "intra_dropout": 0.0, "attention_dropout": 0.0, "inter_dropout": 0.0}
State = dict[str, Tensor]


def unequal_batch() -> EpisodeBatch:
    """Three classes with one to three shots, and a row of padding."""
    labels = torch.tensor([[0, 1, 1, 2, 2, 2, -1], [2, 0, -1, 1, 1, 0, 0]])
    source = make_batch(cube_shape=CUBE_SHAPE, k_shot=3)
    return replace(source, support=source.support[:, :7], support_labels=labels, support_order=None)


def loop_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention of tokens (G, heads D), head by head."""
    size = query.shape[1] // heads
    parts = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        weights = (query[:, own] @ key[:, own].T / math.sqrt(size)).softmax(dim=1)
        parts.append(weights @ value[:, own])
    return torch.cat(parts, dim=1)


def loop_within(frames: Tensor, state: State, heads: int, scale: float, weight: float) -> Tensor:
    """One video (T, C) through the intra-relation."""
    steps, channels = frames.shape
    table = torch.zeros(steps, channels, dtype=frames.dtype)
    for t in range(steps):
        for j in range(channels):
            angle = t / 10000.0 ** (2.0 * j / channels)
            table[t, j] = math.sin(angle) if j % 2 == 0 else math.cos(angle)
    placed = frames * math.sqrt(channels / scale) + weight * table
    normal = F.layer_norm(placed, (channels,), state["intra.norm.weight"], state["intra.norm.bias"])
    query, key, value = (normal @ state["intra.to_all.weight"].T).chunk(3, dim=1)
    gained = loop_attention(query, key, value, heads) @ state["intra.to_out.weight"].T + state["intra.to_out.bias"]
    return (gained + placed).clamp(min=0.0)


def loop_between(videos: list[Tensor], state: State, heads: int) -> list[Tensor]:
    """The videos (T, C) of one group, each joined with what the group is about."""
    means = torch.stack([video.mean(dim=0) for video in videos])
    query, key, value = (means @ state[f"inter.to_{name}.weight"].T for name in ("query", "key", "value"))
    gained = loop_attention(query, key, value, heads) @ state["inter.to_out.weight"].T + state["inter.to_out.bias"]
    relations = F.layer_norm(gained + means, means.shape[1:], state["inter.norm.weight"], state["inter.norm.bias"])
    relations = relations.clamp(min=0.0)
    joined = []
    for video, relation in zip(videos, relations, strict=True):
        both = torch.cat([video, relation.expand_as(video)], dim=1)
        joined.append(both @ state["join.weight"].T + state["join.bias"])
    return joined


def loop_distance(query: Tensor, support: Tensor, reduction: str) -> Tensor:
    total = query.new_zeros(())
    for mine, other in ((query, support), (support, query)):
        nearest = [min(1.0 - F.cosine_similarity(a, b, dim=0) for b in other) for a in mine]
        total = total + torch.stack(nearest).sum() / (1.0 if reduction == "sum" else len(mine))
    return total


def loop_logits(
    query: Tensor, supports: list[Tensor], labels: list[int], options: dict[str, Any], state: State
) -> Tensor:
    """Of one query (T, C) to three classes."""
    heads, place = options["heads"], (options["position_scale"], options["position_weight"])
    if options["relation"]:
        query = loop_within(query, state, heads, *place)
        supports = [loop_within(support, state, heads, *place) for support in supports]
    own = [[support for support, label in zip(supports, labels, strict=True) if label == c] for c in range(3)]
    if options["shots"] == "prototype":
        own = [[torch.stack(shots).mean(dim=0)] for shots in own]
    if options["relation"]:
        *related, query = loop_between([video for shots in own for video in shots] + [query], state, heads)
        own = [[related.pop(0) for _ in shots] for shots in own]
    distances = [[loop_distance(query, video, options["frame_reduction"]) for video in shots] for shots in own]
    return -torch.stack([torch.stack(values).mean() for values in distances])


def relation_state(head: HeadModule) -> State:
    return {name.removeprefix("relation."): value for name, value in head.state_dict().items()}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"frame_reduction": "mean", "shots": "mean"},
        {"relation": True, **NO_DROPOUT},
        {"relation": True, "shots": "mean", "heads": 2, "frame_reduction": "mean", **NO_DROPOUT},
        {"relation": True, "heads": 3, "position_scale": 2048.0, "position_weight": 0.01, **NO_DROPOUT},
    ],
    ids=str,
)
def test_logits_equal_plain_loops(options: dict[str, Any], training: bool) -> None:
    batch = unequal_batch()
    head = make_head(HeadCase("bi_mhm", options, perturbation=0.0), CUBE_SHAPE).train(training)
    # The table of positions is kept in single precision; the loops have it in double.
    tolerance = 1e-5 if options.get("relation") else 1e-10
    values, state, found = head_config("bi_mhm", options).model_dump(), relation_state(head), head(batch).logits
    for episode in range(2):
        supports = [cube.mean(dim=(-1, -2)).T for cube in batch.support[episode]]
        for index in range(4):
            query = batch.query[episode, index].mean(dim=(-1, -2)).T
            expected = loop_logits(query, supports, batch.support_labels[episode].tolist(), values, state)
            torch.testing.assert_close(found[episode, index], expected, rtol=tolerance, atol=tolerance)


def test_global_loss_is_the_mean_over_all_frames_of_the_episode() -> None:
    batch = unequal_batch()
    head = make_head(HeadCase("bi_mhm", {"relation": True, **NO_DROPOUT}, perturbation=0.0), CUBE_SHAPE).train()
    found = head(batch).losses["global"]
    assert head.loss_weights == {"few_shot": 1.0, "global": 0.6}
    state = relation_state(head)
    assert batch.class_global_labels is not None
    assert batch.query_labels is not None
    for episode in range(2):
        losses = []
        cubes = torch.cat([batch.support[episode], batch.query[episode]])
        labels = torch.cat([batch.support_labels[episode], batch.query_labels[episode]])
        for cube, label in zip(cubes, labels.tolist(), strict=True):
            if label < 0:
                continue
            frames = loop_within(cube.mean(dim=(-1, -2)).T, state, 8, 10.0, 1.0)
            logits = frames @ state["classifier.weight"].T + state["classifier.bias"]
            target = batch.class_global_labels[episode, label].expand(len(frames))
            losses.append(F.cross_entropy(logits, target, reduction="none"))
        expected = torch.cat(losses).mean().expand(4)
        torch.testing.assert_close(found[episode], expected, rtol=1e-5, atol=1e-5)


def test_global_loss_is_of_training_with_a_classifier_only() -> None:
    batch = make_batch(cube_shape=CUBE_SHAPE)
    options = {"relation": True}
    head = make_head(HeadCase("bi_mhm", options), CUBE_SHAPE)
    assert set(head.train()(batch).losses) == {"few_shot", "global"}
    assert set(head.eval()(batch).losses) == {"few_shot"}
    assert set(head.train()(replace(batch, class_global_labels=None)).losses) == {"few_shot"}
    for others in ({"relation": False}, {"relation": True, "global_classifier": False}):
        head = make_head(HeadCase("bi_mhm", others), CUBE_SHAPE).train()
        assert set(head(batch).losses) == set(head.loss_weights) == {"few_shot"}


def test_dropout_is_drawn_from_the_seeds_of_the_episodes() -> None:
    batch = make_batch(cube_shape=CUBE_SHAPE)
    head = make_head(HeadCase("bi_mhm", {"relation": True}), CUBE_SHAPE).train()
    before = torch.random.get_rng_state()
    first, second = head(batch).logits, head(batch).logits
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    assert not torch.allclose(head(replace(batch, seeds=torch.tensor([1, 2]))).logits, first)
    with pytest.raises(ValueError, match="seeds"):
        head(replace(batch, seeds=None))
    head.eval()(replace(batch, seeds=None))


@pytest.mark.parametrize("name", list(NO_DROPOUT))
def test_each_dropout_changes_training_only(name: str) -> None:
    batch = make_batch(cube_shape=CUBE_SHAPE)
    plain = make_head(HeadCase("bi_mhm", {"relation": True, **NO_DROPOUT}), CUBE_SHAPE)
    noisy = make_head(HeadCase("bi_mhm", {"relation": True, **NO_DROPOUT, name: 0.5}), CUBE_SHAPE)
    torch.testing.assert_close(noisy.eval()(batch).logits, plain.eval()(batch).logits)
    assert not torch.allclose(noisy.train()(batch).logits, plain.train()(batch).logits)


def test_a_query_does_not_see_another_query_in_training_without_dropout() -> None:
    batch = make_batch(cube_shape=CUBE_SHAPE)
    head = make_head(HeadCase("bi_mhm", {"relation": True, **NO_DROPOUT}), CUBE_SHAPE).train()
    together = head(batch).logits
    for index in range(4):
        alone = head(part(batch, queries=slice(index, index + 1))).logits
        torch.testing.assert_close(alone, together[:, index : index + 1])


def test_supports_are_related_to_each_other() -> None:
    """With the relation, the distance to one class depends on the other classes of the episode."""
    batch = make_batch(cube_shape=CUBE_SHAPE, k_shot=1)
    changed = batch.support.clone()
    changed[batch.support_labels == 2] += torch.rand(
        8, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    for options, is_changed in (({}, False), ({"relation": True}, True)):
        head = make_head(HeadCase("bi_mhm", options), CUBE_SHAPE).eval()
        before, after = (head(replace(batch, support=support)).logits[:, :, :2] for support in (batch.support, changed))
        assert torch.allclose(before, after) != is_changed


def test_maps_are_of_classes_with_prototypes_and_of_supports_without() -> None:
    batch = unequal_batch()
    for shots, name, axis in (("prototype", "class_alignment", 3), ("mean", "alignment", 7)):
        maps = make_head(HeadCase("bi_mhm", {"shots": shots}), CUBE_SHAPE)(batch, with_maps=True).maps
        assert set(maps) == {name}
        assert maps[name].shape == (2, 4, axis, 4, 4)
        # Each frame of either side has one nearest frame.
        torch.testing.assert_close(maps[name].sum(dim=(-2, -1)), torch.full((2, 4, axis), 8.0, dtype=torch.float64))


def test_state_of_the_relation_has_the_published_sizes() -> None:
    head = make_head(HeadCase("bi_mhm", {"relation": True}), CUBE_SHAPE)
    assert isinstance(head, BiMhmHead)
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {
        "relation.intra.norm.weight": (8,),
        "relation.intra.norm.bias": (8,),
        "relation.intra.to_all.weight": (24, 8),
        "relation.intra.to_out.weight": (8, 8),
        "relation.intra.to_out.bias": (8,),
        "relation.inter.to_query.weight": (8, 8),
        "relation.inter.to_key.weight": (8, 8),
        "relation.inter.to_value.weight": (8, 8),
        "relation.inter.to_out.weight": (8, 8),
        "relation.inter.to_out.bias": (8,),
        "relation.inter.norm.weight": (8,),
        "relation.inter.norm.bias": (8,),
        "relation.join.weight": (8, 16),
        "relation.join.bias": (8,),
        "classifier.weight": (NUM_GLOBAL_CLASSES, 8),
        "classifier.bias": (NUM_GLOBAL_CLASSES,),
    }


def test_more_heads_than_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head\.heads = 8, but frames have 5 channels; 1 to 5"):
        make_head(HeadCase("bi_mhm", {"relation": True}), (5, 4, 1, 1))
    make_head(HeadCase("bi_mhm", {"relation": True, "projection": 16}), (5, 4, 1, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 4},
        {"inter_dropout": 0.1},
        {"lambda_global": 1.0},
        {"relation": True, "global_classifier": False, "lambda_global": 1.0},
    ],
    ids=str,
)
def test_options_without_effect_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no effect"):
        head_config("bi_mhm", options)


@pytest.mark.parametrize(
    "options", [{"shots": "joint"}, {"frame_reduction": "max"}, {"relation": True, "intra_dropout": 1.0}], ids=str
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=list(options)[-1]):
        head_config("bi_mhm", options)
