"""The files of a run: what is in a checkpoint, when a folder may be used, the run card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from configs.load import load_config, to_toml
from configs.schema import RunConfig
from episodes.build import head_config
from pipeline.checkpoint import load_checkpoint, save_checkpoint, write_file
from pipeline.model import ClipEncoder, describe_backbone
from pipeline.provenance import code_version, hardware, library_versions
from pipeline.settings import SetupError
from pipeline.setup import Workplace

# May differ between a run and its resumption: they change no number of the training.
CHANGEABLE = frozenset(
    {
        "training.decode_threads",
        "training.clip_cache_bytes",
        "training.cube_cache_bytes",
        "training.initial_weights",
        "extraction.decode_workers",
        "extraction.seconds_per_video",
        "extraction.decode_memory_bytes",
        "evaluation.episodes",
        "evaluation.split",
        "backbone.weights",
        "store.path",
        "data.manifest",
    }
)


@dataclass(slots=True)
class Progress:
    """What the loop has reached; goes into the checkpoint."""

    episode: int = 0
    """Training episodes done."""
    validated_episode: int = -1
    """At which of them the latest validation was; -1 before the first."""
    best_accuracy: float | None = None
    best_interval95: float | None = None
    best_episode: int = 0
    """Of the best checkpoint, by the validation split."""
    test_selected_accuracy: float | None = None
    """Highest score of the test split; published protocol, never used for selection."""
    seconds: float = 0.0
    """Wall clock of all calls."""


def refuse_wrong_folder(folder: Path, resume: bool) -> None:
    """A folder is free unless a run in it has done a step; only such a run, or one about to begin, can be resumed.

    Raises:
        SetupError: the folder is taken, or there is nothing to resume.
    """
    last = folder / "last.pt"
    if resume and not (last.is_file() and (folder / "config.toml").is_file()):
        raise SetupError(f"{folder} holds no run to resume (no last.pt). Start it without --resume.")
    if not resume and last.is_file() and load_checkpoint(last)["progress"]["episode"] > 0:
        raise SetupError(f"{folder} holds a run already. Go on with --resume, or choose another --out.")
    if not resume and (folder / "card.json").is_file():
        raise SetupError(f"{folder} holds a finished run already. Choose another --out.")


def refuse_other_config(folder: Path, config: RunConfig) -> None:
    """Refuse to resume with settings that would change the numbers.

    Raises:
        SetupError: names every such field with both values.
    """
    stored, wanted = load_config(folder / "config.toml").model_dump(mode="json"), config.model_dump(mode="json")
    differing = [
        f"{table}.{key}: run {stored[table].get(key)!r}, now {wanted[table].get(key)!r}"
        for table in stored
        for key in sorted({*stored[table], *wanted[table]})
        if stored[table].get(key) != wanted[table].get(key) and f"{table}.{key}" not in CHANGEABLE
    ]
    if differing:
        raise SetupError(
            f"--resume with another config: {'; '.join(differing)}. Use the run's own settings, or start a new --out."
        )


def load_for_resume(folder: Path, device: torch.device) -> dict[str, Any]:
    """The content of ``folder/last.pt``."""
    return load_checkpoint(folder / "last.pt", device)


def save_run(
    path: Path,
    place: Workplace,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    progress: Progress,
) -> None:
    """Write a checkpoint: weights, optimiser, position, resolved config, and what the numbers depend on."""
    config, encoder = place.config, place.model.encoder
    save_checkpoint(
        path,
        {
            "model": place.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "progress": asdict(progress),
            "config": to_toml(config),
            "head_options": resolved_head_options(config),
            "backbone": describe_backbone(encoder.backbone) if isinstance(encoder, ClipEncoder) else None,
            "classes": {split: list(place.manifest.classes(split)) for split in ("train", "val", "test")},
            "num_classes": place.num_classes,
            "split_hash": place.manifest.split_hash,
            "store_spec": place.store.spec.to_json() if place.store else None,
        },
    )


def resolved_head_options(config: RunConfig) -> dict[str, Any]:
    """Every option of the head with its value, so that a default that changes later cannot re-interpret a run."""
    return head_config(config.head.name, config.head.options).model_dump(mode="json")


def refuse_other_data(checkpoint: Mapping[str, Any], place: Workplace) -> None:
    """Refuse to resume on other data than the run began with.

    Raises:
        SetupError: another split hash or another store.
    """
    spec = place.store.spec.to_json() if place.store else None
    if checkpoint["split_hash"] != place.manifest.split_hash:
        raise SetupError(
            f"--resume: the run's split hash is {checkpoint['split_hash'][:12]}, now it is {place.manifest.split_hash[:12]}. "
            "Restore the manifest, or start a new --out."
        )
    if checkpoint["store_spec"] != spec:
        raise SetupError(
            "--resume: the store's spec is not the one that the run began with. Restore it, or start a new --out."
        )


def trim_metrics(path: Path, episode: int, validated_episode: int) -> None:
    """Drop lines from after the checkpoint; the resumed run writes them again."""
    if not path.exists():
        return
    reached = {"step": episode, "validation": validated_episode}
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that the kill tore; nothing after it can be from before the checkpoint
        if record["episode"] <= reached[record["kind"]]:
            kept.append(line)
    write_file(path, "".join(f"{line}\n" for line in kept).encode())


def export_backbone(folder: Path) -> None:
    """Write the best checkpoint's backbone as a plain state dict, for `mastaf extract --weights` and for other tools."""
    prefix = "encoder.backbone."
    best = load_checkpoint(folder / "best.pt")["model"]
    state = {name.removeprefix(prefix): value for name, value in best.items() if name.startswith(prefix)}
    save_checkpoint(folder / "backbone.pt", {"state_dict": state})


def write_card(
    path: Path, place: Workplace, progress: Progress, is_selected: bool, num_together: int = 1
) -> dict[str, Any]:
    """Write what made the run, as JSON; gives it back. `num_together` heads shared the pass, and its seconds."""
    config = place.config
    card = {
        "mode": config.training.mode,
        "head": config.head.name,
        "head_options": resolved_head_options(config),
        "episodes": progress.episode,
        "best_episode": progress.best_episode,
        "selected_on": "val" if is_selected else "nothing (no validation split: last checkpoint)",
        "val_accuracy": progress.best_accuracy,
        "val_interval95": progress.best_interval95,
        "validation_episodes": config.training.validation_episodes,
        "test_selected_accuracy_published_protocol": progress.test_selected_accuracy,
        "degraded_videos": dict(sorted(place.source.degraded.items())),
        "seconds": progress.seconds,
        "heads_trained_together": num_together,
        "split_hash": place.manifest.split_hash,
        "store_fingerprint": place.store.spec.fingerprint if place.store else None,
        "num_parameters": sum(parameter.numel() for parameter in place.model.parameters()),
        "code_version": code_version(),
        "libraries": library_versions(),
        "hardware": hardware(),
    }
    write_file(path, (json.dumps(card, indent=2) + "\n").encode())
    return card
