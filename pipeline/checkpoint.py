"""Checkpoints of a run: written aside, fsynced, renamed; read back with weights-only loading."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


def write_file(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, or a crash, sees the old content or the new one, whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync_folder(path.parent)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with aside.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync_folder(path.parent)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of ours.

    Raises:
        CheckpointError: no such file, not a checkpoint, or of another format.
    """
    content = load_weights(path, device)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of mastaf format {FORMAT}.")
    return content


def load_weights(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read any file of torch, weights only: code inside it never runs.

    Raises:
        CheckpointError: no such file, or not one that torch reads safely.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}.")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many types here, for a cut file as for a hostile one
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({_plain_reason(error)}). Is the file whole, and from a source you trust?"
        ) from error


def _plain_reason(error: Exception) -> str:
    """The first sentence that says what is wrong; torch's advice to load without weights_only is none for a damaged file."""
    lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
    return lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
