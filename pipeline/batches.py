"""The batches of training episodes, made ahead of the steps that use them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from episodes.batch import EpisodeBatch
from episodes.sampler import Episode, draw_noise_seed, draw_views
from pipeline.live_clips import awaited
from pipeline.sources import Augment, Source, assemble


class _GivenUp(Exception):
    """Nobody waits for the batch any more."""


class Sampler(Protocol):
    """What draws training episodes: `EpisodeSampler`, or `ClipSampler` in classification."""

    split_hash: str
    seed: int

    def episode(self, index: int) -> Episode:
        """Episode `index`, from 0 on; depends on the index alone."""
        ...


@dataclass(frozen=True, slots=True)
class TrainingBatches:
    """Makes the batches of training episodes: what to draw, where the inputs come from, how labels count."""

    sampler: Sampler
    source: Source
    global_index: Mapping[str, int]
    """Training class name -> global label."""
    train_views: int
    """Each video's view is drawn from 0 .. train_views - 1."""
    augment: Augment | None = None
    """What becomes of the clips (`pipeline.augmentation`)."""
    device: torch.device | None = None
    """Where inputs go as soon as they are there; None: they stay where they are read."""
    num_ahead: int = 1
    """Batches that are in the making at most."""
    num_threads: int = 1
    """Threads that make them; more than one helps where they wait for decoding processes."""

    def make(self, indices: range) -> EpisodeBatch:
        """The batch of some training episodes; depends on the indices alone."""
        sampler = self.sampler
        episodes = [sampler.episode(index) for index in indices]
        num_supports = len(episodes[0].support_ids)
        views = np.stack([self._views(episode) for episode in episodes])  # (E, S + Q)
        seeds = [draw_noise_seed(sampler.split_hash, sampler.seed, index) for index in indices]
        return assemble(
            episodes,
            self.source,
            views[:, :num_supports],
            views[:, num_supports:],
            self.global_index,
            seeds,
            self.augment,
            self.device,
        )

    def _views(self, episode: Episode) -> npt.NDArray[np.int64]:
        """(S + Q,) int64."""
        count = len(episode.support_ids) + len(episode.query_ids)
        return draw_views(self.sampler.split_hash, self.sampler.seed, episode.index, count, self.train_views)

    def describe(self, index: int) -> dict[str, Any]:
        """What training episode `index` is made of, as a JSON object."""
        episode = self.sampler.episode(index)
        views = [int(view) for view in self._views(episode)]
        return {**asdict(episode), "views": views}

    @contextmanager
    def ahead(
        self, wanted: Iterator[range], gives_up: Callable[[], bool] = lambda: False
    ) -> Iterator[Callable[[], EpisodeBatch | None]]:
        """Make batches in the background.

        Args:
            wanted: the episodes of each batch.
            gives_up: asked now and then while a batch lets wait for itself: whether to go without it.

        Yields:
            A function that gives the next batch in the order of `wanted`, or None for giving up.
        """
        making: deque[Future[EpisodeBatch]] = deque()
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="batches")

        def begin_another() -> None:
            indices = next(wanted, None)
            if indices is not None:
                making.append(pool.submit(self.make, indices))

        def leave_if_wanted() -> None:
            if gives_up():
                raise _GivenUp

        def next_batch() -> EpisodeBatch | None:
            try:
                batch = awaited(making.popleft(), leave_if_wanted)
            except _GivenUp:
                return None
            begin_another()
            return batch

        try:
            for _ in range(self.num_ahead):
                begin_another()
            yield next_batch
        finally:
            # Not waited for: a run that is stopped saves first, and closing its source ends what is being decoded.
            pool.shutdown(wait=False, cancel_futures=True)
