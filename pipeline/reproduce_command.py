"""`mastaf reproduce CARD`: run every evaluation of a run card again, to the last episode, and say whether it is identical."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cache.open import is_address
from cache.store import StoreError
from pipeline.card_checks import contradictions, refuse_unknown_tables
from pipeline.card_reading import CardError, RecordedEvaluation, read_card
from pipeline.console import progress
from pipeline.evaluation import Accuracy
from pipeline.held_out_again import num_parameters_of, score_again
from pipeline.outcomes import bits_digest, parting, read_outcomes
from pipeline.provenance import code_version, hardware, library_versions
from pipeline.ranks import Ranks, joined_ranks
from pipeline.run_card import weights_sha256
from pipeline.run_page import held_out_percent, percent, protocol_words
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
class NotDone:
    """One evaluation that cannot be run here."""

    name: str
    recorded: str
    """Accuracy of the card."""
    reason: str


@dataclass(frozen=True, slots=True)
class Change:
    """Something that is not what it was when the card was written."""

    what: str
    card: str
    now: str


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What became of a card."""

    card: Path
    """Of the card.json."""
    evaluations: tuple[Again, ...]
    contradictions: tuple[str, ...]
    """What the card says against itself, against the run's config, logs or checkpoints; one sentence each."""
    changes: tuple[Change, ...]
    """Versions and machines that differ; they explain a difference, and are none."""
    not_done: tuple[NotDone, ...] = ()
    """What cannot be run: a store or a manifest is gone, or it is not the run's. Several ranks end with such an error instead."""

    @property
    def is_identical(self) -> bool:
        """Whether everything that the card says of accuracies is so."""
        return not self.contradictions and not self.not_done and all(each.is_identical for each in self.evaluations)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "card": str(self.card),
            "identical": self.is_identical,
            "evaluations": [asdict(each) for each in self.evaluations],
            "not_done": [asdict(each) for each in self.not_done],
            "contradictions": list(self.contradictions),
            "changes": [asdict(each) for each in self.changes],
        }

    def to_text(self) -> str:
        """For people: a line for each evaluation, contradiction and change, and the verdict."""
        lines = []
        for each in self.evaluations:
            verdict = "identical" if each.is_identical else "DIFFERS"
            lines.append(f"{verdict:<9}  {each.name}: card {each.recorded}, now {each.found}; {each.explanation}")
        lines += [f"NOT DONE   {each.name}: card {each.recorded}; {each.reason}" for each in self.not_done]
        lines += [f"WRONG      {each}" for each in self.contradictions]
        lines += [f"changed    {each.what}: card {each.card}, now {each.now}" for each in self.changes]
        lines.append(f"{self.card}: {'identical' if self.is_identical else 'not identical'}")
        return "\n".join(lines)


def reproduce(
    path: Path,
    device: str = "auto",
    store_path: str | None = None,
    manifest: str | None = None,
    split: str | None = None,
) -> Reproduction:
    """Run the evaluations of a card again, on the ranks of this job.

    Args:
        path: a run's folder, or its card.json.
        device: "auto", "cpu", "cuda" or "cuda:N".
        store_path: read the cubes there, in place of what was recorded.
        manifest: another place of the manifest.
        split: only the evaluations on this split, and no held-out videos of a classification run.

    Raises:
        CardError: no card, a damaged one, or one without an evaluation to run.
        SetupError, SpecMismatch, SourceError: as `reproduce_on`.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name != "card.json":
        raise CardError(f"{path} is no card.json. Give the run's folder or its card.json: mastaf reproduce {folder}")
    card = read_card(path)
    refuse_unknown_tables(card, folder / "card.json")
    _recorded(card, split, folder)  # refuses before any rank waits for another
    with joined_ranks(choose_device(device)) as (ranks, chosen):
        return reproduce_on(ranks, chosen, folder, card, store_path, manifest, split)


def reproduce_on(
    ranks: Ranks,
    device: torch.device,
    folder: Path,
    card: Mapping[str, Any],
    store_path: str | None = None,
    manifest: str | None = None,
    split: str | None = None,
) -> Reproduction:
    """As `reproduce`, on ranks that have joined.

    Args:
        ranks: of this job; each scores its share of every evaluation.
        device: of this rank.
        folder: of the run.
        card: of `read_card`.
        store_path: as of `reproduce`, and so are the others.

    Raises:
        SetupError, SpecMismatch, SourceError: none of the evaluations can be run; on several ranks: one of them cannot.
    """
    recorded = _recorded(card, split, folder)
    runs: dict[_Places, LoadedRun] = {}
    with progress("reproduce") as on_progress:
        found: list[Again] = []
        failed: list[tuple[NotDone, Exception]] = []
        total, done = sum(entry.episodes for entry in recorded), 0
        try:
            for entry in recorded:
                places = (store_path or _place(folder, entry.store), manifest or _place(folder, entry.manifest))
                try:
                    if places not in runs:
                        runs[places] = load_run(folder, device, *places, ranks)
                    found.append(_again(runs[places], entry, folder, device, _offset(on_progress, done, total), ranks))
                except (ValueError, OSError, StoreError) as error:
                    if ranks.are_several:
                        # The others may wait within this evaluation: a rank that went on to the next would answer another question.
                        raise
                    failed.append((NotDone(_name(entry), percent(entry.accuracy, entry.interval95), str(error)), error))
                done += entry.episodes
            if failed and not found:
                _refuse_other_weights(folder, card)
                raise failed[0][1]
            if not runs:
                runs[store_path, manifest] = load_run(folder, device, store_path, manifest, ranks)
            first = next(iter(runs.values()))
            if split is None and "heldout_top1" in card:
                found += _held_out_again(first, card, folder, device, ranks)
            wrong = contradictions(folder, card, num_parameters_of(first, folder, device))
            changes = _changes(card, recorded, list(runs.values()))
        finally:
            for run in runs.values():
                run.close()
    return Reproduction(
        folder / "card.json", tuple(found), tuple(wrong), tuple(changes), tuple(each for each, _ in failed)
    )


def _refuse_other_weights(folder: Path, card: Mapping[str, Any]) -> None:
    """Say at once what is wrong where the run's data fit its card, but not its best.pt."""
    written, now = card.get("best_weights_sha256"), weights_sha256(folder / "best.pt")
    if now is not None and written not in (None, now):
        raise CardError(
            f"the weights of {folder / 'best.pt'} are {now[:12]}, but the card is of {written[:12]}. Restore them."
        )


def _name(entry: RecordedEvaluation) -> str:
    through = f", store {entry.store}" if entry.store is not None else ""
    return f"{entry.split}, {protocol_words(entry.model_dump())}, {entry.episodes} episodes, seed {entry.seed}{through}"


def _place(folder: Path, recorded: str | None) -> str | None:
    """A recorded path from here: it is relative to the run's own folder, or in earlier cards to where `evaluate` was typed.

    A link to the run is followed first. Where that leads nowhere, the path is tried from the link: a run that was moved to another
    disk may have left one in its old place.
    """
    if recorded is None or is_address(recorded):
        return recorded
    path, from_link = (Path(os.path.normpath(start / recorded)) for start in (folder.resolve(), folder.absolute()))
    return str(next((each for each in (path, from_link, Path(recorded)) if each.exists()), path))


def _recorded(card: Mapping[str, Any], split: str | None, folder: Path) -> list[RecordedEvaluation]:
    """The evaluations of a card that are asked for, the validation first."""
    validation = card.get("validation")
    written = [*([validation] if validation else []), *card.get("evaluations", [])]
    entries = [RecordedEvaluation.model_validate(each) for each in written]
    if not entries and split is None and "heldout_top1" in card:
        return []
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
        name=_name(entry),
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


def _held_out_again(
    run: LoadedRun, card: Mapping[str, Any], folder: Path, device: torch.device, ranks: Ranks
) -> list[Again]:
    """None where the run keeps no videos out, whatever its card says; that is a contradiction."""
    score = score_again(run, folder, device, ranks)
    if score is None:
        return []
    written = {key: value for key, value in card.items() if key.startswith("heldout_")}
    same_videos = written.get("heldout_videos") == score.videos
    is_same = written.keys() == score.line.keys() and all(
        isinstance(written[key], int | float) and abs(written[key] - value) < ROUNDING_NOISE
        for key, value in score.line.items()
    )
    if is_same:
        explanation = f"all {score.videos} videos"
    elif same_videos:
        explanation = "other answers, or the card's accuracy is not theirs; which is not known, since they were not kept one by one"
    else:
        explanation = f"these are {score.videos} videos, the card's {written.get('heldout_videos')}"
    return [
        Again(
            name="held-out videos of the training classes, classified",
            is_identical=is_same,
            recorded=held_out_percent(written),
            found=held_out_percent(score.line),
            recorded_accuracy=written["heldout_top1"],
            found_accuracy=score.top1,
            has_same_episodes=same_videos,
            episodes_differing=None,
            queries_differing=None,
            first_differing_episode=None,
            explanation=explanation,
        )
    ]


def _changes(
    card: Mapping[str, Any], recorded: Sequence[RecordedEvaluation], runs: Sequence[LoadedRun]
) -> list[Change]:
    """What differs between the card, with its evaluations, and here."""
    here: dict[str, Any] = {"code_version": code_version(), "libraries": library_versions(), "hardware": hardware()}
    stores = [run.source.store for run in runs if isinstance(run.source, CachedCubes)]
    hashes = {
        "split_hash": {run.manifest.split_hash for run in runs},
        "store_fingerprint": {run.store_fingerprint for run in runs},
        "store_content_hash": {store.content_hash() for store in stores},
    }
    pairs: list[tuple[str, Any, Any]] = []
    for each in (card, *(entry.model_dump() for entry in recorded)):
        pairs.append(("code version", each.get("code_version", here["code_version"]), here["code_version"]))
        for what in ("libraries", "hardware"):
            then, now = each.get(what, here[what]), here[what]
            pairs += [(f"{what}: {name}", then.get(name), now.get(name)) for name in sorted({*then, *now})]
        for what, found in hashes.items():
            if found and each.get(what) not in (None, *found):
                pairs.append((what.replace("_", " "), each[what], ", ".join(sorted(found))))
    return list(dict.fromkeys(Change(what, str(then), str(now)) for what, then, now in pairs if then != now))
