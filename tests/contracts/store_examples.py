"""A spec, rows and outcomes to test stores with. Loads neither pytest nor torch.

Letters: R rows of a shard; C channels, T time steps, H W grid.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.cube import ArraySpec, Spec
from cache.store import FeatureStore, RowKey, RowOutcome, Shard

CUBE = ArraySpec("layer4", "none", "float16", None, (4, 2, 3, 3))
POOLED = ArraySpec("layer3", "all", "float32", None, (5, 1, 1, 1))
VIDEO_IDS = ["walk/b", "walk/a", "röhre", "broken", "bytes\udcff", "short", "run/1", "run/2", "last"]
OK = RowOutcome("ok")


def example_spec(**changes: Any) -> Spec:
    """A spec with two arrays."""
    spec = Spec(
        decoder={"name": "pyav", "major": 18},
        sampling={"num_frames": 8, "policy": "even", "resize": {"size": 256, "crop": "centre"}},
        backbone={"name": "r3d50", "options": {}},
        weights_digest="ab" * 32,
        compute={"dtype": "float32", "batch_size": 4},
        arrays={"cube": CUBE, "pooled": POOLED},
    )
    return replace(spec, **changes)


def example_row(key: RowKey, name: str, array: ArraySpec) -> NDArray[Any]:
    """Values that depend on the row alone, (C, T, H, W)."""
    seed = hashlib.sha256(f"{key.video_id!a} {key.view} {name}".encode()).digest()[:8]
    values = np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(array.shape)
    return values.astype(array.dtype)


def example_outcome(key: RowKey) -> RowOutcome:
    """Decided by the id."""
    if key.video_id == "broken":
        return RowOutcome("rejected", "not_a_video", "no stream in broken.mp4")
    return RowOutcome("degraded", "too_short") if key.video_id == "short" else OK


def example_arrays(shard: Shard, spec: Spec) -> dict[str, NDArray[Any]]:
    """Each array of a shard, (R, C, T, H, W)."""
    return {
        name: np.stack([example_row(key, name, array) for key in shard.rows]) for name, array in spec.arrays.items()
    }


def commit_example(store: FeatureStore, shard: Shard) -> None:
    store.commit(shard, example_arrays(shard, store.spec), [example_outcome(key) for key in shard.rows])


def fill(store: FeatureStore, video_ids: Sequence[str], views: Sequence[int], backwards: bool = False) -> None:
    """Plan and commit example rows."""
    store.plan(video_ids, views)
    for shard in sorted(store.pending(), key=lambda shard: shard.index, reverse=backwards):
        commit_example(store, shard)


def expected_hash(spec: Spec, keys: Sequence[RowKey]) -> str:
    """The content hash, written down a second time from the design's sentence."""
    lines = []
    for key in keys:
        for name, array in spec.arrays.items():
            if example_outcome(key).status != "rejected":
                values = example_row(key, name, array).astype(np.dtype(array.dtype).newbyteorder("<"))
                digest = hashlib.sha256(values.tobytes(order="C")).hexdigest()
                lines.append((key.video_id, name, key.view, array.dtype, list(array.shape), digest))
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in sorted(lines))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
