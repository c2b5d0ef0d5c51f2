"""The ordered alignment against plain loops and against all paths there are; the head's options and maps."""

# E episodes, Q queries, S supports, N classes; C channels, T U time steps of query and support

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contracts.head_cases import HeadCase, make_batch, make_head
from episodes.build import head_config
from episodes.heads.ordered_alignment import (
    alignment_distance,
    cumulative_distances,
    expected_alignment,
    two_way_distance,
)

VECTOR = torch.tensor([[0.1, 0.5, 0.9], [0.6, 0.2, 0.8], [0.7, 0.4, 0.3]], dtype=torch.float64)
CUBE_SHAPE = (8, 5, 2, 1)
sizes = pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (4, 1), (2, 3), (3, 2), (3, 3), (4, 5)])


def random_distances(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def loop_cumulative(distances: Tensor, smoothing: float) -> Tensor:
    """The recursion as it is written, for one pair of videos."""

    def minimum(values: list[float]) -> float:
        if smoothing == 0.0:
            return min(values)
        return -smoothing * math.log(sum(math.exp(-value / smoothing) for value in values))

    rows, columns = distances.shape
    padded = [[0.0, *row, 0.0] for row in distances.tolist()]
    table = [[0.0] * (columns + 2) for _ in range(rows)]
    for m in range(1, columns + 2):
        table[0][m] = table[0][m - 1] + padded[0][m]
    for row in range(1, rows):
        for m in range(1, columns + 2):
            choices = [table[row - 1][m - 1], table[row][m - 1]]
            if m in (1, columns + 1):
                choices.append(table[row - 1][m])
            table[row][m] = padded[row][m] + minimum(choices)
    return torch.tensor(table, dtype=torch.float64)


def all_paths(rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """The pairs of frames (row, column) on every allowed path; paths that enter by another way are counted each."""

    def to(row: int, m: int) -> Iterator[list[tuple[int, int]]]:
        if m == 0:
            yield []
            return
        before = [(row, m - 1)]
        if row > 0:
            before.append((row - 1, m - 1))
            if m in (1, columns + 1):
                before.append((row - 1, m))
        here = [(row, m - 1)] if m <= columns else []
        for previous in before:
            for path in to(*previous):
                yield path + here

    return list(to(rows - 1, columns + 1))


def path_costs(distances: Tensor) -> Tensor:
    return torch.stack(
        [sum((distances[pair] for pair in path), distances.new_zeros(())) for path in all_paths(*distances.shape)]
    )


def test_vector_of_the_reference() -> None:
    # As printed there; the printed value of the transpose and that of the sum differ from each other by 2e-8.
    assert alignment_distance(VECTOR, 0.1).item() == pytest.approx(0.5967150106, abs=1e-10)
    assert alignment_distance(VECTOR.T, 0.1).item() == pytest.approx(0.5398259061, abs=3e-8)
    assert two_way_distance(VECTOR, 0.1, "sum").item() == pytest.approx(1.1365409369, abs=1e-9)
    # Computed once with forty digits.
    assert alignment_distance(VECTOR, 0.1).item() == pytest.approx(0.5967150105821143, abs=1e-14)
    assert alignment_distance(VECTOR.T, 0.1).item() == pytest.approx(0.5398259260622463, abs=1e-14)
    assert two_way_distance(VECTOR, 0.1, "mean").item() == pytest.approx(1.1365409366443606 / 2.0, abs=1e-14)


@sizes
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_recursion_equals_plain_loops(rows: int, columns: int, smoothing: float) -> None:
    distances = random_distances(2, 3, rows, columns)
    found = cumulative_distances(distances, smoothing)
    assert found.shape == (2, 3, rows, columns + 2)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], loop_cumulative(distances[i, j], smoothing), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alignment_distance(distances, smoothing), found[..., -1, -1], rtol=0.0, atol=0.0)


@sizes
def test_hard_minimum_is_the_cheapest_of_all_paths(rows: int, columns: int) -> None:
    distances = random_distances(rows, columns)
    cheapest = path_costs(distances).min()
    torch.testing.assert_close(alignment_distance(distances, 0.0), cheapest, rtol=1e-12, atol=1e-12)


@sizes
def test_soft_minimum_is_that_of_all_paths(rows: int, columns: int) -> None:
    distances = random_distances(rows, columns)
    expected = -0.2 * torch.logsumexp(-path_costs(distances) / 0.2, dim=0)
    torch.testing.assert_close(alignment_distance(distances, 0.2), expected, rtol=1e-12, atol=1e-12)


@sizes
def test_expected_alignment_is_the_share_of_paths_through_a_pair(rows: int, columns: int) -> None:
    distances = random_distances(rows, columns)
    expected = torch.zeros_like(distances)
    for matrix, table in ((distances, expected), (distances.T, expected.T)):
        shares = (-path_costs(matrix) / 0.2).softmax(dim=0)
        for path, share in zip(all_paths(*matrix.shape), shares, strict=True):
            for pair in path:
                table[pair] += share / 2.0
    torch.testing.assert_close(expected_alignment(distances, 0.2), expected, rtol=1e-12, atol=1e-12)


def test_hard_alignment_is_the_cheapest_path() -> None:
    distances = random_distances(4, 5)
    best = all_paths(4, 5)[int(path_costs(distances).argmin())]
    best_back = all_paths(5, 4)[int(path_costs(distances.T).argmin())]
    expected = torch.zeros_like(distances)
    for row, column in [*best, *((row, column) for column, row in best_back)]:
        expected[row, column] += 0.5
    torch.testing.assert_close(expected_alignment(distances, 0.0), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_agrees_with_finite_differences(smoothing: float) -> None:
    distances = random_distances(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda pairs: two_way_distance(pairs, smoothing, "sum"), distances)


@pytest.mark.parametrize("smoothing", [0.0, 1e-3, 0.1])
def test_gradients_are_finite_where_frames_are_equal_or_far_apart(smoothing: float) -> None:
    for value in (0.0, 2.0):
        distances = torch.full((32, 32), value, requires_grad=True)
        distance = two_way_distance(distances, smoothing, "sum")
        (gradient,) = torch.autograd.grad(distance, distances)
        assert distance.isfinite()
        assert gradient.isfinite().all()
        assert gradient.sum() > 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_frames_of_zeros_give_finite_gradients(smoothing: float, eps: float) -> None:
    batch = make_batch(cube_shape=CUBE_SHAPE)
    batch.query[:, :, :, 0] = 0.0
    batch.support[:, :, :, 1] = 0.0
    batch.query.requires_grad_()
    batch.support.requires_grad_()
    output = make_head(HeadCase("otam", {"smoothing": smoothing, "eps": eps}), CUBE_SHAPE)(batch)
    torch.autograd.backward(output.losses["few_shot"].sum())
    for cubes in (batch.query, batch.support):
        assert cubes.grad is not None
        assert cubes.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"directions": "mean", "eps": 0.0, "smoothing": 0.0}], ids=str)
def test_logits_equal_plain_loops(options: dict[str, object]) -> None:
    batch = make_batch(cube_shape=CUBE_SHAPE)
    labels = batch.support_labels.clone()
    labels[0, 0] = -1 if (labels[0] == labels[0, 0]).sum() > 1 else labels[0, 0]
    batch = replace(batch, support_labels=labels)
    config = head_config("otam", options)
    eps, smoothing = config.model_dump()["eps"], config.model_dump()["smoothing"]
    found = make_head(HeadCase("otam", options), CUBE_SHAPE)(batch).logits
    for episode in range(2):
        for index in range(4):
            query = batch.query[episode, index].mean(dim=(-1, -2)).T
            of_class: list[list[Tensor]] = [[], [], []]
            for cube, label in zip(batch.support[episode], labels[episode].tolist(), strict=True):
                support = cube.mean(dim=(-1, -2)).T
                norms = query.norm(dim=1)[:, None] * support.norm(dim=1) + eps
                distances = 1.0 - query @ support.T / norms
                both = loop_cumulative(distances, smoothing)[-1, -1] + loop_cumulative(distances.T, smoothing)[-1, -1]
                if label >= 0:
                    of_class[label].append(both if not options else both / 2.0)
            expected = -torch.stack([torch.stack(values).mean() for values in of_class])
            torch.testing.assert_close(found[episode, index], expected, rtol=1e-10, atol=1e-10)


def test_alignment_of_a_video_with_itself_is_the_diagonal() -> None:
    batch = make_batch(cube_shape=CUBE_SHAPE, n_way=1, k_shot=1, n_query=1, num_episodes=1)
    batch = replace(
        batch, support=torch.eye(8, 5, dtype=torch.float64)[None, None, :, :, None, None].expand(1, 1, *CUBE_SHAPE)
    )
    batch = replace(batch, query=batch.support)
    alignment = make_head(HeadCase("otam", {"smoothing": 0.0, "eps": 0.0}), CUBE_SHAPE)(batch, with_maps=True).maps[
        "alignment"
    ]
    assert alignment.shape == (1, 1, 1, 5, 5)
    torch.testing.assert_close(alignment[0, 0, 0], torch.eye(5, dtype=torch.float64))


def test_order_of_frames_matters() -> None:
    batch, head = make_batch(cube_shape=CUBE_SHAPE), make_head(HeadCase("otam"), CUBE_SHAPE)
    reversed_logits = head(replace(batch, query=batch.query.flip(3))).logits
    assert (reversed_logits - head(batch).logits).abs().max() > 1e-3


def test_projection_is_what_there_is_to_train() -> None:
    assert not list(make_head(HeadCase("otam"), CUBE_SHAPE).parameters())
    sizes = {
        name: tuple(value.shape) for name, value in make_head(HeadCase("otam", {"projection": 6})).state_dict().items()
    }
    assert sizes == {
        "frames.linear.weight": (6, 8),
        "frames.linear.bias": (6,),
        "frames.norm.weight": (6,),
        "frames.norm.bias": (6,),
    }


@pytest.mark.parametrize(
    "options", [{"directions": "both"}, {"smoothing": -0.1}, {"eps": -1.0}, {"projection": -1}], ids=str
)
def test_bad_values_are_refused(options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        head_config("otam", options)
