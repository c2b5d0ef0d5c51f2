"""`mastaf compare`: runs meet the same episodes, each store is read once, and what cannot be compared is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from contracts.made_runs import NUM_EPISODES, MadeRuns, compared, fill_store, train_run
from contracts.world import World
from episodes.batch import EpisodeBatch
from episodes.datasets import Manifest, exclude, write_manifest
from episodes.sampler import SamplerError
from pipeline import comparison as comparison_module
from pipeline import evaluation
from pipeline.checkpoint import load_checkpoint
from pipeline.compare_command import compare_folders
from pipeline.comparison import Asked, Comparison, compare_runs
from pipeline.head_cost import HeadCost
from pipeline.scoring import evaluate_run, load_run
from pipeline.settings import SetupError
from pipeline.sources import assemble

pytestmark = pytest.mark.usefixtures("one_thread", "few_timed_calls")
CPU = torch.device("cpu")


def test_every_run_gets_the_score_that_evaluate_gives_it(made: MadeRuns, found: Comparison) -> None:
    assert [run.name for run in found.runs] == ["neighbor", "mastaf", "self", "cross"]
    for folder, run in zip(made.heads, found.runs, strict=True):
        result, score = evaluate_run(load_run(folder, CPU), "test", NUM_EPISODES, CPU)
        assert run.score == score
        assert run.score.episode_hash == result["episode_hash"]
        assert run.run.store_fingerprint == result["store_fingerprint"]
    assert len({run.score.per_episode for run in found.runs}) > 1


def test_a_store_is_read_once_for_all_runs_on_it(made: MadeRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def spy(episodes: Any, *rest: Any, **named: Any) -> EpisodeBatch:
        read.append(len(episodes))
        return assemble(episodes, *rest, **named)

    monkeypatch.setattr(evaluation, "assemble", spy)
    compared(made.heads[:1])
    alone = list(read)
    read.clear()
    compared(made.heads)
    assert read == alone


def test_runs_on_different_stores_meet_the_same_episodes(made: MadeRuns) -> None:
    other = train_run(
        made.world,
        fill_store(made.world, made.world.folder / "other.zarr", "random:2"),
        made.world.folder / "runs" / "other",
    )
    found = compared([made.heads[1], other])
    assert found.runs[0].score.episode_hash == found.runs[1].score.episode_hash
    assert found.runs[0].run.store_fingerprint != found.runs[1].run.store_fingerprint
    assert found.runs[0].score.per_episode != found.runs[1].score.per_episode
    assert not found.episodes.left_out


def test_videos_that_a_store_lacks_are_left_out_for_all_and_counted(
    made: MadeRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    holes = fill_store(
        made.world, made.world.folder / "holes.zarr", "random:3", rejected=["test0/1"], absent=["test3/4"]
    )
    other = train_run(made.world, holes, made.world.folder / "runs" / "holes")
    found = compared([made.heads[0], other])
    assert found.episodes.left_out == {"test0/1": "rejected: not_a_video", "test3/4": "not in a store"}
    smaller = exclude(made.world.manifest, dict.fromkeys(["test0/1", "test3/4"], "for this test"))
    assert found.episodes.manifest.split_hash == smaller.split_hash != made.world.manifest.split_hash
    sampler = found.episodes.sampler
    met = {name for index in range(NUM_EPISODES) for name in sampler.episode(index).support_ids}
    assert met.isdisjoint(found.episodes.left_out)
    report, text = compare_folders([made.heads[0], other], device="cpu")
    assert (report["split_hash"], report["whole_split_hash"]) == (smaller.split_hash, made.world.manifest.split_hash)
    assert [row["video_id"] for row in report["left_out"]] == ["test0/1", "test3/4"]
    assert report["videos"] == 34
    said = capsys.readouterr().err
    assert "2 videos of test are not in all stores" in said
    assert smaller.split_hash[:12] in said
    assert "2 videos of test are not in all stores" in text


def test_stores_with_too_few_videos_in_common_are_refused(made: MadeRuns) -> None:
    few = fill_store(
        made.world, made.world.folder / "few.zarr", "random:4", absent=[f"test2/{video}" for video in range(4)]
    )
    other = train_run(made.world, few, made.world.folder / "runs" / "few")
    with pytest.raises(SamplerError, match=r"test2 \(2\)"):
        compared([made.heads[0], other])


def test_stores_without_a_video_of_the_split_are_refused(made: MadeRuns) -> None:
    absent = [video.video_id for video in made.world.manifest.videos_of("test")]
    other = train_run(
        made.world,
        fill_store(made.world, made.world.folder / "none.zarr", "random:5", absent=absent),
        made.world.folder / "runs" / "none",
    )
    with pytest.raises(SetupError, match="no video of split 'test' is in all stores"):
        compared([made.heads[0], other])


def test_runs_that_cannot_share_episodes_are_refused_by_every_field(made: MadeRuns, tmp_path: Path) -> None:
    other = train_run(
        made.world,
        made.store_path,
        tmp_path / "other",
        "episodes.k_shot=2",
        "evaluation.seed=7",
        "episodes.protocol=one_query",
    )
    with pytest.raises(SetupError) as refusal:
        compared([*made.heads[:2], other])
    message = str(refusal.value)
    assert "episodes.protocol is per_class (neighbor, mastaf) and one_query (other)" in message
    assert "episodes.k_shot is 1 (neighbor, mastaf) and 2 (other)" in message
    assert "evaluation.seed is 0 (neighbor, mastaf) and 7 (other)" in message
    assert "--shots, --seed would give all the same" in message
    assert "n_way" not in message


def test_runs_of_different_manifests_are_refused_unless_one_is_given(made: MadeRuns, tmp_path: Path) -> None:
    smaller = exclude(made.world.manifest, {"test1/0": "for this test"})
    write_manifest(smaller, tmp_path / "smaller.csv")
    other = train_run(World(tmp_path, tmp_path / "smaller.csv"), made.store_path, tmp_path / "other")
    with pytest.raises(SetupError, match=r"split hash is .*--manifest would"):
        compared([made.heads[0], other])
    found = compared([made.heads[0], other], manifest_path=str(tmp_path / "smaller.csv"))
    assert found.episodes.manifest.split_hash == smaller.split_hash


def test_options_settle_what_the_runs_disagree_on(made: MadeRuns, tmp_path: Path) -> None:
    other = train_run(made.world, made.store_path, tmp_path / "other", "episodes.k_shot=2", "evaluation.seed=7")
    found = compared([made.heads[0], other], k_shot=3, n_query=1, seed=5, episodes=10)
    assert (found.episodes.protocol.k_shot, found.episodes.protocol.n_query, found.episodes.seed) == (3, 1, 5)
    assert [len(run.score.per_episode) for run in found.runs] == [10, 10]


def test_a_class_that_a_run_was_trained_on_is_refused(made: MadeRuns, tmp_path: Path) -> None:
    moved = tuple(
        replace(video, split="train") if video.class_name == "test0" else video for video in made.world.manifest.videos
    )
    write_manifest(Manifest(moved, made.world.folder), tmp_path / "moved.csv")
    seen = train_run(World(tmp_path, tmp_path / "moved.csv"), made.store_path, tmp_path / "seen")
    with pytest.raises(SetupError, match="test0"):
        compared([made.heads[0], seen], manifest_path=str(made.world.manifest_path))


def test_a_run_given_twice_and_an_unknown_split_are_refused(made: MadeRuns) -> None:
    with pytest.raises(SetupError, match="twice"):
        compared([made.heads[0], made.heads[0].parent / "." / made.heads[0].name])
    with pytest.raises(SetupError, match="'dev' is not known"):
        compared(made.heads[:1], split="dev")


def test_measuring_costs_changes_no_score_and_no_model(made: MadeRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measured = compared(made.heads)
    assert torch.equal(before, torch.get_rng_state())
    for folder, run in zip(made.heads, measured.runs, strict=True):
        stored = load_checkpoint(folder / "best.pt")["model"]
        now = run.run.model.state_dict()
        assert stored.keys() == now.keys()
        assert all(torch.equal(stored[name], now[name]) for name in now)
    monkeypatch.setattr(
        comparison_module, "measure_heads", lambda heads, *_rest: [HeadCost(0, 0, 0, 1.0, 1) for _ in heads]
    )
    unmeasured = compared(made.heads)
    assert [run.score for run in unmeasured.runs] == [run.score for run in measured.runs]


def test_progress_ends_at_all_episodes_of_all_stores(made: MadeRuns) -> None:
    other = train_run(
        made.world,
        fill_store(made.world, made.world.folder / "third.zarr", "random:6"),
        made.world.folder / "runs" / "third",
    )
    seen: list[tuple[int, int]] = []
    compare_runs([*made.heads[:2], other], Asked(), CPU, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2 * NUM_EPISODES, 2 * NUM_EPISODES)
    assert seen == sorted(seen)
