"""Commits of 64-row shards: Icechunk against this project's ledger, on a local disk. Results: docs/icechunk.md.

Needs icechunk, zarr and numpy only, in an environment of their own (icechunk is no dependency of the project):

    python -m venv /tmp/ice && /tmp/ice/bin/pip install icechunk zarr numpy
    /tmp/ice/bin/python benchmarks/icechunk_commits.py latency icechunk|ledger FOLDER
    /tmp/ice/bin/python benchmarks/icechunk_commits.py kill icechunk|ledger FOLDER
    /tmp/ice/bin/python benchmarks/icechunk_commits.py two icechunk|ledger FOLDER

`latency`: milliseconds per commit. `kill`: writers killed at random moments; shards that were acknowledged and are gone.
`two`: two writers of disjoint shards at once; the same count. Runs under `strace -f -c -e trace=fsync,fdatasync,sync_file_range`
show what is forced to disk. Letters: C channels, T time steps, H W grid.
"""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

SHAPE = (256, 4, 7, 7)
"""(C, T, H, W) of one row: 100,352 bytes as float16."""
SHARD_ROWS = 64
NUM_SHARDS = 50
NUM_KILLS = 20
Commit = Callable[[int], None]
"""Commits the shard of that number."""


def block(shard_index: int) -> Any:
    """Values of a shard, (SHARD_ROWS, C, T, H, W) float16."""
    values = np.random.default_rng(shard_index).standard_normal((SHARD_ROWS, *SHAPE), dtype=np.float32)
    return values.astype(np.float16)


def icechunk_repository(folder: Path) -> Any:
    icechunk = import_module("icechunk")
    return icechunk.Repository.open_or_create(icechunk.local_filesystem_storage(str(folder)))


def make_icechunk(folder: Path) -> None:
    import zarr
    from zarr.codecs import Crc32cCodec

    session = icechunk_repository(folder).writable_session("main")
    zarr.create_group(session.store).create_array(
        "cube",
        shape=(NUM_SHARDS * SHARD_ROWS, *SHAPE),
        dtype="float16",
        chunks=(1, *SHAPE),
        shards=(SHARD_ROWS, *SHAPE),
        fill_value=float("nan"),
        compressors=[Crc32cCodec()],
    )
    session.commit("plan")


@contextmanager
def icechunk_writer(folder: Path) -> Iterator[Commit]:
    """Each commit takes in what others have committed first, as writers of disjoint shards do."""
    import zarr

    icechunk = import_module("icechunk")
    repository = icechunk_repository(folder)

    def commit(shard_index: int) -> None:
        session = repository.writable_session("main")
        array: Any = zarr.open_array(session.store, path="cube")
        array[shard_index * SHARD_ROWS : (shard_index + 1) * SHARD_ROWS] = block(shard_index)
        # What the ledger holds of each row would have to go into the metadata of the commit.
        session.commit(f"shard {shard_index}", rebase_with=icechunk.ConflictDetector())

    yield commit


def icechunk_committed(folder: Path) -> set[int]:
    """Shards whose data is there."""
    import zarr

    array: Any = zarr.open_array(icechunk_repository(folder).readonly_session("main").store, path="cube", mode="r")
    return {index for index in range(NUM_SHARDS) if not np.isnan(array[index * SHARD_ROWS, 0, 0, 0, 0])}


def make_ledger(folder: Path) -> None:
    from cache.cube import ArraySpec, Spec
    from cache.open import open_store

    arrays = {"cube": ArraySpec("layer4", "none", "float16", None, SHAPE)}
    spec = Spec({}, {}, {}, "", {}, arrays)
    with open_store(folder, "zarr", spec, "a", SHARD_ROWS) as store:
        store.plan([f"video/{row}" for row in range(NUM_SHARDS * SHARD_ROWS)], [0])


@contextmanager
def ledger_writer(folder: Path) -> Iterator[Commit]:
    from cache.open import open_store
    from cache.store import RowOutcome

    with open_store(folder, "zarr", mode="a") as store:
        shards = {shard.index: shard for shard in store.pending()}

        def commit(shard_index: int) -> None:
            store.commit(shards[shard_index], {"cube": block(shard_index)}, [RowOutcome("ok")] * SHARD_ROWS)

        yield commit


def ledger_committed(folder: Path) -> set[int]:
    """Shards that the ledger names and whose data is there."""
    from cache.open import open_store

    with open_store(folder, "zarr") as store:
        committed = set(range(NUM_SHARDS)) - {shard.index for shard in store.pending()}
        for index in committed:
            store.read([f"video/{index * SHARD_ROWS}"], [0])
    return committed


ENGINES: dict[str, Any] = {
    "icechunk": (make_icechunk, icechunk_writer, icechunk_committed),
    "ledger": (make_ledger, ledger_writer, ledger_committed),
}


def latency(engine: str, folder: Path) -> None:
    make, writer, _ = ENGINES[engine]
    make(folder)
    seconds = []
    with writer(folder) as commit:
        for index in range(NUM_SHARDS):
            values_start = time.perf_counter()
            block(index)
            values_seconds = time.perf_counter() - values_start
            start = time.perf_counter()
            commit(index)
            # The values are made once more within; that is no part of a commit.
            seconds.append(time.perf_counter() - start - values_seconds)
    first, last = (1000 * float(np.median(part)) for part in (seconds[:10], seconds[-10:]))
    middle, slow = (1000 * float(np.quantile(seconds, part)) for part in (0.5, 0.95))
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{engine}: median {middle:.0f} ms, 95 % {slow:.0f} ms, first ten {first:.0f} ms, last ten {last:.0f} ms")
    print(f"{num_bytes / 1e6:.1f} MB on disk for {NUM_SHARDS * SHARD_ROWS * 2 * np.prod(SHAPE) / 1e6:.1f} MB of values")


def write(engine: str, folder: Path, indices: list[int]) -> None:
    """Commit these shards, printing each one that is done."""
    _, writer, _ = ENGINES[engine]
    with writer(folder) as commit:
        print("ready", flush=True)
        for index in indices:
            commit(index)
            print("committed", index, flush=True)


def start(engine: str, folder: Path, indices: set[int]) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "write", engine, str(folder), *map(str, sorted(indices))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def acknowledged_by(process: "subprocess.Popen[str]") -> set[int]:
    assert process.stdout is not None
    # Icechunk prints warnings between the lines.
    lines = [line.split() for line in process.stdout.read().splitlines()]
    return {int(line[1]) for line in lines if line[:1] == ["committed"]}


def kill(engine: str, folder: Path) -> None:
    make, _, committed = ENGINES[engine]
    make(folder)
    rng, acknowledged = random.Random(0), set()
    for _ in range(NUM_KILLS):
        process = start(engine, folder, set(range(NUM_SHARDS)) - committed(folder))
        assert process.stdout is not None
        while process.stdout.readline() != "ready\n":
            pass
        time.sleep(rng.uniform(0.0, 0.6))
        process.kill()
        acknowledged |= acknowledged_by(process)
        lost = acknowledged - committed(folder)
        assert not lost, f"{engine} lost the acknowledged shards {sorted(lost)}"
    print(f"{engine}: {NUM_KILLS} kills, {len(acknowledged)} shards acknowledged, none lost")


def two(engine: str, folder: Path) -> None:
    make, _, committed = ENGINES[engine]
    make(folder)
    started = time.perf_counter()
    halves = [set(range(0, NUM_SHARDS, 2)), set(range(1, NUM_SHARDS, 2))]
    processes = [start(engine, folder, half) for half in halves]
    acknowledged: set[int] = set()
    for process in processes:
        acknowledged |= acknowledged_by(process)
    codes = [process.wait() for process in processes]
    lost = acknowledged - committed(folder)
    print(
        f"{engine}: two writers ended with {codes} after {time.perf_counter() - started:.1f} s, "
        f"{len(acknowledged)} of {NUM_SHARDS} shards acknowledged, {len(lost)} of them lost"
    )


if __name__ == "__main__":
    what, engine_name, path = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if what == "write":
        write(engine_name, path, [int(index) for index in sys.argv[4:]])
    else:
        {"latency": latency, "kill": kill, "two": two}[what](engine_name, path)
