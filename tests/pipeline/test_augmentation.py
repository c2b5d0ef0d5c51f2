"""Augmentation: what happens to a clip depends on the seed, its video, its view and its episode, and on nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from configs.load import ConfigError
from configs.training import AugmentationConfig
from contracts.world import World
from episodes.sampler import draw_views
from pipeline.augmentation import Augmentation
from pipeline.batches import TrainingBatches
from pipeline.classify import clip_sampler
from pipeline.extraction import video_sources
from pipeline.own_draws import OwnDraws
from pipeline.setup import global_index, make_sampler
from pipeline.sources import LiveClips, assemble
from pipeline.train_command import warn_of_one_view

SIDE = 24
KEYS = [("a", 1, 0), ("b", 2, 0), ("a", 3, 1), ("c", 1, 4), ("c", 0, 4), ("b", 7, 9)]
"""Video, view and episode."""
OPERATIONS: dict[str, dict[str, Any]] = {
    "colours": {"color_jitter": 0.4},
    "rand_augment": {"rand_augment": 2, "rand_augment_magnitude": 12},
    "crop": {"crop_scale": (0.3, 0.9)},
    "erasing": {"erasing_probability": 1.0},
    "all": {"color_jitter": 0.4, "rand_augment": 2, "crop_scale": (0.3, 0.9), "erasing_probability": 0.5},
}


def augmentation(name: str = "all", seed: int = 5) -> Augmentation:
    return Augmentation(AugmentationConfig(**OPERATIONS[name]), seed, SIDE)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """(6, 3, 24, 24, 3): clips of three equal frames, smooth enough for every operation to show."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((6, 3, 6, 6), generator=generator)
    frames = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear").permute(0, 2, 3, 1)
    return (frames * 255).to(torch.uint8)[:, None].expand(-1, 3, -1, -1, -1).contiguous()


@pytest.mark.parametrize("name", OPERATIONS)
def test_clips_keep_their_shape_and_each_gets_draws_of_its_own(clips: Tensor, name: str) -> None:
    before = clips.clone()
    found = augmentation(name)(clips, KEYS)
    assert torch.equal(clips, before)
    assert (found.shape, found.dtype) == (clips.shape, torch.uint8)
    assert torch.equal(found[4], clips[4])  # view 0
    assert sum(not torch.equal(found[place], clips[place]) for place in (0, 1, 2, 3, 5)) >= 4
    same = augmentation(name)(clips[:1].expand(6, -1, -1, -1, -1), KEYS)
    assert len({clip.numpy().tobytes() for clip in same}) >= 5


@pytest.mark.parametrize("name", OPERATIONS)
def test_all_frames_of_a_clip_are_changed_alike(clips: Tensor, name: str) -> None:
    found = augmentation(name)(clips, KEYS)
    assert torch.equal(found, found[:, :1].expand_as(found))


@pytest.mark.parametrize("name", OPERATIONS)
def test_clip_does_not_depend_on_what_else_goes_on(clips: Tensor, name: str) -> None:
    together = augmentation(name)(clips, KEYS)
    for place in (5, 2, 0):
        torch.manual_seed(place)
        alone = augmentation(name)(clips[place : place + 1], KEYS[place : place + 1])
        assert torch.equal(alone[0], together[place])


def test_seed_video_view_and_episode_each_decide(clips: Tensor) -> None:
    clip = clips[:1]
    found = {
        augmentation(seed=seed)(clip, [(video_id, view, episode)]).numpy().tobytes()
        for seed in (0, 1)
        for video_id in ("a", "b")
        for view in (1, 2)
        for episode in (0, 7)
    }
    assert len(found) == 16


@pytest.mark.parametrize("mode", ["end_to_end", "classify"])
def test_view_that_is_drawn_again_is_augmented_anew_by_the_episode_it_is_in(world: World, mode: str) -> None:
    config = world.config(f"training.mode={mode}", "episodes.train_views=2", "augmentation.color_jitter=0.4")
    is_classification = mode == "classify"
    sampler = (
        clip_sampler(config, world.manifest) if is_classification else make_sampler(config, world.manifest, "train")
    )
    keys: list[tuple[str, int, int]] = []

    def note(clips: Tensor, given: Sequence[tuple[str, int, int]]) -> Tensor:
        keys.extend(given)
        return clips

    with LiveClips(video_sources(world.manifest), config.sampling) as source:
        batches = TrainingBatches(sampler, source, global_index(config, world.manifest), 2, augment=note)
        batches.make(range(40, 43))
        expected = [
            (video_id, view, index)
            for index in range(40, 43)
            for episode in [batches.describe(index)]
            for video_id, view in zip([*episode["support_ids"], *episode["query_ids"]], episode["views"], strict=True)
        ]
    assert keys == expected


@pytest.mark.parametrize("scale", [[0.0, 1.0], [-0.1, 0.5], [0.8, 0.5], [0.5, 1.1]])
def test_impossible_shares_of_the_area_are_refused_when_the_config_is_built(world: World, scale: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"augmentation\.crop_scale = .*above 0"):
        world.config("training.mode=end_to_end", "episodes.train_views=9", f"augmentation.crop_scale={scale}")
    assert AugmentationConfig(crop_scale=(1.0, 1.0)).crop_scale == (1.0, 1.0)


@pytest.fixture
def global_generator() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.usefixtures("global_generator")
@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("colours", v2.ColorJitter(0.4, 0.4, 0.4, 0.1)),
        ("rand_augment", v2.RandAugment(2, 12)),
        ("crop", v2.RandomResizedCrop(SIDE, scale=(0.3, 0.9), antialias=True)),
        ("erasing", v2.RandomErasing(1.0)),
    ],
)
def test_pixels_are_torchvisions_from_the_same_seed(clips: Tensor, name: str, operation: v2.Transform) -> None:
    found = augmentation(name)(clips, KEYS)
    for place in (0, 1, 2):
        digest = hashlib.sha256(json.dumps([5, *KEYS[place], "augmentation"]).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        expected = operation(clips[place].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        assert torch.equal(found[place], expected)


@pytest.mark.usefixtures("global_generator")
def test_threads_that_augment_and_draw_do_not_meet(clips: Tensor) -> None:
    augment = augmentation()
    expected = augment(clips, KEYS)
    torch.manual_seed(11)
    alone = [torch.rand(3) for _ in range(200)]
    torch.manual_seed(11)
    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(augment, clips, KEYS) for _ in range(24)]
        drawn = [torch.rand(3) for _ in range(200)]
        assert all(torch.equal(each.result(), expected) for each in found)
    assert all(torch.equal(one, other) for one, other in zip(alone, drawn, strict=True))


def test_number_of_torchs_threads_changes_no_pixel() -> None:
    clips = torch.randint(0, 256, (2, 1, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    config = AugmentationConfig(**OPERATIONS["all"])
    num_threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(Augmentation(config, 0, 224)(clips, [("a", 1, 0), ("b", 4, 0)]))
    torch.set_num_threads(num_threads)
    assert torch.equal(found[0], found[1])


def test_given_generators_are_left_alone_by_own_draws() -> None:
    given = torch.rand(4, generator=torch.Generator().manual_seed(3))
    with OwnDraws(9):
        assert torch.equal(torch.rand(4, generator=torch.Generator().manual_seed(3)), given)
        first = torch.rand(4)
    assert torch.equal(first, torch.rand(4, generator=torch.Generator().manual_seed(9)))


def test_augmentation_that_is_off_touches_nothing(world: World, clips: Tensor) -> None:
    off = AugmentationConfig()
    assert Augmentation.of(world.config("training.mode=end_to_end", "episodes.train_views=9")) is None
    assert Augmentation(off, 0, SIDE)(clips, KEYS) is clips
    assert augmentation()(clips, [("a", 0, 0)] * 6) is clips


def test_augmentation_that_would_meet_view_0_alone_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match=r"train_views = 1.*Raise episodes\.train_views"):
        world.config("training.mode=end_to_end", "augmentation.color_jitter=0.4")
    with pytest.raises(ConfigError, match="cubes are read from the cache"):
        world.config("episodes.train_views=9", "augmentation.color_jitter=0.4")


def test_batches_are_the_same_for_any_number_of_processes(world: World) -> None:
    config = world.config(
        "training.mode=end_to_end",
        "episodes.train_views=50",
        "sampling.crop=random",
        "augmentation.color_jitter=0.4",
        "augmentation.rand_augment=1",
        "augmentation.crop_scale=[0.5, 1.0]",
    )
    sampler = make_sampler(config, world.manifest, "train")
    episodes = [sampler.episode(index) for index in range(3)]
    views = torch.tensor([draw_views(sampler.split_hash, 0, index, 4, 50).tolist() for index in range(3)]).numpy()
    augment = Augmentation.of(config)
    assert augment is not None
    batches = []
    for workers in (0, 1, 3):
        with LiveClips(video_sources(world.manifest), config.sampling, workers) as clips:
            batches.append(assemble(episodes, clips, views[:, :2], views[:, 2:], augment=augment))
            plain = assemble(episodes, clips, views[:, :2], views[:, 2:], device=torch.device("cpu"))
    for batch in batches[1:]:
        assert torch.equal(batch.support, batches[0].support)
        assert torch.equal(batch.query, batches[0].query)
    assert not torch.equal(plain.support, batches[0].support)


def test_crop_and_flip_that_meet_view_0_alone_are_warned_of(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ("sampling.crop=random", "sampling.flip=true")
    for overrides in (
        drawn,
        ("training.mode=end_to_end",),
        ("training.mode=end_to_end", "episodes.train_views=2", *drawn),
    ):
        warn_of_one_view(world.config(*overrides))
    assert capsys.readouterr().err == ""
    warn_of_one_view(world.config("training.mode=end_to_end", *drawn))
    assert "sampling.crop and flip change nothing while training" in capsys.readouterr().err
