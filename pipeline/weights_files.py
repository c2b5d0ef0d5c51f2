"""Weights entries of a config by their content, so that a file may be moved, and one that is replaced is noticed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from configs.schema import RunConfig


def started_from(config: RunConfig) -> dict[str, str]:
    """What a run's first weights come from, by setting: `file` or `directory` with its SHA-256, or the entry itself (`random:0`).

    On the cache the backbone's weights are the store's, whose fingerprint holds them.
    """
    entries = {"training.initial_weights": config.training.initial_weights}
    if config.training.mode != "cached":
        entries["backbone.weights"] = config.backbone.weights
    named = {setting: weights_name(entry) for setting, entry in entries.items()}
    return {setting: name for setting, name in named.items() if name is not None}


def weights_name(text: str | None) -> str | None:
    """What stands for a weights entry of a config: the content of a file or directory, or else the entry itself."""
    if text is None or not Path(text).exists():
        return text
    path = Path(text)
    return f"directory {folder_sha256(path)}" if path.is_dir() else f"file {file_sha256(path)}"


def plain_files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones and those in hidden folders (of a downloader, with its times), sorted."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def folder_sha256(folder: Path) -> str:
    """Over names and contents of `plain_files`."""
    lines = [f"{path.relative_to(folder).as_posix()} {file_sha256(path)}" for path in plain_files(folder)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Of the bytes, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
