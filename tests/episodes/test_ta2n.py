"""The TA2N head beside its formulas written plainly, its options and its errors."""

# E episodes, S supports, Q queries, N classes, K shots; C channels, T time steps, H W grid

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from contracts.head_cases import make_batch, part
from episodes.batch import EpisodeBatch
from episodes.build import build_head
from episodes.episode_norm import EpisodeBatchNorm
from episodes.head import HeadInputs
from episodes.heads.ta2n import TA2NHead, TA2NOptions
from episodes.heads.ta2n_alignment import TemporalSpatialAlignment
from episodes.heads.ta2n_coordination import ActionCoordination, Coordinated
from episodes.heads.ta2n_masks import PERTURBATIONS, region_masks
from episodes.heads.ta2n_softdtw import soft_dtw
from episodes.heads.ta2n_temporal import warp_time

SHAPE = (5, 5, 4, 6)
NARROW: dict[str, Any] = {"dropout": 0.0, "temporal_channels": (3, 4, 3), "offset_channels": (4, 3, 5)}


def ta2n_head(cube_shape: tuple[int, int, int, int] = SHAPE, **options: Any) -> TA2NHead:
    """A narrow head in float64, its parameters and buffers moved off their initial values."""
    source = torch.Generator().manual_seed(3)
    head = TA2NHead(TA2NOptions.model_validate({**NARROW, **options}), HeadInputs(cube_shape, generator=source))
    with torch.no_grad():
        for tensor in [*head.parameters(), *head.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=source), alpha=0.1)
    return head.double()


def batch(**options: Any) -> EpisodeBatch:
    return make_batch(cube_shape=SHAPE, **options)


def plain_network(stage: ActionCoordination, pairs: Tensor, training: bool) -> Tensor:
    """Pairs (P, 2C, T, H, W) to offsets (P, T, 2), layer by layer as published."""
    network = stage.network
    maps = functional.conv3d(pairs, network.first.weight, network.first.bias, padding=1)
    for norm, following in ((network.first_norm, network.second), (network.second_norm, None)):
        mean, variance = (None, None) if training else (norm.running_mean, norm.running_var)
        maps = functional.batch_norm(maps, mean, variance, norm.weight, norm.bias, training)
        maps = functional.max_pool3d(maps, (1, 2, 2)).relu()
        maps = maps if following is None else functional.conv3d(maps, following.weight, following.bias, padding=1)
    largest = maps.flatten(-2).max(dim=-1).values.transpose(1, 2)  # (P, T, U)
    offsets: Tensor = 0.75 * network.out(network.hidden(largest).relu()).tanh()
    return offsets


def plain_mask(x: float, y: float, grid: tuple[int, int]) -> Tensor:
    """The normalised mask of one offset, point by point, averaged over the perturbations."""

    def weight(place: int, size: int, offset: float) -> float:
        distance = abs(-1 + 2 * place / (size - 1) + offset)
        return 1.0 if distance < 1 else max(0.0, 1 - (distance - 1) * (size - 1) / 2)

    height, width = grid
    total = torch.zeros(grid, dtype=torch.float64)
    for right, down in [(i, j) for i in (-0.2, 0.0, 0.2) for j in (-0.2, 0.0, 0.2)]:
        rows = [
            [weight(i, height, y + down) * weight(j, width, x + right) for j in range(width)] for i in range(height)
        ]
        mask = torch.tensor(rows, dtype=torch.float64)
        total += mask / mask.sum() / 9
    return total


def plain_coordination(
    stage: ActionCoordination, support: Tensor, query: Tensor, training: bool
) -> tuple[Tensor, Tensor]:
    """Stage 2 of classes (N, C, T, H, W) and queries (M, C, T, H, W), with every pair built: pooled (N, M, 2C, T), offsets."""
    num_classes, num_queries, steps = len(support), len(query), support.shape[2]

    def mapped(layer: nn.Linear, cubes: Tensor) -> Tensor:
        frames: Tensor = layer(cubes.mean(dim=(-2, -1)).transpose(1, 2))  # (V, T, C)
        return frames

    aligned, beside = [], []
    for n in range(num_classes):
        for m in range(num_queries):
            keys, wanted = mapped(stage.key, support)[n], mapped(stage.query, query)[m]
            attention = (keys @ wanted.T / math.sqrt(keys.shape[-1])).softmax(dim=-1)
            shift = attention @ mapped(stage.value, query)[m]
            aligned.append(query[m] + shift.T[:, :, None, None])
            beside.append(support[n] + mapped(stage.value, support)[n].T[:, :, None, None])
    pairs = torch.cat([torch.stack(beside), torch.stack(aligned)], dim=1)  # (NM, 2C, T, H, W)
    offsets = plain_network(stage, pairs, training)
    grid = (support.shape[-2], support.shape[-1])
    pooled = []
    for index, (left, right) in enumerate(zip(beside, aligned, strict=True)):
        per_step = []
        for t in range(steps):
            x, y = offsets[index, t].tolist()
            there, back = plain_mask(x, y, grid), plain_mask(-x, -y, grid)
            per_step.append(torch.cat([(left[:, t] * there).sum((-2, -1)), (right[:, t] * back).sum((-2, -1))]))
        pooled.append(torch.stack(per_step, dim=1))
    return torch.stack(pooled).reshape(num_classes, num_queries, -1, steps), offsets


def coordinated(stage: ActionCoordination, support: Tensor, query: Tensor) -> Coordinated:
    found = stage(support[None], query[None], perturb=True)
    assert isinstance(found, Coordinated)
    return found


def joined(pair: Coordinated) -> Tensor:
    return torch.cat([pair.support, pair.query], dim=-1)[0].transpose(-1, -2)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("is_factored", [True, False], ids=["factored", "published"])
@pytest.mark.parametrize("grid", [(4, 4, 4), (5, 4, 6), (8, 7, 7), (4, 9, 5)], ids=str)
def test_coordination_is_its_plain_form_on_every_pair(
    grid: tuple[int, int, int], is_factored: bool, training: bool
) -> None:
    head = ta2n_head((5, *grid), factored=is_factored).train(training)
    stage = head.alignment.coordination
    source = torch.Generator().manual_seed(5)
    support, query = (torch.randn(count, 5, *grid, generator=source, dtype=torch.float64) for count in (3, 2))
    pair = coordinated(stage, support, query)
    pooled, offsets = plain_coordination(stage, support, query, training)
    torch.testing.assert_close(pair.offsets[0].flatten(0, 1), offsets, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(joined(pair), pooled, rtol=1e-10, atol=1e-12)


def test_split_convolution_has_the_gradients_of_the_published_one() -> None:
    gradients = {}
    for is_factored in (True, False):
        head = ta2n_head(factored=is_factored).train()
        torch.autograd.backward(head(batch()).losses["few_shot"].sum())
        gradients[is_factored] = {name: parameter.grad for name, parameter in head.named_parameters()}
    assert gradients[True]["alignment.coordination.network.first.weight"] is not None
    for name, expected in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], expected, rtol=1e-8, atol=1e-12, msg=name)


def test_split_convolution_costs_what_the_reference_counts() -> None:
    macs = {}
    for is_factored in (True, False):
        head = TA2NHead(TA2NOptions(factored=is_factored), HeadInputs((8, 8, 7, 7)))
        stage = ActionCoordination(2048, (128, 128, 64), is_factored=is_factored, generator=None).to("meta")
        classes, queries = (torch.zeros(1, count, 2048, 8, 7, 7, device="meta") for count in (5, 25))
        shift = torch.zeros(1, 5, 25, 8, 2048, device="meta")
        first = stage._first_of_parts if head.config.factored else stage._first_of_pairs
        with FlopCounterMode(display=False) as counter:
            first(classes, queries, shift)
        macs[is_factored] = counter.get_total_flops() / 2
    # 5 supports and 25 queries of the published size (reference 12.6), in multiply-accumulates.
    assert macs[False] == pytest.approx(693.6e9, rel=0.01)
    assert macs[True] == pytest.approx(90.3e9, rel=0.01)


@pytest.mark.parametrize("steps", [4, 5, 8])
def test_warp_reads_like_a_sampling_grid_with_zeros_outside(steps: int) -> None:
    source = torch.Generator().manual_seed(1)
    cubes = torch.randn(6, 3, steps, 2, 4, generator=source, dtype=torch.float64, requires_grad=True)
    warp = torch.randn(6, 2, generator=source, dtype=torch.float64)
    # The identity, as a head starts (a time step is met exactly where T is odd), and one that leaves the clip.
    warp[:3] = torch.tensor([[1.0, 0.0], [math.tanh(2.0), 0.0], [1.0, 1.7]], dtype=torch.float64)
    warp.requires_grad_()
    time = warp[:, :1] * torch.linspace(-1, 1, steps, dtype=torch.float64) + warp[:, 1:]  # (V, T)
    # As an image of time by places, read in the middle of each place's column.
    places = torch.linspace(-1, 1, 8, dtype=torch.float64)
    where = torch.stack([places.expand(6, steps, 8), time[:, :, None].expand(6, steps, 8)], dim=-1)
    expected = functional.grid_sample(cubes.flatten(-2), where, padding_mode="zeros", align_corners=True)
    found = warp_time(cubes, warp)
    torch.testing.assert_close(found.flatten(-2), expected, rtol=1e-9, atol=1e-9)
    probe = torch.randn(found.shape, generator=source, dtype=torch.float64)
    ours = torch.autograd.grad((found * probe).sum(), [cubes, warp], retain_graph=True)
    theirs = torch.autograd.grad((expected.reshape(probe.shape) * probe).sum(), [cubes, warp])
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-8, atol=1e-8)
    # At the clip's first and last time step the two sides differ, so that the identity's slope is not comparable.
    torch.testing.assert_close(ours[1][1:], theirs[1][1:], rtol=1e-6, atol=1e-6)


def test_head_starts_with_a_slight_zoom_and_centred_regions() -> None:
    head = build_head("ta2n", {}, (3, 8, 7, 7), None, True, torch.Generator().manual_seed(0)).double().eval()
    with torch.no_grad():
        maps = head(make_batch(cube_shape=(3, 8, 7, 7)), with_maps=True).maps
    zoom = torch.tensor([math.tanh(2.0), 0.0], dtype=torch.float64)
    for name in ("warp_support", "warp_query"):
        torch.testing.assert_close(maps[name], zoom.expand_as(maps[name]))
    assert not maps["offset"].any()
    # Reference 13.10.
    for name in ("mask_support", "mask_query"):
        assert float(maps[name][0, 0, 0, 0, 3, 3]) == pytest.approx(0.02304, abs=5e-6)
        assert float(maps[name][0, 0, 0, 0, 0, 0]) == pytest.approx(0.01453, abs=5e-6)


def test_first_weights_come_from_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = (build_head("ta2n", {}, SHAPE, None, True, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def plain_prototypes(head: TA2NHead, shots: list[Tensor]) -> Tensor:
    """Fusion of warped shots, one list entry (K, C, T, H, W) per class, shot by shot."""
    fusion = head.alignment.fusion
    prototypes = []
    for each in shots:
        reference = fusion.query(each[0].mean(dim=(-2, -1)).T)  # (T, C)
        laid = []
        for shot in each:
            attention = (reference @ fusion.key(shot.mean(dim=(-2, -1)).T).T / math.sqrt(SHAPE[0])).softmax(dim=-1)
            values = torch.einsum("oc,cshw->oshw", fusion.value.weight, shot)
            laid.append(torch.einsum("ts,oshw->othw", attention, values))
        prototypes.append(torch.stack(laid).mean(dim=0))
    return torch.stack(prototypes)


def uneven(given: EpisodeBatch) -> EpisodeBatch:
    """The episodes with a second and third shot of class 0 and a second one of class 2, other classes with one."""
    extra = make_batch(cube_shape=SHAPE, num_episodes=given.num_episodes, n_way=3, seed=8).support[:, :3]
    labels = torch.tensor([0, 2, 0]).expand(given.num_episodes, 3)
    assert given.support_order is not None
    return replace(
        given,
        support=torch.cat([extra, given.support], dim=1),
        support_labels=torch.cat([labels, given.support_labels], dim=1),
        support_order=torch.cat([labels * 0 + torch.tensor([10, 11, 12]), given.support_order], dim=1),
    )


def test_unequal_shots_are_fused_shot_by_shot_on_the_first_by_id() -> None:
    head, episode = ta2n_head().eval(), uneven(batch(num_episodes=1, k_shot=1))
    warp = head.alignment.temporal
    # The extra shots have the last ids, so that the episode's own first shots are the references.
    order = [[index for index in (3, 4, 5, 0, 1, 2) if int(episode.support_labels[0, index]) == n] for n in range(3)]
    assert [len(shots) for shots in order] == [3, 1, 2]
    warped = warp(episode.support).cubes[0]
    prototypes = plain_prototypes(head, [warped[shots] for shots in order])
    queries = torch.einsum("oc,qcthw->qothw", head.alignment.fusion.value.weight, warp(episode.query).cubes[0])
    pair = coordinated(head.alignment.coordination, prototypes, queries)
    distance = (1 - functional.cosine_similarity(pair.support, pair.query, dim=-1)).sum(dim=-1)
    torch.testing.assert_close(head(episode).logits, -distance.transpose(1, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_single_shots_beside_an_episode_of_several_stay_as_they_are(training: bool) -> None:
    single = batch(num_episodes=1, k_shot=1)
    several = uneven(single)
    # The same episode with three rows of padding.
    padded = replace(several, support_labels=torch.cat([torch.full((1, 3), -1), single.support_labels], dim=1))
    both = [torch.cat([getattr(each, name) for each in (padded, several)]) for name in ("support", "support_labels")]
    together = replace(
        several,
        support=both[0],
        support_labels=both[1],
        query=several.query.repeat(2, *[1] * 5),
        query_labels=None,
        class_global_labels=None,
        seeds=None,
        support_order=None if several.support_order is None else several.support_order.repeat(2, 1),
    )
    head = ta2n_head().train(training)
    expected = torch.cat([head(each).logits for each in (single, several)])
    torch.testing.assert_close(head(together).logits, expected, rtol=1e-9, atol=1e-9)


def test_another_first_shot_is_another_prototype() -> None:
    episodes, head = batch(), ta2n_head().eval()
    assert episodes.support_order is not None
    turned = replace(episodes, support_order=episodes.support_order.max() - episodes.support_order)
    assert not torch.allclose(head(turned).logits, head(episodes).logits)


def test_one_shot_leaves_the_fusion_without_gradient() -> None:
    head = ta2n_head().train()
    torch.autograd.backward(head(batch(k_shot=1)).losses["few_shot"].sum())
    without = {name for name, parameter in head.named_parameters() if parameter.grad is None}
    assert without == {f"alignment.fusion.{kind}.weight" for kind in ("key", "query", "value")}


def test_maps_are_in_the_order_of_the_batch() -> None:
    head, episodes = ta2n_head().eval(), batch()
    maps = head(episodes, with_maps=True).maps
    torch.testing.assert_close(maps["warp_support"], head.alignment.temporal(episodes.support).warp)
    torch.testing.assert_close(maps["warp_query"], head.alignment.temporal(episodes.query).warp)
    for name in ("mask_support", "mask_query"):
        assert maps[name].shape == (2, 4, 3, *SHAPE[1:])
        torch.testing.assert_close(maps[name].sum(dim=(-2, -1)), torch.ones(2, 4, 3, SHAPE[1], dtype=torch.float64))
    torch.testing.assert_close(maps["mask_support"], region_masks(maps["offset"], (SHAPE[2], SHAPE[3]), perturb=True))
    assert maps["offset"].shape == (2, 4, 3, SHAPE[1], 2)
    # Of each time step of the class, over those of the query.
    assert maps["class_alignment"].shape == (2, 4, 3, SHAPE[1], SHAPE[1])
    torch.testing.assert_close(maps["class_alignment"].sum(dim=-2), torch.ones(2, 4, 3, SHAPE[1], dtype=torch.float64))
    one = head(part(episodes, queries=slice(2, 3)), with_maps=True).maps
    torch.testing.assert_close(one["offset"][:, 0], maps["offset"][:, 2])


def test_alignment_alone_takes_one_episode_of_cubes() -> None:
    source = torch.Generator().manual_seed(0)
    align = TemporalSpatialAlignment((6, 8, 7, 7), (4, 4, 4), (4, 4, 4), generator=source)
    support, query = torch.rand(5, 6, 8, 7, 7, generator=source), torch.rand(3, 6, 8, 7, 7, generator=source)
    pairs, offsets = align.eval()(support, query)
    assert pairs.shape == (5, 3, 12, 8, 1, 1)
    assert offsets.shape == (15, 8, 2)
    several, _ = align(torch.cat([support, support[:1]]), query, k_shot=2)
    assert several.shape == (3, 3, 12, 8, 1, 1)
    before = align.temporal.network.first_norm.running_mean.clone()
    align.train()(support, query)
    assert not torch.equal(align.temporal.network.first_norm.running_mean, before)
    # Supports, then queries.
    assert int(align.temporal.network.first_norm.num_batches_tracked) == 2
    assert int(align.coordination.network.first_norm.num_batches_tracked) == 1
    with pytest.raises(ValueError, match="5 supports do not make classes of k_shot = 2"):
        align(support, query, k_shot=2)


def test_normalisation_counts_only_the_samples_it_is_told_to() -> None:
    source = torch.Generator().manual_seed(0)
    values = torch.randn(2, 4, 3, 2, 2, generator=source, dtype=torch.float64)
    is_counted = torch.tensor([[True, False, True, True], [False, True, True, False]])
    values[~is_counted] = 1e3
    norm, plain = EpisodeBatchNorm(3).double(), nn.BatchNorm2d(3).double()
    found, moments = norm.normalize(values, is_counted=is_counted)
    norm.update([moments])
    for episode, counted in enumerate(is_counted):
        torch.testing.assert_close(found[episode, counted], plain(values[episode, counted]))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value, msg=name)


def test_dropout_is_for_training_and_follows_the_seeds() -> None:
    head, episodes = ta2n_head(dropout=0.5), batch()
    assert episodes.seeds is not None
    unseeded = replace(episodes, seeds=None)
    torch.testing.assert_close(head.eval()(unseeded).logits, ta2n_head(dropout=0.0).eval()(episodes).logits)
    trained = head.train()(episodes).logits
    torch.testing.assert_close(head(episodes).logits, trained, rtol=0.0, atol=0.0)
    assert not torch.allclose(head(replace(episodes, seeds=episodes.seeds + 1)).logits, trained)
    with pytest.raises(ValueError, match="seeds"):
        head(unseeded)


def test_perturbations_may_be_left_out_of_evaluation_alone() -> None:
    always, training_only = ta2n_head(), ta2n_head(perturb_in_evaluation=False)
    episodes = batch()
    assert torch.equal(always.train()(episodes).logits, training_only.train()(episodes).logits)
    assert not torch.allclose(always.eval()(episodes).logits, training_only.eval()(episodes).logits)
    offsets = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    shifted = [region_masks(offsets + torch.tensor(shift), (7, 7), perturb=False) for shift in PERTURBATIONS]
    torch.testing.assert_close(region_masks(offsets, (7, 7), perturb=True), torch.stack(shifted).mean(dim=0))


def test_soft_dtw_compares_aligned_videos_where_it_is_asked_for() -> None:
    plain, warped = ta2n_head().eval(), ta2n_head(distance="soft_dtw", soft_dtw_gamma=0.3).eval()
    episodes = batch()
    shots = episodes.in_order()
    pair = plain._align(shots).coordinated
    expected = -soft_dtw(pair.support, pair.query, 0.3).transpose(1, 2)
    torch.testing.assert_close(warped(episodes).logits, expected)
    assert not torch.allclose(plain(episodes).logits, expected)


def test_soft_dtw_is_its_recursion_cell_by_cell() -> None:
    source = torch.Generator().manual_seed(2)
    first, second = (torch.randn(2, size, 3, generator=source, dtype=torch.float64) for size in (4, 6))

    def plain(one: Tensor, other: Tensor, gamma: float) -> float:
        costs = torch.zeros(len(one) + 2, len(other), dtype=torch.float64)
        costs[1:-1] = 1 - functional.cosine_similarity(one[:, None], other[None], dim=-1)
        total: dict[tuple[int, int], float] = {(-1, -1): 0.0}
        for i in range(len(one) + 2):
            for j in range(len(other)):
                ways = [total[cell] for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if cell in total]
                smallest = -gamma * math.log(sum(math.exp(-way / gamma) for way in ways))
                total[i, j] = float(costs[i, j]) + smallest
        return total[len(one) + 1, len(other) - 1]

    for gamma in (0.1, 2.0):
        expected = [(plain(x, y, gamma) + plain(y, x, gamma)) / 2 for x, y in zip(first, second, strict=True)]
        assert soft_dtw(first, second, gamma).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(5, 3, 7, 7), (5, 8, 3, 7), (5, 8, 7, 1)], ids=str)
def test_cubes_too_small_for_the_pools_are_one_plain_error(shape: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"4 or more time steps, rows and columns.*\(5, .*extract with more frames"):
        build_head("ta2n", {}, shape, None, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temporal_channels": [64, 128]}, "temporal_channels"),
        ({"offset_channels": [0, 128, 64]}, "offset_channels"),
        ({"dropout": 1.0}, "dropout"),
        ({"distance": "otam"}, "distance"),
        ({"soft_dtw_gamma": 0.5}, r'soft_dtw_gamma = 0.5 has no effect, since distance is not "soft_dtw"'),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_head("ta2n", options, (5, 4, 4, 4), None, True)
