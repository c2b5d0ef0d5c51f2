"""What the bits of a run depend on beside its config and data: processor, threads, ranks, versions; and where that changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from pipeline.provenance import code_version, processor_name

FROM = "from_episode"
NAMES = {"device": "the device", "threads": "threads", "ranks": "ranks", "torch": "torch", "code": "mastaf"}
"""What each of them is called in a sentence."""


def computed_here(device: torch.device, num_ranks: int) -> dict[str, Any]:
    """What this process computes with. On a GPU the number of threads changes no bit, and is left out."""
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else processor_name(),
        **({} if is_gpu else {"threads": torch.get_num_threads()}),
        "ranks": num_ranks,
        "torch": str(torch.__version__),  # else of a type of torch's own, which no checkpoint may hold
        "code": code_version(),
    }


def note_place(places: list[dict[str, Any]], episode: int, here: Mapping[str, Any]) -> str:
    """Add where a run goes on to the places where it was computed, unless it is the last of them.

    Args:
        places: of the run so far, in order; changed.
        episode: after which it goes on.
        here: of `computed_here`.

    Returns:
        What is other than before, for a person: `threads were 2, now 4`. Nothing where nothing is, or the run begins.
    """
    before = places[-1] if places else None
    if before is not None and {key: value for key, value in before.items() if key != FROM} == here:
        return ""
    places.append({FROM: episode, **here})
    return "" if before is None else _change(before, here)


def moves(places: Sequence[Mapping[str, Any]]) -> list[str]:
    """`after 40 episodes: threads were 2, now 4`, for each change."""
    return [f"after {now[FROM]} episodes: {_change(before, now)}" for before, now in pairwise(places)]


def _change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    def said(facts: Mapping[str, Any], key: str) -> str:
        return str(facts.get(key, "unknown"))

    return ", ".join(
        f"{name} {'were' if name.endswith('s') else 'was'} {said(before, key)}, now {said(now, key)}"
        for key, name in NAMES.items()
        if before.get(key) != now.get(key) and not (key == "threads" and key not in {*before} & {*now})
    )
