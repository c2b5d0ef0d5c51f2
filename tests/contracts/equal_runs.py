"""Whether two runs are the same, to the bit: weights, optimiser, generators, metrics, logs and card. Loads no pytest."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.load import load_config
from pipeline.checkpoint import CheckpointError, load_checkpoint
from pipeline.run_files import CHANGEABLE

OF_THE_CALLS = frozenset({"seconds", "resumptions", "started_utc"})
"""What a checkpoint's progress says of the calls, and not of the run."""
OF_THE_CARD = OF_THE_CALLS | {"ended_utc", "hardware", "code_version", "config"}
FILES = {"step": "steps", "validation": "validations"}
"""What each kind of line is called in CSV and TensorBoard."""
CHECKPOINTS = ("last.pt", "best.pt", "previous.pt", "backbone.pt")
SAME_BYTES = ("metrics.jsonl", "evaluations/validation.npz")


def differences(expected: Path, run: Path) -> list[str]:
    """What is not as in another run's folder, one line each; empty for equal runs.

    Checkpoints count with all that a run depends on (not torch's global generators, which begin with another seed in each process),
    card and config but for what belongs to the call and to the machine, the CSV files and TensorBoard without what was measured.
    """
    names = [_file_names(folder) for folder in (expected, run)]
    found = [f"{name} is missing" for name in sorted(names[0] - names[1])]
    found += [f"{name} is too many" for name in sorted(names[1] - names[0])]
    if found:
        return found
    for name in CHECKPOINTS:
        if name in names[0]:
            try:
                found += unequal(_checkpoint(expected / name), _checkpoint(run / name), name)
            except CheckpointError as error:
                found.append(str(error))
    for name in SAME_BYTES:
        if name in names[0] and (expected / name).read_bytes() != (run / name).read_bytes():
            found.append(f"{name} has other bytes")
    found += unequal(_config(expected), _config(run), "config.toml")
    cards = [json.loads((folder / "card.json").read_text()) for folder in (expected, run)]
    mine, other = ({key: card[key] for key in card.keys() - OF_THE_CARD} for card in cards)
    found += unequal(mine, other, "card.json")
    for kind, name in FILES.items():
        lines = [line for line in _metrics(expected) if line["kind"] == kind]
        if (expected / f"{name}.csv").is_file():
            found += _wrong_rows(lines, run / f"{name}.csv")
        if (expected / "tensorboard" / name).is_dir():
            found += _wrong_events(lines, run / "tensorboard" / name)
    return found


def unequal(expected: Any, value: Any, where: str) -> list[str]:
    """Where two nests of values differ. Tensors must agree in every bit, so that NaN equals NaN and 0 is not -0."""
    if isinstance(expected, torch.Tensor) and isinstance(value, torch.Tensor):
        is_same = expected.dtype == value.dtype and expected.shape == value.shape
        is_same = is_same and expected.numpy().tobytes() == value.numpy().tobytes()
        return [] if is_same else [f"{where} differs"]
    if isinstance(expected, Mapping) and isinstance(value, Mapping):
        if list(expected) != list(value) and set(expected) != set(value):
            return [f"{where} has other entries: {sorted(map(str, set(expected) ^ set(value)))}"]
        return [line for key in expected for line in unequal(expected[key], value[key], f"{where}: {key}")]
    if isinstance(expected, list | tuple) and isinstance(value, list | tuple):
        if len(expected) != len(value):
            return [f"{where} has {len(value)} entries, not {len(expected)}"]
        pairs = enumerate(zip(expected, value, strict=True))
        return [line for index, (one, other) in pairs for line in unequal(one, other, f"{where}: {index}")]
    return [] if expected == value and type(expected) is type(value) else [f"{where} is {value!r}, not {expected!r}"]


def _file_names(folder: Path) -> set[str]:
    """Relative names of all files; TensorBoard's count as one, since each call begins another."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name if "tfevents" not in name else str(Path(name).parent / "events") for name in names}


def _checkpoint(path: Path) -> dict[str, Any]:
    content = load_checkpoint(path)
    # Noted with the last save of all, which is the one before it where a run has come to its end twice.
    left_out = OF_THE_CALLS | ({"store_content_hash"} if path.name == "previous.pt" else set())
    progress = {key: value for key, value in content.get("progress", {}).items() if key not in left_out}
    return {**content, "progress": progress, "config": None, "generators": None}


def _config(folder: Path) -> dict[str, Any]:
    tables = load_config(folder / "config.toml").model_dump(mode="json")
    return {
        f"{table}.{key}": value
        for table, values in tables.items()
        for key, value in values.items()
        if f"{table}.{key}" not in CHANGEABLE
    }


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _wrong_rows(lines: Sequence[Mapping[str, Any]], path: Path) -> list[str]:
    """A CSV file against the lines of metrics.jsonl: the same episodes in order, each once, with the same values."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    episodes = [int(row["episode"]) for row in rows]
    if episodes != [line["episode"] for line in lines]:
        return [f"{path.name} has the episodes {episodes}"]
    return [
        f"{path.name}: {key} of episode {line['episode']} is {row[key]}"
        for row, line in zip(rows, lines, strict=True)
        for key, value in line.items()
        if key != "kind" and row[key] != str(value)
    ]


def _wrong_events(lines: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """TensorBoard's events, as TensorBoard reads them: each value once, up to float32."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    logger = logging.getLogger("tensorboard")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of every resumption
    try:
        events.Reload()
    finally:
        logger.setLevel(level)
    found = []
    for tag in events.Tags()["scalars"]:
        key = tag.partition("/")[2]
        for name in (key, f"{tag.partition('/')[0]}_{key}"):
            wanted = [(line["episode"], line[name]) for line in lines if name in line]
            if wanted:
                scalars = [(event.step, event.value) for event in events.Scalars(tag)]
                is_same = [step for step, _ in scalars] == [step for step, _ in wanted] and all(
                    value == float(torch.tensor(expected, dtype=torch.float32))
                    for (_, value), (_, expected) in zip(scalars, wanted, strict=True)
                )
                found += [] if is_same else [f"TensorBoard has {tag} as {scalars}"]
    return found
