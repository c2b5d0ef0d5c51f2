"""Scoring a run: it changes nothing in the run, meets the episodes it says, and refuses cubes of another backbone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cache.open import open_store
from cache.store import SpecMismatch
from configs.schema import RunConfig
from contracts.world import World
from episodes.sampler import EpisodeProtocol, EpisodeSampler, episode_hash
from extract.build import build_backbone
from pipeline import evaluation, training
from pipeline.evaluation import evaluate_model
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.scoring import LoadedRun, evaluate_run, load_run
from pipeline.setup import make_sampler
from pipeline.sources import assemble

CPU = torch.device("cpu")


def fill_store(world: World, path: Path, *overrides: str) -> Path:
    config = world.config(*overrides)
    backbone = build_backbone(config.backbone, config.sampling)
    with open_store(path, spec=build_spec(config, backbone, CPU), mode="a", shard_rows=8) as store:
        extract_videos(store, list(video_sources(world.manifest).values()), backbone, config, CPU)
    return path


@pytest.fixture(scope="module")
def store_path(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_store(world, tmp_path_factory.mktemp("cubes") / "cubes.zarr")


@pytest.fixture(scope="module")
def run_folder(world: World, store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MASTAF head trained a little on the cache; four queries in an episode, so that all its maps are normalised."""
    folder = tmp_path_factory.mktemp("run") / "run"
    training.train(world.config(f'store.path="{store_path}"', "episodes.n_query=2"), folder, CPU)
    return folder


def with_seed(run: LoadedRun, **seeds: int) -> LoadedRun:
    """The run with other seeds in its tables."""
    changes: dict[str, Any] = {
        table: getattr(run.config, table).model_copy(update={"seed": seed}) for table, seed in seeds.items()
    }
    return replace(run, config=run.config.model_copy(update=changes))


def sampler_of(config: RunConfig, world: World) -> EpisodeSampler:
    return make_sampler(config, world.manifest, "test")


@pytest.mark.parametrize("is_training", [True, False])
def test_scores_are_those_of_single_episodes_and_leave_the_model_as_it_was(
    world: World, run_folder: Path, is_training: bool
) -> None:
    run = load_run(run_folder, CPU)
    sampler = sampler_of(run.config, world)
    model = run.model.train(is_training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    statistics = [name for name in before if "running" in name]
    assert statistics
    modes: set[bool] = set()
    hook = model.head.register_forward_hook(lambda head, _inputs, _output: modes.add(head.training))
    score = evaluate_model(model, run.source, sampler, 30, CPU)
    hook.remove()
    assert modes == {False}
    assert model.training == model.head.training == is_training
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.eval()
    alone = []
    for index in range(30):
        zeros = np.zeros((1, 2), dtype=np.int64)
        batch = assemble([sampler.episode(index)], run.source, zeros, np.zeros((1, 4), dtype=np.int64))
        with torch.no_grad():
            answers = model(batch).logits.argmax(dim=-1)
        assert batch.query_labels is not None
        alone.append(float((answers == batch.query_labels).double().mean()))
    assert score.per_episode == tuple(alone)
    assert len(set(alone)) > 1


def test_scores_do_not_depend_on_the_size_of_the_evaluation_batches(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored() -> tuple[list[int], Tensor, tuple[float, ...]]:
        run = load_run(run_folder, CPU)
        logits: list[Tensor] = []
        run.model.head.register_forward_hook(lambda _head, _inputs, output: logits.append(output.logits))
        _, score = evaluate_run(run, "test", 25, CPU)
        return [len(part) for part in logits], torch.cat(logits), score.per_episode

    large_sizes, large, large_scores = scored()
    monkeypatch.setattr(evaluation, "BATCH_BYTES", 1)
    small_sizes, small, small_scores = scored()
    assert small_sizes == [1] * 25
    assert max(large_sizes) > 10
    assert sum(large_sizes) == 25
    assert large_scores == small_scores
    # Batched products may round in another order.
    torch.testing.assert_close(large, small, rtol=1e-5, atol=1e-6)


def test_episodes_follow_the_evaluation_seed_and_no_other(run_folder: Path) -> None:
    run = load_run(run_folder, CPU)
    plain, _ = evaluate_run(run, "test", 20, CPU)
    others, _ = evaluate_run(with_seed(run, episodes=5, training=5), "test", 20, CPU)
    moved, _ = evaluate_run(with_seed(run, evaluation=5), "test", 20, CPU)
    assert others["episode_hash"] == plain["episode_hash"]
    assert moved["episode_hash"] != plain["episode_hash"]
    assert (plain["seed"], moved["seed"]) == (0, 5)


@pytest.mark.parametrize("overrides", [{}, {"k_shot": 2}, {"n_query": 1}, {"k_shot": 3, "n_query": 1}])
def test_result_names_the_episodes_that_were_asked_for(
    world: World, run_folder: Path, overrides: dict[str, int]
) -> None:
    result, score = evaluate_run(load_run(run_folder, CPU), "test", 20, CPU, **overrides)  # type: ignore[arg-type]
    shots, queries = overrides.get("k_shot", 1), overrides.get("n_query", 2)
    assert (result["k_shot"], result["n_query"], result["n_way"]) == (shots, queries, 2)
    sampler = EpisodeSampler(world.manifest, "test", EpisodeProtocol("per_class", 2, shots, queries), 0)
    assert result["episode_hash"] == episode_hash(sampler.episode(index) for index in range(20))
    # Each accuracy is a share of the 2 x queries answers of one episode.
    assert all((2 * queries * share).is_integer() for share in score.per_episode)


def test_store_of_another_fingerprint_is_refused(world: World, run_folder: Path, tmp_path: Path) -> None:
    other = fill_store(world, tmp_path / "other.zarr", "backbone.weights=random:2")
    with pytest.raises(SpecMismatch, match="weights"):
        load_run(run_folder, CPU, str(other))


def test_store_of_another_decoder_is_refused_though_no_config_states_one(
    run_folder: Path, store_path: Path, tmp_path: Path
) -> None:
    with open_store(store_path) as store:
        spec = replace(store.spec, decoder={**store.spec.decoder, "avcodec": 1})
        ids = store.ids()
    with open_store(tmp_path / "other.zarr", spec=spec, mode="a") as other:
        other.plan(ids, [0])
    with pytest.raises(SpecMismatch, match=r"decoder\.avcodec"):
        load_run(run_folder, CPU, str(tmp_path / "other.zarr"))


def test_end_to_end_run_refuses_cubes_of_other_weights(world: World, store_path: Path, tmp_path: Path) -> None:
    training.train(
        world.config("training.mode=end_to_end", "training.episodes=3", "training.validation_episodes=2"),
        tmp_path / "run",
        CPU,
    )
    with pytest.raises(SpecMismatch, match=r"weights.*--from-run"):
        load_run(tmp_path / "run", CPU, str(store_path))


def test_scorer_of_a_cached_run_has_no_encoder(run_folder: Path) -> None:
    assert isinstance(load_run(run_folder, CPU).model.encoder, nn.Identity)
