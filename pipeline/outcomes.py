"""Which queries a model got right: digests to compare, and small files to say where two evaluations part.

E episodes, Q queries of an episode.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.checkpoint import write_file
from pipeline.evaluation import Accuracy

Bits = npt.NDArray[np.bool_]


def outcomes_digest(score: Accuracy) -> str | None:
    """SHA-256 of whether each query of each episode was right, in their order; None where a score has no queries."""
    return None if score.outcomes is None else bits_digest(score.outcomes.is_right)


def bits_digest(is_right: Bits) -> str:
    """SHA-256 of (E, Q) answers, and of E and Q."""
    digest = hashlib.sha256("x".join(map(str, is_right.shape)).encode())
    digest.update(np.packbits(is_right.reshape(-1)).tobytes())
    return digest.hexdigest()


def write_outcomes(path: Path, score: Accuracy) -> None:
    """Keep the answers of an evaluation, one bit for each query; nothing where a score has no queries."""
    if score.outcomes is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    is_right, file = score.outcomes.is_right, io.BytesIO()
    shape = np.array(is_right.shape, dtype=np.int64)
    np.savez_compressed(file, allow_pickle=False, is_right=np.packbits(is_right.reshape(-1)), shape=shape)
    write_file(path, file.getvalue())


def read_outcomes(path: Path, digest: str | None) -> Bits | None:
    """(E, Q) answers from `write_outcomes`; None where there are none, or not those with this digest."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            shape = tuple(int(size) for size in arrays["shape"])
            bits = np.unpackbits(arrays["is_right"], count=int(np.prod(shape)))
        is_right = bits.reshape(shape).astype(np.bool_)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return is_right if bits_digest(is_right) == digest else None


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two evaluations of the same episodes differ."""

    episodes: int
    """With at least one query that was right in one of them only."""
    queries: int
    """In all."""
    first_episode: int | None
    """The first of these episodes; None where nothing differs."""


def parting(first: Bits, second: Bits) -> Parting:
    """Compare (E, Q) answers with others to the same queries."""
    differs = first != second
    episodes = np.flatnonzero(differs.any(axis=1))
    return Parting(len(episodes), int(differs.sum()), int(episodes[0]) if len(episodes) else None)
