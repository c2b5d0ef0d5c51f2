"""The two stages of `--engine ray` as they run on the nodes of a cluster: decode the videos of a shard, embed and commit it.

Ray may run both twice: decoding changes nothing, and a commit of a shard that is done is none. Nothing here needs Ray to be
imported.

R rows of a shard; F frames, H W pixels.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

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


def decode_shard(row: Mapping[str, Any]) -> dict[str, Any]:
    """The first stage: a shard with its decoded clips (R, F, H, W, 3) uint8, zeros where there is none."""
    started = time.perf_counter()
    item: ShardItem = pickle.loads(row["item"])
    size = item.sampling.crop_size
    clips = np.zeros((len(item.shard.rows), item.sampling.num_frames, size, size, 3), dtype=np.uint8)
    outcomes: list[RowOutcome] = []
    has_clip: list[bool] = []
    # One process, so that a native crash or a hang costs one video and not the whole task.
    config = item.config.model_copy(update={"decode_workers": 1})
    with ShardFeed(_OneShard(item.wanted), [item.shard], item.videos, item.sampling, config) as feed:  # type: ignore[arg-type]
        while (rows := feed.next_rows(lambda: None)) is not None:
            for fed in rows:
                outcomes.append(fed.outcome)
                has_clip.append(fed.clip is not None)
                if fed.clip is not None:
                    clips[fed.position] = fed.clip
        num_restarts = feed.num_restarts
    return {
        "shard": pickle.dumps(item.shard),
        "outcomes": pickle.dumps(outcomes),
        "has_clip": pickle.dumps(has_clip),
        "clips": clips,
        "num_restarts": num_restarts,
        "decoding_seconds": time.perf_counter() - started,
    }


class ShardActor:
    """The second stage: holds the backbone and a store, embeds shards and commits them; made once per process."""

    def __init__(
        self, store: str, kind: str, get_backbone: Callable[[], nn.Module], config: RunConfig, device: str, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        built = get_backbone().to(device).eval()
        # Of this machine: one with other library versions is refused before it writes anything.
        spec = build_spec(config, built, torch.device(device))
        self._store = open_disk_store(store, kind, spec=spec, mode="a")
        self._embedder = ShardEmbedder(spec, built, config, torch.device(device))

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Do one shard."""
        shard: Shard = pickle.loads(row["shard"])
        started = time.perf_counter()
        result = {name: row[name] for name in ("num_restarts", "decoding_seconds")}
        claim = self._store.claim(shard)
        if claim.state != "ours":
            return {**result, "backbone_seconds": 0.0, "writing_seconds": 0.0}
        try:
            finished = None
            outcomes, has_clip = pickle.loads(row["outcomes"]), pickle.loads(row["has_clip"])
            for position, (outcome, is_there) in enumerate(zip(outcomes, has_clip, strict=True)):
                clip = row["clips"][position] if is_there else None
                finished = self._embedder.add(FedRow(shard, position, clip, outcome))
            assert finished is not None
            embedded = time.perf_counter()
            with ShardWriter(self._store, on_commit=lambda _: None) as writer:
                writer.submit(finished, lambda: None)
            if writer.error is not None:
                raise writer.error
        finally:
            self._store.release(shard)
        return {
            **result,
            "backbone_seconds": embedded - started,
            "writing_seconds": time.perf_counter() - embedded,
        }
