"""STRM's own parts: patches of any grid, the auxiliary projections trained and frozen, unequal shots, maps and errors."""

# E episodes, S supports, Q queries, N classes; C channels, T time steps, H W grid; P tuples

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contracts.head_cases import HeadCase, make_batch, make_head, part, total_loss
from episodes.batch import EpisodeBatch
from episodes.build import HEADS, build_head, head_config
from episodes.heads.strm import StrmHead
from episodes.heads.strm_auxiliary import FixedLinear, NearestTuples, own_stream
from episodes.heads.tuples import EpisodeFrames, frame_tuples
from episodes.noise import EpisodeNoise
from episodes.shots import class_shots

SHAPE = (6, 4, 7, 7)


def strm_head(options: Mapping[str, object] | None = None, shape: tuple[int, int, int, int] = SHAPE) -> StrmHead:
    case = HeadCase("strm", {"hidden": 12, **(options or {})}, perturbation=0.05)
    head = make_head(case, shape)
    assert isinstance(head, StrmHead)
    return head.eval()


def unequal_batch(shape: tuple[int, int, int, int] = SHAPE) -> EpisodeBatch:
    """Episodes of 3 classes with 3, 1 and 2 shots in mixed order, and three rows of padding."""
    batch = make_batch(cube_shape=shape, k_shot=3)
    labels = torch.tensor([0, 2, 0, -1, 1, 2, 0, -1, -1]).expand(2, 9)
    return replace(batch, support_labels=labels.contiguous())


def nearest_by_loop(nearest: NearestTuples, frames: EpisodeFrames, batch: EpisodeBatch) -> Tensor:
    """The auxiliary logits of one cardinality, (E, Q, N), one pair at a time."""
    steps = nearest.tuples
    weight, bias = nearest.projection.weight, nearest.projection.bias

    def mapped(vectors: Tensor) -> Tensor:
        return torch.stack([F.linear(vectors[each].flatten(), weight, bias).relu() for each in steps])

    logits = torch.empty(*batch.query.shape[:2], batch.n_way, dtype=batch.query.dtype)
    for episode, query, label in itertools.product(*(range(size) for size in logits.shape)):
        members = (batch.support_labels[episode] == label).nonzero()[:, 0]
        supports = torch.cat([mapped(frames.support[episode, member]) for member in members])
        distances = (mapped(frames.query[episode, query])[:, None] - supports).norm(dim=-1)
        logits[episode, query, label] = -distances.amin(dim=1).mean()
    return logits


@pytest.mark.parametrize("aux_head", ["trained", "frozen_random"])
def test_auxiliary_logits_are_those_of_a_plain_loop_with_unequal_shots(aux_head: str) -> None:
    head, batch = strm_head({"aux_head": aux_head, "dropout": 0.0, "cardinalities": [2, 3]}), unequal_batch()
    stages = head.stages(batch)
    frames = EpisodeFrames(stages.support.frames, stages.query.frames)
    for nearest, found in zip(head.auxiliary, stages.auxiliary, strict=True):
        assert isinstance(nearest, NearestTuples)
        torch.testing.assert_close(found, nearest_by_loop(nearest, frames, batch), rtol=1e-10, atol=1e-12)


def test_frozen_projections_keep_their_dropout_in_evaluation() -> None:
    head, batch = strm_head({"aux_head": "frozen_random"}), unequal_batch()
    assert batch.seeds is not None
    first = head(batch)
    torch.testing.assert_close(head(batch).logits, first.logits, rtol=0.0, atol=0.0)
    other = head(replace(batch, seeds=batch.seeds + 1))
    assert not torch.allclose(other.losses["patch"], first.losses["patch"])
    torch.testing.assert_close(other.losses["few_shot"], first.losses["few_shot"], rtol=0.0, atol=0.0)
    with pytest.raises(ValueError, match="seeds"):
        head(replace(batch, seeds=None))
    without = strm_head({"aux_head": "frozen_random", "dropout": 0.0})
    assert without(replace(batch, seeds=None)).logits.isfinite().all()


def test_frozen_dropout_has_one_mask_for_the_queries_and_one_for_each_support_by_id() -> None:
    options = {"aux_head": "frozen_random", "dropout": 0.4, "cardinalities": [2, 3]}
    head, batch = strm_head(options), unequal_batch()
    assert batch.seeds is not None
    assert batch.support_order is not None
    stages = head.stages(batch)
    plain = EpisodeFrames(stages.support.frames, stages.query.frames)
    noise = EpisodeNoise(batch.seeds)
    for nearest, found in zip(head.auxiliary, stages.auxiliary, strict=True):
        assert isinstance(nearest, NearestTuples)
        own = own_stream(noise)
        query_mask = own.dropout(torch.ones_like(plain.query[:, :1]), 0.4, is_on=True)
        by_id = own.dropout(torch.ones_like(plain.support), 0.4, is_on=True)
        support_mask = torch.stack([by_id[episode, order] for episode, order in enumerate(batch.support_order)])
        masked = EpisodeFrames(plain.support * support_mask, plain.query * query_mask)
        torch.testing.assert_close(found, nearest_by_loop(nearest, masked, batch), rtol=1e-10, atol=1e-12)


def test_frozen_dropout_is_another_one_for_each_cardinality_and_episode() -> None:
    noise = EpisodeNoise(torch.tensor([3, 4, 3]))
    first, second = (own_stream(noise).uniform((50,)) for _ in range(2))
    assert torch.equal(first[0], first[2])
    together = torch.cat([first[:2], second[:2]])
    assert len({tuple(row) for row in together.tolist()}) == 4
    assert not torch.equal(first[0], EpisodeNoise(torch.tensor([3])).uniform((50,))[0])


def test_frozen_dropout_in_training_is_drawn_for_every_query() -> None:
    head, batch = strm_head({"aux_head": "frozen_random", "dropout": 0.4}), unequal_batch()
    (nearest,) = head.auxiliary
    assert isinstance(nearest, NearestTuples)
    vectors = torch.ones(2, 4, *SHAPE[1::-1], dtype=torch.float64)
    frames = EpisodeFrames(vectors[:, :1].expand(-1, 9, -1, -1), vectors)

    def spread() -> float:
        logits = nearest(frames, class_shots(batch), batch.support_order, EpisodeNoise(batch.seeds))
        return float((logits - logits[:, :1]).detach().abs().max())

    assert spread() < 1e-12
    nearest.train()
    assert spread() > 1e-3


def test_trained_projections_learn_and_frozen_ones_are_saved_but_do_not() -> None:
    batch = unequal_batch()
    trained, frozen = strm_head().train(), strm_head({"aux_head": "frozen_random"}).train()
    name = "auxiliary.0.projection.weight"
    torch.autograd.backward(total_loss(trained, batch))
    gradient = dict(trained.named_parameters())[name].grad
    assert gradient is not None
    assert gradient.abs().max() > 0.0
    torch.autograd.backward(total_loss(frozen, batch))
    assert name not in dict(frozen.named_parameters())
    assert name in frozen.state_dict()
    # Gradients pass through the frozen projections to what comes before.
    assert frozen.patches.mixer[0].weight.grad is not None


def test_frozen_projections_come_from_the_generator() -> None:
    def drawn(seed: int) -> Tensor:
        options = {"aux_head": "frozen_random", "hidden": 4}
        head = build_head("strm", options, SHAPE, None, True, torch.Generator().manual_seed(seed))
        return head.get_buffer("auxiliary.0.projection.weight")

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    bound = 1.0 / (2 * SHAPE[0]) ** 0.5
    assert 0.8 * bound < float(drawn(1).abs().max()) <= bound


@pytest.mark.parametrize("grid", [(7, 7), (1, 1), (2, 3), (4, 4), (14, 9)], ids=str)
@pytest.mark.parametrize("patches", [1, 2, 4])
def test_grids_of_any_size_are_pooled_to_patches(grid: tuple[int, int], patches: int) -> None:
    shape = (*SHAPE[:2], *grid)
    head, batch = strm_head({"patches": patches}, shape), unequal_batch(shape)
    output = head(batch, with_maps=True)
    assert output.logits.isfinite().all()
    assert output.maps["patch_support"].shape == (2, 9, SHAPE[1], patches, patches)


def test_patches_of_a_seven_by_seven_grid_overlap_as_published() -> None:
    head, batch = strm_head(), make_batch(cube_shape=SHAPE)
    bins = [slice(0, 2), slice(1, 4), slice(3, 6), slice(5, 7)]
    frame = batch.query[1, 2, :, 3]  # (C, H, W)
    expected = torch.stack([frame[:, rows, columns].amax(dim=(-2, -1)) for rows in bins for columns in bins])
    torch.testing.assert_close(head.patches.tokens(batch.query)[1, 2, 3], expected, rtol=0.0, atol=0.0)


def test_logits_are_those_of_the_tuples_and_a_share_of_the_auxiliary_ones() -> None:
    batch = unequal_batch()
    for weight in (0.0, 0.1, 2.0):
        head = strm_head({"aux_weight": weight})
        stages = head.stages(batch)
        expected = stages.tuples[0].logits + weight * stages.auxiliary[0]
        output = head(batch)
        torch.testing.assert_close(output.logits, expected)
        assert head.loss_weights == {"few_shot": 1.0, "patch": weight}
        assert set(output.losses) == {"few_shot", "patch"}


def test_maps_are_the_attention_that_patches_receive_and_the_best_tuples() -> None:
    head, batch = strm_head({"cardinalities": [2, 3]}), unequal_batch()
    maps = head(batch, with_maps=True).maps
    tuples = {f"tuple_{kind}_{number}" for kind in ("query", "support", "video") for number in (2, 3)}
    assert set(maps) == tuples | {"patch_query", "patch_support"}
    given = head.stages(batch).query.attention[0, 1, 2]  # (L, L)
    torch.testing.assert_close(maps["patch_query"][0, 1, 2], given.mean(dim=0).reshape(4, 4))
    torch.testing.assert_close(maps["patch_support"].sum(dim=(-2, -1)), torch.ones(2, 9, 4, dtype=torch.float64))


def test_without_enrichment_the_tuples_are_those_of_trx() -> None:
    options = {"cardinalities": [2], "hidden": 12}
    head, batch = strm_head(options), unequal_batch()
    trx = make_head(HeadCase("trx", options), (SHAPE[0], SHAPE[1], 1, 1)).eval()
    trx.load_state_dict({name: value for name, value in head.state_dict().items() if name.startswith("transformers.")})
    frames = head.stages(batch).frames
    cubes = {name: getattr(frames, name).transpose(-1, -2)[..., None, None] for name in ("support", "query")}
    torch.testing.assert_close(head.stages(batch).tuples[0].logits, trx(replace(batch, **cubes)).logits)


def test_a_query_alone_scores_as_beside_others_with_frozen_projections() -> None:
    head, batch = strm_head({"aux_head": "frozen_random"}), make_batch(cube_shape=SHAPE)
    together = head(batch).logits
    for index in range(4):
        alone = head(part(batch, queries=slice(index, index + 1))).logits
        torch.testing.assert_close(alone, together[:, index : index + 1])


def test_a_query_that_is_a_support_has_finite_gradients() -> None:
    head, batch = strm_head({"dropout": 0.0}).train(), make_batch(cube_shape=SHAPE)
    copied = replace(batch, query=batch.support[:, :4].clone().requires_grad_())
    torch.autograd.backward(total_loss(head, copied))
    assert copied.query.grad is not None
    assert copied.query.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (6, 1, 7, 7), r"tuples of 2 frames.*set head\.cardinalities = \[1\]$"),
        ({"patches": 0}, SHAPE, "patches = 0"),
        ({"aux_head": "random"}, SHAPE, "'frozen_random' or 'trained'"),
        ({"aux_weight": -0.1}, SHAPE, "aux_weight"),
        ({"aux_weight": 0.0, "aux_head": "frozen_random"}, SHAPE, "aux_head.*no effect.*aux_weight = 0"),
    ],
)
def test_what_makes_no_sense_is_refused_when_built(
    options: dict[str, object], shape: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_head("strm", options, shape, None, True)


def test_defaults_are_the_published_ones_but_for_the_trained_projections() -> None:
    config = head_config("strm", {}).model_dump()
    assert config == {
        "cardinalities": (2,),
        "hidden": 1152,
        "dropout": 0.1,
        "factored": True,
        "patches": 4,
        "aux_head": "trained",
        "aux_weight": 0.1,
    }
    assert HEADS["strm"].query_reduction == "sum"
    assert isinstance(strm_head({"aux_head": "frozen_random"}).auxiliary[0].get_submodule("projection"), FixedLinear)
    assert frame_tuples(SHAPE[1], 2).equal(strm_head().auxiliary[0].get_buffer("tuples"))
