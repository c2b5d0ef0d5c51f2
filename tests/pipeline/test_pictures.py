"""Pictures are written in the expected size, are not blank, and carry their labels."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from pipeline.pictures import AccuracyRow, AttentionRow, accuracy_bars, attention_over_frames, contact_sheet
from pipeline.strips import DOTS_PER_INCH, join_frames, overlay_heat, pick_frames, upsample_attention


def noise_frames(seed: int, num_frames: int = 12, side: int = 32) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (num_frames, side, side, 3)).astype(np.uint8)


def even_attention(shape: tuple[int, int, int] = (4, 4, 4)) -> np.ndarray:
    return np.full(shape, 1.0 / np.prod(shape))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def check_png(path: Path, figure: Figure) -> np.ndarray:
    """The written pixels, of the figure's size and not blank."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    width, height = figure.get_size_inches()
    assert abs(pixels.shape[1] - width * DOTS_PER_INCH) <= 1
    assert abs(pixels.shape[0] - height * DOTS_PER_INCH) <= 1
    assert pixels.std() > 10.0
    return pixels


def texts_that_overlap(figure: Figure) -> list[tuple[str, str]]:
    figure.draw_without_rendering()
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in figure.findobj(Text)
        if text.get_text() and text.get_visible()
    ]
    return [
        (first, second)
        for index, (first, box) in enumerate(boxes)
        for second, other in boxes[index + 1 :]
        if box.overlaps(other) and first != second
    ]


def test_contact_sheet_shows_every_class_under_its_group(tmp_path: Path) -> None:
    frames = {name: noise_frames(seed) for seed, name in enumerate(("grow", "shrink", "hop"))}
    groups = {"grow": "training", "shrink": "training", "hop": "test"}
    figure = contact_sheet(frames, tmp_path / "new" / "sheet.png", groups, {"hop": "like a ball"}, title="Classes")
    check_png(tmp_path / "new" / "sheet.png", figure)
    assert {"grow", "shrink", "hop", "training", "test", "like a ball", "Classes"} <= set(texts(figure))
    assert len(figure.axes) == len(frames)
    assert texts_that_overlap(figure) == []


def test_contact_sheet_grows_with_the_classes_and_takes_clips_of_few_frames(tmp_path: Path) -> None:
    heights = []
    for count in (2, 6):
        frames = {f"class_{index}": noise_frames(index, num_frames=3) for index in range(count)}
        heights.append(contact_sheet(frames, tmp_path / "sheet.png").get_size_inches()[1])
    assert heights[0] < heights[1]


def test_attention_picture_has_a_heat_strip_below_each_clip_and_a_colour_bar(tmp_path: Path) -> None:
    rows = [
        AttentionRow("query: hop", noise_frames(0), even_attention()),
        AttentionRow("support: hop", noise_frames(1), np.random.default_rng(0).dirichlet(np.ones(27)).reshape(3, 3, 3)),
        AttentionRow("plain", noise_frames(2), None),
    ]
    figure = attention_over_frames(rows, tmp_path / "attention.png", title="Where it looks")
    check_png(tmp_path / "attention.png", figure)
    assert len(figure.axes) == 2 + 2 + 1 + 1  # strips, and the colour bar
    assert {"query: hop", "support: hop", "plain", "Where it looks"} <= set(texts(figure))
    assert any("multiple of an even spread" in text for text in texts(figure))
    assert texts_that_overlap(figure) == []


def test_peak_of_the_attention_lands_on_its_place_in_time_and_space() -> None:
    attention = np.zeros((2, 4, 4))
    attention[1, 3, 0] = 1.0
    heat = upsample_attention(attention, (8, 32, 32))
    assert heat.shape == (8, 32, 32)
    frame, row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert frame >= 4
    assert row >= 24
    assert column < 8


def test_upsampling_keeps_an_even_map_even_and_takes_a_single_time_step() -> None:
    np.testing.assert_allclose(upsample_attention(np.full((1, 7, 7), 0.3), (8, 30, 40)), 0.3)


def test_overlay_is_brighter_where_attention_is_high() -> None:
    frames = np.full((1, 8, 8, 3), 100, np.uint8)
    heat = np.zeros((1, 8, 8))
    heat[0, :, 4:] = 2.0
    shown = overlay_heat(frames, heat, Normalize(0.0, 2.0)).astype(float)
    assert shown[0, :, 4:].mean() > shown[0, :, :4].mean() + 40.0


def test_strip_puts_frames_side_by_side_and_keeps_first_and_last() -> None:
    frames = noise_frames(0, num_frames=12)
    chosen = pick_frames(frames, 4)
    np.testing.assert_array_equal(chosen[[0, -1]], frames[[0, -1]])
    strip = join_frames(chosen)
    np.testing.assert_array_equal(strip[:, :32], frames[0])
    np.testing.assert_array_equal(strip[:, -32:], frames[-1])


def test_accuracy_bars_have_intervals_a_legend_and_a_chance_line(tmp_path: Path) -> None:
    rows = [
        AccuracyRow(name, shots, accuracy, 0.012)
        for name, accuracies in (("untrained backbone", (0.21, 0.24)), ("MASTAF, end to end", (0.52, 0.71)))
        for shots, accuracy in zip((1, 5), accuracies, strict=True)
    ]
    figure = accuracy_bars(rows, tmp_path / "bars.png", chance=0.2, title="Unseen classes")
    check_png(tmp_path / "bars.png", figure)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(legend) == ["1-shot", "5-shot", "chance, 20 %"]
    axes = figure.axes[0]
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert sorted(round(float(bar.get_width()), 6) for bar in bars) == [21.0, 24.0, 52.0, 71.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["untrained backbone", "MASTAF, end to end"]
    assert len(axes.containers) == 4  # two sets of bars, two sets of intervals
    assert "71.0 ± 1.2 %" in texts(figure)
    assert texts_that_overlap(figure) == []


def test_accuracy_bars_take_a_single_method_and_near_certain_scores(tmp_path: Path) -> None:
    figure = accuracy_bars([AccuracyRow("MASTAF", 5, 0.99, 0.002)], tmp_path / "bars.png")
    check_png(tmp_path / "bars.png", figure)
    assert figure.axes[0].get_xticks().max() <= 100.0


def test_wrong_inputs_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="query: frames are float64"):
        AttentionRow("query", np.zeros((2, 8, 8, 3)), None)
    with pytest.raises(ValueError, match=r"query: attention \(4, 4\)"):
        AttentionRow("query", noise_frames(0), np.ones((4, 4)))
    with pytest.raises(ValueError, match=r"MASTAF: accuracy 52\.0"):
        AccuracyRow("MASTAF", 1, 52.0, 1.2)
    with pytest.raises(ValueError, match="one class or more"):
        contact_sheet({}, tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="one row or more"):
        accuracy_bars([], tmp_path / "bars.png")
    with pytest.raises(ValueError, match="one row or more"):
        attention_over_frames([], tmp_path / "attention.png")
