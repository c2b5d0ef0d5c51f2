"""The scores of a pipeline in the cards of its runs, where `mastaf reproduce` finds them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from episodes.datasets import write_manifest
from pipeline.card_reading import read_card
from pipeline.comparison import Comparison, ScoredRun, SharedEpisodes
from pipeline.evaluation import Accuracy
from pipeline.run_card import is_through_store, record_evaluation
from pipeline.scoring import LoadedRun, result_of
from pipeline.whole_outputs import OutputDamaged

SCORED_MANIFEST = "scored.csv"
"""In a comparison's folder, where the store lacks videos: the manifest without them."""
_SAME = ("episode_hash", "k_shot", "n_query", "store_fingerprint", "accuracy", "interval95")
"""What finds an evaluation again among those of a card that were scored the same way, by decoding or through a store."""


def note_comparison(comparison: Comparison, store: Path, manifest: Path, folder: Path) -> None:
    """Put the scores of a comparison into the cards of its runs.

    Args:
        comparison: all of whose runs were scored through the store.
        store: with the cubes.
        manifest: of the pipeline.
        folder: of the comparison; it gets a manifest of its own where the store lacks videos.

    Raises:
        CardError: a run has no card, or a damaged one.
    """
    episodes = comparison.episodes
    if episodes.left_out:
        write_manifest(episodes.manifest, folder / SCORED_MANIFEST)
    place = scored_manifest(manifest, folder, bool(episodes.left_out))
    for scored in comparison.runs:
        result = result_of(_as_scored(scored, episodes), episodes.split, scored.score)
        record_evaluation(scored.folder, result, scored.score, str(store.resolve()), place)


def note_live(folder: Path, result: Mapping[str, Any], score: Accuracy, manifest: str) -> None:
    """Put a score by decoding into the card of the backbone's run, beside the one through the store."""
    record_evaluation(folder, result, score, None, manifest)


def scored_manifest(manifest: Path, comparison: Path, leaves_out: bool) -> str:
    """Path of the manifest of a comparison's episodes: the pipeline's, or the comparison's own where videos are left out."""
    return str((comparison / SCORED_MANIFEST if leaves_out else manifest).resolve())


def refuse_unnoted_comparison(runs: Sequence[Path], folder: Path) -> None:
    """Hold a comparison against the cards of its runs; a run that was made again has a new card.

    Raises:
        OutputDamaged: a card lacks its score.
        CardError, OSError, ValueError, KeyError: a card or the comparison cannot be read.
    """
    compared = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    shared = {key: compared[key] for key in ("episode_hash", "k_shot", "n_query")}
    for run, row in zip(runs, compared["runs"], strict=True):
        _refuse_unnoted(run, [{**row, **shared}], is_by_decoding=False)


def refuse_unnoted_live(run: Path, file: Path) -> None:
    """As `refuse_unnoted_comparison`, for the scores by decoding."""
    _refuse_unnoted(run, json.loads(file.read_text(encoding="utf-8")).values(), is_by_decoding=True)


def _refuse_unnoted(run: Path, scores: Iterable[Mapping[str, Any]], is_by_decoding: bool) -> None:
    card = read_card(run)
    noted = [
        tuple(each[key] for key in _SAME)
        for each in card.get("evaluations", [])
        if card["mode"] == "cached" or is_through_store(card["mode"], each.get("store")) != is_by_decoding
    ]
    if any(tuple(score[key] for key in _SAME) not in noted for score in scores):
        raise OutputDamaged(f"the card of {run} does not hold its score")


def _as_scored(scored: ScoredRun, episodes: SharedEpisodes) -> LoadedRun:
    """The run with the episodes that it was scored on as its own."""
    config, protocol = scored.run.config, episodes.protocol
    own = config.episodes.model_copy(update={"k_shot": protocol.k_shot, "n_query": protocol.n_query})
    evaluation = config.evaluation.model_copy(update={"seed": episodes.seed})
    changed = config.model_copy(update={"episodes": own, "evaluation": evaluation})
    return replace(scored.run, config=changed, manifest=episodes.manifest)
