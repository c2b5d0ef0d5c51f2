"""What fills an episode batch: cubes from a store, or clips decoded on the spot. The only place where the two modes differ.

E episodes, V videos of an episode, S supports, Q queries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cache.store import FeatureStore
from episodes.batch import EpisodeBatch
from episodes.sampler import Episode
from pipeline.console import shortened
from pipeline.live_clips import LiveClips, SourceError
from pipeline.ranks import ALONE, Ranks

__all__ = ["Augment", "CachedCubes", "EncodedClips", "LiveClips", "Source", "SourceError", "assemble"]

Augment = Callable[[Tensor, Sequence[tuple[str, int, int]]], Tensor]
"""What becomes of training clips (V, F, H, W, 3) uint8, given the video, the view and the episode of each."""


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
        self.degraded: dict[str, str] = {}
        """Reason by video id, of every checked video that is not quite whole."""
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
                elif outcome.status == "degraded":
                    self.degraded[video_id] = str(outcome.reason)
        if missing:
            raise SourceError(
                f"{len(missing)} rows are not in the store: {shortened(missing)}. Run `mastaf extract` on this manifest first."
            )
        if rejected:
            rejected = list(dict.fromkeys(rejected))
            raise SourceError(
                f"{len(rejected)} videos of the split were rejected when extracting: {shortened(rejected)}. An episode never avoids them "
                "silently: write a manifest without them by `mastaf dataset exclude MANIFEST --from-store STORE --out NEW.csv` and go on "
                "with it (a run that is trained already: `mastaf evaluate RUN --manifest NEW.csv`)."
            )
        self._load([(video_id, view) for video_id in video_ids for view in views])

    def _load(self, rows: list[tuple[str, int]]) -> None:
        """Read the rows that are not in memory yet, if all fit together."""
        new = [row for row in dict.fromkeys(rows) if row not in self._rows]
        item_bytes = int(np.prod(self.cube_shape)) * np.dtype(self.store.spec.arrays[self.array].dtype).itemsize
        if not new or (len(self._rows) + len(new)) * item_bytes > self.cache_bytes:
            return
        cubes = torch.from_numpy(self.store.read([row[0] for row in new], [row[1] for row in new], self.array))
        self._rows |= {row: len(self._rows) + index for index, row in enumerate(new)}
        self._resident = cubes if self._resident is None else torch.cat([self._resident, cubes])

    def read(self, video_ids: Sequence[str], views: Sequence[int]) -> Tensor:
        """Cubes (V, C, T, H, W) in the stored dtype."""
        rows = list(zip(video_ids, views, strict=True))
        if self._resident is not None and all(row in self._rows for row in rows):
            return self._resident[torch.tensor([self._rows[row] for row in rows])]
        return torch.from_numpy(self.store.read(list(video_ids), list(views), self.array))


class EncodedClips:
    """Each clip passed once through a backbone in evaluation mode; a video is encoded once however many episodes draw it.

    With running statistics a cube is a constant of its video (reference 12.8), so the scores are those of the whole model.
    """

    def __init__(
        self,
        clips: LiveClips,
        encoder: nn.Module,
        device: torch.device,
        ranks: Ranks = ALONE,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Encode nothing yet.

        Args:
            clips: decoded on the spot.
            encoder: the backbone.
            device: where it is.
            ranks: of this job; each encodes a share in `check`.
            on_progress: called with (clips encoded, clips to encode) while they are, and while they are waited for; may raise to leave.
        """
        self.on_progress = on_progress
        self.clips = clips
        self.encoder = encoder
        self.device = device
        self.ranks = ranks
        self._cubes: dict[tuple[str, int], Tensor] = {}

    def check(self, video_ids: Sequence[str], views: Sequence[int]) -> None:
        """Decode and encode every video in each of the views; ranks, which all ask for the same, each do a share for all."""
        self.clips.check(video_ids, views)
        rows = self._missing([(video_id, view) for video_id in video_ids for view in views])
        if not self.ranks.are_several or len(rows) < self.ranks.world_size:
            self._encode(rows)
            return
        own = self.ranks.slice_of(range(len(rows)))
        self._encode([rows[index] for index in own])
        cubes = self.ranks.gather_rows(torch.stack([self._cubes[rows[index]] for index in own]))
        self._cubes |= dict(zip(rows, cubes, strict=True))

    def _missing(self, rows: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        return [row for row in dict.fromkeys(rows) if row not in self._cubes]

    def _encode(self, rows: Sequence[tuple[str, int]], chunk: int = 32) -> None:
        was_training = self.encoder.training
        self.encoder.eval()
        parts = [rows[start : start + chunk] for start in range(0, len(rows), chunk)]
        encoded = 0

        def look() -> None:
            self.on_progress(encoded, len(rows))

        reads = deque(self._begin_read(part, look) for part in parts[:2])
        with torch.no_grad():
            for number, part in enumerate(parts):
                clips = reads.popleft()()
                if number + 2 < len(parts):
                    # Decoded while this part and the next one are encoded.
                    reads.append(self._begin_read(parts[number + 2], look))
                cubes = self.encoder(clips.to(self.device, non_blocking=True)[None])[0].cpu()
                self._cubes |= dict(zip(part, cubes, strict=True))
                encoded += len(part)
                look()
        self.encoder.train(was_training)

    def _begin_read(self, rows: Sequence[tuple[str, int]], while_waiting: Callable[[], None]) -> Callable[[], Tensor]:
        return self.clips.begin_read([row[0] for row in rows], [row[1] for row in rows], while_waiting)

    def read(self, video_ids: Sequence[str], views: Sequence[int]) -> Tensor:
        """Cubes (V, C, T, H, W) float32."""
        rows = list(zip(video_ids, views, strict=True))
        self._encode(self._missing(rows))
        return torch.stack([self._cubes[row] for row in rows])


def assemble(
    episodes: Sequence[Episode],
    source: Source,
    support_views: np.ndarray,
    query_views: np.ndarray,
    global_index: Mapping[str, int] | None = None,
    seeds: Sequence[int] | None = None,
    augment: Augment | None = None,
    device: torch.device | None = None,
) -> EpisodeBatch:
    """Turn episodes (ids and labels) into the tensors of one batch.

    Args:
        episodes: E episodes of equal sizes.
        source: where the inputs come from.
        support_views: (E, S) int64, the view of each support.
        query_views: (E, Q) int64, the view of each query.
        global_index: training class name -> global label; None leaves the global labels out (evaluation).
        seeds: E seeds of what a head draws (`episodes.sampler.draw_noise_seed`).
        augment: what becomes of clips in training (`pipeline.augmentation`).
        device: where the inputs go, in one piece and before they are augmented; None: they stay where they are read.
    """
    num_supports = len(episodes[0].support_ids)
    ids = [video_id for episode in episodes for video_id in (*episode.support_ids, *episode.query_ids)]
    views = [int(view) for view in np.concatenate([support_views, query_views], axis=1).reshape(-1)]
    videos = source.read(ids, views)
    if device is not None:
        videos = videos.to(device, non_blocking=True)
    if augment is not None:
        indices = [episode.index for episode in episodes for _ in (*episode.support_ids, *episode.query_ids)]
        videos = augment(videos, list(zip(ids, views, indices, strict=True)))
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
        seeds=None if seeds is None else torch.tensor(seeds, dtype=torch.int64),
        support_order=torch.tensor([_places(episode.support_ids) for episode in episodes], dtype=torch.int64),
    )


def _places(video_ids: Sequence[str]) -> list[int]:
    """The place of each video when they are sorted by id."""
    place_of = {video_id: place for place, video_id in enumerate(sorted(video_ids))}
    return [place_of[video_id] for video_id in video_ids]
