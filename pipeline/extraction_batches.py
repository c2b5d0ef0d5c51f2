"""The rows of a shard through the backbone, in batches whose composition the shard alone decides.

Zeros stand in for rows that have no clip, so the bytes of a row depend neither on its neighbours' fate nor on where an earlier
run was killed.

B clips of a batch, R rows of a shard; F frames, H W pixels or grid; C channels, T time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from cache.cube import Spec
from cache.format import Cubes
from cache.store import RowOutcome
from configs.schema import RunConfig
from pipeline.extraction_feed import FedRow
from pipeline.extraction_writer import FinishedShard
from pipeline.model import forward_in_full_batches


class ShardEmbedder:
    """Takes the rows of one shard after the other, in order, and gives each shard when it is finished."""

    def __init__(self, spec: Spec, backbone: nn.Module, config: RunConfig, device: torch.device) -> None:
        sampling = config.sampling
        self._spec, self._backbone, self._config, self._device = spec, backbone, config, device
        self._batch_size = config.extraction.forward_batch
        shape = (self._batch_size, sampling.num_frames, sampling.crop_size, sampling.crop_size, 3)
        self._clips = np.zeros(shape, dtype=np.uint8)  # (B, F, H, W, 3)
        self._num_clips = 0
        self._arrays: dict[str, Cubes] = {}
        self._outcomes: list[RowOutcome] = []

    def add(self, row: FedRow) -> FinishedShard | None:
        """Take a row; runs the backbone when its batch is complete."""
        num_rows = len(row.shard.rows)
        if row.position == 0:
            self._arrays = {
                name: np.full((num_rows, *array.shape), np.nan, dtype=array.dtype)
                for name, array in self._spec.arrays.items()
            }
            self._outcomes = []
            # An error may have left clips of another shard here.
            self._clips.fill(0)
            self._num_clips = 0
        offset = row.position % self._batch_size
        if row.clip is not None:
            self._clips[offset] = row.clip
            self._num_clips += 1
        self._outcomes.append(row.outcome)
        is_last = row.position + 1 == num_rows
        if is_last or offset + 1 == self._batch_size:
            self._run_backbone(row.position - offset, offset + 1)
        return FinishedShard(row.shard, self._arrays, self._outcomes) if is_last else None

    def _run_backbone(self, start: int, num_rows: int) -> None:
        if not self._num_clips:
            return
        extraction = self._config.extraction
        clips = torch.from_numpy(self._clips).to(self._device)
        with torch.no_grad():
            cubes = forward_in_full_batches(
                self._backbone, clips, self._config.sampling, self._batch_size, extraction.compute_dtype
            )
        for name, values in cubes.items():
            array = self._arrays[name]
            # An overflow to float16 infinity is found, counted and rejected when the shard is written.
            with np.errstate(over="ignore"):
                array[start : start + num_rows] = values[:num_rows].cpu().numpy().astype(array.dtype)
        self._clips.fill(0)
        self._num_clips = 0
