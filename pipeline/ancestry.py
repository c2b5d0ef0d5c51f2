"""Classes that the weights behind a run have seen before it: those of the runs of ours that they come from.

A chain of runs (classification, end to end, heads on the cubes) may use several manifests. What one of them trained on must not be
scored as unseen by another. Of weights that are not ours nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from pipeline.checkpoint import FORMAT


@dataclass(frozen=True, slots=True)
class SeenClasses:
    """Class names by what they were used for."""

    train: frozenset[str] = frozenset()
    """Trained on."""
    val: frozenset[str] = frozenset()
    """Used to choose a checkpoint."""

    def __or__(self, other: SeenClasses) -> SeenClasses:
        return SeenClasses(self.train | other.train, self.val | other.val)

    def leaked_into(self, split: str, class_names: Iterable[str]) -> list[str]:
        """Those of the classes of a split that may not be called unseen."""
        seen = {"train": frozenset[str](), "val": self.train}.get(split, self.train | self.val)
        return sorted(seen & set(class_names))

    def to_json(self) -> dict[str, list[str]]:
        """As a JSON object."""
        return {"train": sorted(self.train), "val": sorted(self.val)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> Self:
        """From `to_json`; None, of files of earlier versions, is nothing known."""
        return cls() if value is None else cls(frozenset(value["train"]), frozenset(value["val"]))


def classes_of_run(content: Mapping[str, Any]) -> SeenClasses:
    """Of a run and all before it, given its checkpoint."""
    own = SeenClasses(frozenset(content["classes"]["train"]), frozenset(content["classes"]["val"]))
    return own | SeenClasses.from_json(content.get("inherited_classes"))


def classes_behind(path: str | Path | None) -> SeenClasses:
    """What a file of weights has seen: a run's checkpoint or exported backbone; nothing for others, or where there is no such file."""
    if path is None or not Path(path).is_file():
        return SeenClasses()
    try:
        # Only what is looked at is read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # not a file of ours; whoever loads its weights says what is wrong with it
        return SeenClasses()
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        return SeenClasses()
    return classes_of_run(content) if "classes" in content else SeenClasses.from_json(content.get("seen_classes"))
