"""Whether a run card is that of the run in its folder: held against itself, the logs, the config and the checkpoints."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cache.cube import Spec
from configs.load import parse_config
from configs.schema import RunConfig
from pipeline.card_reading import CardError, held_out_scores, own_test_accuracy, read_metrics, selected_on
from pipeline.checkpoint import CheckpointError, content_digest, load_checkpoint
from pipeline.provenance import code_version
from pipeline.run_files import CHANGEABLE
from pipeline.run_page import to_markdown

OF_LAST = {
    "episodes": "episode",
    "seconds": "seconds",
    "resumptions": "resumptions",
    "started_utc": "started_utc",
    "started_from": "started_from",
    "computed_on": "computed_on",
    "degraded_videos": "degraded",
    "second_tries": "second_tries",
    "lost_decoding_processes": "lost_decoding_processes",
    "store_content_hash": "store_content_hash",
    "test_selected_accuracy_published_protocol": "test_selected_accuracy",
}
"""Keys of a card, and what last.pt calls them in its progress."""


def refuse_unknown_tables(card: Mapping[str, Any], path: Path) -> None:
    """A config with tables that this version does not know cannot be held against anything.

    Raises:
        CardError: names them.
    """
    unknown = [table for table in card.get("config", {}) if table not in RunConfig.model_fields]
    if unknown:
        raise CardError(
            f"{path}: its config has a table {unknown[0]!r}, but those of this version are {', '.join(RunConfig.model_fields)}. "
            f"Restore it from a copy, or use the version that wrote it ({card['code_version']})."
        )


def contradictions(folder: Path, card: Mapping[str, Any], num_parameters: int) -> list[str]:
    """Where the card is not that of the run in its folder, or not one with itself; one sentence each.

    Args:
        folder: of the run, with best.pt; last.pt and metrics.jsonl are held against the card where they are there.
        card: of `read_card`.
        num_parameters: of the run's model as it is now.
    """
    best = load_checkpoint(folder / "best.pt")
    said = list(_against_weights(card, best))
    truth = {
        "num_parameters": num_parameters,
        **_by_best(best),
        **own_test_accuracy(card),
    }
    try:
        truth |= _by_metrics(folder / "metrics.jsonl", best, card)
    except CardError as error:
        said.append(f"metrics.jsonl cannot be held against the card: {error}")
    if (folder / "last.pt").is_file():
        try:
            truth |= _by_last(load_checkpoint(folder / "last.pt"))
        except CheckpointError as error:
            said.append(f"last.pt cannot be held against the card: {error}")
    said += [
        f"the card's {key} is {card.get(key)!r}, but by {source_of(key)} it is {value!r}"
        for key, value in truth.items()
        if _is_said(card, key) and card.get(key) != value
    ]
    said += [
        f"the card's validation.{key} is {card['validation'][key]!r}, but by best.pt it is {truth[f'val_{key}']!r}"
        for key in ("accuracy", "interval95")
        if card.get("validation") and card["validation"][key] != truth[f"val_{key}"]
    ]
    if _is_said(card, "validation") and (card.get("validation") is None) != (truth["selected_on"] != "val"):
        said.append(
            "the card has no validation, but a validation split chose best.pt"
            if card.get("validation") is None
            else "the card has a validation, but the run has no validation split"
        )
    said += _against_config(card, (folder / "config.toml").read_text(encoding="utf-8"), "config.toml", CHANGEABLE)
    # A run may have been made longer since.
    said += _against_config(card, best["config"], "best.pt", {*CHANGEABLE, "training.episodes"})
    return [*dict.fromkeys(said), *_against_page(card, folder / "card.md")]


def source_of(key: str) -> str:
    """Which file of the run says what a key of the card has to be."""
    if key in OF_LAST or key == "last_weights_sha256":
        return "last.pt or metrics.jsonl"
    if key.startswith("heldout_"):
        return "metrics.jsonl"
    return "its own evaluations" if key.startswith("test_") else "best.pt"


def _is_said(card: Mapping[str, Any], key: str) -> bool:
    """Cards of version 0.1.0 have fewer keys."""
    return key in card or "schema_version" in card


def _against_weights(card: Mapping[str, Any], best: Mapping[str, Any]) -> Iterator[str]:
    digest, written = content_digest(best["model"]), card.get("best_weights_sha256")
    if _is_said(card, "best_weights_sha256") and written != digest:
        yield f"the weights of best.pt are {digest[:12]}, but the card is of {str(written)[:12]}"
    for each in (card.get("validation"), *card.get("evaluations", [])):
        if each and each.get("best_weights_sha256") not in (None, written):
            yield f"an evaluation on {each['split']} is of weights {each['best_weights_sha256'][:12]}, the card of {str(written)[:12]}"


def _by_best(best: Mapping[str, Any]) -> dict[str, Any]:
    """What the best checkpoint says of the run."""
    config, progress = parse_config(tomllib.loads(best["config"])), best["progress"]
    is_by_validation = bool(best["classes"]["val"])
    has_held_out = config.training.mode == "classify" and config.classify.holdout > 0
    return {
        "mode": config.training.mode,
        "head": config.head.name,
        "head_options": best["head_options"],
        "validation_episodes": config.training.validation_episodes,
        "best_episode": progress["best_episode"],
        "selected_on": selected_on(is_by_validation, has_held_out),
        "val_accuracy": progress["best_accuracy"] if is_by_validation else None,
        "val_interval95": progress["best_interval95"] if is_by_validation else None,
        "split_hash": best["split_hash"],
        "store_fingerprint": Spec.from_json(best["store_spec"]).fingerprint if best["store_spec"] else None,
    }


def _by_last(last: Mapping[str, Any]) -> dict[str, Any]:
    """What the last checkpoint says; one of an earlier version says less."""
    progress = last["progress"]
    truth = {key: progress[name] for key, name in OF_LAST.items() if name in progress}
    return truth | {"last_weights_sha256": content_digest(last["model"])}


def _by_metrics(metrics: Path, best: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """What metrics.jsonl says; nothing where it is gone."""
    if not metrics.is_file():
        return {}
    records = read_metrics(metrics)
    tested = [
        record["test_accuracy_not_for_selection"] for record in records if "test_accuracy_not_for_selection" in record
    ]
    return {
        "episodes": max((record["episode"] for record in records), default=0),
        "test_selected_accuracy_published_protocol": max(tested, default=None),
        **{key: None for key in card if key.startswith("heldout_")},
        **held_out_scores(metrics, best["progress"]["best_episode"]),
    }


def _against_config(card: Mapping[str, Any], document: str, name: str, changeable: Collection[str]) -> list[str]:
    """Where the card's config is not the one written in a file of the run."""
    config = parse_config(tomllib.loads(document))
    now, stated = config.model_dump(mode="json"), config.model_dump(mode="json", exclude_unset=True)
    if "config" not in card and "schema_version" not in card:
        return []
    written = card.get("config", {})
    said = []
    for table, values in stated.items():
        if table not in written:
            said.append(f"the card's config lacks the table {table} of {name}")
            continue
        said += [
            f"the card's config lacks {table}.{key} of {name}"
            for key, value in values.items()
            if key not in written[table] and value is not None
        ]
    said += [
        f"the card's config has {table}.{key} = {value!r}, but {name} has {now[table].get(key)!r}"
        for table, values in written.items()
        for key, value in values.items()
        if now[table].get(key) != value and f"{table}.{key}" not in changeable
    ]
    return said


def _against_page(card: Mapping[str, Any], page: Path) -> list[str]:
    writers = {card["code_version"], *(each["code_version"] for each in card.get("evaluations", []))}
    # Another version may word the page otherwise.
    is_comparable = page.is_file() and writers == {code_version()}
    if is_comparable and page.read_text(encoding="utf-8", errors="replace") != to_markdown(card):
        return ["card.md is not the page of this card.json"]
    return []
