"""`mastaf train` and `mastaf evaluate`: from options to a run and its score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.load import find_recipe, load_config
from pipeline.console import progress, say
from pipeline.scoring import evaluate_run, load_run
from pipeline.settings import SetupError
from pipeline.setup import choose_device
from pipeline.training import train


def train_recipe(
    recipe: str, out: Path | None, resume: bool, device: str, overrides: tuple[str, ...]
) -> dict[str, Any]:
    """Train a recipe; the run card."""
    path = find_recipe(recipe)
    config = load_config(path, overrides)
    folder = out or Path("runs") / path.stem
    chosen = choose_device(device)
    if config.training.mode == "end_to_end" and config.backbone.weights == "none":
        say(f"warning: backbone {config.backbone.name} starts untrained (backbone.weights = none)")
    with progress(f"train {config.head.name}") as on_progress:

        def report(line: Mapping[str, Any]) -> None:
            if line["kind"] == "step":
                on_progress(int(line["episode"]), config.training.episodes)
            else:
                say(describe_validation(line))

        card = train(config, folder, chosen, resume, report)
    if card["val_accuracy"] is not None:
        say(
            f"best: {100 * card['val_accuracy']:.2f} ± {100 * card['val_interval95']:.2f} % on val "
            f"after {card['best_episode']} episodes ({card['seconds']:.0f} s)"
        )
    if card["test_selected_accuracy_published_protocol"] is not None:
        say(
            f"test-selected, as the published code reports it (not an honest estimate): "
            f"{100 * card['test_selected_accuracy_published_protocol']:.2f} %"
        )
    say(f"run: {folder}. Score it: mastaf evaluate {folder} --split test")
    return card


def describe_validation(line: Mapping[str, Any]) -> str:
    """One readable line of a validation record."""
    parts = [f"after {line['episode']} episodes"]
    if "val_accuracy" in line:
        parts.append(f"val {100 * line['val_accuracy']:.2f} ± {100 * line['val_interval95']:.2f} %")
    else:
        parts.append("no validation split, nothing is selected")
    if "test_accuracy_not_for_selection" in line:
        parts.append(f"test {100 * line['test_accuracy_not_for_selection']:.2f} % (never used for selection)")
    return ", ".join(parts)


def evaluate_folder(
    run: Path,
    split: str | None,
    episodes: int | None,
    shots: int | None,
    queries: int | None,
    store_path: str | None,
    manifest: str | None,
    device: str,
) -> tuple[dict[str, Any], str]:
    """Score a run; the JSON-able result and one readable line."""
    chosen = choose_device(device)
    loaded = load_run(run, chosen, store_path, manifest)
    split = split or loaded.config.evaluation.split
    if split not in ("train", "val", "test"):
        raise SetupError(f"--split {split!r} is not known; use train, val or test.")
    with progress("evaluate") as on_progress:
        result, score = evaluate_run(
            loaded, split, episodes or loaded.config.evaluation.episodes, chosen, on_progress, shots, queries
        )
    line = (
        f"{score} on {split}, {result['n_way']}-way {result['k_shot']}-shot, {result['episodes']} episodes "
        f"(split {result['split_hash'][:12]}, episodes {result['episode_hash'][:12]}, store {result['store_fingerprint'][:12]}, "
        f"code {result['code_version']})"
    )
    return {"run": str(run), **result}, line
