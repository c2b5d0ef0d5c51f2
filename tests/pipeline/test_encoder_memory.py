"""A learning backbone in less memory: parts of an episode, blocks run again, half precision; and the noise of its own layers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from contracts.backbone_families import FAMILIES, family_config, tiny_vivit
from contracts.learning_ranks import SAMPLING, made_batch
from contracts.live_bytes import LiveBytes
from contracts.world import World
from extract.backbone import HALF
from extract.build import build_backbone
from extract.config import BackboneConfig, SamplingConfig
from pipeline.backbone_memory import blocks_of
from pipeline.batchnorm import BatchStatistics
from pipeline.half_precision import keep_convolutions_whole
from pipeline.model import BackboneLearning, ClipEncoder

TWO_BLOCKS = SamplingConfig(num_frames=8, resize_size=28, crop_size=24)
FAST = [pytest.param(name, marks=pytest.mark.slow) if name in ("torchvision", "r3d") else name for name in FAMILIES]


def random_clips(num_episodes: int, num_videos: int, num_frames: int = 8) -> Tensor:
    source = torch.Generator().manual_seed(11)
    return torch.randint(0, 256, (num_episodes, num_videos, num_frames, 24, 24, 3), generator=source, dtype=torch.uint8)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return build_backbone(
        BackboneConfig(name="small3d", weights="random:3", options={"width": 4, "depth": 3}), TWO_BLOCKS
    )


@dataclass(frozen=True, slots=True)
class Learnt:
    """What one forward and backward pass gives."""

    cubes: Tensor
    gradients: dict[str, Tensor]
    statistics: dict[str, Tensor]
    kept_bytes: int
    peak_bytes: int


def learnt(
    backbone: nn.Module, clips: Tensor, learning: BackboneLearning, num_supports: int = 2, seeds: Tensor | None = None
) -> Learnt:
    encoder = ClipEncoder(deepcopy(backbone), TWO_BLOCKS, learning=learning).train()
    with LiveBytes() as live:
        cubes = encoder(clips, num_supports, seeds)
        kept = live.now
        (cubes * torch.linspace(-1, 1, cubes.numel()).reshape(cubes.shape)).sum().backward()
    gradients = {name: each.grad for name, each in encoder.backbone.named_parameters() if each.grad is not None}
    return Learnt(cubes.detach(), gradients, dict(encoder.backbone.named_buffers()), kept, live.peak)


def gradient_errors(found: Learnt, expected: Learnt, floor: float) -> dict[str, float]:
    """Relative distance per parameter. A share of the largest gradient counts with each, since some are zero but for rounding (of a
    bias before softmax)."""
    assert found.gradients.keys() == expected.gradients.keys()
    least = floor * max(float(gradient.norm()) for gradient in expected.gradients.values())
    return {
        name: float((found.gradients[name] - gradient).norm() / (gradient.norm() + least))
        for name, gradient in expected.gradients.items()
    }


def assert_same(found: Learnt, expected: Learnt) -> None:
    # Convolutions of fewer clips, and gradients added up part by part: another order of float32 sums.
    torch.testing.assert_close(found.cubes, expected.cubes, rtol=1e-5, atol=1e-5)
    for name, error in gradient_errors(found, expected, floor=1e-6).items():
        assert error < 1e-5, (name, error)
    for name, value in expected.statistics.items():
        torch.testing.assert_close(found.statistics[name], value, msg=name)


@pytest.mark.parametrize("family", FAST)
def test_parts_and_blocks_change_no_number_of_any_family(world: World, tmp_path: Path, family: str) -> None:
    config = family_config(world, family, tmp_path)
    backbone = build_backbone(config.backbone, config.sampling)
    clips = random_clips(1, 3)
    frozen = learnt(backbone, clips, BackboneLearning())
    for learning in (
        BackboneLearning(clips_per_forward=2),
        BackboneLearning(clips_per_forward=1, gradient_checkpointing=True),
    ):
        parts = learnt(backbone, clips, learning)
        assert_same(parts, frozen)
        assert parts.kept_bytes < 0.1 * frozen.kept_bytes
    batch, again = (
        learnt(backbone, clips, BackboneLearning(batchnorm="episode", gradient_checkpointing=is_on))
        for is_on in (False, True)
    )
    assert torch.equal(again.cubes, batch.cubes)
    # The same kernels run twice on the same numbers.
    assert max(gradient_errors(again, batch, floor=1e-6).values()) == 0.0
    assert all(torch.equal(again.statistics[name], value) for name, value in batch.statistics.items())
    assert again.kept_bytes < 0.9 * batch.kept_bytes
    if family != "vivit":
        assert not torch.equal(batch.cubes, frozen.cubes)


def test_one_part_is_in_memory_at_a_time(small: nn.Module) -> None:
    def peak(num_clips: int, clips_per_forward: int | None) -> int:
        return learnt(
            small, random_clips(1, num_clips), BackboneLearning(clips_per_forward=clips_per_forward)
        ).peak_bytes

    assert peak(8, None) > 2.5 * peak(2, None)
    assert peak(8, 2) < 1.5 * peak(2, None)
    assert peak(8, 1) < 1.1 * peak(4, 1)


def test_parts_of_several_episodes_are_in_memory_one_at_a_time(small: nn.Module) -> None:
    for num_supports in (0, 2):
        one, three = (
            learnt(small, random_clips(number, 2), BackboneLearning(clips_per_forward=2), num_supports)
            for number in (1, 3)
        )
        assert three.peak_bytes < 1.5 * one.peak_bytes


def test_blocks_run_again_keep_less(small: nn.Module) -> None:
    clips = random_clips(2, 3)
    policies: tuple[BatchStatistics, ...] = ("frozen", "episode", "supports_then_queries", "synchronised")
    for policy in policies:
        kept, again = (
            learnt(small, clips, BackboneLearning(batchnorm=policy, gradient_checkpointing=is_on))
            for is_on in (False, True)
        )
        assert_same(again, kept)
        assert again.kept_bytes < 0.5 * kept.kept_bytes


@pytest.mark.parametrize(
    ("name", "blocks"), [("r3d18", 8), ("tv_r2plus1d_18", 9), ("tv_mc3_18", 9), ("tsn_resnet18", 8), ("small3d", 3)]
)
def test_blocks_are_the_residual_blocks_and_the_stem_where_it_is_one_module(name: str, blocks: int) -> None:
    backbone = build_backbone(BackboneConfig(name=name, weights="random:0"), TWO_BLOCKS)
    found = blocks_of(backbone)
    assert len(found) == blocks
    assert sum(type(block).__name__ in ("BasicBlock", "ResidualBlock") for block in found) == blocks - (blocks % 2)
    names = list(backbone.state_dict())
    ClipEncoder(backbone, TWO_BLOCKS, learning=BackboneLearning(gradient_checkpointing=True))
    assert list(backbone.state_dict()) == names


def test_a_network_without_blocks_is_told_so() -> None:
    with pytest.raises(ValueError, match="Sequential has no blocks"):
        ClipEncoder(
            nn.Sequential(nn.Conv3d(3, 4, 1)), TWO_BLOCKS, learning=BackboneLearning(gradient_checkpointing=True)
        )


def test_a_copy_runs_its_own_blocks(small: nn.Module) -> None:
    # The moving average of the weights is such a copy.
    learning = BackboneLearning(gradient_checkpointing=True, compute_dtype="bfloat16")
    encoder = ClipEncoder(deepcopy(small), TWO_BLOCKS, learning=learning).train()
    copy = deepcopy(encoder)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False).zero_()
    copy(random_clips(1, 2), 1).sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in copy.parameters())


class Noisy(nn.Module):
    """Two blocks with dropout; draws on the device's global generator, as torch's layers do."""

    preprocessing = HALF

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(NoisyBlock() for _ in range(2))

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            frames = block(frames)
        return {"cube": frames}


class NoisyBlock(nn.Module):
    """A convolution, then dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 3, 1)
        self.dropout = nn.Dropout(0.4)

    def forward(self, frames: Tensor) -> Tensor:
        dropped: Tensor = self.dropout(self.conv(frames))
        return dropped


@pytest.fixture(scope="module")
def noisy() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Noisy()


def test_noise_of_an_episode_comes_from_its_seed_alone(noisy: nn.Module) -> None:
    clips = random_clips(1, 3).expand(3, -1, -1, -1, -1, -1)
    encoder = ClipEncoder(deepcopy(noisy), TWO_BLOCKS).train()
    seeds = torch.tensor([5, 6, 5])
    state = torch.get_rng_state()
    first, other, same = encoder(clips, 2, seeds)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    torch.rand(3)
    assert torch.equal(encoder(clips[1:2], 2, seeds[1:2])[0], other)
    # Not the numbers that a head draws from the same seed.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        assert not torch.equal(encoder._cubes(clips[0]), first)
    assert torch.equal(encoder.eval()(clips[:1]), encoder(clips[1:2]))


def test_noise_without_seeds_is_refused(noisy: nn.Module) -> None:
    encoder = ClipEncoder(deepcopy(noisy), TWO_BLOCKS).train()
    with pytest.raises(ValueError, match=r"drew random numbers .* EpisodeBatch.seeds"):
        encoder(random_clips(1, 2), 1)
    encoder.eval()(random_clips(1, 2), 1)


def test_what_is_run_again_sees_the_same_noise(noisy: nn.Module) -> None:
    clips, seeds = random_clips(2, 3), torch.tensor([3, 4])
    kept = learnt(noisy, clips, BackboneLearning(), seeds=seeds)
    assert_same(learnt(noisy, clips, BackboneLearning(gradient_checkpointing=True), seeds=seeds), kept)
    assert_same(learnt(noisy, clips, BackboneLearning(clips_per_forward=3), seeds=seeds), kept)


def test_parts_of_an_episode_would_draw_other_noise_so_they_are_refused(noisy: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"clips_per_forward = 2: .*gradient_checkpointing, which changes no result"):
        learnt(noisy, random_clips(2, 3), BackboneLearning(clips_per_forward=2), seeds=torch.tensor([3, 4]))


def test_dropout_of_a_transformer_is_seeded_too(tmp_path: Path) -> None:
    folder = tiny_vivit(tmp_path / "vivit", hidden_dropout_prob=0.3, num_hidden_layers=2)
    backbone = build_backbone(BackboneConfig(name="vivit", weights=str(folder)), TWO_BLOCKS)
    clips, seeds = random_clips(1, 2), torch.tensor([3])
    kept, again = (
        learnt(backbone, clips, BackboneLearning(gradient_checkpointing=is_on), seeds=seeds) for is_on in (False, True)
    )
    assert_same(again, kept)
    other = learnt(backbone, clips, BackboneLearning(), seeds=seeds + 1)
    assert not torch.equal(other.cubes, kept.cubes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAST)
def test_gradients_in_half_precision_are_those_of_float32(
    world: World, tmp_path: Path, family: str, dtype: str
) -> None:
    config = family_config(world, family, tmp_path)
    backbone = build_backbone(config.backbone, config.sampling)
    whole, half = (
        learnt(backbone, random_clips(1, 2), BackboneLearning(compute_dtype=name, gradient_checkpointing=True))
        for name in ("float32", dtype)
    )
    # 8 and 11 bits through 18 layers of random weights. Where kernels are wrong, some gradient is off by its own size.
    for name, error in gradient_errors(half, whole, floor=1e-3).items():
        assert error < 0.25, (name, error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolutions_learn_rightly_in_half_precision_on_few_pixels(dtype: torch.dtype) -> None:
    # Here torch 2.15's own bfloat16 weight gradients are wrong, infinite or damage the heap.
    source = torch.Generator().manual_seed(0)
    for kernel, stride, size in ((3, 1, (2, 3, 3)), (7, 2, (3, 4, 4)), (3, 2, (4, 1, 1)), (3, 2, (1, 1))):
        kind = nn.Conv3d if len(size) == 3 else nn.Conv2d
        layer = kind(16, 16, kernel, stride, kernel // 2, bias=False)
        values = torch.randn(3, 16, *size, generator=source, requires_grad=True)
        expected = layer(values)
        weights = torch.randn(expected.shape, generator=source)
        wanted = torch.autograd.grad((expected * weights).sum(), (values, layer.weight))
        keep_convolutions_whole(layer)
        with torch.autocast("cpu", dtype=dtype):
            found = layer(values)
        assert found.dtype == dtype
        given = torch.autograd.grad((found.float() * weights).sum(), (values, layer.weight))
        for ours, theirs in zip(given, wanted, strict=True):
            # The gradient that comes in has 8 bits.
            assert float((ours - theirs).norm()) < 0.01 * float(theirs.norm())


def test_number_format_of_learning_leaves_evaluation_alone(small: nn.Module) -> None:
    clips = random_clips(1, 4)
    for stored in ("float32", "bfloat16"):
        plain = ClipEncoder(deepcopy(small), TWO_BLOCKS, compute_dtype=stored, is_trained=False)
        learning = BackboneLearning(compute_dtype="bfloat16", gradient_checkpointing=True)
        encoder = ClipEncoder(deepcopy(small), TWO_BLOCKS, compute_dtype=stored, learning=learning)
        assert torch.equal(encoder.eval()(clips, 2), plain(clips))


def test_clips_of_classification_pass_at_once(small: nn.Module) -> None:
    batch = made_batch(3)
    clips = batch.query[:, :1]
    sizes: list[int] = []
    for policy in ("frozen", "synchronised"):
        encoder = ClipEncoder(deepcopy(small), SAMPLING, learning=BackboneLearning(batchnorm=policy)).train()
        handle = encoder.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        assert encoder(clips, 0, batch.seeds).shape[:2] == (3, 1)
        handle.remove()
    assert sizes == [3, 3]
