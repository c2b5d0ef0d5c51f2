"""The golden helper: absent families, tolerances, and that a comparison can fail."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contracts import golden
from contracts.compared import Compared


@pytest.fixture
def named_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MASTAF_GOLDEN_DIR", str(tmp_path))
    arrays: dict[str, Any] = {
        "out/x": np.array([1.0, -2.0]),
        "grad/x": np.array([1.0]),
        "grad/zero": np.array([0.5]),
        "in/n": np.arange(3),
    }
    np.savez(tmp_path / "some_family_a.npz", **arrays)
    listed = {"out/x": {"err": 1e-3, "max": 2.0}, "grad/zero": {"err": 1e-9, "max": 0.5, "zero": True}}
    (tmp_path / "tolerances.json").write_text(json.dumps({"some_family_a.npz": listed}))
    return tmp_path


def test_default_directory_is_that_of_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTAF_GOLDEN_DIR", raising=False)
    assert golden.golden_directory() == golden.DEFAULT_DIRECTORY
    assert [path.name for path in golden.family("mastaf_attention_l18")] == ["mastaf_attention_l18.npz"]


def test_absent_family_fails_in_the_repository_and_skips_in_a_named_directory(
    monkeypatch: pytest.MonkeyPatch, named_directory: Path
) -> None:
    with pytest.raises(pytest.skip.Exception, match="not part of that set"):
        golden.family("absent_")
    with pytest.raises(pytest.skip.Exception, match="not part of that set"):
        golden.load(named_directory / "absent_*.npz")
    monkeypatch.setenv("MASTAF_GOLDEN_DIR", str(golden.DEFAULT_DIRECTORY))
    with pytest.raises(pytest.fail.Exception, match="ships this family"):
        golden.family("absent_")


@pytest.mark.parametrize("exists", [False, True])
def test_named_directory_that_is_absent_or_empty_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    directory = tmp_path / "goldne"
    if exists:
        directory.mkdir()
    monkeypatch.setenv("MASTAF_GOLDEN_DIR", str(directory))
    with pytest.raises(pytest.fail.Exception, match=r"goldne.*names no directory with golden arrays"):
        golden.family("mastaf_head_")
    (case,) = golden.each_file("mastaf_head_").args[1]
    with pytest.raises(pytest.fail.Exception, match="names no directory with golden arrays"):
        golden.load(case)


def test_every_file_of_a_family_is_found(named_directory: Path) -> None:
    assert golden.family("some_family_") == [named_directory / "some_family_a.npz"]


def test_tolerance_is_the_default_or_ten_times_the_measured_error(named_directory: Path) -> None:
    assert golden.tolerance("some_family_a.npz", "out/x", 1e-5) == pytest.approx(10 * 1e-3 / 2.0)
    assert golden.tolerance("some_family_a.npz", "out/x", 1.0) == 1.0
    assert golden.tolerance("some_family_a.npz", "grad/x", 1e-4) == 1e-4
    assert golden.tolerance("another.npz", "out/x", 1e-5) == 1e-5
    (named_directory / "tolerances.json").unlink()
    assert golden.tolerance("some_family_a.npz", "out/x", 1e-5) == 1e-5


@pytest.mark.parametrize(
    ("name", "attention", "is_allowed"),
    [("mastaf_paper_new.npz", 0.999, True), ("mastaf_paper_saturated.npz", 0.96, False)],
    ids=["saturated", "not saturated"],
)
def test_gradients_are_compared_loosely_where_the_attention_is_saturated(
    named_directory: Path, name: str, attention: float, is_allowed: bool
) -> None:
    arrays: dict[str, Any] = {
        "out/A_self_query": np.array([1.0 - attention, attention]),
        "out/P": np.array([1.0]),
        "grad/f_delta_weight": np.array([1.0]),
        "grad/query": np.array([1.0]),
    }
    np.savez(named_directory / name, **arrays)
    file = Compared(named_directory / name, torch.float32)
    wrong, far = torch.tensor([1.02]), torch.tensor([1.06])
    with contextlib.nullcontext() if is_allowed else pytest.raises(AssertionError):
        file.matches("grad/f_delta_weight", wrong)
    for array, found in (("grad/f_delta_weight", far), ("grad/query", wrong)):
        with pytest.raises(AssertionError):
            file.matches(array, found)
    with pytest.raises(AssertionError):
        Compared(named_directory / name, torch.float64).matches("grad/f_delta_weight", wrong)


def test_comparison_fails_beyond_the_tolerance(named_directory: Path) -> None:
    path = named_directory / "some_family_a.npz"
    golden.assert_matches(path, "out/x", np.array([1.0, -2.009]), double=False)
    golden.assert_matches(path, "grad/x", np.array([1.00009]), double=False)
    golden.assert_matches(path, "grad/zero", np.array([0.5000009]), double=False)
    for array, wrong, double in [
        ("out/x", [1.0, -2.011], False),
        ("out/x", [1.0, -2.009], True),
        ("out/x", [1.0, float("nan")], False),
        ("grad/x", [1.00011], False),
        ("grad/zero", [0.500002], False),
        ("in/n", [0, 1, 3], False),
    ]:
        with pytest.raises(AssertionError):
            golden.assert_matches(path, array, np.array(wrong), double=double)
