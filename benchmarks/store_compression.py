"""Size and speed of the stores with each compression, on cubes such as a ReLU leaves them: half zeros.

python benchmarks/store_compression.py

Every store holds the same rows. Numbers are medians over the repeats, in which the stores take turns, so that another
process on the machine slows all of them; and they are given as ratios to the uncompressed Zarr store of the same run.
Rows are read from memory (the files were just written), one at a time, in random order, each from a part or shard
that a store has open already or not, as it comes.

Letters: R rows of a shard; C channels, T time steps, H W grid.
"""

import argparse
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.cube import ArraySpec, Spec
from cache.open import open_store
from cache.store import RowOutcome, StoreError

STORES = tuple((kind, compression) for kind in ("zarr", "hdf5") for compression in ("none", "zstd", "gzip"))
BASELINE = ("zarr", "none")
OK = RowOutcome("ok")


@dataclass
class Measured:
    """One kind of store; a value per repeat."""

    num_bytes: int = 0
    """Of all files, ledger and index included."""
    write_seconds: list[float] = field(default_factory=list)
    """Per shard: hashing, packing, writing and fsync."""
    read_seconds: list[float] = field(default_factory=list)
    """Per row."""


def relu_cubes(num_rows: int, shape: tuple[int, int, int, int], seed: int) -> NDArray[Any]:
    """Normal numbers with the negative half set to zero, (R, C, T, H, W) float16."""
    normal = np.random.default_rng(seed).standard_normal((num_rows, *shape), dtype=np.float32)
    return np.maximum(normal, 0).astype(np.float16)


def example_spec(shape: tuple[int, int, int, int]) -> Spec:
    """A spec with one array."""
    return Spec({}, {}, {}, "", {}, {"cube": ArraySpec("layer4", "none", "float16", None, shape)})


def measure(kind: str, compression: str, shards: list[NDArray[Any]], num_reads: int, result: Measured) -> None:
    """Write all shards, then read random rows, once; in a folder that is removed again."""
    num_rows = len(shards[0])
    video_ids = [f"video_{row:05d}" for row in range(num_rows * len(shards))]
    folder = Path(tempfile.mkdtemp(prefix="store_compression_"))
    try:
        spec = example_spec(shards[0].shape[1:])
        with open_store(folder / "store", kind, spec, "a", num_rows, compression) as store:
            store.plan(video_ids, [0])
            for shard, cubes in zip(store.pending(), shards, strict=True):
                start = time.perf_counter()
                store.commit(shard, {"cube": cubes}, [OK] * num_rows)
                result.write_seconds.append(time.perf_counter() - start)
            result.num_bytes = store.layout()["bytes"]
        with open_store(folder / "store", kind) as store:
            for row in np.random.default_rng(0).integers(0, len(video_ids), num_reads).tolist():
                start = time.perf_counter()
                store.read([video_ids[row]], [0])
                result.read_seconds.append(time.perf_counter() - start)
    finally:
        shutil.rmtree(folder)


def print_table(results: dict[tuple[str, str], Measured], values_bytes: int, shard_bytes: int) -> None:
    """One line per store; the ratios are time or bytes over the baseline's."""
    base = results[BASELINE]
    header = ("store", "bytes / values", "x", "write MB/s", "time x", "ms / row", "time x")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for (kind, compression), result in results.items():
        write, read = median(result.write_seconds), median(result.read_seconds)
        cells = (
            f"{kind} {compression}",
            f"{result.num_bytes / values_bytes:.3f}",
            f"{result.num_bytes / base.num_bytes:.3f}",
            f"{shard_bytes / write / 1e6:.0f}",
            f"{write / median(base.write_seconds):.2f}",
            f"{read * 1e3:.2f}",
            f"{read / median(base.read_seconds):.2f}",
        )
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="rows per shard")
    parser.add_argument("--shape", type=int, nargs=4, default=(2048, 4, 7, 7), metavar=("C", "T", "H", "W"))
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--reads", type=int, default=100, help="rows read per repeat")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    shape = (arguments.shape[0], arguments.shape[1], arguments.shape[2], arguments.shape[3])
    shards = [relu_cubes(arguments.rows, shape, seed) for seed in range(arguments.shards)]
    results: dict[tuple[str, str], Measured] = {}
    for repeat in range(arguments.repeats):
        for kind, compression in STORES:
            try:
                measure(kind, compression, shards, arguments.reads, results.setdefault((kind, compression), Measured()))
            except StoreError as error:
                # A backend does not take every compression, and says so before it writes anything.
                del results[kind, compression]
                if repeat == 0:
                    print(f"{kind} {compression}: {error}")
    print(f"{arguments.shards} shards of {arguments.rows} rows of {shards[0][0].nbytes:,} bytes, float16")
    print_table(results, sum(cubes.nbytes for cubes in shards), shards[0].nbytes)


if __name__ == "__main__":
    main()
