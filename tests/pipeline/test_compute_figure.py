"""The counts of whole systems agree with the arithmetic of the field; the picture and the table say what was measured."""

import csv
import json
from pathlib import Path

import pytest
import torch

from pipeline.compute_cost import count_macs
from pipeline.compute_figure import SYSTEMS, System, bench_compute, draw_costs, measure_costs
from pipeline.settings import SetupError

CPU = torch.device("cpu")
BY_NAME = {system.name: system for system in SYSTEMS}
# Reference 8.3: multiply-accumulates of a 5-way 1-shot episode with one query, 224 x 224 pixels.
BACKBONE_GIGAS = {
    ("MASTAF-R3D", 16): 239.0,
    ("MASTAF-R3D", 8): 6 * 20.62,
    ("MASTAF-TSN", 8): 196.0,
    ("MASTAF-TSN", 16): 392.0,
    ("TRX, as published", 12): 294.0,
}
# Reference 8.3 and 12.5: projections of six videos, and a tuple attention of 2 P P 1152 for each of the five classes.
HEAD_GIGAS = {
    ("TRX, as published", 8): 6.39,
    ("TRX, as published", 12): 23.0,
    ("TRX, as published", 16): 58.1,
    ("TRX, factored", 8): 0.396 + 0.510 + 0.009 + 0.036,
    ("TRX, factored", 12): 0.623 + 0.849 + 10 * (66**2 + 220**2) * 1152e-9,
    ("TRX, factored", 16): 0.849 + 1.189 + 0.17 + 3.6,
}


def test_multiply_accumulates_of_a_product_are_counted() -> None:
    assert count_macs(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 3 * 4 * 5


@pytest.mark.parametrize(
    ("name", "frames"),
    [pytest.param(*key, marks=pytest.mark.slow if key[1] > 8 else ()) for key in BACKBONE_GIGAS],
    ids=str,
)
def test_backbones_cost_what_the_reference_says(name: str, frames: int) -> None:
    system = BY_NAME[name]
    # Another head would cost the same backbone; this one takes no time.
    (cost,) = measure_costs([frames], 1, 224, 0, CPU, [System(name, system.backbone, "neighbor", {})])
    assert cost.backbone_macs / 1e9 == pytest.approx(BACKBONE_GIGAS[name, frames], rel=0.01)


@pytest.mark.parametrize(("name", "frames"), HEAD_GIGAS, ids=str)
def test_trx_costs_what_the_reference_says(name: str, frames: int) -> None:
    (cost,) = measure_costs([frames], 1, 64, 0, CPU, [BY_NAME[name]])
    assert cost.head_macs / 1e9 == pytest.approx(HEAD_GIGAS[name, frames], rel=0.01)


@pytest.mark.slow
def test_trx_with_five_shots_costs_what_the_reference_says() -> None:
    (cost,) = measure_costs([16], 5, 64, 0, CPU, [BY_NAME["TRX, as published"]])
    assert cost.head_macs / 1e9 == pytest.approx(254.0, rel=0.01)


def test_mastaf_without_relation_maps_costs_what_the_reference_says() -> None:
    # Reference 12.1: 16 maps, each with 3 C L for its relation and C L for its average, and 12 L for the meta-learner; torch counts
    # no sums, so the reference's averages of the six videos are not in it, and the five prototypes are a product of ours.
    (cost,) = measure_costs([16], 1, 224, 0, CPU, [BY_NAME["MASTAF-R3D"]])
    channels, positions = 2048, 49
    expected = 16 * (4 * channels * positions + 12 * positions) + 5 * 5 * channels * positions
    assert cost.head_macs == pytest.approx(expected, rel=0.01)
    assert 7.03e6 - 6 * channels * positions == pytest.approx(16 * 4 * channels * positions, rel=0.01)


def test_command_writes_table_and_picture(tmp_path: Path) -> None:
    result = bench_compute("8", 1, 32, 1, "cpu", tmp_path)
    rows = list(csv.DictReader((tmp_path / "compute.csv").read_text().splitlines()))
    assert json.loads((tmp_path / "compute.json").read_text()) == result
    assert [(row["system"], int(row["num_frames"])) for row in rows] == [(system.name, 8) for system in SYSTEMS]
    assert all(float(row["milliseconds"]) > float(row["head_milliseconds"]) > 0.0 for row in rows)
    by_name = {(row["system"], row["num_frames"]): int(row["head_macs"]) for row in rows}
    assert by_name["TRX, factored", "8"] < by_name["TRX, as published", "8"] / 5
    assert (tmp_path / "compute.png").stat().st_size > 10_000


def test_counting_alone_draws_one_panel(tmp_path: Path) -> None:
    costs = measure_costs([4, 8], 1, 32, 0, CPU, [BY_NAME["MASTAF-TSN"]])
    assert costs[0].milliseconds is None
    assert len(draw_costs(costs, tmp_path / "one.png", "counted").axes) == 1


@pytest.mark.parametrize(("frames", "message"), [("8,x", "'8,x' is not a list"), ("2,8", "4 or more are needed")])
def test_odd_numbers_of_frames_are_refused(frames: str, message: str) -> None:
    with pytest.raises(SetupError, match=message):
        bench_compute(frames, 1, 32, 0, "cpu", None)
