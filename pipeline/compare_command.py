"""`mastaf compare`: from options to a table, and to files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoint import write_file
from pipeline.comparison import Asked, Comparison, compare_runs
from pipeline.comparison_report import episode_arrays, to_csv, to_json
from pipeline.comparison_rows import Row, recipe_rows, run_rows
from pipeline.comparison_table import counted, to_text
from pipeline.console import progress, say, shortened
from pipeline.output_folder import check_output_folder
from pipeline.setup import choose_device


def compare_folders(
    runs: Sequence[Path],
    split: str | None = None,
    episodes: int | None = None,
    shots: int | None = None,
    queries: int | None = None,
    seed: int | None = None,
    store_path: str | None = None,
    manifest: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    on_scored: Callable[[Comparison], None] = lambda comparison: None,
) -> tuple[dict[str, Any], str]:
    """Compare runs, writing files if asked to; `on_scored` is called before.

    Returns:
        The JSON-able report and the table as text.

    Raises:
        SetupError: as `compare_runs`, or `out` is no folder to write into.
    """
    if out is not None:
        check_output_folder(out)
    asked = Asked(split, episodes, shots, queries, seed, store_path, manifest)
    with progress(f"compare {counted(len(runs), 'run')}") as on_progress:
        comparison = compare_runs(runs, asked, choose_device(device), on_progress)
    left_out = comparison.episodes.left_out
    if left_out:
        say(
            f"note: {counted(len(left_out), 'video')} of {comparison.episodes.split} {'is' if len(left_out) == 1 else 'are'} not in "
            f"all stores, so no episode uses {'it' if len(left_out) == 1 else 'them'}: "
            f"{shortened([f'{name} ({reason})' for name, reason in sorted(left_out.items())])}; split hash "
            f"{comparison.episodes.whole_split_hash[:12]} -> {comparison.episodes.manifest.split_hash[:12]}"
        )
    on_scored(comparison)
    rows, recipes = run_rows(comparison), recipe_rows(comparison)
    report = to_json(comparison, rows, recipes)
    if out is not None:
        write_comparison(out, comparison, report, rows, recipes)
    return report, to_text(comparison, rows, recipes)


def write_comparison(
    folder: Path, comparison: Comparison, report: dict[str, Any], rows: Sequence[Row], recipes: Sequence[Row]
) -> None:
    """Write compare.json, compare.csv, episodes.npz and compare.png."""
    # Imported here: a table on the terminal needs no matplotlib.
    from pipeline.comparison_picture import CostPoint, accuracy_against_cost

    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "compare.json", (json.dumps(report, indent=2) + "\n").encode())
    write_file(folder / "compare.csv", to_csv(comparison, rows, recipes).encode())
    arrays = io.BytesIO()
    np.savez_compressed(arrays, allow_pickle=False, **episode_arrays(comparison))
    write_file(folder / "episodes.npz", arrays.getvalue())
    protocol = comparison.episodes.protocol
    accuracy_against_cost(
        [
            CostPoint(row.name, row.accuracy, row.interval95, row.cost.flops, row.cost.milliseconds)
            for row in recipes or rows
        ],
        folder / "compare.png",
        title=f"{protocol.n_way}-way {protocol.k_shot}-shot accuracy on {comparison.episodes.split}, "
        f"{comparison.episodes.num_episodes} episodes",
        chance=1.0 / protocol.n_way,
        device=str(comparison.device),
    )
    say(f"written: {folder}/compare.json, compare.csv, compare.png, episodes.npz")
