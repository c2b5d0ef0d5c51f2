"""The two stages of `--engine ray` as they run on the nodes of a cluster: decode the videos of a shard, embed and commit it.

Ray may run both twice: decoding changes nothing, and a commit of a shard that is done is none. Nothing here needs Ray to be
imported.

R rows of a shard; F frames, H W pixels.
"""

from __future__ import annotations

import json
import pickle
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cache.disk_store import DiskStore
from cache.open import open_disk_store
from cache.store import Claim, RowOutcome, Shard
from configs.schema import ExtractionConfig, RunConfig
from extract.config import SamplingConfig
from extract.decode import VideoSource
from pipeline.extraction import build_spec
from pipeline.extraction_batches import ShardEmbedder
from pipeline.extraction_feed import FedRow, ShardFeed
from pipeline.extraction_writer import ShardWriter


@dataclass(frozen=True, slots=True)
class ShardItem:
    """One shard on its way to a decoding task; self-contained, so that this needs no access to the store."""

    shard: Shard
    wanted: tuple[bool, ...]
    """Of each row, see `FeatureStore.wanted`."""
    videos: Mapping[str, VideoSource]
    """Those of the shard."""
    sampling: SamplingConfig
    config: ExtractionConfig


class _OneShard:
    """Stands for the store where rows are decoded: the shard is claimed later, by whoever commits it."""

    def __init__(self, wanted: Sequence[bool]) -> None:
        self._wanted = list(wanted)

    def claim(self, _shard: Shard) -> Claim:
        return Claim("ours")

    def release(self, _shard: Shard) -> None:
        pass

    def wanted(self, _shard: Shard) -> list[bool]:
        return self._wanted


class ShardDecoder:
    """The first stage: a shard with its decoded clips."""

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Columns `decoded` (a `DecodedShard` without its clips), `clips` (R, F, H, W, 3) uint8, and `failure`."""
        try:
            decoded, clips = decode_shard(pickle.loads(row["item"]))
        except Exception as error:
            return {"decoded": b"", "clips": np.zeros((0, 1, 1, 1, 3), dtype=np.uint8), "failure": carried(error)}
        return {"decoded": pickle.dumps(decoded), "clips": clips, "failure": b""}


@dataclass(frozen=True, slots=True)
class DecodedShard:
    """A shard between the stages, but for its clips."""

    shard: Shard
    outcomes: list[RowOutcome]
    """R of them."""
    has_clip: list[bool]
    """R of them; the others have zeros for a clip."""
    num_restarts: int
    seconds: float


def decode_shard(item: ShardItem) -> tuple[DecodedShard, NDArray[np.uint8]]:
    """Decode the videos of a shard; clips (R, F, H, W, 3), zeros where there is none.

    Raises:
        VideoTooShortError, WorkerStartError: as `ShardFeed.next_rows`.
    """
    started = time.perf_counter()
    size = item.sampling.crop_size
    clips = np.zeros((len(item.shard.rows), item.sampling.num_frames, size, size, 3), dtype=np.uint8)
    fed: list[FedRow] = []
    # One process, so that a native crash or a hang costs one video and not the whole task.
    config = item.config.model_copy(update={"decode_workers": 1})
    with ShardFeed(_OneShard(item.wanted), [item.shard], item.videos, item.sampling, config) as feed:  # type: ignore[arg-type]
        while (rows := feed.next_rows(lambda: None)) is not None:
            for row in rows:
                if row.clip is not None:
                    clips[row.position] = row.clip
            fed += rows
        num_restarts = feed.num_restarts
    outcomes, has_clip = [row.outcome for row in fed], [row.clip is not None for row in fed]
    return DecodedShard(item.shard, outcomes, has_clip, num_restarts, time.perf_counter() - started), clips


@dataclass(frozen=True, slots=True)
class ActorSettings:
    """What an actor needs to begin."""

    store: str
    store_kind: str
    get_backbone: Callable[[], nn.Module]
    """Gives it on the CPU."""
    config: RunConfig
    device: str
    num_threads: int


class ShardActor:
    """The second stage: holds the backbone and the store, embeds shards and commits them."""

    def __init__(self, settings: ActorSettings) -> None:
        self._settings = settings
        self._store: DiskStore | None = None
        self._embedder: ShardEmbedder | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Column `report` (JSON, as in `ExtractionReport`), and `failure`."""
        if row["failure"]:
            return {"report": "{}", "failure": row["failure"]}
        try:
            # Not when the actor is made: Ray makes an actor that fails anew, without end.
            if self._embedder is None:
                self._begin()
            report = self._do(pickle.loads(row["decoded"]), row["clips"])
        except Exception as error:
            # It holds part of the shard that failed, and the actor may be given another.
            self._embedder = None
            return {"report": "{}", "failure": carried(error)}
        return {"report": json.dumps(report), "failure": b""}

    def _begin(self) -> None:
        settings, device = self._settings, torch.device(self._settings.device)
        torch.set_num_threads(settings.num_threads)
        backbone = settings.get_backbone().to(device).eval()
        # Made here: a machine with other library versions is refused before it writes anything.
        spec = build_spec(settings.config, backbone, device)
        if self._store is None:
            self._store = open_disk_store(settings.store, settings.store_kind, spec=spec, mode="a")
        self._embedder = ShardEmbedder(spec, backbone, settings.config, device)

    def _do(self, decoded: DecodedShard, clips: NDArray[np.uint8]) -> dict[str, Any]:
        assert self._store is not None
        assert self._embedder is not None
        started = embedded = time.perf_counter()
        num_clips = 0
        shard = decoded.shard
        if self._store.claim(shard).state == "ours":
            try:
                finished = None
                for position, outcome in enumerate(decoded.outcomes):
                    clip = clips[position] if decoded.has_clip[position] else None
                    finished = self._embedder.add(FedRow(shard, position, clip, outcome))
                assert finished is not None
                embedded = time.perf_counter()
                with ShardWriter(self._store, on_commit=lambda _: None) as writer:
                    writer.submit(finished, lambda: None)
                if writer.error is not None:
                    raise writer.error
                num_clips = writer.num_rows
            finally:
                self._store.release(shard)
        return {
            "num_clips": num_clips,
            "num_restarts": decoded.num_restarts,
            "decoding_seconds": decoded.seconds,
            "backbone_seconds": embedded - started,
            "writing_seconds": time.perf_counter() - embedded,
        }


def carried(error: Exception) -> bytes:
    """An error as bytes. As a value it arrives as it is; raised, Ray would keep its text at best."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # an error of a library that cannot be pickled
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data
