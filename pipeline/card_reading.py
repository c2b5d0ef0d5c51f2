"""What reading a run card relies on, and what its evaluations are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SAME_EPISODES = ("split", "protocol", "n_way", "k_shot", "n_query", "episodes", "seed", "split_hash")
"""What makes the episodes of an evaluation."""
KEY = (*SAME_EPISODES, "store_fingerprint")
"""A new evaluation takes the place of one that agrees in all of these and was scored the same way (`run_card.record_evaluation`)."""

HELD_OUT = "held-out videos"
"""What the checkpoint of a classification run without validation classes is selected on."""


class CardError(ValueError):
    """A run card cannot be used; the message says why and what to do."""


class RecordedEvaluation(BaseModel):
    """What a card says of one evaluation, as far as it takes to run it again."""

    model_config = ConfigDict(frozen=True, extra="allow")

    accuracy: float
    interval95: float
    split: Literal["train", "val", "test"]
    protocol: Literal["per_class", "one_query"]
    n_way: int = Field(ge=2)
    k_shot: int = Field(ge=1)
    n_query: int = Field(ge=1)
    episodes: int = Field(ge=1)
    seed: int = Field(ge=0)
    split_hash: str
    store_fingerprint: str | None
    """None: the run made its cubes itself, while it trained."""
    episode_hash: str | None
    """None: not noted."""
    outcomes_sha256: str | None
    """Over the answers to all queries; None: not noted."""
    outcomes_file: str = Field(pattern=r"^evaluations/[\w.-]+\.npz$")
    """Within the run's folder, where it was kept."""
    best_weights_sha256: str | None
    store: str | None = None
    """Given with `--store`; relative to the run's folder, or absolute."""
    manifest: str | None = None
    """Given with `--manifest`; likewise."""


class _Card(BaseModel):
    """What reading a card relies on."""

    model_config = ConfigDict(extra="allow")

    mode: str
    head: str
    episodes: int
    best_episode: int
    selected_on: str
    seconds: float
    num_parameters: int
    validation_episodes: int
    val_accuracy: float | None
    val_interval95: float | None
    test_selected_accuracy_published_protocol: float | None
    split_hash: str
    store_fingerprint: str | None
    code_version: str
    libraries: dict[str, str]
    hardware: dict[str, Any]
    config: dict[str, dict[str, Any]] = {}
    validation: RecordedEvaluation | None = None
    evaluations: list[RecordedEvaluation] = []


class _MetricsLine(BaseModel):
    """What reading metrics.jsonl relies on."""

    model_config = ConfigDict(extra="allow", strict=True)

    kind: str
    episode: int
    test_accuracy_not_for_selection: float = 0.0


def read_card(path: Path) -> dict[str, Any]:
    """The content of a run's card.json.

    Args:
        path: of the file, or of the run's folder.

    Raises:
        CardError: there is none, or it is damaged.
    """
    if path.is_dir():
        path = path / "card.json"
    if not path.is_file():
        raise CardError(f"{path.parent} has no {path.name}: it holds no run, or one that has not come to its end.")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CardError(f"{path} is damaged: it is no JSON ({error}). Restore it from a copy.") from error
    try:
        _Card.model_validate(card)
    except ValidationError as error:
        raise CardError(
            f"{path} is damaged, or no run card of mastaf: {_first_problem(error)}. Restore it from a copy."
        ) from error
    return dict(card)


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where or 'its content'}: {first['msg']}"


def own_test_accuracy(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card's test accuracy: that of the evaluation on test with the run's own protocol, seed and manifest; of several, the one
    with the config's number of episodes, or else with the most."""
    found = [each for each in card.get("evaluations", []) if _is_own_test(each, card)]
    if not found:
        return {"test_accuracy": None, "test_interval95": None, "test_episodes": None}
    asked = _of_config(card, "evaluation", "episodes")
    best = max(found, key=lambda each: (each["episodes"] == asked, each["episodes"]))
    return {
        "test_accuracy": best["accuracy"],
        "test_interval95": best["interval95"],
        "test_episodes": best["episodes"],
    }


def selected_on(is_by_validation: bool, has_held_out: bool) -> str:
    """What chose the best checkpoint."""
    if is_by_validation:
        return "val"
    return HELD_OUT if has_held_out else "nothing (no validation split: last checkpoint)"


def held_out_scores(metrics: Path, best_episode: int) -> dict[str, Any]:
    """What the best checkpoint of a classification run scored on the videos kept out of its training.

    Raises:
        CardError: as `read_metrics`.
    """
    found: dict[str, Any] = {}
    for record in read_metrics(metrics):
        if record["kind"] == "validation" and record["episode"] == best_episode:
            found = {key: value for key, value in record.items() if key.startswith("heldout_")}
    return found


def read_metrics(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; none where it is gone.

    Raises:
        CardError: it cannot be read, or a line of it is damaged.
    """
    if not metrics.is_file():
        return []
    try:
        lines = metrics.read_bytes().splitlines()
    except OSError as error:
        raise CardError(f"{metrics} cannot be read: {error}") from error
    return [_metrics_line(line, f"line {number} of {metrics}") for number, line in enumerate(lines, start=1)]


def _metrics_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        _MetricsLine.model_validate(record)
    except ValidationError as error:
        raise CardError(f"{where} is damaged: {_first_problem(error)}. Restore the file from a copy.") from error
    except ValueError as error:
        raise CardError(f"{where} is damaged: it is no JSON ({error}). Restore the file from a copy.") from error
    return dict(record)


def _is_own_test(evaluation: Mapping[str, Any], card: Mapping[str, Any]) -> bool:
    own = {"split": "test", "split_hash": card["split_hash"], "seed": _of_config(card, "evaluation", "seed")}
    own |= {key: _of_config(card, "episodes", key) for key in ("protocol", "n_way", "k_shot", "n_query")}
    return all(evaluation[key] == value for key, value in own.items())


def _of_config(card: Mapping[str, Any], table: str, key: str) -> Any:
    """A value of the card's config; None in a card of a version that had none."""
    return card.get("config", {}).get(table, {}).get(key)
