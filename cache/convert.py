"""`convert`: the rows of a store in another backend, number type or layout; also gives back the space of removed rows.

Letters: R rows of a shard; C channels, T time steps, H W grid.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cache.cube import ArraySpec, Spec
from cache.disk_store import DiskStore
from cache.errors import StoreError
from cache.format import Cubes
from cache.open import open_disk_store, store_kind
from cache.rows import RowKey, RowOutcome, Shard

_GONE = RowOutcome("rejected", "missing", "removed or planned anew before it was converted")


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What `convert` did."""

    num_rows: int
    """Rows in the new store."""
    num_rows_left_out: int
    """Rows that were planned in the old store and not extracted yet."""
    num_overflowed: int
    """Rows with values too large for the new number type; rejected in the new store."""
    content_hash: str
    fingerprint: str


def converted_spec(spec: Spec, dtype: str | None) -> Spec:
    """The spec of a converted store.

    A float32 store rounded to float16 is what extraction to float16 gives. The other way the lost digits do not come back,
    and the spec says so: such a store is not mistaken for one that was extracted to float32.
    """
    return replace(spec, arrays={name: _converted(array, dtype) for name, array in spec.arrays.items()})


def _converted(array: ArraySpec, dtype: str | None) -> ArraySpec:
    if dtype is None or dtype == array.dtype:
        return array
    quantiser = {"cast_from": array.dtype} if dtype == "float32" else None
    return replace(array, dtype=dtype, quantiser=quantiser)


def convert(
    source: DiskStore,
    target_path: str | Path,
    kind: str | None = None,
    dtype: str | None = None,
    shard_rows: int | None = None,
    compression: str = "none",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConvertReport:
    """Copy every finished row of `source` into another store; a second call after a kill goes on where the first one was.

    Args:
        target_path: new or unfinished; its ending tells the backend unless `kind` does.
        dtype: `float16` or `float32`; None keeps each array's own.
        shard_rows: None keeps the source's.
        on_progress: called with (shards done, shards).

    Raises:
        StoreError: the target is the source, or holds another spec; a row of the source cannot be read.
    """
    if _is_same_place(str(target_path), source.url):
        raise StoreError(f"{target_path} cannot be converted into itself; name another store")
    spec = converted_spec(source.spec, dtype)
    target = open_disk_store(
        target_path,
        store_kind(target_path, kind),
        spec,
        "a",
        shard_rows or int(source.layout()["shard_rows"]),
        compression,
        source.origin,
    )
    with target:
        rows = source.rows()
        finished = [key for key in rows if source.outcome(key.video_id, key.view) is not None]
        _follow(source, target, finished, spec)
        pending = target.pending()
        for done, shard in enumerate(pending, 1):
            target.commit(shard, *_read(source, target, shard, spec))
            on_progress(done, len(pending))
        overflowed = sum(
            (outcome := target.outcome(key.video_id, key.view)) is not None and outcome.reason == "not_finite"
            for key in finished
        )
        return ConvertReport(
            num_rows=len(finished),
            num_rows_left_out=len(rows) - len(finished),
            num_overflowed=overflowed,
            content_hash=target.content_hash(),
            fingerprint=spec.fingerprint,
        )


def _is_same_place(first: str, second: str) -> bool:
    return first == second or ("://" not in first + second and Path(first).resolve() == Path(second).resolve())


def _follow(source: DiskStore, target: DiskStore, finished: list[RowKey], spec: Spec) -> None:
    """Plan what the target lacks; take out, or make anew, what has changed in the source since an earlier conversion."""
    ids = set(source.ids())
    gone = [video_id for video_id in target.ids() if video_id not in ids]
    if gone:
        target.remove(gone)
    is_same_spec = spec.fingerprint == source.spec.fingerprint
    changed = []
    for key in finished:
        outcome = target.outcome(key.video_id, key.view)
        if outcome is None or outcome.reason == "not_finite":
            continue
        if outcome != source.outcome(key.video_id, key.view) or (
            is_same_spec and target.row_hashes(key) != source.row_hashes(key)
        ):
            changed.append(key)
    target.replan(changed)
    target.plan_rows(finished)


def _read(source: DiskStore, target: DiskStore, shard: Shard, spec: Spec) -> tuple[dict[str, Cubes], list[RowOutcome]]:
    outcomes = []
    for key, is_wanted in zip(shard.rows, target.wanted(shard), strict=True):
        # A row that has left this place needs no values.
        outcome = source.outcome(key.video_id, key.view) if is_wanted else _GONE
        if outcome is None:
            raise StoreError(f"view {key.view} of video {key.video_id!r} left {source.url} during the conversion")
        outcomes.append(outcome)
    arrays = {
        name: np.full((len(shard.rows), *array.shape), np.nan, dtype=array.dtype) for name, array in spec.arrays.items()
    }
    for position, (key, outcome) in enumerate(zip(shard.rows, outcomes, strict=True)):
        if outcome.status == "rejected":
            continue
        for name, values in arrays.items():
            # An overflow to float16 infinity is found just below.
            with np.errstate(over="ignore"):
                values[position] = source.read([key.video_id], [key.view], name)[0].astype(values.dtype)
            if not np.isfinite(values[position]).all():
                detail = f"{name}: not all values are finite as {values.dtype}"
                outcomes[position] = RowOutcome("rejected", "not_finite", detail, outcome.source)
    return arrays, outcomes
