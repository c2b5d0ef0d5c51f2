"""The demo's orchestration on little data; what its numbers should be is measured by the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pipeline.demo import ROWS, SHOTS, paired_difference, run_demo
from pipeline.settings import SetupError


@pytest.mark.slow
def test_quick_demo_writes_report_pictures_and_every_row(tmp_path: Path) -> None:
    facts = run_demo(tmp_path / "demo", quick=True)
    stored = json.loads((tmp_path / "demo/report.json").read_text())
    assert stored["results"] == facts["results"]
    assert [(row["title"], row["k_shot"]) for row in stored["results"]] == [
        (title, k) for title, _, _ in ROWS for k in SHOTS
    ]
    for k_shot in SHOTS:
        assert len({row["episode_hash"] for row in stored["results"] if row["k_shot"] == k_shot}) == 1
    trained = {row["store_fingerprint"] for row in stored["results"] if row["title"] != "untrained backbone"}
    assert len(trained) == 1, "all trained rows are scored on the same re-extracted cubes"
    text = (tmp_path / "demo/report.md").read_text()
    for name in ("classes.png", "attention.png", "accuracy.png"):
        assert f"({name})" in text
        with Image.open(tmp_path / "demo" / name) as picture:
            assert min(picture.size) > 400
            darkest, brightest = picture.convert("L").getextrema()
            assert isinstance(darkest, int)
            assert isinstance(brightest, int)
            assert brightest - darkest > 100
    with pytest.raises(SetupError, match="not empty"):
        run_demo(tmp_path / "demo", quick=True)


def test_paired_difference_is_narrower_than_unpaired_where_methods_agree() -> None:
    first = {"episode_hash": "h", "per_episode": [0.2, 0.8, 0.4, 1.0]}
    second = {"episode_hash": "h", "per_episode": [0.2, 0.6, 0.4, 1.0]}
    difference, width = paired_difference(first, second)
    assert difference == pytest.approx(0.05)
    assert width == pytest.approx(1.96 * (0.2**2 * 3 / 16) ** 0.5 / 2)
