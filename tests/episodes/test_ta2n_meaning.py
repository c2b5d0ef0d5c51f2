"""What TA2N's two stages are for, on synthetic cubes whose best possible result is known.

Stage 1: an action begins at another time in each video. After a short training the warp must follow the planted shift. Best
possible: it moves by exactly the shift, so that no spread of onsets is left; untrained, it does not move at all.

Stage 2: with hand-set weights the attention between frames must pick the frame that was shifted away, and the offset must choose
the region in which class and query agree.
"""

# E episodes, S supports, Q queries, N classes, V videos; C channels, T time steps, H W grid

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs
from episodes.heads.ta2n import TA2NHead, TA2NOptions

CHANNELS, STEPS, SIDE = 8, 8, 4
LARGEST_SHIFT = 2.0
"""Time steps."""
NUM_MOVES = 4
"""Movements of an action, one after the other; classes differ in which channels they light, and in what order."""


@dataclass(frozen=True, slots=True)
class ShiftedEpisodes:
    """Episodes of actions with their planted onsets."""

    batch: EpisodeBatch
    support_shift: Tensor
    """(E, S) time steps."""
    query_shift: Tensor
    """(E, Q) time steps."""


def actions(moves: Tensor, shifts: Tensor, source: torch.Generator) -> Tensor:
    """Videos of actions: moves (..., M) channels, shifts (...) time steps, to cubes (..., C, T, H, W)."""
    time = torch.arange(STEPS) - shifts[..., None]  # (..., T)
    frames = torch.zeros(*shifts.shape, STEPS, CHANNELS)
    for place in range(NUM_MOVES):
        light = torch.exp(-0.5 * ((time - 2.0 - 1.2 * place) / 0.6).square())
        frames.scatter_add_(-1, moves[..., None, place, None].expand(*time.shape, 1), light[..., None])
    cubes = frames.transpose(-1, -2)[..., None, None].expand(*shifts.shape, CHANNELS, STEPS, SIDE, SIDE)
    return cubes + 0.05 * torch.randn(cubes.shape, generator=source)


def shifted_episodes(classes: Tensor, seed: int, num_episodes: int) -> ShiftedEpisodes:
    """Three-way one-shot episodes over classes (each a row of moves), every video with a shift of its own."""
    source = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(len(classes), generator=source)[:3] for _ in range(num_episodes)])
    labels = torch.arange(3).expand(num_episodes, 3), torch.randint(3, (num_episodes, 6), generator=source)
    shifts = [(2.0 * torch.rand(each.shape, generator=source) - 1.0) * LARGEST_SHIFT for each in labels]
    support, query = (
        actions(classes[drawn.gather(1, label)], shift, source) for label, shift in zip(labels, shifts, strict=True)
    )
    batch = EpisodeBatch(support, labels[0], query, labels[1], 3, seeds=torch.arange(num_episodes))
    return ShiftedEpisodes(batch, *shifts)


def head_without_second_stage() -> TA2NHead:
    """Only stage 1 may align: stage 2 attends to nothing, and its offsets stay at 0."""
    options = TA2NOptions(dropout=0.0, temporal_channels=(16, 32, 16), offset_channels=(1, 1, 1))
    inputs = HeadInputs((CHANNELS, STEPS, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    head = TA2NHead(options, inputs)
    torch.nn.init.zeros_(head.alignment.coordination.value.weight)
    return head


def followed(head: TA2NHead, episodes: ShiftedEpisodes) -> tuple[Tensor, Tensor]:
    """Planted shift of every video, and the shift of its warp, in time steps; (V,) each."""
    with torch.no_grad():
        maps = head.eval()(episodes.batch, with_maps=True).maps
    warps = torch.cat([maps["warp_support"].flatten(0, 1), maps["warp_query"].flatten(0, 1)])
    planted = torch.cat([episodes.support_shift.flatten(), episodes.query_shift.flatten()])
    return planted, warps[:, 1] * ((STEPS - 1) / 2)


def test_warp_recovers_a_planted_onset() -> None:
    classes = torch.stack([torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(i)) for i in range(66)])
    known, unseen = classes[:60, :NUM_MOVES], classes[60:, :NUM_MOVES]
    head = head_without_second_stage()
    held_out = shifted_episodes(unseen, 10_000, 24)
    assert held_out.batch.query_labels is not None
    planted, untrained = followed(head, held_out)
    assert not untrained.any()
    # Labels of classes are all that it learns from: no shift is ever shown.
    optimizer = torch.optim.Adam(head.alignment.temporal.parameters(), lr=0.001)
    for step in range(100):
        loss = head.train()(shifted_episodes(known, step, 8).batch).losses["few_shot"].mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    _, recovered = followed(head, held_out)
    correlation = float(torch.corrcoef(torch.stack([planted, recovered]))[0, 1])
    slope = float(torch.cov(torch.stack([planted, recovered]))[0, 1] / planted.var())
    left = float((planted - recovered).std() / planted.std())
    report = f"correlation {correlation:.3f}, slope {slope:.3f}, spread left {left:.3f}"
    # On classes never trained on. Best possible: 1, 1 and 0; a warp that ignores the shift has 0, 0 and 1. Over other first weights
    # and episodes we saw correlations of 0.97 and more, slopes of 0.93 to 1.05, and 0.25 or less left.
    assert correlation > 0.95, report
    assert 0.85 < slope < 1.15, report
    assert left < 0.35, report


def test_attention_picks_the_frame_that_was_shifted_away() -> None:
    shift = 2
    support = torch.eye(STEPS)[:, :, None, None].expand(CHANNELS, STEPS, SIDE, SIDE)
    # The query shows each frame two time steps later.
    query = support.roll(shift, dims=1)
    head = head_without_second_stage().eval()
    stage = head.alignment.coordination
    with torch.no_grad():
        without = stage(support[None, None], query[None, None], perturb=True)
        for layer, scale in ((stage.key, 8.0), (stage.query, 8.0), (stage.value, 4.0)):
            layer.weight.copy_(scale * torch.eye(CHANNELS))
        found = stage(support[None, None], query[None, None], perturb=True)
    attention = found.attention[0, 0, 0]
    expected = (torch.arange(STEPS) + shift) % STEPS
    assert torch.equal(attention.argmax(dim=-1), expected)
    assert float(attention.gather(1, expected[:, None]).min()) > 0.99
    cosines = [torch.nn.functional.cosine_similarity(each.support, each.query, dim=-1) for each in (without, found)]
    # Frame t of the class is e_t, of the query e_(t - 2): orthogonal. With 4 e_t added to both: 20 / (5 * sqrt(17)).
    torch.testing.assert_close(cosines[0], torch.zeros_like(cosines[0]), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(cosines[1], torch.full_like(cosines[1], 20 / (5 * math.sqrt(17))), rtol=0.0, atol=1e-3)


def test_offset_chooses_the_region_in_which_class_and_query_agree() -> None:
    """The actor is on the left in the class and on the right in the query, before different backgrounds."""
    side = 8
    support, query = (torch.zeros(CHANNELS, STEPS, side, side) for _ in range(2))
    support[0, ..., :4], support[1, ..., 4:] = 1.0, 1.0
    query[0, ..., 4:], query[2, ..., :4] = 1.0, 1.0
    head = head_without_second_stage().eval()
    stage = head.alignment.coordination
    cosines = {}
    with torch.no_grad():
        for offset in (-0.7, 0.0, 0.7):
            stage.network.out.bias.copy_(torch.tensor([math.atanh(offset / 0.75), 0.0]))
            pair = stage(support[None, None], query[None, None], perturb=True)
            cosines[offset] = float(torch.nn.functional.cosine_similarity(pair.support, pair.query, dim=-1).mean())
    # With a share p of the weight on the actor the cosine is p² / (p² + (1 - p)²): 1/2 without offset. The window is as wide as the
    # frame, so that moved by 0.7 about a quarter of it is still background: 0.9 towards the actors, 0.1 away from them.
    assert 0.45 < cosines[0.0] < 0.55
    assert cosines[0.7] > 0.8
    assert cosines[-0.7] < 0.2
