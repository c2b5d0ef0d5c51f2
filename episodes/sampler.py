"""Which videos meet in an episode. Episode i depends on the split hash, the protocol, the seed and i alone.

After the published STAF sampler (reference protocol: queries of one class) and the usual one (queries of every class).
Differences from the published code, on purpose: counter-based draws in place of a global generator; everything else is
the same, including that every class must have k_shot + n_query videos where only one class is asked about.
"""

import hashlib
import json
import operator
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from episodes.datasets import Manifest, ManifestError
from episodes.draws import Draws, key_of


class SamplerError(ManifestError):
    """A split cannot give such episodes; the message names the classes that are too small."""


@dataclass(frozen=True, slots=True)
class EpisodeProtocol:
    """What one few-shot task is made of."""

    kind: Literal["per_class", "one_query"]
    """per_class: queries of every class. one_query: queries of one class, drawn uniformly in every episode."""
    n_way: int
    """Classes."""
    k_shot: int
    """Labelled videos of each class."""
    n_query: int
    """Queries of each class, or of the one class."""

    def __post_init__(self) -> None:
        if self.kind not in ("per_class", "one_query"):
            raise ValueError(f"protocol {self.kind!r} is not known; use per_class or one_query")
        for name, least in (("n_way", 2), ("k_shot", 1), ("n_query", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)} is too small; it must be at least {least}")


@dataclass(frozen=True, slots=True)
class Episode:
    """One few-shot task: ids and labels only."""

    index: int
    """Which episode of its sampler this is."""
    class_names: tuple[str, ...]
    """(N,) the classes; a label is a place in here."""
    support_ids: tuple[str, ...]
    """(N k_shot,) the labelled videos, in random order."""
    support_labels: tuple[int, ...]
    """Label of each support."""
    query_ids: tuple[str, ...]
    """(Q,) the videos to classify, in random order."""
    query_labels: tuple[int, ...]
    """Label of each query."""

    def __post_init__(self) -> None:
        if len(self.support_ids) != len(self.support_labels) or len(self.query_ids) != len(self.query_labels):
            raise ValueError(
                f"episode {self.index}: {len(self.support_ids)} supports with {len(self.support_labels)} labels, "
                f"{len(self.query_ids)} queries with {len(self.query_labels)} labels"
            )
        if len({*self.support_ids, *self.query_ids}) < len(self.support_ids) + len(self.query_ids):
            raise ValueError(f"episode {self.index} holds a video twice")


class EpisodeSampler:
    """Draws the episodes of one split, any of them at any time and in any process."""

    def __init__(self, manifest: Manifest, split: str, protocol: EpisodeProtocol, seed: int = 0) -> None:
        """Check that the split is large enough.

        Raises:
            SamplerError: fewer classes than n_way, or a class with fewer than k_shot + n_query videos.
        """
        self.split = split
        self.protocol = protocol
        self.seed = operator.index(seed)
        self.split_hash = manifest.split_hash
        self._ids_of = _ids_by_class(manifest, split)
        self._class_names = list(self._ids_of)
        self.video_ids = tuple(video_id for ids in self._ids_of.values() for video_id in ids)
        self._refuse_small()
        self._key = key_of(
            "mastaf episodes 1", self.split_hash, split, *(str(value) for value in asdict(protocol).values()), self.seed
        )

    def _refuse_small(self) -> None:
        protocol = self.protocol
        if len(self._class_names) < protocol.n_way:
            raise SamplerError(
                f"split {self.split!r} has {len(self._class_names)} classes, but n_way = {protocol.n_way}. "
                "Lower episodes.n_way or give the split more classes."
            )
        needed = protocol.k_shot + protocol.n_query
        small = [f"{name} ({len(ids)})" for name, ids in self._ids_of.items() if len(ids) < needed]
        if small:
            raise SamplerError(
                f"split {self.split!r}: {len(small)} classes have fewer than k_shot + n_query = {protocol.k_shot} + "
                f"{protocol.n_query} = {needed} videos: {', '.join(small)}. Lower episodes.k_shot or episodes.n_query, or "
                "exclude all videos of these classes."
            )

    def episode(self, index: int) -> Episode:
        """Draw episode `index`, from 0 on."""
        protocol, draws = self.protocol, Draws(self._key, index)
        class_names = draws.sample(self._class_names, protocol.n_way)
        asked = range(protocol.n_way) if protocol.kind == "per_class" else [draws.below(protocol.n_way)]
        supports: list[tuple[str, int]] = []
        queries: list[tuple[str, int]] = []
        for label, class_name in enumerate(class_names):
            drawn = draws.sample(self._ids_of[class_name], protocol.k_shot + protocol.n_query)
            supports += [(video_id, label) for video_id in drawn[: protocol.k_shot]]
            if label in asked:
                queries += [(video_id, label) for video_id in drawn[protocol.k_shot :]]
        supports, queries = draws.shuffled(supports), draws.shuffled(queries)
        return Episode(
            index=index,
            class_names=tuple(class_names),
            support_ids=tuple(video_id for video_id, _ in supports),
            support_labels=tuple(label for _, label in supports),
            query_ids=tuple(video_id for video_id, _ in queries),
            query_labels=tuple(label for _, label in queries),
        )


def _ids_by_class(manifest: Manifest, split: str) -> dict[str, list[str]]:
    """Sorted ids by class name, in the order of the names: the manifest's own order must not matter."""
    ids_of: dict[str, list[str]] = {name: [] for name in manifest.classes(split)}
    for video in manifest.videos_of(split):
        ids_of[video.class_name].append(video.video_id)
    return {name: sorted(ids) for name, ids in ids_of.items()}


def draw_views(split_hash: str, seed: int, index: int, count: int, num_views: int) -> npt.NDArray[np.int64]:
    """The views that the videos of training episode `index` are seen in; a stream of its own, apart from the videos'.

    Args:
        count: videos of the episode, supports before queries.
        num_views: views there are.

    Returns:
        Views in 0 .. num_views - 1, (count,) int64.
    """
    draws = Draws(key_of("mastaf views 1", split_hash, operator.index(seed)), index)
    return np.array([draws.below(num_views) for _ in range(count)], dtype=np.int64)


def draw_noise_seed(split_hash: str, seed: int, index: int) -> int:
    """Seed of what a head draws within episode `index`, in 0 .. 2**63 - 1; a stream of its own, apart from videos and views."""
    return Draws(key_of("mastaf noise 1", split_hash, operator.index(seed)), index).below(1 << 63)


def episode_hash(episodes: Iterable[Episode]) -> str:
    """SHA-256 of episodes in their order, as hexadecimal digits."""
    digest = hashlib.sha256()
    for episode in episodes:
        line = [
            episode.index,
            episode.class_names,
            episode.support_ids,
            episode.support_labels,
            episode.query_ids,
            episode.query_labels,
        ]
        digest.update(json.dumps(line).encode("ascii") + b"\n")
    return digest.hexdigest()
