"""From a config to the objects of a run: each setting arrives, and what does not fit is refused before any work."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cache.open import open_store
from cache.store import SpecMismatch
from configs.schema import RunConfig
from contracts.world import World
from episodes.datasets import Manifest, write_manifest
from episodes.heads.mastaf import MastafHead
from extract.build import build_backbone
from pipeline import training
from pipeline.batches import TrainingBatches
from pipeline.checkpoint import load_checkpoint
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.interrupts import Stopped
from pipeline.model import FewShotModel
from pipeline.settings import SetupError
from pipeline.setup import build_encoder, build_model, global_index, make_sampler, prepare

CPU = torch.device("cpu")
CUBE_SHAPE = (16, 2, 2, 2)


@pytest.fixture(scope="module")
def store_path(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cubes") / "cubes.zarr"
    config = world.config()
    backbone = build_backbone(config.backbone, config.sampling)
    with open_store(path, spec=build_spec(config, backbone, CPU), mode="a", shard_rows=8) as store:
        extract_videos(store, list(video_sources(world.manifest).values()), backbone, config, CPU)
    return path


def end_to_end(world: World, *overrides: str) -> RunConfig:
    return world.config(
        "training.mode=end_to_end",
        "training.validation_episodes=2",
        "training.episodes=3",
        "training.learning_rate=0.5",
        *overrides,
    )


def trained(config: RunConfig, folder: Path) -> dict[str, Tensor]:
    """All weights and statistics after training."""
    training.train(config, folder, CPU)
    return dict(load_checkpoint(folder / "last.pt")["model"])


def fresh(config: RunConfig) -> tuple[dict[str, Tensor], set[str]]:
    """All weights and statistics before training, and which of them are parameters."""
    model = prepare(config, CPU).model
    return model.state_dict(), {name for name, _ in model.named_parameters()}


def head_of(config: RunConfig, num_classes: int = 3) -> MastafHead:
    head = build_model(config, nn.Identity(), CUBE_SHAPE, num_classes, CPU).head
    assert isinstance(head, MastafHead)
    return head


@pytest.mark.parametrize(
    ("protocol", "n_query", "is_normalised"),
    [("one_query", 1, False), ("one_query", 2, True), ("per_class", 1, True), ("per_class", 2, True)],
)
def test_query_map_is_normalised_unless_the_episode_has_one_query(
    world: World, protocol: str, n_query: int, is_normalised: bool
) -> None:
    config = world.config(f"episodes.protocol={protocol}", f"episodes.n_query={n_query}")
    assert head_of(config).meta_bn_query is is_normalised


def test_training_seed_decides_the_first_weights(world: World) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        return {
            name: value.detach() for name, value in head_of(world.config(f"training.seed={seed}")).named_parameters()
        }

    zero, one, again = weights(0), weights(1), weights(0)
    assert all(torch.equal(zero[name], again[name]) for name in zero)
    assert not any(torch.equal(zero[name], one[name]) for name in zero if name.endswith("reduce.weight"))
    assert any(name.endswith("reduce.weight") for name in zero)


def test_each_split_draws_from_its_own_seed(world: World) -> None:
    config = world.config("episodes.seed=7", "evaluation.seed=9")
    seeds = {split: make_sampler(config, world.manifest, split).seed for split in ("train", "val", "test")}
    assert seeds == {"train": 7, "val": 9, "test": 9}


@pytest.mark.parametrize(
    ("labels", "num_classes", "expected"),
    # By name over all seven classes: diagonal, down, jump, left, right, still, up.
    [
        ("train", 3, {"down": 0, "left": 1, "right": 2}),
        ("all", 7, {"down": 1, "left": 3, "right": 4}),
    ],
)
def test_global_labels_count_over_the_classes_that_the_config_says(
    world: World, store_path: Path, labels: str, num_classes: int, expected: dict[str, int]
) -> None:
    place = prepare(world.config(f'store.path="{store_path}"', f"data.global_labels={labels}"), CPU)
    assert isinstance(place.model.head, MastafHead)
    assert place.model.head.classifier is not None
    assert place.model.head.classifier.out_features == num_classes
    sampler = make_sampler(place.config, place.manifest, "train")
    batches = TrainingBatches(sampler, place.source, global_index(place.config, place.manifest), 1)
    batch = batches.make(range(6))
    assert batch.class_global_labels is not None
    names = [sampler.episode(index).class_names for index in range(6)]
    assert batch.class_global_labels.tolist() == [[expected[name] for name in each] for each in names]


def test_backbone_with_rate_zero_is_frozen_in_evaluation_mode(world: World) -> None:
    config = world.config("training.mode=end_to_end", "training.backbone_learning_rate=0")
    model = FewShotModel(build_encoder(config, CPU), head_of(config)).train()
    assert model.head.training
    assert not any(module.training for module in build_encoder(config, CPU).train().backbone.modules())
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


def test_frozen_batchnorm_stays_in_evaluation_mode(world: World) -> None:
    config = world.config("training.mode=end_to_end", "training.backbone_batchnorm=frozen")
    encoder = build_encoder(config, CPU).train()
    norms = [module for module in encoder.backbone.modules() if isinstance(module, nn.BatchNorm3d)]
    assert norms
    assert not any(module.training for module in norms)
    assert encoder.backbone.training


def test_training_sees_more_than_one_view_where_the_config_says_so(world: World, tmp_path: Path) -> None:
    views = [
        trained(end_to_end(world, "sampling.crop=random", f"episodes.train_views={count}"), tmp_path / str(count))
        for count in (1, 5)
    ]
    assert not all(torch.equal(views[0][name], views[1][name]) for name in views[0])


def test_backbone_moves_at_its_own_rate(world: World, tmp_path: Path) -> None:
    before, parameters = fresh(end_to_end(world))
    fast = trained(end_to_end(world), tmp_path / "fast")
    slow = trained(end_to_end(world, "training.backbone_learning_rate=0.1"), tmp_path / "slow")
    farthest = 0.0
    for name in parameters:
        if name.startswith("head."):
            assert torch.equal(slow[name], fast[name]), name
        else:
            moved = fast[name] - before[name]
            torch.testing.assert_close(slow[name], before[name] + 0.2 * moved, rtol=1e-5, atol=1e-6)
            farthest = max(farthest, float(moved.abs().max()))
    assert farthest > 1e-3


def test_backbone_with_rate_zero_keeps_its_weights_and_statistics(world: World, tmp_path: Path) -> None:
    config = end_to_end(world, "training.backbone_learning_rate=0")
    before, _ = fresh(config)
    after = trained(config, tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("head.") for name in changed)


@pytest.mark.parametrize("batchnorm", ["episode", "frozen"])
def test_frozen_batchnorm_keeps_its_statistics_while_weights_learn(
    world: World, tmp_path: Path, batchnorm: str
) -> None:
    config = end_to_end(world, f"training.backbone_batchnorm={batchnorm}")
    before, parameters = fresh(config)
    after = trained(config, tmp_path / "run")
    changed = {name for name in before if name.startswith("encoder.") and not torch.equal(before[name], after[name])}
    assert changed & parameters
    statistics = {name for name in changed if name not in parameters}
    assert bool(statistics) == (batchnorm == "episode")


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("sampling.num_frames=8", "sampling.num_frames: store 4, config 8"),
        ("sampling.policy=even", "sampling.policy: store 'reference', config 'even'"),
        ("sampling.seed=1", "sampling.seed: store 0, config 1"),
        ("backbone.name=r3d18", "backbone.name: store 'small3d', config 'r3d18'"),
        ("backbone.options.width=8", "backbone.options.width: store 4, config 8"),
        ("backbone.weights=random:2", "backbone.weights: store "),
    ],
)
def test_cached_training_names_the_setting_in_which_the_store_differs(
    world: World, store_path: Path, tmp_path: Path, override: str, field: str
) -> None:
    config = world.config(f'store.path="{store_path}"', override)
    with pytest.raises(SpecMismatch) as refused:
        training.train(config, tmp_path / "run", CPU)
    assert field in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_settings_that_the_config_leaves_open_come_from_the_store(world: World, store_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "data": {"manifest": str(world.manifest_path)},
            "store": {"path": str(store_path)},
            "episodes": {"n_way": 2},
        }
    )
    resolved = prepare(config, CPU).config
    assert (resolved.sampling.num_frames, resolved.sampling.crop_size, resolved.sampling.policy) == (4, 24, "reference")
    assert resolved.backbone.name == "small3d"


def stop_after_one_step(config: RunConfig, folder: Path) -> None:
    def stop(line: Mapping[str, Any]) -> None:
        if line["kind"] == "step":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        training.train(config, folder, CPU, report=stop)


def test_resuming_on_another_split_is_refused_with_both_hashes(world: World, store_path: Path, tmp_path: Path) -> None:
    config = world.config(f'store.path="{store_path}"')

    stop_after_one_step(config, tmp_path / "run")
    last = (tmp_path / "run/last.pt").read_bytes()
    videos = list(world.manifest.videos)
    videos[0] = replace(videos[0], excluded="blurred")
    other = Manifest(tuple(videos), world.manifest.root)
    write_manifest(other, tmp_path / "other.csv")
    moved = world.config(f'store.path="{store_path}"', f'data.manifest="{tmp_path / "other.csv"}"')
    with pytest.raises(SetupError, match="split hash") as refused:
        training.train(moved, tmp_path / "run", CPU, resume=True)
    assert world.manifest.split_hash[:12] in str(refused.value)
    assert other.split_hash[:12] in str(refused.value)
    assert (tmp_path / "run/last.pt").read_bytes() == last


def test_resuming_on_a_store_of_another_decoder_is_refused(world: World, store_path: Path, tmp_path: Path) -> None:
    stop_after_one_step(world.config(f'store.path="{store_path}"'), tmp_path / "run")
    with open_store(store_path) as store:
        spec = replace(store.spec, decoder={**store.spec.decoder, "avcodec": 1})
        ids = store.ids()
    with open_store(tmp_path / "other.zarr", spec=spec, mode="a") as other:
        other.plan(ids, [0])
    with pytest.raises(SetupError, match="store's spec"):
        training.train(world.config(f'store.path="{tmp_path / "other.zarr"}"'), tmp_path / "run", CPU, resume=True)


def test_resuming_with_the_same_split_in_another_place_is_allowed(
    world: World, store_path: Path, tmp_path: Path
) -> None:
    training.train(world.config(f'store.path="{store_path}"', "training.episodes=3"), tmp_path / "run", CPU)
    write_manifest(world.manifest, tmp_path / "copy.csv")
    moved = world.config(
        f'store.path="{store_path}"', "training.episodes=3", f'data.manifest="{tmp_path / "copy.csv"}"'
    )
    assert training.train(moved, tmp_path / "run", CPU, resume=True)["episodes"] == 3
