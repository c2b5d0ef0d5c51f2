"""The picture of accuracy and cost: every method is named, no name lies on another, and no cost is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image

from pipeline.comparison_picture import FRONT_COLOUR, CostPoint, accuracy_against_cost, spread_apart


def points(count: int) -> list[CostPoint]:
    """Methods of nearly the same accuracy, the worst case for their names, and one far below."""
    generator = np.random.default_rng(0)
    accuracies = [0.2, *(0.55 + 0.01 * generator.random(count - 1))]
    return [
        CostPoint(f"method number {number}", accuracy, 0.006, int(10 ** (4 + number % 6)), 10.0 ** (number % 4 - 2))
        for number, accuracy in enumerate(accuracies)
    ]


def names_that_overlap(figure: Figure) -> list[tuple[str, str]]:
    figure.draw_without_rendering()
    texts = [
        *figure.texts,
        *(text for axes in figure.axes for text in (*axes.texts, axes.xaxis.label, axes.yaxis.label)),
    ]
    # By its letters alone: the line of a name is part of its annotation.
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts if text.get_text()]
    return [
        (first, second)
        for index, (first, box) in enumerate(boxes)
        for second, other in boxes[index + 1 :]
        if box.overlaps(other)
    ]


@pytest.mark.parametrize("count", [1, 4, 24])
def test_every_method_is_named_in_both_panels_and_no_name_lies_on_another(tmp_path: Path, count: int) -> None:
    figure = accuracy_against_cost(points(count), tmp_path / "new" / "compare.png", "5-way", chance=0.2)
    for axes in figure.axes:
        names = [text.get_text() for text in axes.texts if isinstance(text, Annotation)]
        assert names == [point.name for point in points(count)]
        assert axes.get_xscale() == "log"
    assert names_that_overlap(figure) == []
    figure_box = figure.bbox
    for text in figure.findobj(Annotation):
        assert Text.get_window_extent(text).x1 <= figure_box.x1
    with Image.open(tmp_path / "new" / "compare.png") as image:
        assert np.asarray(image.convert("L")).std() > 5.0


def test_bars_reach_as_far_as_the_intervals(tmp_path: Path) -> None:
    figure = accuracy_against_cost([CostPoint("one", 0.5, 0.1, 1000, 0.5)], tmp_path / "p.png")
    for axes in figure.axes:
        (bar,) = axes.collections
        assert isinstance(bar, LineCollection)
        (segment,) = bar.get_segments()
        assert segment[:, 1] == pytest.approx([40.0, 60.0])
        low, high = axes.get_ylim()
        assert low < 40.0
        assert high > 60.0


def test_method_without_counted_flops_stands_left_of_the_others_and_says_so(tmp_path: Path) -> None:
    figure = accuracy_against_cost(
        [CostPoint("free", 0.5, 0.01, 0, 0.5), CostPoint("dear", 0.6, 0.01, 10**6, 0.9)], tmp_path / "p.png"
    )
    first, second = figure.axes
    assert [text.get_text() for text in first.texts] == ["free (0)", "dear"]
    assert [text.get_text() for text in second.texts] == ["free", "dear"]
    places = [float(np.asarray(line.get_xdata())[0]) for line in first.get_lines() if line.get_marker() == "o"]
    assert 0.0 < places[0] < places[1]


def test_methods_that_nothing_cheaper_matches_are_dark(tmp_path: Path) -> None:
    chosen = [
        CostPoint("cheap", 0.5, 0.01, 1000, 1.0),
        CostPoint("as dear but worse", 0.4, 0.01, 1000, 1.0),
        CostPoint("dear and better", 0.6, 0.01, 9000, 9.0),
        CostPoint("dear for nothing", 0.5, 0.01, 9000, 9.0),
    ]
    figure = accuracy_against_cost(chosen, tmp_path / "p.png")
    for axes in figure.axes:
        colours = [line.get_color() for line in axes.get_lines() if line.get_marker() == "o"]
        assert [colour == FRONT_COLOUR for colour in colours] == [True, False, True, False]


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one method or more"):
        accuracy_against_cost([], tmp_path / "p.png")


def test_places_keep_their_gap_and_order_and_move_no_further_than_needed() -> None:
    assert spread_apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread_apart([0.5, 0.5, 0.1], 0.1) == pytest.approx([0.45, 0.55, 0.1])
    assert spread_apart([1.0, 0.97, 0.0], 0.1) == pytest.approx([0.95, 0.85, 0.05])
    wanted = np.random.default_rng(0).random(12).tolist()
    places = np.array(spread_apart(wanted, 0.07))
    order = np.argsort(wanted)
    assert np.diff(places[order]).min() >= 0.07 - 1e-12
    assert places.min() >= 0.035 - 1e-12
    assert places.max() <= 0.965 + 1e-12
