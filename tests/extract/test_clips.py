"""Frame indices: the published formulas, the time axis, and where the draws come from."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contracts.golden import each_file, family
from extract.clips import (
    POLICIES,
    VideoTooShortError,
    Window,
    guarded_window,
    jitter_ranges,
    on_axis,
    sample_frames,
    short_indices,
    spread,
    view_generator,
)
from extract.config import SamplingConfig

# Written down once: another machine or version must draw the same.
GOLDEN_INTEGERS = [2, -1, 3589574338689127788]
GOLDEN_SHARES = [0.6879293653386611, 0.800967435909638]


class CornerDraws:
    """Answers the draws with given numbers and remembers the inclusive ranges that were asked for."""

    def __init__(self, *answers: int) -> None:
        self.answers: Iterator[int] = iter(answers)
        self.ranges: list[list[int]] = []

    def integers(self, low: int, high: int) -> int:
        self.ranges.append([low, high - 1])
        answer = next(self.answers)
        assert low <= answer < high
        return answer


class NoDraws:
    """Fails where a formula should be fixed."""

    def integers(self, low: int, high: int) -> int:
        raise AssertionError(f"a draw of [{low}, {high}) in a fixed formula")


def indices(policy: str, row: dict[str, Any], view: int, draws: CornerDraws | NoDraws) -> list[int]:
    result: list[int] = POLICIES[policy](row["n_frames"], row["seq_len"], view, draws).tolist()
    return result


def check_released_mastaf(row: dict[str, Any]) -> int:
    expected = row["mastaf_train_and_test"]
    if expected["dropped_by_reader"]:
        with pytest.raises(VideoTooShortError):
            short_indices(row["n_frames"], row["seq_len"], "drop")
        return 1
    whole = spread(Window(0, row["n_frames"] - 1), row["seq_len"]).tolist()
    assert indices("reference", row, 0, NoDraws()) == indices("even", row, 1, NoDraws()) == whole
    if not expected["random"]:
        for policy in ("reference", "reference_test_jitter"):
            assert [indices(policy, row, view, NoDraws()) for view in (0, 1)] == [expected["indices"]] * 2
        return 2
    for case in expected["cases"]:
        for policy, view in (("reference", 1), ("reference_test_jitter", 0), ("reference_test_jitter", 3)):
            draws = CornerDraws(case["start"], case["end"])
            assert indices(policy, row, view, draws) == case["indices"], (row["n_frames"], case)
            assert draws.ranges == [expected["start_range"], expected["end_range"]]
    return len(expected["cases"])


def check_trx(row: dict[str, Any]) -> int:
    expected = row["trx"]
    for policy in ("trx", "ta2n"):  # they differ only where the outcome is the same
        if not expected["dropped_by_reader"] or row["n_frames"] > 2:
            assert indices(policy, row, 0, NoDraws()) == expected["test_indices"], row
    if not expected["train_random"]:
        assert indices("trx", row, 1, NoDraws()) == expected["train_indices"]
        return 2
    for case in expected["train_cases"]:
        for policy in ("trx", "ta2n"):
            draws = CornerDraws(case["drawn_start"], case["drawn_end"])
            assert indices(policy, row, 1, draws) == case["indices"], (row["n_frames"], case)
            assert draws.ranges == [expected["train_start_range"], expected["train_end_range"]]
    return len(expected["train_cases"])


@each_file("frame_indices", ".json")
def test_frame_indices_parity_with_golden(golden_file: Path) -> None:
    if not golden_file.exists():
        family("frame_indices", ".json")  # reports the absence
    rows = json.loads(golden_file.read_text())["rows"]
    num_checked = 0
    for row in rows:
        num_checked += check_released_mastaf(row) + check_trx(row)
    assert num_checked >= 2 * len(rows) > 0


@pytest.mark.parametrize(
    ("window", "num_frames", "expected"),
    [
        (Window(0, 99), 16, [0, 6, 13, 19, 26, 33, 39, 46, 52, 59, 66, 72, 79, 85, 92, 99]),
        (Window(5, 94), 16, [5, 10, 16, 22, 28, 34, 40, 46, 52, 58, 64, 70, 76, 82, 88, 94]),
        (Window(0, 16), 16, [*range(15), 16]),
        (Window(0, 19), 16, [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 19]),
        (Window(1, 28), 8, [1, 4, 8, 12, 16, 20, 24, 28]),
    ],
)
def test_spread_gives_the_published_vectors(window: Window, num_frames: int, expected: list[int]) -> None:
    assert spread(window, num_frames).tolist() == expected


def test_spread_ends_exactly_at_the_window_end() -> None:
    for end in range(1, 400):
        for num_frames in (2, 7, 8, 16, 32):
            assert spread(Window(0, end), num_frames)[-1] == end


@pytest.mark.parametrize(
    ("num_available", "pad"), [(16, 0), (17, 0), (18, 1), (19, 1), (21, 2), (23, 3), (25, 4), (26, 5), (500, 5)]
)
def test_jitter_reaches_at_most_five_frames(num_available: int, pad: int) -> None:
    ranges = jitter_ranges(num_available, 16)
    assert (ranges.start.high if ranges else 0) == pad
    if ranges:
        assert (ranges.start.low, ranges.end.low, ranges.end.high) == (0, num_available - 1 - pad, num_available - 1)


def test_short_window_is_reset_to_the_whole_video() -> None:
    assert guarded_window(Window(1, 8), 10, 8) == Window(0, 9)
    assert guarded_window(Window(1, 9), 11, 8) == Window(1, 9)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_stays_inside_the_video_and_ascends(policy: str) -> None:
    for num_available in (1, 2, 3, 8, 9, 17, 40):
        for num_frames in (1, 2, 8):
            if num_available < num_frames:
                continue
            for view in range(4):
                chosen = POLICIES[policy](num_available, num_frames, view, view_generator(0, "v", view))
                assert chosen.shape == (num_frames,)
                assert chosen.dtype == np.int64
                assert chosen.min() >= 0
                assert chosen.max() < num_available
                assert (np.diff(chosen) >= 0).all()


@pytest.mark.parametrize("policy", ["even", "reference", "trx", "ta2n"])
@pytest.mark.parametrize("num_frames", [1, 8])
def test_view_zero_draws_nothing(policy: str, num_frames: int) -> None:
    POLICIES[policy](50, num_frames, 0, NoDraws())


def test_short_videos_are_padded_or_looped_or_refused() -> None:
    assert short_indices(3, 8, "pad").tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert short_indices(3, 8, "loop").tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    for policy in ("drop", "fail"):
        with pytest.raises(VideoTooShortError, match="3 frames, fewer than num_frames = 8"):
            short_indices(3, 8, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_time_axis_equals_index_axis_on_a_constant_rate(policy: str) -> None:
    sampling = SamplingConfig.model_validate({"policy": policy})
    for rate, first, tick in ((25, 0.0, 0.0), (30000 / 1001, 1.4, 1e-3), (10, -0.3, 1 / 90000), (60, 0.0, 1e-3)):
        seconds = first + np.arange(83) / rate
        if tick:
            seconds = np.round(seconds / tick) * tick
        for view in range(3):
            draws = [view_generator(7, "video", view) for _ in range(2)]
            by_index = sample_frames(seconds, sampling, view, draws[0])
            by_time = sample_frames(seconds, sampling.model_copy(update={"axis": "time"}), view, draws[1])
            np.testing.assert_array_equal(by_index, by_time)


def test_time_axis_follows_the_clock_on_a_variable_rate() -> None:
    seconds = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 4.0, 7.0])
    assert on_axis(np.arange(10), seconds, "index").tolist() == list(range(10))
    # Moments are 0, 7/9, ..., 7; e.g. 14/9 is 0.86 after frame 7 and 2.4 before frame 8.
    assert on_axis(np.arange(10), seconds, "time").tolist() == [0, 7, 7, 7, 8, 8, 8, 8, 9, 9]


def test_time_axis_takes_the_earlier_frame_of_a_tie() -> None:
    seconds = np.array([0.0, 0.5, 1.5, 2.0, 4.0])  # the moments are 0, 1, 2, 3, 4
    assert on_axis(np.arange(5), seconds, "time").tolist() == [0, 1, 3, 3, 4]


def test_frames_with_equal_times_are_no_trouble() -> None:
    assert on_axis(np.arange(4), np.zeros(4), "time").tolist() == [0, 0, 0, 0]


def test_draws_depend_on_seed_video_and_view_alone() -> None:
    def first(seed: int, video_id: str, view: int) -> int:
        return int(view_generator(seed, video_id, view).integers(0, 2**62))

    assert first(1, "a", 2) == first(1, "a", 2)
    others = [
        first(1, "a", 2),
        first(2, "a", 2),
        first(1, "b", 2),
        first(1, "a", 3),
        first(1, "a2", 2),
        first(12, "a", 2),
    ]
    assert len(set(others)) == len(others)
    draws = view_generator(0, "video", 1)
    assert [draws.integers(0, 10), draws.integers(-3, 3), draws.integers(0, 2**62)] == GOLDEN_INTEGERS
    assert [draws.random(), draws.random()] == GOLDEN_SHARES
    assert first(0, "odd\udcff name", 0) >= 0


def test_words_that_would_favour_small_numbers_are_drawn_again() -> None:
    draws = view_generator(0, "video", 1)
    words = iter([2**64 - 1, 2**64 - 6, 17])  # 2**64 is 6 modulo 10, so the last six words are one round too many
    draws._word = lambda: next(words)  # type: ignore[method-assign]
    assert draws.integers(5, 15) == 5 + 7
    assert next(words, None) is None


def test_draws_are_even_and_stay_inside() -> None:
    draws = view_generator(3, "video", 2)
    counts = np.bincount([draws.integers(0, 6) for _ in range(12_000)], minlength=6)
    assert counts.shape == (6,)
    assert (np.abs(counts - 2000) < 210).all()  # five standard deviations are 204
    shares = np.array([draws.random() for _ in range(12_000)])
    assert shares.min() >= 0
    assert shares.max() < 1
    assert abs(shares.mean() - 0.5) < 0.0132  # five standard deviations
    with pytest.raises(ValueError, match=r"a draw from \[3, 3\)"):
        draws.integers(3, 3)


def test_global_random_state_is_neither_read_nor_changed() -> None:
    sampling = SamplingConfig(policy="reference", num_views=4)
    before = (random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist())
    chosen = sample_frames(np.arange(90.0), sampling, 3, view_generator(0, "v", 3))
    assert (random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist()) == before
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    np.testing.assert_array_equal(chosen, sample_frames(np.arange(90.0), sampling, 3, view_generator(0, "v", 3)))


def test_crop_larger_than_the_resized_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="crop_size 224 is larger than resize_size 200"):
        SamplingConfig(resize_size=200)
    with pytest.raises(ValueError, match="frames_per_clip"):
        SamplingConfig.model_validate({"frames_per_clip": 8})
