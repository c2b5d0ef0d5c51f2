"""What to do about a stage of a pipeline: what its record says is held against what is on disk now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.console import shortened
from pipeline.whole_outputs import DAMAGE, OutputDamaged
from pipeline.whole_record import Record, is_filled
from pipeline.whole_stages import FILE_SIZES, Stage

Action = Literal["skip", "begin", "go on", "mend", "set aside", "refuse", "wait"]
SHOWN_DIFFERENCES = 4
HASH_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do about a stage."""

    action: Action
    """"wait": it depends on what an earlier stage will give."""
    why: str


@dataclass(frozen=True, slots=True)
class Redo:
    """What the user wants made again."""

    asked: frozenset[str] = frozenset()
    """Names of stages."""
    later: frozenset[str] = frozenset()
    """All stages after the first of them, which may be made again where their settings have changed too."""


def judge_config(stage: Stage, record: Record | None, redo: Redo) -> Verdict | None:
    """Whether an output on disk belongs to what the user's config says now; None: it does, or there is none."""
    if not is_filled(stage.output):
        return Verdict("begin", "--redo") if stage.name in redo.asked else None
    if stage.name in redo.asked:
        return Verdict("set aside", "--redo")
    if record is None:
        return Verdict(
            "refuse", f"{stage.output} holds something that this pipeline did not make. Choose another --out."
        )
    now, then = stage.stated, record.stated
    differing = [key for key in sorted({*now, *then}) if _differs(key, now.get(key), then.get(key))]
    if not differing:
        return _judge_inputs(stage, redo)
    shown = [
        f"{key}: then {_short(then.get(key))}, now {_short(now.get(key))}" for key in differing[:SHOWN_DIFFERENCES]
    ]
    more = f" and {len(differing) - len(shown)} more" if len(differing) > len(shown) else ""
    what = f"{'; '.join(shown)}{more}"
    if not stage.is_costly or stage.name in redo.later:
        return Verdict("set aside", f"other settings: {what}")
    return Verdict(
        "refuse",
        f"{stage.output} was made with another config{' and other videos' * (FILE_SIZES in differing)} ({what}). Use what was used "
        f"then, another --out, or --redo {stage.name}, which sets it aside and makes it again.",
    )


def _differs(key: str, now: Any, then: Any) -> bool:
    # Files that cannot be reached now are no others.
    return bool(now != then and not (key == FILE_SIZES and None in (now, then)))


def _judge_inputs(stage: Stage, redo: Redo) -> Verdict | None:
    changed = stage.changed_inputs()
    if not changed:
        return None
    what = f"{len(changed)} of its videos were made from other files: {shortened(changed)}"
    if stage.name in redo.later:
        return Verdict("set aside", what)
    return Verdict(
        "refuse",
        f"{stage.output}: {what}. Put back the files of then, choose another --out, or --redo {stage.name}, which sets it aside and "
        "makes it again.",
    )


def judge(
    stage: Stage, record: Record | None, outputs: Mapping[str, str], redo: Redo, is_full: bool = False
) -> Verdict:
    """What to do about a stage, from its record and what is on disk now.

    Args:
        stage: the stage.
        record: what is known of it.
        outputs: hash of each part of earlier stages' outputs, as "stage.part"; those that are not known yet are left out.
        redo: what the user wants made again.
        is_full: read every byte of its output.
    """
    found = judge_config(stage, record, redo)
    if found is not None:
        return found
    if record is None or not is_filled(stage.output):
        return Verdict(
            "begin", "nothing there yet" if record is None or record.output is None else "its output is gone"
        )
    if any(part not in outputs for part in stage.reads):
        return Verdict("wait", "an earlier stage comes first")
    changed = [part for part in stage.reads if record.made.get(part) != outputs[part]]
    if changed:
        return Verdict("set aside", f"{', '.join(sorted({part.rpartition('.')[0] for part in changed}))} changed")
    if record.output is None:
        return Verdict("go on", "it was stopped")
    try:
        now = stage.hashes(is_full)
        gone = sorted(record.output.keys() - now.keys())
        if gone:
            raise OutputDamaged(f"its {', '.join(gone)} is gone")
    except DAMAGE as error:
        if stage.mend is None and stage.is_mended_by_going_on(record.output):
            return Verdict("mend", f"damaged: {error}; its weights are whole, so nothing is trained again")
        return Verdict("mend" if stage.mend else "set aside", f"damaged: {error}")
    if now != record.output:
        parts = [part for part in record.output if now.get(part) != record.output[part]]
        return Verdict("set aside", f"on disk is not what it made: other {', '.join(parts)}")
    digits = ", ".join(f"{part} {value[:HASH_DIGITS]}" for part, value in now.items())
    return Verdict("skip", f"done before ({digits})")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
