"""TRX beside a plain loop over episodes, queries, classes and tuples; its options, its errors and its maps."""

# E episodes, S supports, Q queries, N classes; C channels, T time steps; P tuples, D width

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from contracts.head_cases import HeadCase, make_batch, make_head, part, reordered
from episodes.batch import EpisodeBatch
from episodes.build import HEADS, build_head
from episodes.head import HeadInputs
from episodes.heads import tuples as tuples_module
from episodes.heads.sine_table import SineTable, sine_table
from episodes.heads.trx import TrxConfig, TrxHead, TupleTransformer
from episodes.heads.tuples import frame_tuples, project_tuples, query_slices
from episodes.shots import frame_vectors

SHAPE = (6, 5, 2, 3)


def trx_head(dtype: torch.dtype = torch.float64, **options: object) -> TrxHead:
    head = make_head(HeadCase("trx", {"hidden": 12, **options}), SHAPE, dtype)
    assert isinstance(head, TrxHead)
    return head.eval()


def unequal_batch(num_episodes: int = 2) -> EpisodeBatch:
    """Episodes of 3 classes with 3, 1 and 2 shots in mixed order, and a row of padding."""
    batch = make_batch(num_episodes=num_episodes, cube_shape=SHAPE, k_shot=3)
    labels = torch.tensor([0, 2, 0, -1, 1, 2, 0, -1, -1]).expand(num_episodes, 9)
    return replace(batch, support_labels=labels.contiguous())


def plain_loop(transformer: TupleTransformer, batch: EpisodeBatch) -> Tensor:
    """The printed method, one query and one class at a time: logits (E, Q, N)."""
    num_steps = batch.query.shape[3]

    def encoded(cube: Tensor) -> tuple[Tensor, Tensor]:
        frames = cube.mean(dim=(-2, -1)).T + transformer.positions.table[0, :num_steps]
        chosen = itertools.combinations(range(num_steps), transformer.cardinality)
        joined = torch.stack([torch.cat([frames[step] for step in steps]) for steps in chosen])  # (P, M C)
        return transformer.key_norm(transformer.key(joined)), transformer.value(joined)

    logits = torch.empty(*batch.query.shape[:2], batch.n_way, dtype=batch.query.dtype)
    for episode, query, label in itertools.product(*(range(size) for size in logits.shape)):
        members = (batch.support_labels[episode] == label).nonzero()[:, 0].tolist()
        shots = [encoded(batch.support[episode, member]) for member in members]
        keys, values = (torch.cat(each) for each in zip(*shots, strict=True))
        query_keys, query_values = encoded(batch.query[episode, query])
        weights = (query_keys @ keys.T / math.sqrt(keys.shape[1])).softmax(dim=-1)
        logits[episode, query, label] = -(query_values - weights @ values).square().sum() / len(query_values)
    return logits


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("cardinalities", [[1], [2], [3], [5], [2, 3], [4, 1]], ids=str)
def test_logits_are_those_of_a_plain_loop(cardinalities: list[int], factored: bool) -> None:
    head, batch = trx_head(cardinalities=cardinalities, factored=factored), unequal_batch()
    expected = [plain_loop(each, batch) for each in head.transformers if isinstance(each, TupleTransformer)]
    torch.testing.assert_close(head(batch).logits, torch.stack(expected).mean(dim=0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cardinality", [1, 2, 3, 4])
@pytest.mark.parametrize("num_steps", [4, 5, 6, 7, 8])
def test_factored_projection_equals_the_concatenated_one(num_steps: int, cardinality: int) -> None:
    source = torch.Generator().manual_seed(num_steps)
    chosen = frame_tuples(num_steps, cardinality)
    frames, weight, bias = (
        torch.randn(shape, generator=source, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, num_steps, 7), (5, cardinality * 7), (5,))
    )
    target = torch.randn((2, 3, len(chosen), 5), generator=source, dtype=torch.float64)
    results = []
    for factored in (True, False):
        mapped = project_tuples(frames, weight, bias, chosen, factored)
        results.append([mapped, *torch.autograd.grad((mapped * target).sum(), [frames, weight, bias])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_tuples_are_in_lexicographic_order() -> None:
    assert frame_tuples(4, 2).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert [len(frame_tuples(8, cardinality)) for cardinality in (1, 2, 3, 8)] == [8, 28, 56, 1]


@pytest.mark.parametrize("training", [False, True])
def test_factored_head_equals_the_concatenated_one_in_all_but_cost(training: bool) -> None:
    batch = unequal_batch()
    factored, joined = trx_head(factored=True).train(training), trx_head(factored=False).train(training)
    found, expected = factored(batch), joined(batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-11, atol=1e-11)
    for output in (found, expected):
        torch.autograd.backward(output.losses["few_shot"].sum())
    for mine, theirs in zip(factored.parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)


def test_keys_are_normalised_and_values_are_not() -> None:
    head, batch = trx_head(cardinalities=[2]), unequal_batch()
    (transformer,) = head.transformers
    assert isinstance(transformer, TupleTransformer)
    before = head(batch).logits
    with torch.no_grad():
        transformer.value_norm.weight.add_(5.0)
        transformer.value_norm.bias.add_(5.0)
    torch.testing.assert_close(head(batch).logits, before, rtol=0.0, atol=0.0)
    with torch.no_grad():
        transformer.value.weight.mul_(2.0)
    torch.testing.assert_close(head(batch).logits, 4.0 * before)
    with torch.no_grad():
        transformer.key.weight.mul_(2.0)
        transformer.key.bias.mul_(2.0)
    # The scale of the keys goes, but for the small number in the normalisation's root.
    torch.testing.assert_close(head(batch).logits, 4.0 * before, rtol=1e-3, atol=0.0)


def test_state_dict_keeps_the_unused_norm_and_nothing_trains_it() -> None:
    head = trx_head(cardinalities=[2])
    assert {"transformers.0.value_norm.weight", "transformers.0.value_norm.bias"} <= set(head.state_dict())
    assert not [name for name, _ in head.named_parameters() if "value_norm" in name]


def test_published_sizes_have_the_published_number_of_parameters() -> None:
    head = TrxHead(TrxConfig(), HeadInputs((2048, 8, 1, 1)))
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in head.transformers]
    assert [round(count / 1e6, 2) for count in counts] == [9.44, 14.16]


@pytest.mark.parametrize(("factored", "billions"), [(False, 6.39), (True, 0.951)])
def test_products_are_as_many_as_the_reference_counts(factored: bool, billions: float) -> None:
    # 5-way 1-shot with 1 query, 8 frames of ResNet-50, pairs and triples: projections of 6 videos and the attention of tuples.
    head = TrxHead(TrxConfig(factored=factored), HeadInputs((2048, 8, 1, 1))).eval()
    batch = make_batch(num_episodes=1, n_way=5, k_shot=1, n_query=1, cube_shape=(2048, 8, 1, 1), dtype=torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head(batch)
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("most", [1, 400, 3000])
def test_queries_in_parts_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    head, batch = trx_head(), make_batch(cube_shape=SHAPE, n_query=7)
    whole = head(batch, with_maps=True)
    monkeypatch.setattr(tuples_module, "MOST_NUMBERS", most)
    assert len(query_slices(7, 300)) > 1 or most == 3000
    parts = head(batch, with_maps=True)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(parts.maps[name], values) for name, values in whole.maps.items())


def test_query_slices_cover_every_query_once() -> None:
    assert query_slices(5, tuples_module.MOST_NUMBERS // 2) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert query_slices(5, 1) == [slice(0, tuples_module.MOST_NUMBERS)]
    assert query_slices(2, 2 * tuples_module.MOST_NUMBERS) == [slice(0, 1), slice(1, 2)]


def test_distances_of_close_videos_keep_their_digits_in_single_precision() -> None:
    # Around 30 with differences of 1e-2: an expanded square would lose them all. The values themselves are rounded to 2e-6,
    # a thousandth of their differences.
    batch = make_batch(cube_shape=SHAPE, k_shot=1)
    near = replace(batch, support=(30.0 + 0.01 * batch.support).float(), query=(30.0 + 0.01 * batch.query).float())
    double = replace(near, support=near.support.double(), query=near.query.double())
    found = trx_head(torch.float32, cardinalities=[1])(near).logits
    expected = trx_head(cardinalities=[1])(double).logits
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.0)


def test_maps_name_the_query_tuple_nearest_to_its_prototype_and_what_it_attends_to() -> None:
    head, batch = trx_head(cardinalities=[2]), unequal_batch()
    (transformer,) = head.transformers
    assert isinstance(transformer, TupleTransformer)
    maps = head(batch, with_maps=True).maps
    assert set(maps) == {"tuple_query_2", "tuple_support_2", "tuple_video_2"}
    frames = {
        name: frame_vectors(getattr(batch, name)) + transformer.positions.table[0, :5] for name in ("support", "query")
    }
    steps = frame_tuples(5, 2)
    for episode, query, label in itertools.product(range(2), range(4), range(3)):
        joined = {name: values[episode][:, steps].flatten(-2) for name, values in frames.items()}
        members = (batch.support_labels[episode] == label).nonzero()[:, 0]
        query_keys = transformer.key_norm(transformer.key(joined["query"][query]))
        keys = transformer.key_norm(transformer.key(joined["support"][members].flatten(0, 1)))
        values = transformer.value(joined["support"][members].flatten(0, 1))
        weights = (query_keys @ keys.T / math.sqrt(12)).softmax(dim=-1)
        distances = (transformer.value(joined["query"][query]) - weights @ values).square().sum(dim=-1)
        best = int(distances.argmin())
        attended = int(weights[best].argmax())
        place = (episode, query, label)
        assert maps["tuple_query_2"][place].tolist() == steps[best].tolist()
        assert maps["tuple_support_2"][place].tolist() == steps[attended % len(steps)].tolist()
        assert int(maps["tuple_video_2"][place]) == int(members[attended // len(steps)])


def test_order_of_frames_matters_but_for_single_frames() -> None:
    batch = make_batch(cube_shape=SHAPE)
    turned = replace(batch, query=batch.query.flip(3))
    for cardinalities, matters in (([2], True), ([3], True)):
        head = trx_head(cardinalities=cardinalities)
        assert torch.allclose(head(turned).logits, head(batch).logits) != matters
    head = trx_head(cardinalities=[1])
    for transformer in head.transformers:
        assert isinstance(transformer, TupleTransformer)
        transformer.positions.table.zero_()
    torch.testing.assert_close(head(turned).logits, head(batch).logits)


def test_double_precision_adds_the_numbers_of_the_formula() -> None:
    values = torch.zeros(5, 6, dtype=torch.float64)
    torch.testing.assert_close(SineTable(5, 6).double()(values), sine_table(5, 6), rtol=0.0, atol=0.0)
    assert SineTable(5, 6)(values.float()).dtype == torch.float32


def test_dropout_is_the_episodes_own_and_of_training_only() -> None:
    head, batch = trx_head(dropout=0.5).train(), make_batch(cube_shape=SHAPE)
    assert batch.seeds is not None
    torch.manual_seed(1)
    first = head(batch).logits
    torch.manual_seed(2)
    torch.testing.assert_close(head(batch).logits, first, rtol=0.0, atol=0.0)
    other = head(replace(batch, seeds=batch.seeds + 1)).logits
    assert not torch.allclose(other, first)
    with pytest.raises(ValueError, match="seeds"):
        head(replace(batch, seeds=None))
    assert head.eval()(replace(batch, seeds=None)).logits.isfinite().all()
    assert trx_head(dropout=0.0).train()(replace(batch, seeds=None)).logits.isfinite().all()


def test_first_weights_come_from_the_generator_alone() -> None:
    def built(seed: int, global_seed: int) -> dict[str, Tensor]:
        torch.manual_seed(global_seed)
        return build_head("trx", {"hidden": 4}, SHAPE, None, True, torch.Generator().manual_seed(seed)).state_dict()

    first, again, other = built(1, 1), built(1, 2), built(2, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformers.0.key.weight"], other["transformers.0.key.weight"])


def test_a_repeated_or_reordered_support_changes_nothing() -> None:
    head, batch = trx_head(), make_batch(cube_shape=SHAPE)
    turned = reordered(batch, torch.tensor([5, 1, 2, 4, 0, 3]))
    torch.testing.assert_close(head(turned).logits, head(batch).logits)
    alone = head(part(batch, queries=slice(2, 3)))
    torch.testing.assert_close(alone.logits, head(batch).logits[:, 2:3])


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (6, 1, 2, 2), r"tuples of 3 frames.*\(6, 1, 2, 2\) has 1 time step; set head\.cardinalities = \[1\]$"),
        ({"cardinalities": [2]}, (6, 1, 1, 1), r"head\.cardinalities = \[2\].*set head\.cardinalities = \[1\]$"),
        ({}, (6, 2, 2, 2), r"has 2 time steps; set head\.cardinalities = \[1\] \(tuples of up to 2 frames"),
        ({"cardinalities": []}, SHAPE, r"cardinalities = \[\].*one or more different numbers"),
        ({"cardinalities": [2, 2]}, SHAPE, r"cardinalities = \[2, 2\]"),
        ({"cardinalities": [0]}, SHAPE, r"cardinalities = \[0\]"),
        ({"hidden": 0}, SHAPE, "hidden"),
        ({"dropout": 1.0}, SHAPE, "dropout"),
        ({"cardinality": [2]}, SHAPE, "nearest: 'cardinalities'"),
    ],
)
def test_what_makes_no_sense_is_refused_when_built(
    options: dict[str, object], shape: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_head("trx", options, shape, None, True)


def test_one_vector_per_video_is_scored_with_cardinality_one() -> None:
    head = make_head(HeadCase("trx", {"cardinalities": [1], "hidden": 4}), (6, 1, 1, 1)).eval()
    assert head(make_batch(cube_shape=(6, 1, 1, 1))).logits.shape == (2, 4, 3)


def test_averaged_time_is_a_cube_of_one_step() -> None:
    options: dict[str, object] = {"cardinalities": [1], "hidden": 6}
    long, short = (
        build_head("trx", {**options, **more}, shape, None, True, torch.Generator().manual_seed(1)).double().eval()
        for more, shape in (({"average_time": True}, (5, 4, 2, 2)), ({}, (5, 1, 2, 2)))
    )
    batch = make_batch(cube_shape=(5, 4, 2, 2))
    average = replace(batch, support=batch.support.mean(3, keepdim=True), query=batch.query.mean(3, keepdim=True))
    torch.testing.assert_close(long(batch).logits, short(average).logits)
    with pytest.raises(ValueError, match=r"1 time step; set head.cardinalities = \[1\]"):
        build_head("trx", {"average_time": True}, (5, 4, 2, 2), None, True)


def test_loss_is_summed_over_queries_as_published() -> None:
    assert HEADS["trx"].query_reduction == "sum"
