"""What fills an episode batch: cubes from a store, or clips decoded on the spot. The only place where the two modes differ.

E episodes, V videos of an episode, S supports, Q queries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cache.store import FeatureStore
from episodes.batch import EpisodeBatch
from episodes.sampler import Episode
from extract.config import SamplingConfig
from extract.decode import VideoError, VideoSource, read_views
from pipeline.console import shortened


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
        # The batch of the next step is made while the loop validates: both read.
        self._lock = Lock()
        self.degraded: dict[str, str] = {}
        """Reason by video id, of every video that was read so far and is not quite whole."""

    def check(self, video_ids: Sequence[str], views: Sequence[int]) -> None:  # noqa: ARG002  any view can be made of a file
        """Refuse videos that have no file in this source; whether they decode shows only when they are read."""
        unknown = [video_id for video_id in video_ids if video_id not in self.videos]
        if unknown:
            raise SourceError(f"{len(unknown)} videos have no file: {shortened(unknown)}")

    def read(self, video_ids: Sequence[str], views: Sequence[int]) -> Tensor:
        """Clips (V, F, H, W, 3) uint8.

        Raises:
            SourceError: a video cannot be decoded; it is named with the reason.
        """
        rows = list(zip(video_ids, views, strict=True))
        held = self._take(rows)
        wanted: dict[str, list[int]] = {}
        for video_id, view in dict.fromkeys(rows):
            if (video_id, view) not in held:
                wanted.setdefault(video_id, []).append(view)
        for clips in self._pool.map(lambda item: self._decode(*item), wanted.items()):
            held.update(clips)
            self._keep(clips)
        return torch.from_numpy(np.stack([held[row] for row in rows]))

    def _take(self, rows: Sequence[tuple[str, int]]) -> dict[tuple[str, int], np.ndarray]:
        """What is in memory of these rows, marked as used."""
        with self._lock:
            held = {row: self._clips[row] for row in rows if row in self._clips}
            for row in held:
                self._clips.move_to_end(row)
        return held

    def _decode(self, video_id: str, views: list[int]) -> dict[tuple[str, int], np.ndarray]:
        try:
            decoded = read_views(self.videos[video_id], self.sampling, views)
        except VideoError as error:
            raise SourceError(
                f"video {video_id} cannot be used: {error}. Take it out of the episodes with `mastaf extract` followed by "
                "`mastaf dataset exclude MANIFEST --from-store STORE --out NEW.csv`, or repair the file."
            ) from error
        if decoded.status != "ok":
            self.degraded[video_id] = str(decoded.reason)
        return {(video_id, view): clip for view, clip in zip(views, decoded.clips, strict=True)}

    def _keep(self, clips: Mapping[tuple[str, int], np.ndarray]) -> None:
        with self._lock:
            for row, clip in clips.items():
                if row in self._clips or clip.nbytes > self.cache_bytes:
                    continue
                self._clips[row] = clip
                self._held_bytes += clip.nbytes
            while self._held_bytes > self.cache_bytes:
                _, oldest = self._clips.popitem(last=False)
                self._held_bytes -= oldest.nbytes


class EncodedClips:
    """Each clip passed once through a backbone in evaluation mode; a video is encoded once however many episodes draw it.

    With running statistics a cube is a constant of its video (reference 12.8), so the scores are those of the whole model.
    """

    def __init__(self, clips: LiveClips, encoder: nn.Module, device: torch.device) -> None:
        self.clips = clips
        self.encoder = encoder
        self.device = device
        self._cubes: dict[tuple[str, int], Tensor] = {}

    def check(self, video_ids: Sequence[str], views: Sequence[int]) -> None:
        """Decode and encode every video in each of the views."""
        self.clips.check(video_ids, views)
        self._encode([(video_id, view) for video_id in video_ids for view in views])

    def _encode(self, rows: Sequence[tuple[str, int]], chunk: int = 32) -> None:
        rows = [row for row in dict.fromkeys(rows) if row not in self._cubes]
        was_training = self.encoder.training
        self.encoder.eval()
        with torch.no_grad():
            for start in range(0, len(rows), chunk):
                part = rows[start : start + chunk]
                clips = self.clips.read([row[0] for row in part], [row[1] for row in part]).to(self.device)
                for row, cube in zip(part, self.encoder(clips[None])[0].cpu(), strict=True):
                    self._cubes[row] = cube
        self.encoder.train(was_training)

    def read(self, video_ids: Sequence[str], views: Sequence[int]) -> Tensor:
        """Cubes (V, C, T, H, W) float32."""
        rows = list(zip(video_ids, views, strict=True))
        self._encode(rows)
        return torch.stack([self._cubes[row] for row in rows])


def assemble(
    episodes: Sequence[Episode],
    source: Source,
    support_views: np.ndarray,
    query_views: np.ndarray,
    global_index: Mapping[str, int] | None = None,
    seeds: Sequence[int] | None = None,
) -> EpisodeBatch:
    """Turn episodes (ids and labels) into the tensors of one batch.

    Args:
        episodes: E episodes of equal sizes.
        source: where the inputs come from.
        support_views: (E, S) int64, the view of each support.
        query_views: (E, Q) int64, the view of each query.
        global_index: training class name -> global label; None leaves the global labels out (evaluation).
        seeds: E seeds of what a head draws (`episodes.sampler.draw_noise_seed`).
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
        seeds=None if seeds is None else torch.tensor(seeds, dtype=torch.int64),
        support_order=torch.tensor([_places(episode.support_ids) for episode in episodes]),
    )


def _places(video_ids: Sequence[str]) -> list[int]:
    """The place of each video when they are sorted by id."""
    place_of = {video_id: place for place, video_id in enumerate(sorted(video_ids))}
    return [place_of[video_id] for video_id in video_ids]
