"""Mixed clips: what torchvision does to them, from seeds of ours."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.training import ClassifyConfig
from pipeline.classify_model import Mixing

CLIPS, CLASSES = 6, 4
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def clips() -> Tensor:
    """Noise that differs between frames, (E, F, H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (CLIPS, 3, 16, 12, 3), dtype=torch.uint8, generator=generator)


def seeds(first: int) -> Tensor:
    return torch.arange(first, first + CLIPS)


def test_mixup_adds_a_share_of_the_neighbour_to_every_frame_and_to_the_target() -> None:
    mixing = Mixing(ClassifyConfig(mixup_alpha=0.8), CLASSES)
    shares = set()
    for first in range(5):
        mixed, targets = mixing(clips(), LABELS, seeds(first))
        own = targets[1, 1]  # of clip 1, which is of class 1, beside clip 0 of class 0
        shares.add(float(own))
        assert mixed.dtype == torch.uint8
        expected = own * clips().float() + (1 - own) * clips().roll(1, 0).float()
        # Half a grey level is lost in rounding back to bytes.
        torch.testing.assert_close(mixed.float(), expected, rtol=0, atol=0.5 + 1e-3)
        one_hot = torch.eye(CLASSES)[LABELS]
        torch.testing.assert_close(targets, own * one_hot + (1 - own) * one_hot.roll(1, 0))
    assert len(shares) == 5


def test_cutmix_pastes_the_same_box_of_the_neighbour_into_every_frame() -> None:
    mixing = Mixing(ClassifyConfig(cutmix_alpha=1.0), CLASSES)
    mixed, targets = mixing(clips(), LABELS, seeds(0))
    is_pasted = (mixed != clips()).any(dim=-1).any(dim=0).any(dim=0)  # (H, W), over clips and frames
    rows, columns = is_pasted.any(dim=1).nonzero()[:, 0], is_pasted.any(dim=0).nonzero()[:, 0]
    box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    assert torch.equal(mixed[:, :, *box], clips().roll(1, 0)[:, :, *box])
    area = is_pasted[box].numel() / is_pasted.numel()
    assert 0 < area < 1
    torch.testing.assert_close(targets[1, 0], torch.tensor(area))
    expected = clips()
    expected[:, :, *box] = clips().roll(1, 0)[:, :, *box]
    assert torch.equal(mixed, expected)


def test_with_both_each_pass_draws_one_of_them() -> None:
    mixing = Mixing(ClassifyConfig(mixup_alpha=0.8, cutmix_alpha=1.0), CLASSES)
    # Pixels of cutmix are all of one clip or the other.
    was_cut = set()
    for first in range(12):
        mixed = mixing(clips(), LABELS, seeds(first))[0]
        was_cut.add(bool(((mixed == clips()) | (mixed == clips().roll(1, 0))).all()))
    assert was_cut == {False, True}


@pytest.mark.parametrize(
    "options", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}]
)
def test_what_is_drawn_depends_on_the_seeds_alone_and_leaves_the_global_generator_as_it_was(
    options: dict[str, Any],
) -> None:
    mixing = Mixing(ClassifyConfig(**options), CLASSES)
    expected = [mixing(clips(), LABELS, seeds(first)) for first in range(8)]
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda first: mixing(clips(), LABELS, seeds(first)), range(8)))
    assert torch.equal(torch.get_rng_state(), before)
    for (mixed, targets), (mixed_again, targets_again) in zip(expected, again, strict=True):
        assert torch.equal(mixed, mixed_again)
        assert torch.equal(targets, targets_again)
    assert len({tuple(targets.flatten().tolist()) for _, targets in expected}) > 1
