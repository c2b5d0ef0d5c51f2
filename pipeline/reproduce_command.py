"""`mastaf reproduce CARD`: run every evaluation of a run card again, to the last episode, and say whether it is identical."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.card_reading import CardError, RecordedEvaluation, own_test_accuracy, read_card
from pipeline.checkpoint import content_digest, load_checkpoint
from pipeline.console import progress
from pipeline.evaluation import Accuracy
from pipeline.outcomes import bits_digest, parting, read_outcomes
from pipeline.provenance import code_version, hardware, library_versions
from pipeline.ranks import Ranks, joined_ranks
from pipeline.run_files import CHANGEABLE
from pipeline.run_page import percent, protocol_words, to_markdown
from pipeline.scoring import LoadedRun, evaluate_run, load_run
from pipeline.setup import choose_device
from pipeline.sources import CachedCubes
from pipeline.statistics import ROUNDING_NOISE

_Places = tuple[str | None, str | None]
"""Of the store and of the manifest, where they are not the run's own."""


@dataclass(frozen=True, slots=True)
class Again:
    """One evaluation, run once more."""

    name: str
    """`val` or `test` with its protocol."""
    is_identical: bool
    """The same episodes, the same answers to every query, and the accuracy that the card says."""
    recorded: str
    """Accuracy of the card."""
    found: str
    """Accuracy now."""
    recorded_accuracy: float
    found_accuracy: float
    has_same_episodes: bool
    episodes_differing: int | None
    """None where the card's answers are not known one by one, or are those of other episodes."""
    queries_differing: int | None
    first_differing_episode: int | None
    explanation: str
    """One line for a person."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something that is not what it was when the card was written."""

    what: str
    card: str
    now: str


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What became of a card."""

    evaluations: tuple[Again, ...]
    contradictions: tuple[str, ...]
    """What the card says against itself, against the run's config or against its checkpoint; one sentence each."""
    changes: tuple[Change, ...]
    """Versions and machines that differ; they explain a difference, and are none."""

    @property
    def is_identical(self) -> bool:
        """Whether everything that the card says of accuracies is so."""
        return not self.contradictions and all(each.is_identical for each in self.evaluations)


def reproduce(
    path: Path,
    device: str = "auto",
    store_path: str | None = None,
    manifest: str | None = None,
    split: str | None = None,
) -> tuple[dict[str, Any], str, bool]:
    """Run the evaluations of a card again.

    Args:
        path: a run's folder, or its card.json.
        device: "auto", "cpu", "cuda" or "cuda:N".
        store_path: read the cubes there, in place of what was recorded.
        manifest: another place of the manifest.
        split: only the evaluations on this split.

    Returns:
        The JSON-able result, the same as text, and whether all is identical.

    Raises:
        CardError: no card, a damaged one, or one without an evaluation to run.
        SetupError, SpecMismatch, SourceError: the run cannot be opened as it was.
    """
    folder = path if path.is_dir() else path.parent
    card = read_card(path)
    recorded = _recorded(card, split, folder)
    runs: dict[_Places, LoadedRun] = {}
    with joined_ranks(choose_device(device)) as (ranks, chosen), progress("reproduce") as on_progress:
        found = []
        total, done = sum(entry.episodes for entry in recorded), 0
        try:
            for entry in recorded:
                places = (store_path or entry.store, manifest or entry.manifest)
                if places not in runs:
                    runs[places] = load_run(folder, chosen, *places, ranks)
                found.append(_again(runs[places], entry, folder, chosen, _offset(on_progress, done, total), ranks))
                done += entry.episodes
        finally:
            for run in runs.values():
                if isinstance(run.source, CachedCubes):
                    run.source.store.close()
    result = Reproduction(
        tuple(found),
        tuple(_contradictions(folder, card, next(iter(runs.values())))),
        tuple(_changes(card, recorded, list(runs.values()))),
    )
    return _report(result, folder), _text(result, folder), result.is_identical


def _recorded(card: Mapping[str, Any], split: str | None, folder: Path) -> list[RecordedEvaluation]:
    """The evaluations of a card that are asked for, the validation first."""
    validation = card.get("validation")
    written = [*([validation] if validation else []), *card.get("evaluations", [])]
    entries = [RecordedEvaluation.model_validate(each) for each in written]
    if not entries:
        raise CardError(
            f"{folder / 'card.json'} holds no evaluation to run again. Score the run: mastaf evaluate {folder} --split test."
        )
    wanted = [entry for entry in entries if split is None or entry.split == split]
    if not wanted:
        splits = ", ".join(sorted({entry.split for entry in entries}))
        raise CardError(f"--split {split}: {folder / 'card.json'} holds evaluations on {splits} only.")
    return wanted


def _offset(report: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: report(before + done, total)


def _again(
    run: LoadedRun,
    entry: RecordedEvaluation,
    folder: Path,
    device: torch.device,
    on_progress: Callable[[int, int], None],
    ranks: Ranks,
) -> Again:
    # Protocol and seed are the card's, whatever the config has come to say.
    protocol = {key: getattr(entry, key) for key in ("protocol", "n_way", "k_shot", "n_query")}
    tables = {
        "episodes": run.config.episodes.model_copy(update=protocol),
        "evaluation": run.config.evaluation.model_copy(update={"seed": entry.seed}),
    }
    as_recorded = replace(run, config=run.config.model_copy(update=tables))
    result, score = evaluate_run(as_recorded, entry.split, entry.episodes, device, on_progress, ranks=ranks)
    return _compared(entry, result["episode_hash"], score, folder)


def _compared(entry: RecordedEvaluation, episode_hash: str, score: Accuracy, folder: Path) -> Again:
    assert score.outcomes is not None
    is_right = score.outcomes.is_right
    same_episodes = entry.episode_hash in (None, episode_hash)
    same_answers = entry.outcomes_sha256 in (None, bits_digest(is_right))
    distance = max(abs(entry.accuracy - score.accuracy), abs(entry.interval95 - score.interval95))
    # The order of a sum is not the same on every machine; what was right is.
    same_number = distance < ROUNDING_NOISE
    before = read_outcomes(folder / entry.outcomes_file, entry.outcomes_sha256) if same_episodes else None
    parts = parting(before, is_right) if before is not None and before.shape == is_right.shape else None
    if not same_episodes:
        explanation = "these are other episodes: the manifest or the sampler is not the card's"
    elif not same_answers and parts is not None:
        explanation = (
            f"{parts.episodes} of {score.episodes} episodes and {parts.queries} of {is_right.size} queries differ, "
            f"first in episode {parts.first_episode}"
        )
    elif not same_answers:
        explanation = "answers differ; which ones is not known, since they were not kept one by one"
    elif not same_number:
        explanation = "every answer is the same, but the card's accuracy is not theirs"
    elif entry.outcomes_sha256 is None:
        explanation = "the same accuracy; the card says no more"
    else:
        explanation = f"all {is_right.size} queries of {score.episodes} episodes"
    return Again(
        name=f"{entry.split}, {protocol_words(entry.model_dump())}, {entry.episodes} episodes, seed {entry.seed}",
        is_identical=same_episodes and same_answers and same_number,
        recorded=percent(entry.accuracy, entry.interval95),
        found=percent(score.accuracy, score.interval95),
        recorded_accuracy=entry.accuracy,
        found_accuracy=score.accuracy,
        has_same_episodes=same_episodes,
        episodes_differing=parts.episodes if parts else None,
        queries_differing=parts.queries if parts else None,
        first_differing_episode=parts.first_episode if parts else None,
        explanation=explanation,
    )


def _contradictions(folder: Path, card: Mapping[str, Any], run: LoadedRun) -> list[str]:
    """Where the card is not that of the run in its folder, or not one with itself."""
    said = [*_contradicting_numbers(folder, card), *_contradicting_config(card, run)]
    digest, written = content_digest(load_checkpoint(folder / "best.pt")["model"]), card.get("best_weights_sha256")
    if written not in (None, digest):
        said.append(f"the weights of best.pt are {digest[:12]}, but the card is of {written[:12]}")
    page, writers = (
        folder / "card.md",
        {card["code_version"], *(each["code_version"] for each in card.get("evaluations", []))},
    )
    # Another version may word the page otherwise.
    if page.is_file() and writers == {code_version()} and page.read_text(encoding="utf-8") != to_markdown(card):
        said.append("card.md is not the page of this card.json")
    return said


def _contradicting_numbers(folder: Path, card: Mapping[str, Any]) -> list[str]:
    """Numbers that the card says twice, or that metrics.jsonl says too."""
    validation = card.get("validation") or {}
    truth = {
        "val_accuracy": validation.get("accuracy", card["val_accuracy"]),
        "val_interval95": validation.get("interval95", card["val_interval95"]),
        "test_selected_accuracy_published_protocol": _test_selected(folder / "metrics.jsonl", card),
        **own_test_accuracy(card),
    }
    return [
        f"the card's {key} is {card.get(key)}, but by its own records it is {value}"
        for key, value in truth.items()
        if card.get(key) != value
    ]


def _test_selected(metrics: Path, card: Mapping[str, Any]) -> float | None:
    """The highest test accuracy of a validation; the card's own word where the log is gone."""
    name = "test_accuracy_not_for_selection"
    if not metrics.is_file():
        written: float | None = card["test_selected_accuracy_published_protocol"]
        return written
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return max((record[name] for record in records if name in record), default=None)


def _contradicting_config(card: Mapping[str, Any], run: LoadedRun) -> list[str]:
    now = run.config.model_dump(mode="json")
    return [
        f"the card's config has {table}.{key} = {value!r}, but config.toml has {now[table].get(key)!r}"
        for table, values in card.get("config", now).items()
        for key, value in values.items()
        if now[table].get(key) != value and f"{table}.{key}" not in {*CHANGEABLE, "training.episodes"}
    ]


def _changes(
    card: Mapping[str, Any], recorded: Sequence[RecordedEvaluation], runs: Sequence[LoadedRun]
) -> list[Change]:
    """What differs between the card, with its evaluations, and here."""
    here: dict[str, Any] = {"code_version": code_version(), "libraries": library_versions(), "hardware": hardware()}
    hashes = {
        "split_hash": {run.manifest.split_hash for run in runs},
        "store_fingerprint": {run.store_fingerprint for run in runs},
    }
    pairs: list[tuple[str, Any, Any]] = []
    for each in (card, *(entry.model_dump() for entry in recorded)):
        pairs.append(("code version", each.get("code_version", here["code_version"]), here["code_version"]))
        for what in ("libraries", "hardware"):
            then, now = each.get(what, here[what]), here[what]
            pairs += [(f"{what}: {name}", then.get(name), now.get(name)) for name in sorted({*then, *now})]
        for what, found in hashes.items():
            if each[what] not in (None, *found):
                pairs.append((what.replace("_", " "), each[what], ", ".join(sorted(found))))
    return list(dict.fromkeys(Change(what, str(then), str(now)) for what, then, now in pairs if then != now))


def _report(result: Reproduction, folder: Path) -> dict[str, Any]:
    return {
        "card": str(folder / "card.json"),
        "identical": result.is_identical,
        "evaluations": [asdict(each) for each in result.evaluations],
        "contradictions": list(result.contradictions),
        "changes": [asdict(each) for each in result.changes],
    }


def _text(result: Reproduction, folder: Path) -> str:
    lines = []
    for each in result.evaluations:
        verdict = "identical" if each.is_identical else "DIFFERS"
        lines.append(f"{verdict:<9}  {each.name}: card {each.recorded}, now {each.found}; {each.explanation}")
    lines += [f"WRONG      {each}" for each in result.contradictions]
    lines += [f"changed    {each.what}: card {each.card}, now {each.now}" for each in result.changes]
    lines.append(f"{folder / 'card.json'}: {'identical' if result.is_identical else 'not identical'}")
    return "\n".join(lines)
