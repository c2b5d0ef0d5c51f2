"""What fills an episode batch: cubes from a store, or clips decoded on the spot. The only place where the two modes differ.

E episodes, V videos of an episode, S supports, Q queries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cache.store import FeatureStore
from episodes.batch import EpisodeBatch
from episodes.sampler import Episode
from extract.config import SamplingConfig
from extract.decode import VideoError, VideoSource, read_views


class SourceError(ValueError):
    """A video that an episode needs cannot be had; the message names it and the way out."""


class Source(Protocol):
    """Gives the model's inputs for (video, view) pairs."""

    def read(self, video_ids: Sequence[str], views: Sequence[int]) -> Tensor:
        """Inputs (V, ...) in the order asked for."""
        ...

    def check(self, video_ids: Sequence[str], views: Sequence[int]) -> None:
        """Refuse, before any work, what `read` could not give: every video in each of the views."""
        ...


class CachedCubes:
    """Cubes of one array of a store; kept in memory when they all fit."""

    def __init__(self, store: FeatureStore, array: str = "cube", cache_bytes: int = 8 << 30) -> None:
        if array not in store.spec.arrays:
            raise SourceError(f"the store has no array {array!r}, only {sorted(store.spec.arrays)}. Change head.array.")
        self.store = store
        self.array = array
        self.cache_bytes = cache_bytes
        self.cube_shape = store.spec.arrays[array].shape
        """(C, T, H, W) of one cube."""
        self._rows: dict[tuple[str, int], int] = {}
        self._resident: Tensor | None = None

    def check(self, video_ids: Sequence[str], views: Sequence[int]) -> None:
        """Refuse rows that are missing or rejected, naming them; then read all rows into memory if they fit."""
        missing, rejected = [], []
        for video_id in video_ids:
            for view in views:
                outcome = self.store.outcome(video_id, view)
                if outcome is None:
                    missing.append(video_id if len(views) == 1 else f"{video_id} (view {view})")
                elif outcome.status == "rejected":
                    rejected.append(f"{video_id} ({outcome.reason})")
        if missing:
            raise SourceError(
                f"{len(missing)} rows are not in the store: {_some(missing)}. Run `mastaf extract` on this manifest first."
            )
        if rejected:
            rejected = list(dict.fromkeys(rejected))
            raise SourceError(
                f"{len(rejected)} videos of the split were rejected when extracting: {_some(rejected)}. An episode never avoids them "
                "silently: write a manifest without them by `mastaf dataset exclude MANIFEST --from-store STORE --out NEW.csv`."
            )
        self._load([(video_id, view) for video_id in video_ids for view in views])

    def _load(self, rows: list[tuple[str, int]]) -> None:
        rows = list(dict.fromkeys([*self._rows, *rows]))
        item_bytes = int(np.prod(self.cube_shape)) * np.dtype(self.store.spec.arrays[self.array].dtype).itemsize
        if len(rows) * item_bytes > self.cache_bytes or len(rows) == len(self._rows):
            return
        cubes = self.store.read([row[0] for row in rows], [row[1] for row in rows], self.array)
        self._resident = torch.from_numpy(cubes)
        self._rows = {row: index for index, row in enumerate(rows)}

    def read(self, video_ids: Sequence[str], views: Sequence[int]) -> Tensor:
        """Cubes (V, C, T, H, W) in the stored dtype."""
        rows = list(zip(video_ids, views, strict=True))
        if self._resident is not None and all(row in self._rows for row in rows):
            return self._resident[torch.tensor([self._rows[row] for row in rows])]
        return torch.from_numpy(self.store.read(list(video_ids), list(views), self.array))


class LiveClips:
    """Clips decoded from the video files, several at a time; the latest stay in memory as bytes."""

    def __init__(
        self,
        videos: Mapping[str, VideoSource],
        sampling: SamplingConfig,
        decode_threads: int = 2,
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.videos = videos
        self.sampling = sampling
        self.cache_bytes = cache_bytes
        self._pool = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._clips: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._held_bytes = 0

    def check(self, video_ids: Sequence[str], views: Sequence[int]) -> None:  # noqa: ARG002  any view can be made of a file
        """Refuse videos that have no file in this source; whether they decode shows only when they are read."""
        unknown = [video_id for video_id in video_ids if video_id not in self.videos]
        if unknown:
            raise SourceError(f"{len(unknown)} videos have no file: {_some(unknown)}")

    def read(self, video_ids: Sequence[str], views: Sequence[int]) -> Tensor:
        """Clips (V, F, H, W, 3) uint8.

        Raises:
            SourceError: a video cannot be decoded; it is named with the reason.
        """
        rows = list(zip(video_ids, views, strict=True))
        wanted: dict[str, list[int]] = {}
        for video_id, view in dict.fromkeys(rows):
            if (video_id, view) not in self._clips:
                wanted.setdefault(video_id, []).append(view)
        held = {row: self._clips[row] for row in rows if row in self._clips}
        for clips in self._pool.map(lambda item: self._decode(*item), wanted.items()):
            held.update(clips)
            for row, clip in clips.items():
                self._keep(row, clip)
        for row in dict.fromkeys(rows):
            if row in self._clips:
                self._clips.move_to_end(row)
        return torch.from_numpy(np.stack([held[row] for row in rows]))

    def _decode(self, video_id: str, views: list[int]) -> dict[tuple[str, int], np.ndarray]:
        try:
            decoded = read_views(self.videos[video_id], self.sampling, views)
        except VideoError as error:
            raise SourceError(
                f"video {video_id} cannot be used: {error}. Take it out of the episodes with `mastaf extract` followed by "
                "`mastaf dataset exclude MANIFEST --from-store STORE --out NEW.csv`, or repair the file."
            ) from error
        return {(video_id, view): clip for view, clip in zip(views, decoded.clips, strict=True)}

    def _keep(self, row: tuple[str, int], clip: np.ndarray) -> None:
        if clip.nbytes > self.cache_bytes:
            return
        self._clips[row] = clip
        self._held_bytes += clip.nbytes
        while self._held_bytes > self.cache_bytes:
            _, oldest = self._clips.popitem(last=False)
            self._held_bytes -= oldest.nbytes


def assemble(
    episodes: Sequence[Episode],
    source: Source,
    support_views: np.ndarray,
    query_views: np.ndarray,
    global_index: Mapping[str, int] | None = None,
    generator: torch.Generator | None = None,
) -> EpisodeBatch:
    """Turn episodes (ids and labels) into the tensors of one batch.

    Args:
        episodes: E episodes of equal sizes.
        source: where the inputs come from.
        support_views: (E, S) int64, the view of each support.
        query_views: (E, Q) int64, the view of each query.
        global_index: training class name -> global label; None leaves the global labels out (evaluation).
        generator: for heads that draw.
    """
    num_supports = len(episodes[0].support_ids)
    ids = [video_id for episode in episodes for video_id in (*episode.support_ids, *episode.query_ids)]
    views = np.concatenate([support_views, query_views], axis=1).reshape(-1)
    videos = source.read(ids, [int(view) for view in views])
    videos = videos.reshape(len(episodes), -1, *videos.shape[1:])  # (E, V, ...)
    global_labels = None
    if global_index is not None:
        global_labels = torch.tensor([[global_index[name] for name in episode.class_names] for episode in episodes])
    return EpisodeBatch(
        support=videos[:, :num_supports],
        support_labels=torch.from_numpy(
            np.stack([np.asarray(episode.support_labels, dtype=np.int64) for episode in episodes])
        ),
        query=videos[:, num_supports:],
        query_labels=torch.from_numpy(
            np.stack([np.asarray(episode.query_labels, dtype=np.int64) for episode in episodes])
        ),
        n_way=len(episodes[0].class_names),
        class_global_labels=global_labels,
        generator=generator,
    )


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
