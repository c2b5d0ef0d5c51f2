"""What `mastaf compare` makes of the scores: rows, means over seeds, files, and the command itself."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contracts.made_runs import NUM_EPISODES, MadeRuns, compared, train_run
from pipeline.compare_command import compare_folders
from pipeline.comparison import Comparison
from pipeline.comparison_report import to_json
from pipeline.comparison_rows import class_accuracies, recipe_rows, recipes, run_rows
from pipeline.comparison_table import to_text
from pipeline.settings import SetupError
from pipeline.statistics import mean_and_interval

pytestmark = pytest.mark.usefixtures("one_thread", "few_timed_calls")
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def test_rows_hold_accuracy_difference_and_intervals(found: Comparison) -> None:
    rows = run_rows(found)
    assert recipe_rows(found) == []
    first = rows[0]
    assert first.difference is None
    assert first.class_difference is None
    assert first.adjusted_p_value is None
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
        assert row.difference.p_value is not None
        assert row.adjusted_p_value >= row.difference.p_value
        assert row.class_difference is not None
        assert row.class_difference.low <= row.difference.mean <= row.class_difference.high


def test_outcomes_of_queries_add_up_to_the_accuracy(found: Comparison) -> None:
    outcomes, sampler = found.runs[0].score.outcomes, found.episodes.sampler
    assert outcomes is not None
    assert outcomes.is_right.shape == outcomes.query_classes.shape == (NUM_EPISODES, 4)
    assert tuple(outcomes.is_right.mean(axis=1)) == found.runs[0].score.per_episode
    for index in (0, 17, NUM_EPISODES - 1):
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


def test_runs_apart_in_seeds_alone_get_a_mean(made: MadeRuns) -> None:
    found = compared([made.heads[0], made.heads[1], *made.seeds, made.heads[2]])
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
    report, text = compare_folders([made.heads[0], made.heads[1], *made.seeds], device="cpu")
    assert report["recipes"][1]["runs"] == ["mastaf", "mastaf1", "mastaf2"]
    assert report["recipes"][1]["seed_spread"] == mean.seeds.spread
    assert [row["training_seed"] for row in report["runs"]] == [0, 0, 1, 2]
    names = [line.split("  ")[0] for line in text.splitlines()]
    assert names.index(" mastaf, 3 seeds") < next(i for i, line in enumerate(text.splitlines()) if "   mastaf1 " in line)  # fmt: skip


def test_runs_with_the_same_seeds_are_no_further_seeds(
    made: MadeRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = Path(shutil.copytree(made.heads[1], tmp_path / "twin"))
    found = compared([made.heads[1], twin, made.seeds[0]])
    assert recipe_rows(found) == []
    assert "mastaf, twin, mastaf1 share recipe and seeds" in capsys.readouterr().err


def test_another_option_is_another_recipe(made: MadeRuns, tmp_path: Path) -> None:
    other = train_run(made.world, made.store_path, tmp_path / "other", "training.seed=1", "training.learning_rate=0.02")
    assert len(recipes(compared([made.heads[1], other]).runs)) == 2


def test_runs_of_one_name_are_called_by_their_paths(made: MadeRuns, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(made.heads[0], tmp_path / "neighbor"))
    found = compared([made.heads[0], twin])
    assert [run.name for run in found.runs] == [str(made.heads[0]), str(twin)]
    second = run_rows(found)[1]
    assert second.difference is not None
    assert (second.difference.mean, second.difference.interval95, second.difference.p_value) == (0.0, 0.0, 1.0)
    assert second.class_difference is not None
    assert (second.class_difference.low, second.class_difference.high) == (0.0, 0.0)


def test_files_hold_what_was_printed(made: MadeRuns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, text = compare_folders(made.heads, out=tmp_path / "new" / "out", device="cpu")
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
        assert arrays["accuracy"].shape == (4, NUM_EPISODES)
        assert arrays["accuracy"].mean(axis=1) == pytest.approx([row["accuracy"] for row in report["runs"]])
        assert np.array_equal(arrays["is_right"].mean(axis=2), arrays["accuracy"])
        assert list(arrays["runs"]) == ["neighbor", "mastaf", "self", "cross"]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    for row in report["runs"]:
        assert f"{100 * row['accuracy']:.2f} ± {100 * row['interval95']:.2f}" in text
    for digest in (report["split_hash"], report["episode_hash"], report["runs"][0]["store_fingerprint"]):
        assert digest[:12] in text
    assert report["code_version"] in text
    assert "adjusted for the number of rows after Holm" in text
    for row in report["runs"][1:]:
        p_value = row["difference"]["p_value_holm"]
        assert ("< 0.0001" if p_value < 0.0001 else f"{p_value:.4f}") in text


def test_comparing_again_gives_the_same_numbers(made: MadeRuns) -> None:
    def without_times(report: dict[str, Any]) -> dict[str, Any]:
        return {**report, "runs": [{**row, "milliseconds_per_episode": 0} for row in report["runs"]]}

    first, _ = compare_folders(made.heads, device="cpu")
    second, _ = compare_folders(made.heads, device="cpu")
    assert without_times(first) == without_times(second)


def test_out_that_is_a_file_is_refused_before_any_work(made: MadeRuns, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(SetupError, match="is a file"):
        compare_folders(made.heads, out=tmp_path / "out", device="cpu")
    with pytest.raises(SetupError, match="nothing can be written into"):
        compare_folders([tmp_path / "no run"], out=tmp_path / "out" / "within", device="cpu")


def test_difference_without_a_p_value_is_a_dash_and_null(found: Comparison) -> None:
    # The first run's accuracies lowered by one number: its differences never vary.
    first = found.runs[0]
    lower = tuple(value - 0.25 for value in first.score.per_episode)
    second = replace(first, name="lower", score=replace(first.score, per_episode=lower))
    rows = run_rows(replace(found, runs=(first, second)))
    assert to_json(found, rows, [])["runs"][1]["difference"]["p_value_holm"] is None
    assert to_json(found, rows, [])["runs"][1]["difference"]["p_value"] is None
    (line,) = [line for line in to_text(found, rows, []).splitlines() if line.startswith(" lower ")]
    assert " - " in line


def test_one_run_has_no_columns_of_differences(made: MadeRuns) -> None:
    _, text = compare_folders(made.heads[:1], device="cpu")
    assert "difference" not in text
    assert "Holm" not in text
    assert "milli-" in text


def mastaf(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)


@pytest.mark.slow
def test_command_prints_json_and_refuses_in_one_line(made: MadeRuns, tmp_path: Path) -> None:
    done = mastaf("compare", *made.heads[:2], "--episodes", 20, "--shots", 2, "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["episodes"], report["k_shot"]) == (20, 2)
    assert [row["name"] for row in report["runs"]] == ["neighbor", "mastaf"]
    other = train_run(made.world, made.store_path, tmp_path / "other", "episodes.n_way=3")
    done = mastaf("compare", made.heads[0], other, "--device", "cpu")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "mastaf: these runs cannot share episodes: episodes.n_way is 2 (neighbor) and 3 (other). "
        "Otherwise compare runs of one protocol on one manifest."
    ]
