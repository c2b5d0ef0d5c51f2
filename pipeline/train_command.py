"""`mastaf train` and `mastaf evaluate`: from options to a run and its score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.load import find_recipe, load_config
from configs.schema import RunConfig
from pipeline.card_reading import CardError
from pipeline.console import progress, say
from pipeline.ranks import Ranks, joined_ranks
from pipeline.run_card import record_evaluation
from pipeline.run_log import refuse_absent_loggers
from pipeline.run_page import decoding_words, held_out_percent
from pipeline.scoring import evaluate_run, load_run
from pipeline.settings import SetupError
from pipeline.setup import choose_device
from pipeline.training import train


def train_recipe(
    recipe: str, out: Path | None, resume: bool | None, device: str, overrides: tuple[str, ...]
) -> dict[str, Any]:
    """Train a recipe; the run card. `resume` None: go on where there is a run, else begin. Under torchrun, on all its ranks."""
    path = find_recipe(recipe)
    config = load_config(path, overrides)
    refuse_absent_loggers(config.training.loggers)
    folder = out or Path("runs") / path.stem
    with joined_ranks(choose_device(device)) as (ranks, chosen):
        card = _train_on(ranks, chosen, config, folder, resume)
    if ranks.is_first:
        _say_result(card, folder)
    return card


def _train_on(
    ranks: Ranks, device: torch.device, config: RunConfig, folder: Path, resume: bool | None
) -> dict[str, Any]:
    _warn_of_untrained_backbone(config)
    warn_of_one_view(config)
    what = "a classifier" if config.training.mode == "classify" else config.head.name
    with progress(f"train {what}") as on_progress:

        def report(line: Mapping[str, Any]) -> None:
            if line["kind"] == "step":
                on_progress(int(line["episode"]), config.training.episodes)
            else:
                say(describe_validation(line))

        return train(config, folder, device, resume, report, ranks)


def _warn_of_untrained_backbone(config: RunConfig) -> None:
    training, backbone = config.training, config.backbone
    if training.mode == "cached" or training.initial_weights:
        return
    if backbone.weights == "none":
        say(f"warning: backbone {backbone.name} starts untrained (backbone.weights = none)")
    is_untrained = backbone.weights == "none" or backbone.weights.startswith("random:")
    if is_untrained and training.mode == "end_to_end" and training.backbone_batchnorm in (None, "frozen"):
        say(
            "warning: an untrained backbone with frozen BatchNorm statistics, which say nothing yet; "
            'training.backbone_batchnorm = "episode" lets them follow the clips'
        )


def warn_of_one_view(config: RunConfig) -> None:
    """Not refused: the views may be for the store that is extracted from the run."""
    drawn = [
        name
        for name, is_drawn in (("crop", config.sampling.crop == "random"), ("flip", config.sampling.flip))
        if is_drawn
    ]
    if config.training.mode != "cached" and config.episodes.train_views == 1 and drawn:
        say(
            f"warning: sampling.{' and '.join(drawn)} change nothing while training, which sees view 0 alone; "
            "episodes.train_views = 1000000 draws a fresh view each time"
        )


def _say_result(card: Mapping[str, Any], folder: Path) -> None:
    if card["val_accuracy"] is not None:
        say(
            f"best: {100 * card['val_accuracy']:.2f} ± {100 * card['val_interval95']:.2f} % on val "
            f"after {card['best_episode']} episodes ({card['seconds']:.0f} s)"
        )
    if "heldout_top1" in card:
        say(
            f"at that checkpoint: {held_out_percent(card)} of the held-out videos classified, after {card['best_episode']} clips"
        )
    if card["test_selected_accuracy_published_protocol"] is not None:
        say(
            f"test-selected, as the published code reports it (not an honest estimate): "
            f"{100 * card['test_selected_accuracy_published_protocol']:.2f} %"
        )
    faults = decoding_words(card)
    say(f"run: {folder} (card.md{f'; {faults}' if faults else ''}). Score it: mastaf evaluate {folder} --split test")


def describe_validation(line: Mapping[str, Any]) -> str:
    """One readable line of a validation record."""
    parts = [f"after {line['episode']} episodes"]
    if "val_accuracy" in line:
        parts.append(f"val {100 * line['val_accuracy']:.2f} ± {100 * line['val_interval95']:.2f} %")
    if "heldout_top1" in line:
        parts.append(f"held-out videos {held_out_percent(line)}")
    if len(parts) == 1:
        parts.append("no validation split, nothing is selected")
    if "test_accuracy_not_for_selection" in line:
        parts.append(f"test {100 * line['test_accuracy_not_for_selection']:.2f} % (never used for selection)")
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """What `mastaf evaluate` was asked for; None: as the run's config says."""

    run: Path
    split: str | None = None
    """train, val or test."""
    episodes: int | None = None
    shots: int | None = None
    queries: int | None = None
    store_path: str | None = None
    """Another store than the run's own source."""
    manifest: str | None = None
    """Another manifest than the run's."""


def evaluate_folder(request: EvaluationRequest, device: str) -> tuple[dict[str, Any], str]:
    """Score a run and note it in the run's card; the JSON-able result and one readable line, which all ranks of torchrun get."""
    with joined_ranks(choose_device(device)) as (ranks, chosen):
        return _evaluate_on(ranks, chosen, request)


def _evaluate_on(ranks: Ranks, device: torch.device, request: EvaluationRequest) -> tuple[dict[str, Any], str]:
    run, store, manifest = request.run, request.store_path, request.manifest
    with load_run(run, device, store, manifest, ranks) as loaded, progress("evaluate") as on_progress:
        split = request.split or loaded.config.evaluation.split
        if split not in ("train", "val", "test"):
            raise SetupError(f"--split {split!r} is not known; use train, val or test.")
        episodes = request.episodes or loaded.config.evaluation.episodes
        result, score = evaluate_run(
            loaded, split, episodes, device, on_progress, request.shots, request.queries, ranks
        )
    if ranks.is_first:
        try:
            record_evaluation(run, result, score, store, manifest)
        except (CardError, OSError) as error:
            say(f"warning: this result is not noted in the run's card: {error}")
    # A classification run has no few-shot head of its own.
    by = f", backbone of a classification run, by the head {result['head']}" if result["mode"] == "classify" else ""
    line = (
        f"{score} on {split}, {result['n_way']}-way {result['k_shot']}-shot, {result['episodes']} episodes{by} "
        f"(split {result['split_hash'][:12]}, episodes {result['episode_hash'][:12]}, store {result['store_fingerprint'][:12]}, "
        f"code {result['code_version']})"
    )
    return {"run": str(run), **result}, line
