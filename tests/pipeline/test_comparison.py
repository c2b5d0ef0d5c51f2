"""`mastaf compare`: runs meet the same episodes, each store is read once, and what cannot be compared is refused by name."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cache.cube import Spec
from cache.open import open_store
from cache.store import RowOutcome
from contracts.world import World
from episodes.batch import EpisodeBatch
from episodes.datasets import Manifest, exclude, write_manifest
from episodes.head import HeadModule, HeadOutput
from episodes.sampler import SamplerError
from episodes.video import Video
from extract.build import build_backbone
from pipeline import comparison as comparison_module
from pipeline import evaluation, training
from pipeline.checkpoint import load_checkpoint
from pipeline.compare_command import compare_folders
from pipeline.comparison import Asked, Comparison, compare_runs
from pipeline.comparison_rows import class_accuracies, recipe_rows, recipes, run_rows
from pipeline.extraction import build_spec
from pipeline.head_cost import HeadCost, count_flops, measure_heads
from pipeline.scoring import evaluate_run, load_run
from pipeline.settings import DIGEST, SetupError
from pipeline.statistics import mean_and_interval

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
CLASSES = {"train": 3, "val": 3, "test": 6}
CUBE_SHAPE = (6, 2, 3, 3)
VIDEOS_PER_CLASS = 6
EPISODES = 40


def make_manifest(folder: Path) -> World:
    """A manifest of videos that nobody decodes: their cubes are made up."""
    videos = tuple(
        Video(f"{split}{number}/{video}", f"{split}{number}/{video}.mp4", f"{split}{number}", split)
        for split, count in CLASSES.items()
        for number in range(count)
        for video in range(VIDEOS_PER_CLASS)
    )
    write_manifest(Manifest(videos, folder), folder / "videos.csv")
    return World(folder, folder / "videos.csv")


def fill(
    world: World, path: Path, weights: str = "random:1", rejected: Sequence[str] = (), absent: Sequence[str] = ()
) -> Path:
    """A store with noise around a random cube of each class."""
    config = world.config(f"backbone.weights={weights}")
    spec: Spec = build_spec(config, build_backbone(config.backbone, config.sampling), CPU)
    spec = replace(spec, arrays={"cube": replace(spec.arrays["cube"], shape=CUBE_SHAPE)})
    generator = np.random.default_rng(len(weights) + int(weights[-1]))
    classes = sorted({video.class_name for video in world.manifest.videos})
    middle_of = {name: generator.standard_normal(CUBE_SHAPE) for name in classes}
    class_of = {video.video_id: video.class_name for video in world.manifest.videos}
    with open_store(path, spec=spec, mode="a", shard_rows=8) as store:
        store.plan([video_id for video_id in class_of if video_id not in absent], [0])
        for shard in store.pending():
            cubes = [
                middle_of[class_of[row.video_id]] + 1.5 * generator.standard_normal(CUBE_SHAPE) for row in shard.rows
            ]
            outcomes = [
                RowOutcome("rejected", "not_a_video") if row.video_id in rejected else RowOutcome("ok")
                for row in shard.rows
            ]
            store.commit(shard, {"cube": np.stack(cubes).astype(np.float32)}, outcomes)
    return path


def train(world: World, store_path: Path, folder: Path, *overrides: str) -> Path:
    with open_store(store_path) as store:
        weights = f"backbone.weights={DIGEST}{store.spec.weights_digest}"
    config = world.config(
        f'store.path="{store_path}"', weights, "training.episodes=6", "training.validate_every=6",
        "training.validation_episodes=2", f"evaluation.episodes={EPISODES}", "episodes.n_query=2", *overrides,
    )  # fmt: skip
    training.train(config, folder, CPU)
    return folder


@pytest.fixture(autouse=True)
def _few_timed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is not looked at here."""
    monkeypatch.setattr(comparison_module, "TIMED_CALLS", 1)
    monkeypatch.setattr(comparison_module, "TIMED_EPISODES", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_manifest(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def store_path(made: World) -> Path:
    return fill(made, made.folder / "cubes.zarr")


@pytest.fixture(scope="module")
def folders(made: World, store_path: Path) -> list[Path]:
    """Four heads on one store."""
    return [
        train(made, store_path, made.folder / "runs" / name, f"head.name={name}")
        for name in ("neighbor", "mastaf", "self", "cross")
    ]


@pytest.fixture(scope="module")
def seed_folders(made: World, store_path: Path) -> list[Path]:
    """The mastaf head twice more, with other seeds."""
    return [
        train(
            made, store_path, made.folder / "runs" / f"mastaf{seed}", f"training.seed={seed}", f"episodes.seed={seed}"
        )
        for seed in (1, 2)
    ]


def compared(folders: Sequence[Path], **asked: Any) -> Comparison:
    return compare_runs(folders, Asked(**asked), CPU)


@pytest.fixture(scope="module")
def found(folders: list[Path]) -> Comparison:
    """The four heads, compared once."""
    return compared(folders)


def test_every_run_gets_the_score_that_evaluate_gives_it(folders: list[Path], found: Comparison) -> None:
    assert [run.name for run in found.runs] == ["neighbor", "mastaf", "self", "cross"]
    for folder, run in zip(folders, found.runs, strict=True):
        result, score = evaluate_run(load_run(folder, CPU), "test", EPISODES, CPU)
        assert run.score == score
        assert run.score.episode_hash == result["episode_hash"]
        assert run.run.store_fingerprint == result["store_fingerprint"]
    assert len({run.score.per_episode for run in found.runs}) > 1


def test_a_store_is_read_once_for_all_runs_on_it(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    assemble = evaluation.assemble

    def spy(episodes: Any, *rest: Any, **named: Any) -> EpisodeBatch:
        read.append(len(episodes))
        return assemble(episodes, *rest, **named)

    monkeypatch.setattr(evaluation, "assemble", spy)
    compared(folders[:1])
    alone = list(read)
    read.clear()
    compared(folders)
    assert read == alone


def test_runs_on_different_stores_meet_the_same_episodes(made: World, folders: list[Path]) -> None:
    other = train(made, fill(made, made.folder / "other.zarr", "random:2"), made.folder / "runs" / "other")
    found = compared([folders[1], other])
    assert found.runs[0].score.episode_hash == found.runs[1].score.episode_hash
    assert found.runs[0].run.store_fingerprint != found.runs[1].run.store_fingerprint
    assert found.runs[0].score.per_episode != found.runs[1].score.per_episode
    assert not found.episodes.left_out


def test_videos_that_a_store_lacks_are_left_out_for_all_and_counted(
    made: World, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    holes = fill(made, made.folder / "holes.zarr", "random:3", rejected=["test0/1"], absent=["test3/4"])
    other = train(made, holes, made.folder / "runs" / "holes")
    found = compared([folders[0], other])
    assert found.episodes.left_out == {"test0/1": "rejected: not_a_video", "test3/4": "not in a store"}
    smaller = exclude(made.manifest, dict.fromkeys(["test0/1", "test3/4"], "for this test"))
    assert found.episodes.manifest.split_hash == smaller.split_hash != made.manifest.split_hash
    sampler = found.episodes.sampler
    met = {name for index in range(EPISODES) for name in sampler.episode(index).support_ids}
    assert met.isdisjoint(found.episodes.left_out)
    report, text = compare_folders([folders[0], other], device="cpu")
    assert (report["split_hash"], report["whole_split_hash"]) == (smaller.split_hash, made.manifest.split_hash)
    assert [row["video_id"] for row in report["left_out"]] == ["test0/1", "test3/4"]
    assert report["videos"] == 34
    said = capsys.readouterr().err
    assert "2 videos of test are not in all stores" in said
    assert smaller.split_hash[:12] in said
    assert "2 videos of test are not in all stores" in text


def test_stores_with_too_few_videos_in_common_are_refused(made: World, folders: list[Path]) -> None:
    few = fill(made, made.folder / "few.zarr", "random:4", absent=[f"test2/{video}" for video in range(4)])
    other = train(made, few, made.folder / "runs" / "few")
    with pytest.raises(SamplerError, match=r"test2 \(2\)"):
        compared([folders[0], other])


def test_stores_without_a_video_of_the_split_are_refused(made: World, folders: list[Path]) -> None:
    absent = [video.video_id for video in made.manifest.videos_of("test")]
    other = train(made, fill(made, made.folder / "none.zarr", "random:5", absent=absent), made.folder / "runs" / "none")
    with pytest.raises(SetupError, match="no video of split 'test' is in all stores"):
        compared([folders[0], other])


def test_runs_that_cannot_share_episodes_are_refused_by_every_field(
    made: World, store_path: Path, folders: list[Path], tmp_path: Path
) -> None:
    other = train(
        made, store_path, tmp_path / "other", "episodes.k_shot=2", "evaluation.seed=7", "episodes.protocol=one_query"
    )
    with pytest.raises(SetupError) as refusal:
        compared([*folders[:2], other])
    message = str(refusal.value)
    assert "episodes.protocol is per_class (neighbor, mastaf) and one_query (other)" in message
    assert "episodes.k_shot is 1 (neighbor, mastaf) and 2 (other)" in message
    assert "evaluation.seed is 0 (neighbor, mastaf) and 7 (other)" in message
    assert "--shots, --seed would give all the same" in message
    assert "n_way" not in message


def test_runs_of_different_manifests_are_refused_unless_one_is_given(
    made: World, store_path: Path, folders: list[Path], tmp_path: Path
) -> None:
    smaller = exclude(made.manifest, {"test1/0": "for this test"})
    write_manifest(smaller, tmp_path / "smaller.csv")
    other = train(World(tmp_path, tmp_path / "smaller.csv"), store_path, tmp_path / "other")
    with pytest.raises(SetupError, match=r"split hash is .*--manifest would"):
        compared([folders[0], other])
    found = compared([folders[0], other], manifest_path=str(tmp_path / "smaller.csv"))
    assert found.episodes.manifest.split_hash == smaller.split_hash


def test_options_settle_what_the_runs_disagree_on(
    made: World, store_path: Path, folders: list[Path], tmp_path: Path
) -> None:
    other = train(made, store_path, tmp_path / "other", "episodes.k_shot=2", "evaluation.seed=7")
    found = compared([folders[0], other], k_shot=3, n_query=1, seed=5, episodes=10)
    assert (found.episodes.protocol.k_shot, found.episodes.protocol.n_query, found.episodes.seed) == (3, 1, 5)
    assert [len(run.score.per_episode) for run in found.runs] == [10, 10]


def test_a_class_that_a_run_was_trained_on_is_refused(
    made: World, store_path: Path, folders: list[Path], tmp_path: Path
) -> None:
    moved = tuple(
        replace(video, split="train") if video.class_name == "test0" else video for video in made.manifest.videos
    )
    write_manifest(Manifest(moved, made.folder), tmp_path / "moved.csv")
    seen = train(World(tmp_path, tmp_path / "moved.csv"), store_path, tmp_path / "seen")
    with pytest.raises(SetupError, match="test0"):
        compared([folders[0], seen], manifest_path=str(made.manifest_path))


def test_a_run_given_twice_and_an_unknown_split_are_refused(folders: list[Path]) -> None:
    with pytest.raises(SetupError, match="twice"):
        compared([folders[0], folders[0].parent / "." / folders[0].name])
    with pytest.raises(SetupError, match="'dev' is not known"):
        compared(folders[:1], split="dev")


def test_runs_of_one_name_are_called_by_their_paths(folders: list[Path], tmp_path: Path) -> None:
    twin = Path(shutil.copytree(folders[0], tmp_path / "neighbor"))
    found = compared([folders[0], twin])
    assert [run.name for run in found.runs] == [str(folders[0]), str(twin)]
    second = run_rows(found)[1]
    assert second.difference is not None
    assert (second.difference.mean, second.difference.interval95, second.difference.p_value) == (0.0, 0.0, 1.0)
    assert second.class_difference is not None
    assert (second.class_difference.low, second.class_difference.high) == (0.0, 0.0)


def test_rows_hold_accuracy_difference_and_intervals(found: Comparison) -> None:
    rows = run_rows(found)
    assert recipe_rows(found) == []
    first = rows[0]
    assert first.difference is first.class_difference is first.adjusted_p_value is None
    for row, run in zip(rows, found.runs, strict=True):
        assert (row.accuracy, row.interval95) == mean_and_interval(run.score.per_episode)
        assert row.class_interval is not None
        assert row.class_interval.low < row.accuracy < row.class_interval.high
    for row in rows[1:]:
        assert row.difference is not None
        assert row.difference.mean == pytest.approx(row.accuracy - first.accuracy)
        assert row.difference.interval95 < row.difference.unpaired_interval95, (
            "heads on one cache agree on what is hard"
        )
        assert row.adjusted_p_value is not None
        assert row.adjusted_p_value >= row.difference.p_value
        assert row.class_difference is not None
        assert row.class_difference.low <= row.difference.mean <= row.class_difference.high


def test_outcomes_of_queries_add_up_to_the_accuracy(found: Comparison) -> None:
    outcomes, sampler = found.runs[0].score.outcomes, found.episodes.sampler
    assert outcomes is not None
    assert outcomes.is_right.shape == outcomes.query_classes.shape == (EPISODES, 4)
    assert tuple(outcomes.is_right.mean(axis=1)) == found.runs[0].score.per_episode
    for index in (0, 17, EPISODES - 1):
        episode = sampler.episode(index)
        assert tuple(outcomes.class_names[place] for place in outcomes.episode_classes[index]) == episode.class_names
        asked = [video_id.split("/")[0] for video_id in episode.query_ids]
        assert [outcomes.class_names[place] for place in outcomes.query_classes[index]] == asked
    # Every class is asked equally often within an episode, so the weighted mean over classes is the accuracy.
    counts = np.bincount(outcomes.query_classes.reshape(-1))
    weighted = sum(
        count * class_accuracies(found.runs[0])[name] for name, count in zip(outcomes.class_names, counts, strict=True)
    )
    assert weighted / counts.sum() == pytest.approx(found.runs[0].score.accuracy)


def test_runs_apart_in_seeds_alone_get_a_mean(folders: list[Path], seed_folders: list[Path]) -> None:
    found = compared([folders[0], folders[1], *seed_folders, folders[2]])
    assert [[run.name for run in runs] for runs in recipes(found.runs)] == [
        ["neighbor"], ["mastaf", "mastaf1", "mastaf2"], ["self"],
    ]  # fmt: skip
    rows = recipe_rows(found)
    assert [row.name for row in rows] == ["neighbor", "mastaf, 3 seeds", "self"]
    accuracies = [run.score.accuracy for run in found.runs[1:4]]
    mean = rows[1]
    assert mean.seeds is not None
    assert mean.accuracy == pytest.approx(np.mean(accuracies))
    assert mean.seeds.spread == pytest.approx(np.std(accuracies, ddof=1))
    assert mean.interval95 == mean.seeds.interval95 >= mean.seeds.seed_interval95
    assert mean.difference is not None
    assert mean.difference.mean == pytest.approx(mean.accuracy - rows[0].accuracy)
    assert rows[2].seeds is None
    report, text = compare_folders([folders[0], folders[1], *seed_folders], device="cpu")
    assert report["recipes"][1]["runs"] == ["mastaf", "mastaf1", "mastaf2"]
    assert report["recipes"][1]["seed_spread"] == mean.seeds.spread
    assert [row["training_seed"] for row in report["runs"]] == [0, 0, 1, 2]
    names = [line.split("  ")[0] for line in text.splitlines()]
    assert names.index(" mastaf, 3 seeds") < next(i for i, line in enumerate(text.splitlines()) if "   mastaf1 " in line)  # fmt: skip


def test_runs_with_the_same_seeds_are_no_further_seeds(
    folders: list[Path], seed_folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = Path(shutil.copytree(folders[1], tmp_path / "twin"))
    found = compared([folders[1], twin, seed_folders[0]])
    assert recipe_rows(found) == []
    assert "mastaf, twin, mastaf1 share recipe and seeds" in capsys.readouterr().err


def test_another_option_is_another_recipe(made: World, store_path: Path, folders: list[Path], tmp_path: Path) -> None:
    other = train(made, store_path, tmp_path / "other", "training.seed=1", "training.learning_rate=0.02")
    assert len(recipes(compared([folders[1], other]).runs)) == 2


def test_measuring_costs_changes_no_score_and_no_model(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measured = compared(folders)
    assert torch.equal(before, torch.get_rng_state())
    for folder, run in zip(folders, measured.runs, strict=True):
        stored = load_checkpoint(folder / "best.pt")["model"]
        now = run.run.model.state_dict()
        assert stored.keys() == now.keys()
        assert all(torch.equal(stored[name], now[name]) for name in now)
    monkeypatch.setattr(
        comparison_module, "measure_heads", lambda heads, *_rest: [HeadCost(0, 0, 0, 1.0, 1) for _ in heads]
    )
    unmeasured = compared(folders)
    assert [run.score for run in unmeasured.runs] == [run.score for run in measured.runs]


def test_progress_ends_at_all_episodes_of_all_stores(made: World, folders: list[Path]) -> None:
    other = train(made, fill(made, made.folder / "third.zarr", "random:6"), made.folder / "runs" / "third")
    seen: list[tuple[int, int]] = []
    compare_runs([*folders[:2], other], Asked(), CPU, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2 * EPISODES, 2 * EPISODES)
    assert seen == sorted(seen)


class CountedHead(HeadModule):
    """A matrix product, a recurrent layer and an attention whose multiplications are counted by hand below."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_weights = {}
        self.cube_shape = (6, 1, 1, 1)
        self.linear = nn.Linear(6, 8, bias=False)
        self.recurrent = nn.LSTM(8, 5, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.frozen = nn.Parameter(torch.zeros(7), requires_grad=False)
        self.calls: list[tuple[int, torch.dtype, bool, bool]] = []

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:  # noqa: ARG002  part of the protocol
        query = batch.query.flatten(2)
        self.calls.append(
            (batch.num_episodes, query.dtype, batch.query_labels is None, torch.is_grad_enabled() or self.training)
        )
        mapped = self.linear(query)
        self.recurrent(mapped)
        attended: Tensor = self.attention(mapped, mapped, mapped, need_weights=False)[0]
        return HeadOutput(attended[..., : batch.n_way])


def example_batch(num_episodes: int) -> EpisodeBatch:
    return EpisodeBatch(
        support=torch.ones(num_episodes, 2, 6, 1, 1, 1, dtype=torch.float16),
        support_labels=torch.tensor([[0, 1]] * num_episodes),
        query=torch.ones(num_episodes, 4, 6, 1, 1, 1, dtype=torch.float16),
        query_labels=torch.zeros(num_episodes, 4, dtype=torch.int64),
        n_way=2,
    )


def test_flops_are_those_counted_by_hand_fused_layers_too() -> None:
    linear = 4 * 6 * 8
    recurrent = 2 * 4 * 4 * 5 * (8 + 5)  # directions, steps, gates, units, inputs and state
    attention = 4 * 8 * 8 * 4 + 2 * 4 * 4 * 8  # three maps in and one out; scores and sums of the values
    assert count_flops(CountedHead().eval(), example_batch(3)) == 2 * (linear + recurrent + attention)
    assert torch.backends.mha.get_fastpath_enabled()


def test_heads_are_timed_in_evaluation_without_labels_and_the_first_call_warms_up() -> None:
    heads = [CountedHead().eval(), CountedHead().eval()]
    costs = measure_heads(heads, [example_batch(3)] * 4, CPU)
    for head, cost in zip(heads, costs, strict=True):
        assert cost.parameters == cost.trainable_parameters + 7
        assert cost.timed_episodes == 3
        assert cost.milliseconds > 0.0
        # Four timed calls; counting is done on a copy.
        assert head.calls[-4:] == [(3, torch.float32, True, False)] * 4


def test_files_hold_what_was_printed(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, text = compare_folders(folders, out=tmp_path / "new" / "out", device="cpu")
    out = tmp_path / "new" / "out"
    assert json.loads((out / "compare.json").read_text()) == report
    assert str(out) in capsys.readouterr().err
    with (out / "compare.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == ["neighbor", "mastaf", "self", "cross"]
    for line, row in zip(lines, report["runs"], strict=True):
        assert float(line["accuracy"]) == row["accuracy"]
        assert float(line["class_interval95_low"]) == row["class_interval95"][0]
        assert line["store_fingerprint"] == row["store_fingerprint"]
        assert (line["split_hash"], line["episode_hash"]) == (report["split_hash"], report["episode_hash"])
        assert float(line["macs_per_episode"]) * 2 == float(line["flops_per_episode"]) > 0
    assert lines[0]["difference_mean"] == ""
    assert float(lines[1]["difference_p_value"]) == report["runs"][1]["difference"]["p_value"]
    with np.load(out / "episodes.npz") as arrays:
        assert arrays["accuracy"].shape == (4, EPISODES)
        assert arrays["accuracy"].mean(axis=1) == pytest.approx([row["accuracy"] for row in report["runs"]])
        assert np.array_equal(arrays["is_right"].mean(axis=2), arrays["accuracy"])
        assert list(arrays["runs"]) == ["neighbor", "mastaf", "self", "cross"]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    for row in report["runs"]:
        assert f"{100 * row['accuracy']:.2f} ± {100 * row['interval95']:.2f}" in text
    for digest in (report["split_hash"], report["episode_hash"], report["runs"][0]["store_fingerprint"]):
        assert digest[:12] in text
    assert report["code_version"] in text


def test_comparing_again_gives_the_same_numbers(folders: list[Path]) -> None:
    def without_times(report: dict[str, Any]) -> dict[str, Any]:
        return {**report, "runs": [{**row, "milliseconds_per_episode": 0} for row in report["runs"]]}

    first, _ = compare_folders(folders, device="cpu")
    second, _ = compare_folders(folders, device="cpu")
    assert without_times(first) == without_times(second)


def test_out_that_is_a_file_is_refused_before_any_work(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(SetupError, match="is a file"):
        compare_folders(folders, out=tmp_path / "out", device="cpu")


def mastaf(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)


def test_command_prints_json_and_refuses_in_one_line(
    made: World, store_path: Path, folders: list[Path], tmp_path: Path
) -> None:
    done = mastaf("compare", *folders[:2], "--episodes", 20, "--shots", 2, "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["episodes"], report["k_shot"]) == (20, 2)
    assert [row["name"] for row in report["runs"]] == ["neighbor", "mastaf"]
    other = train(made, store_path, tmp_path / "other", "episodes.n_way=3")
    done = mastaf("compare", folders[0], other, "--device", "cpu")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "mastaf: these runs cannot share episodes: episodes.n_way is 2 (neighbor) and 3 (other). "
        "Otherwise compare runs of one protocol on one manifest."
    ]
