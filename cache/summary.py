"""What a store holds, for a person: counts, sizes, failures."""

from collections import Counter
from typing import Any

from cache.store import FeatureStore, RowOutcome

_WORST_FIRST = ("rejected", "missing", "degraded", "ok")


def _worst_outcomes(store: FeatureStore) -> dict[str, tuple[str, RowOutcome | None]]:
    """Per video, the status and outcome of its worst view: rejected, then missing, degraded, ok."""
    worst: dict[str, tuple[str, RowOutcome | None]] = {}
    for key in store.rows():
        outcome = store.outcome(key.video_id, key.view)
        status = "missing" if outcome is None else outcome.status
        known = worst.get(key.video_id)
        if known is None or _WORST_FIRST.index(status) < _WORST_FIRST.index(known[0]):
            worst[key.video_id] = (status, outcome)
    return worst


def summarise(store: FeatureStore) -> dict[str, Any]:
    """The layout of the store, its counts of videos by the status of their worst view, and its hashes."""
    layout = store.layout()
    counts = Counter(status for status, _ in _worst_outcomes(store).values())
    arrays = layout["arrays"]
    first = arrays.get("cube", next(iter(arrays.values())))
    return {
        "num_videos": len(store.ids()),
        **{f"num_{status}": counts[status] for status in ("ok", "degraded", "rejected", "missing")},
        "cube_shape": first["shape"],
        "dtype": first["dtype"],
        "fingerprint": store.spec.fingerprint,
        "content_hash": store.content_hash(),
        **layout,
    }


def failures(store: FeatureStore) -> list[dict[str, Any]]:
    """Videos that are degraded, rejected or missing, in the order they were planned."""
    return [
        {
            "video_id": video_id,
            "status": status,
            "reason": outcome.reason if outcome else "not_extracted",
            "detail": outcome.detail if outcome else "planned, but not extracted yet",
        }
        for video_id, (status, outcome) in _worst_outcomes(store).items()
        if status != "ok"
    ]
