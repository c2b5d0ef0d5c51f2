"""Bit flips anywhere in a store: are they found, mended, and is nothing else touched? Loads neither pytest nor torch."""

import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cache.open import FORMATS, open_files, open_store
from cache.repair import repair
from cache.verify import verify
from contracts.store_examples import VIDEO_IDS, commit_example, example_spec, expected_hash

GROUPS = ("data", "metadata", "row table", "spec", "plan", "ledger")


@dataclass(slots=True)
class FlipResults:
    """What became of the flips."""

    flips: Counter[str] = field(default_factory=Counter)
    """By group of files."""
    bad: list[str] = field(default_factory=list)
    """What went wrong, one line each."""


def make_store(path: Path, kind: str) -> None:
    """A full store that has lived: it grew, a row was retried, a video removed."""
    with open_store(path, kind, example_spec(), "a", 4) as store:
        for ids, views in ((VIDEO_IDS[:6], [0]), (VIDEO_IDS, [0, 1])):
            store.plan(ids, views)
            for shard in store.pending():
                commit_example(store, shard)
        store.replan([key for key in store.rows() if key.video_id == "broken"])
        for shard in store.pending():
            commit_example(store, shard)
        store.remove(["run/1"])


def group_of(name: str) -> str:
    """Which part of the store a file belongs to."""
    if name.startswith("ledger/spec"):
        return "spec"
    if name.startswith("ledger/plan"):
        return "plan"
    if name.endswith(".jsonl"):
        return "ledger"
    if name.startswith(("video_id/c", "view/c")):
        return "row table"
    return "metadata" if name.endswith("zarr.json") or name.startswith("index.h5") else "data"


def contents(path: Path) -> dict[str, bytes]:
    """Every file of the store that holds a byte, by name."""
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: data for name, data in files.items() if data}


def flip_and_mend(good: Path, scratch: Path, draws: random.Random, results: FlipResults) -> None:
    """One trial: flip one bit of a copy, verify, repair, extract what is pending, compare."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(good, scratch)
    before = contents(scratch)
    names: dict[str, list[str]] = {}
    for name in sorted(before):
        names.setdefault(group_of(name), []).append(name)
    group = draws.choice(sorted(names))
    name = draws.choice(names[group])
    data = bytearray(before[name])
    bit = draws.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    (scratch / name).write_bytes(data)
    results.flips[group] += 1
    where = f"bit {bit} of {name}"
    report = verify(open_files(scratch), FORMATS.__getitem__)
    if report.is_whole:
        results.bad.append(f"{where}: not detected")
        return
    if {damage.file for damage in report.damages} != {name}:
        results.bad.append(f"{where}: blamed on {sorted({damage.file for damage in report.damages})}")
    repair(open_files(scratch), FORMATS.__getitem__)
    with open_store(scratch, mode="a") as store:
        pending = store.pending()
        for shard in pending:
            commit_example(store, shard)
        keys = store.rows()
        if store.content_hash() != expected_hash(store.spec, keys):
            results.bad.append(f"{where}: other content after the repair")
    if len(pending) > (group in ("data", "ledger")):
        results.bad.append(f"{where}: {len(pending)} shards made anew")
    if not (report := verify(open_files(scratch), FORMATS.__getitem__)).is_whole:
        results.bad.append(f"{where}: damaged after the repair: {report.damages[0]}")
    after = contents(scratch)
    changed = {other for other in before if after.get(other) != before[other]}
    if changed - ({name} if group == "ledger" else set()):
        results.bad.append(f"{where}: {sorted(changed)} differ after the repair")


def flip_many(folder: Path, kind: str, num_flips: int, seed: int) -> FlipResults:
    """Many trials on copies of one store."""
    results = FlipResults()
    draws = random.Random(seed)
    make_store(folder / "good", kind)
    for _ in range(num_flips):
        flip_and_mend(folder / "good", folder / "scratch", draws, results)
    return results
