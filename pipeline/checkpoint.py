"""Checkpoints of a run: written aside, fsynced, renamed; read back with weights-only loading."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


class WriteError(OSError):
    """A file of a run cannot be written; the message says which, why and what to do."""


@dataclass(frozen=True, slots=True)
class Newest:
    """A checkpoint that was found."""

    path: Path
    content: dict[str, Any]
    problems: tuple[str, ...]
    """What is wrong with others that were passed over."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says of a write into one line with the path and the way out.

    Raises:
        WriteError: in place of an OSError, also of one that torch wraps into a RuntimeError of its own.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        hidden: BaseException | None = error
        while hidden is not None and not isinstance(hidden, OSError):
            hidden = hidden.__context__
        if hidden is None or isinstance(hidden, WriteError):
            raise
        raise WriteError(
            f"{path} cannot be written ({hidden.strerror or hidden}). What was written before is whole: make room, or mend the "
            "folder, and start the same command again (with --resume where the run has done a step)."
        ) from error


def write_file(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, or a crash, sees the old content or the new one, whole.

    Raises:
        WriteError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path), aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def save_checkpoint(path: Path, content: dict[str, Any], keep: Path | None = None) -> None:
    """Write tensors, numbers, strings and containers of them, with a digest of them all.

    Args:
        path: replaced at once; a reader, or a crash, sees the old file or the new one.
        content: what to write.
        keep: gets the file that `path` held before, so that there is a good one whatever becomes of the new one.

    Raises:
        WriteError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    content = {"format": FORMAT, **content}
    with writing(path), aside.open("wb") as file:
        torch.save({**content, "digest": content_digest(content)}, file)
        file.flush()
        os.fsync(file.fileno())
    if keep is None or not path.exists():
        aside.replace(path)
    else:
        _replace_and_keep(aside, path, keep)
    sync_folder(path.parent)


def _replace_and_keep(aside: Path, path: Path, keep: Path) -> None:
    """Rename `aside` to `path` and `path` to `keep`; at no instant is there less than the two files that were there before."""
    former = keep.with_name(f".{keep.name}.{os.getpid()}.partial")
    former.unlink(missing_ok=True)
    try:
        os.link(path, former)
    except OSError:
        # A file system without hard links: for a moment the kept one is all there is.
        path.replace(keep)
        aside.replace(path)
        return
    aside.replace(path)
    former.replace(keep)
    # Where `path` and `keep` were two names of one file, the rename has done nothing.
    former.unlink(missing_ok=True)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of ours.

    Raises:
        CheckpointError: no such file, not a checkpoint, of another format, or not with the values that were written.
    """
    content = load_weights(path, device)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of mastaf format {FORMAT}.")
    digest = content.pop("digest", None)  # runs of earlier versions have none
    if digest is not None and digest != content_digest(content):
        raise CheckpointError(f"{path} is damaged: it does not hold what was written into it. Restore it from a copy.")
    return content


def load_newest(paths: Sequence[Path]) -> Newest:
    """The first good checkpoint of those that there are, on the CPU.

    Args:
        paths: where one may be, the newest first; those that do not exist are passed over.

    Raises:
        CheckpointError: none of them can be read; the reason of each.
    """
    problems: list[CheckpointError] = []
    for path in paths:
        if not path.is_file():
            continue
        try:
            return Newest(path, load_checkpoint(path), tuple(str(problem) for problem in problems))
        except CheckpointError as error:
            problems.append(error)
    if not problems:
        raise CheckpointError(f"no checkpoint {paths[0]}.")
    if len(problems) > 1:
        others = " ".join(map(str, problems[1:]))
        raise CheckpointError(f"{problems[0]} Nor is there another to go on from: {others}")
    raise problems[0]


def content_digest(content: Any) -> str:
    """SHA-256 over a nest of dicts, lists, tensors, numbers and strings; equal for equal values, wherever the tensors are."""
    digest = hashlib.sha256()
    _digest_into(digest, content)
    return digest.hexdigest()


def _digest_into(digest: hashlib._Hash, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"tensor {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)}".encode())
        for key, item in value.items():
            digest.update(repr(key).encode())
            _digest_into(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)}".encode())
        for item in value:
            _digest_into(digest, item)
    else:
        digest.update(repr(value).encode())


def remove_leftovers(folder: Path) -> None:
    """Remove what writes of a killed process left in a folder of ours and in those within."""
    for pattern in (".*.partial", "*/.*.partial"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


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


def sync_folder(folder: Path) -> None:
    """Have what was renamed or removed in a folder on the disk itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
