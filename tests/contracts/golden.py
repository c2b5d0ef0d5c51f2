"""Where the golden arrays lie, which files a family has, and how closely a result must match.

The directory comes from the environment variable MASTAF_GOLDEN_DIR (default `tests/golden`), so that another set of
arrays in the same format can be run. A family that is absent from a named directory is a skip; absent from
`tests/golden` it is a failure, and so is a named directory that does not exist or is empty.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DEFAULT_DIRECTORY = Path(__file__).resolve().parents[1] / "golden"

# Recommended acceptance of the golden arrays (largest difference relative to the largest value of the array).
FLOAT64 = 1e-6
FLOAT32_OUTPUT = 1e-5
FLOAT32_GRADIENT = 1e-4
# For arrays whose exact value is zero for mathematical reasons.
ZERO_ABSOLUTE = 1e-6
# A stored value below this is the rounding residue of an exact zero, listed as such or not.
ZERO_RESIDUE = 1e-12


def golden_directory() -> Path:
    """The directory whose arrays are compared."""
    return Path(os.environ.get("MASTAF_GOLDEN_DIR") or DEFAULT_DIRECTORY)


def family(prefix: str, suffix: str = ".npz") -> list[Path]:
    """Every file of a family, in order of name; for use inside a test.

    Args:
        prefix: beginning of the file names, for example "mastaf_head_".
        suffix: ending of the file names.

    Returns:
        One path or more. An absent family skips the test (named directory) or fails it (`tests/golden`, or no directory).
    """
    files = _find(prefix, suffix)
    if not files:
        _report_absence(prefix, suffix)
    return files


def each_file(prefix: str, suffix: str = ".npz") -> pytest.MarkDecorator:
    """Parametrize a test over every file of a family, as the argument `golden_file`.

    Unlike `family` this is safe while tests are collected: an absent family leaves one case, which `load` or
    `family` turns into the skip or the failure when the test runs.
    """
    files = _find(prefix, suffix) or [golden_directory() / f"{prefix}*{suffix}"]
    return pytest.mark.parametrize("golden_file", files, ids=[path.name.removesuffix(suffix) for path in files])


def load(path: Path) -> dict[str, Any]:
    """Every array of a file by its full name ("in/support", "grad/query"...)."""
    if not path.exists():
        _report_absence(path.stem.rstrip("*"), path.suffix)
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def group(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The arrays whose name begins with `prefix` and a slash, by the rest of their name."""
    return {name.removeprefix(f"{prefix}/"): value for name, value in arrays.items() if name.startswith(f"{prefix}/")}


def tolerance(file_name: str, array: str, default: float) -> float:
    """Largest allowed error relative to the largest value of the array, for a float32 result.

    Args:
        file_name: name of the golden file.
        array: full name of the array.
        default: the recommended tolerance of that kind of array.

    Returns:
        `default`, or ten times the measured error of a float32 evaluation where that is larger.
    """
    listed = _listed(file_name, array)
    largest = float(listed.get("max", 0.0))
    measured = float(listed.get("err", 0.0)) / largest if largest > 0.0 and not listed.get("zero", False) else 0.0
    return max(default, 10.0 * measured)


def is_exact_zero(file_name: str, array: str, expected: Any) -> bool:
    """Whether the exact value of the array is zero, so that only an absolute tolerance makes sense."""
    if np.asarray(expected).dtype.kind in "iub":
        return False
    return bool(_listed(file_name, array).get("zero", False)) or bool(np.abs(expected).max(initial=0.0) < ZERO_RESIDUE)


def assert_matches(path: Path, array: str, result: Any, *, double: bool, default: float | None = None) -> None:
    """Compare a result with the array of that name at the recommended tolerance.

    Args:
        path: the golden file.
        array: full name of the array; a name that begins with "grad" has the tolerance of gradients.
        result: what was computed, a NumPy array of the same number of elements in the same order.
        double: whether it was computed in float64.
        default: another float32 tolerance than the recommended one.
    """
    expected = load(path)[array]
    found = np.asarray(result, dtype=np.float64).reshape(expected.shape)
    if expected.dtype.kind in "iub":
        np.testing.assert_array_equal(found, expected, err_msg=f"{path.name} {array}")
        return
    assert np.isfinite(found).all(), f"{path.name} {array}: not finite"
    error = float(np.abs(found - expected).max(initial=0.0))
    if is_exact_zero(path.name, array, expected):
        assert error <= ZERO_ABSOLUTE, f"{path.name} {array}: {error:.3g} where the exact value is zero"
        return
    recommended = default or (FLOAT32_GRADIENT if array.startswith("grad") else FLOAT32_OUTPUT)
    allowed = FLOAT64 if double else tolerance(path.name, array, recommended)
    relative = error / float(np.abs(expected).max())
    assert relative <= allowed, f"{path.name} {array}: relative error {relative:.3g}, allowed {allowed:.3g}"


def _find(prefix: str, suffix: str) -> list[Path]:
    return sorted(path for path in golden_directory().glob(f"{prefix}*{suffix}") if path.is_file())


def _report_absence(prefix: str, suffix: str) -> None:
    directory = golden_directory()
    message = f"no file {prefix}*{suffix} in {directory}"
    if not directory.is_dir() or next(directory.iterdir(), None) is None:
        pytest.fail(f"{message}: MASTAF_GOLDEN_DIR names no directory with golden arrays", pytrace=False)
    if directory.resolve() == DEFAULT_DIRECTORY.resolve():
        pytest.fail(f"{message}: the repository ships this family", pytrace=False)
    pytest.skip(f"{message} (MASTAF_GOLDEN_DIR): this family is not part of that set")


def _listed(file_name: str, array: str) -> dict[str, Any]:
    path = golden_directory() / "tolerances.json"
    if not path.exists():
        return {}
    entries: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text())
    return entries.get(file_name, {}).get(array, {})
