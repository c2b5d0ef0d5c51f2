"""The demo's orchestration on little data; what its numbers should be is measured by the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pipeline.demo import ROWS, SHOTS, run_demo
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
