"""The run card: what made a run and what it scores, as card.json for programs and card.md for people."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cache.open import is_address
from pipeline.card_reading import (
    KEY,
    SAME_EPISODES,
    CardError,
    held_out_scores,
    own_test_accuracy,
    read_card,
    selected_on,
)
from pipeline.checkpoint import content_digest, load_checkpoint, write_file
from pipeline.evaluation import Accuracy
from pipeline.outcomes import outcomes_digest, write_outcomes
from pipeline.provenance import code_version, hardware, library_versions
from pipeline.run_files import Progress, resolved_head_options
from pipeline.run_page import to_markdown
from pipeline.setup import Workplace

SCHEMA_VERSION = 2
"""1, without this key, is the card of version 0.1.0."""
VALIDATION_OUTCOMES = "evaluations/validation.npz"
"""Within a run's folder: the answers to the validation queries of the best checkpoint."""


def write_card(
    folder: Path,
    place: Workplace,
    progress: Progress,
    is_selected: bool,
    num_together: int = 1,
    num_ranks: int = 1,
) -> dict[str, Any]:
    """Write what made a finished run into its folder, as card.json and card.md.

    Args:
        folder: of the run, with best.pt and last.pt.
        place: the run's parts.
        progress: at the end of training.
        is_selected: whether the validation split chose the best checkpoint.
        num_together: heads that shared the pass, and its seconds.
        num_ranks: processes that trained together.

    Returns:
        The content of card.json.
    """
    config = place.config
    best_digest = weights_sha256(folder / "best.pt")
    card: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run": folder.resolve().name,
        "mode": config.training.mode,
        "head": config.head.name,
        "head_options": resolved_head_options(config),
        **_scores(folder, place, progress, is_selected),
        "validation": _validation(place, progress, best_digest) if is_selected else None,
        "evaluations": _kept_evaluations(folder, best_digest),
        **_course(progress, num_together, num_ranks),
        "started_from": progress.started_from,
        **_data(place, progress),
        "best_weights_sha256": best_digest,
        "last_weights_sha256": weights_sha256(folder / "last.pt"),
        "num_parameters": sum(parameter.numel() for parameter in place.model.parameters()),
        "code_version": code_version(),
        "libraries": library_versions(),
        "hardware": hardware(),
        "commands": _commands(folder.resolve().name, config.evaluation.episodes, num_ranks),
        "config": config.model_dump(mode="json"),
    }
    card |= own_test_accuracy(card)
    with _locked(folder):
        _write(folder, card)
    return card


def _scores(folder: Path, place: Workplace, progress: Progress, is_selected: bool) -> dict[str, Any]:
    """How far the training came, and what it scored on the way."""
    held_out = held_out_scores(folder / "metrics.jsonl", progress.best_episode)
    return {
        "episodes": progress.episode,
        "best_episode": progress.best_episode,
        "selected_on": selected_on(is_selected, bool(held_out)),
        "val_accuracy": progress.best_accuracy if is_selected else None,
        "val_interval95": progress.best_interval95 if is_selected else None,
        "validation_episodes": place.config.training.validation_episodes,
        "test_accuracy": None,  # until it is evaluated
        "test_interval95": None,
        "test_episodes": None,
        "test_selected_accuracy_published_protocol": progress.test_selected_accuracy,
        "test_selected_note": "the highest of all scores of the test split itself while training, as published codes report it; "
        "too high for an estimate on unseen classes",
        **held_out,
    }


def _course(progress: Progress, num_together: int, num_ranks: int) -> dict[str, Any]:
    """When the run was made, and how smoothly."""
    return {
        "started_utc": progress.started_utc,
        "ended_utc": _now(),
        "seconds": progress.seconds,
        "resumptions": progress.resumptions,
        "second_tries": progress.second_tries,
        "lost_decoding_processes": progress.lost_decoding_processes,
        "heads_trained_together": num_together,
        "ranks": num_ranks,
        "computed_on": progress.computed_on,
    }


def _data(place: Workplace, progress: Progress) -> dict[str, Any]:
    """What it was trained on."""
    return {
        "degraded_videos": progress.degraded,
        "excluded_videos": {video.video_id: video.excluded for video in place.manifest.videos if video.excluded},
        "split_hash": place.manifest.split_hash,
        "store_fingerprint": place.store.spec.fingerprint if place.store else None,
        "store_content_hash": progress.store_content_hash,
    }


def record_evaluation(
    folder: Path, result: Mapping[str, Any], score: Accuracy, store: str | None = None, manifest: str | None = None
) -> None:
    """Add an evaluation to a run's card, or put it in the place of the same one; the answers go to a file of their own.

    One by decoding and one through a store are two, though their cubes be described alike: half precision rounds.

    Args:
        folder: of the run.
        result: of `evaluate_run`.
        score: of `evaluate_run`.
        store: as given with `--store`; `mastaf reproduce` finds it from any folder.
        manifest: as given with `--manifest`; likewise.

    Raises:
        CardError: the run has no card, or a damaged one.
        OSError: nothing can be written there.
    """
    with _locked(folder):
        card = read_card(folder)
        entry = {
            **{key: result[key] for key in ("accuracy", "interval95", *KEY, "episode_hash")},
            "outcomes_sha256": outcomes_digest(score),
            "outcomes_file": _outcomes_file(result, is_through_store(card["mode"], store)),
            "store": _from_run(store, folder),
            "store_as_given": store,
            "manifest": _from_run(manifest, folder),
            "manifest_as_given": manifest,
            "best_weights_sha256": weights_sha256(folder / "best.pt"),
            "evaluated_utc": _now(),
            "code_version": result["code_version"],
            "libraries": library_versions(),
            "hardware": hardware(),
        }
        write_outcomes(folder / entry["outcomes_file"], score)
        others = [each for each in card.get("evaluations", []) if not _gives_way(each, entry, card["mode"])]
        card["evaluations"] = sorted([*others, entry], key=lambda each: json.dumps(_order(each, card["mode"])))
        _write(folder, card | own_test_accuracy(card))


def is_through_store(mode: str, store: str | None) -> bool:
    """Whether a run that decodes its videos was scored through a store of their cubes; one on the cache knows no other way.

    Args:
        mode: the run's `training.mode`.
        store: of the evaluation in its card; None: the run's own source.
    """
    return mode != "cached" and store is not None


def _gives_way(earlier: Mapping[str, Any], new: Mapping[str, Any], mode: str) -> bool:
    """Whether a new evaluation takes the place of an earlier one: on the same episodes, scored the same way, on the same cubes.

    Through a store: or on other cubes that were in its place then. They are there no more, so nobody could score them again.
    """
    if _order(earlier, mode)[:-1] != _order(new, mode)[:-1]:
        return False
    is_same_place = is_through_store(mode, new["store"]) and earlier.get("store") == new["store"]
    return is_same_place or bool(earlier["store_fingerprint"] == new["store_fingerprint"])


def _order(evaluation: Mapping[str, Any], mode: str) -> list[Any]:
    """What evaluations are sorted by. On the same episodes that by decoding comes first: the card's own test accuracy is the first
    of those that fit equally well."""
    return [
        *(evaluation[key] for key in SAME_EPISODES),
        is_through_store(mode, evaluation.get("store")),
        evaluation["store_fingerprint"],
    ]


def _validation(place: Workplace, progress: Progress, best_digest: str | None) -> dict[str, Any]:
    """The validation that chose the best checkpoint, as an evaluation that can be run again."""
    episodes = place.config.episodes
    return {
        "accuracy": progress.best_accuracy,
        "interval95": progress.best_interval95,
        "split": "val",
        "protocol": episodes.protocol,
        "n_way": episodes.n_way,
        "k_shot": episodes.k_shot,
        "n_query": episodes.n_query,
        "episodes": place.config.training.validation_episodes,
        "seed": place.config.evaluation.seed,
        "split_hash": place.manifest.split_hash,
        "store_fingerprint": place.store.spec.fingerprint if place.store else None,
        "episode_hash": progress.best_episode_hash,
        "outcomes_sha256": progress.best_outcomes_digest,
        "outcomes_file": VALIDATION_OUTCOMES,
        "best_weights_sha256": best_digest,
    }


def _kept_evaluations(folder: Path, best_digest: str | None) -> list[dict[str, Any]]:
    """Those of an earlier card of the same best checkpoint: a finished run may be gone on with."""
    with suppress(CardError):
        card = read_card(folder)
        return [each for each in card.get("evaluations", []) if each["best_weights_sha256"] == best_digest]
    return []


def _from_run(given: str | None, folder: Path) -> str | None:
    """A path that holds from any folder: from the run's own where it lies beside or below that, so that both may move together.

    An address stays one.
    """
    if given is None or is_address(given):
        return given
    path, run = Path(given).resolve(), folder.resolve()
    return os.path.relpath(path, run) if path.is_relative_to(run.parent) else str(path)


def _outcomes_file(result: Mapping[str, Any], is_through_store: bool) -> str:
    """`evaluations/test_5way_1shot_1query_10000episodes_seed0_1a2b3c4d.npz`; the end stands for protocol, data and cubes."""
    parts = [result[key] for key in KEY] + ["through a store"] * is_through_store
    rest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    return (
        f"evaluations/{result['split']}_{result['n_way']}way_{result['k_shot']}shot_{result['n_query']}query_"
        f"{result['episodes']}episodes_seed{result['seed']}_{rest}.npz"
    )


def _commands(name: str, episodes: int, num_ranks: int) -> dict[str, str]:
    """What to type in the folder that holds the run's folder."""
    run = shlex.quote(name)
    program = f"torchrun --nproc-per-node {num_ranks} -m cli" if num_ranks > 1 else "mastaf"
    return {
        "train": f"{program} train {shlex.quote(f'{name}/config.toml')} --out {shlex.quote(f'{name}-again')}",
        "evaluate": f"mastaf evaluate {run} --split test --episodes {episodes}",
        "reproduce": f"mastaf reproduce {run}",
    }


def weights_sha256(path: Path) -> str | None:
    """SHA-256 over names, types, shapes and bytes of a checkpoint's weights; None where there is no checkpoint."""
    return content_digest(load_checkpoint(path)["model"]) if path.is_file() else None


def _write(folder: Path, card: Mapping[str, Any]) -> None:
    write_file(folder / "card.json", (json.dumps(card, indent=2) + "\n").encode())
    write_file(folder / "card.md", to_markdown(card).encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Of several evaluations that end together, one writes the card at a time. A file system without locks goes without."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
