"""card.md: the run card as a page for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.card_reading import HELD_OUT
from pipeline.computed_on import moves

MOST_VIDEOS = 10
"""Videos that the page names; card.json has all."""


def to_markdown(card: Mapping[str, Any]) -> str:
    """The page of a card; what a card of an earlier version does not say is left out."""
    parts = [f"# Run {_plain(card.get('run', ''))}".rstrip(), _summary(card), "## Accuracy", _accuracies(card)]
    parts += ["## What made it", _table(("", ""), _facts(card))]
    parts += _videos(card)
    commands = card.get("commands")
    if commands:
        parts += [
            "## Again",
            "In the folder that holds this run's folder:",
            "\n".join(["```", *commands.values(), "```"]),
        ]
        parts.append(
            "The first command trains anew from the same config. The last one runs every evaluation above once more, to the last "
            "episode, and says whether it is identical."
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def percent(accuracy: float | None, interval95: float | None = None) -> str:
    """`54.77 ± 0.63 %`, or what is known of it."""
    if accuracy is None:
        return "-"
    half = "" if interval95 is None else f" ± {100 * interval95:.2f}"
    return f"{100 * accuracy:.2f}{half} %"


def held_out_percent(record: Mapping[str, Any]) -> str:
    """`50.00 % (18.76 to 81.24)` of a validation line, a card or a score of held-out videos: the interval need not be symmetric."""
    value = percent(record["heldout_top1"])
    if "heldout_low95" not in record:
        return value
    return f"{value} ({100 * record['heldout_low95']:.2f} to {100 * record['heldout_high95']:.2f})"


def protocol_words(evaluation: Mapping[str, Any]) -> str:
    """`5-way 1-shot, 3 queries of every class`."""
    queries = evaluation["n_query"]
    asked = "one class" if evaluation["protocol"] == "one_query" else "every class"
    return f"{evaluation['n_way']}-way {evaluation['k_shot']}-shot, {queries} {'query' if queries == 1 else 'queries'} of {asked}"


def duration(seconds: float) -> str:
    """`3 h 05 min`, `4 min 18 s`, `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def decoding_words(card: Mapping[str, Any]) -> str:
    """`3 videos decoded at a second try, 1 decoding process lost`; nothing where nothing went wrong."""
    tries, lost = card.get("second_tries", 0), card.get("lost_decoding_processes", 0)
    words = [f"{tries} video{'' if tries == 1 else 's'} decoded at a second try"] if tries else []
    words += [f"{lost} decoding process{'' if lost == 1 else 'es'} lost"] if lost else []
    return ", ".join(words)


def _summary(card: Mapping[str, Any]) -> str:
    where = {
        "cached": "trained on cached cubes",
        "end_to_end": "trained end to end with its backbone",
        "classify": "a backbone trained by classification",
    }
    backbone = card.get("config", {}).get("backbone", {}).get("name")
    of_backbone = f" of backbone `{_code(backbone)}`" if backbone and card["mode"] == "cached" else ""
    with_backbone = f" (`{_code(backbone)}`)" if backbone and card["mode"] != "cached" else ""
    return f"Head `{_code(card['head'])}`, {where.get(card['mode'], card['mode'])}{of_backbone}{with_backbone}."


def _accuracies(card: Mapping[str, Any]) -> str:
    rows: list[Sequence[str]] = []
    validation = card.get("validation")
    if card.get("val_accuracy") is not None:
        words = protocol_words(validation) if validation else ""
        value = percent(card["val_accuracy"], card["val_interval95"])
        rows.append(
            ("val", value, str(card["validation_episodes"]), words, "chose the checkpoint, so a little too high")
        )
    if "heldout_top1" in card:
        value = held_out_percent(card)
        note = f"{card.get('heldout_videos', '?')} videos of the training classes, classified"
        if card["selected_on"] == HELD_OUT:
            note += "; chose the checkpoint, so a little too high"
        rows.append(("held-out videos", value, "", "", note))
    if card.get("test_accuracy") is None:
        command = card.get("commands", {}).get("evaluate", "mastaf evaluate RUN --split test")
        rows.append(("test", "not scored yet", "", "", f"`{command}`"))
    for each in card.get("evaluations", []):
        note = ", ".join([f"seed {each['seed']}", *_other_data(each)])
        value = percent(each["accuracy"], each["interval95"])
        rows.append((each["split"], value, str(each["episodes"]), protocol_words(each), note))
    published = card.get("test_selected_accuracy_published_protocol")
    if published is not None:
        note = f"**not an honest estimate**: {card.get('test_selected_note', 'selected on the test split itself')}"
        rows.append(("test-selected", percent(published), str(card["validation_episodes"]), "", note))
    return _table(("split", "accuracy", "episodes", "protocol", ""), rows) + (
        "\n\n± is the half width of the 95 % interval over episodes"
        + (", that of held-out videos is Wilson's over the videos." if "heldout_top1" in card else ".")
    )


def _other_data(evaluation: Mapping[str, Any]) -> list[str]:
    """Where its data were, in the words of whoever gave it: the paths that are kept may be of the machine."""
    given = {name: evaluation.get(f"{name}_as_given") or evaluation.get(name) for name in ("store", "manifest")}
    return [f"{name} {_plain(path)}" for name, path in given.items() if path]


def _facts(card: Mapping[str, Any]) -> list[Sequence[str]]:
    """What is known of the run's making."""
    hardware, libraries = card["hardware"], card["libraries"]
    together, ranks = card.get("heads_trained_together", 1), card.get("ranks", 1)
    shared = f", with {together - 1} other heads on one pass" if together > 1 else ""
    processor = hardware.get("processor", hardware.get("machine", ""))
    gpus = hardware.get("gpus") or ([hardware["gpu"]] if "gpu" in hardware else [])
    facts = {
        "training": f"{card['episodes']} episodes, best after {card['best_episode']} (selected on {card['selected_on']})",
        "time": f"{duration(card['seconds'])}{shared}; {_times(card)}"
        if card.get("started_utc")
        else duration(card["seconds"]) + shared,
        **({"computed": "; ".join(moved)} if (moved := moves(card.get("computed_on", []))) else {}),
        **({"decoding": decoding_words(card)} if decoding_words(card) else {}),
        "parameters": f"{card['num_parameters']:,}",
        "hardware": f"{_plain(processor)}, {hardware.get('cores', '?')} cores"
        + (f"; {_counted(gpus)}" if gpus else ", no GPU")
        + (f"; {ranks} processes" if ranks > 1 else ""),
        "code": _plain(card["code_version"]),
        "libraries": ", ".join(f"{name} {number}" for name, number in libraries.items()),
    }
    hashes = {
        "split hash": card["split_hash"],
        "validation episodes": (card.get("validation") or {}).get("episode_hash"),
        "store fingerprint": card["store_fingerprint"],
        "store content": card.get("store_content_hash"),
        **{f"starts from {setting}": origin for setting, origin in card.get("started_from", {}).items()},
        "weights of best.pt": card.get("best_weights_sha256"),
        "weights of last.pt": card.get("last_weights_sha256"),
    }
    return [*facts.items(), *((name, f"`{value}`") for name, value in hashes.items() if value)]


def _times(card: Mapping[str, Any]) -> str:
    resumptions = card.get("resumptions", 0)
    times = {0: "never interrupted", 1: "gone on with once"}.get(resumptions, f"gone on with {resumptions} times")
    return f"{card['started_utc']} to {card['ended_utc']}, {times}"


def _counted(names: Sequence[str]) -> str:
    """`2 x NVIDIA H100`."""
    return ", ".join(f"{names.count(name)} x {_plain(name)}" for name in dict.fromkeys(names))


def _videos(card: Mapping[str, Any]) -> list[str]:
    rows = []
    for kind in ("degraded", "excluded"):
        videos = card.get(f"{kind}_videos", {})
        if videos:
            named = [f"{_plain(name)} ({_plain(reason)})" for name, reason in list(videos.items())[:MOST_VIDEOS]]
            more = [f"and {len(videos) - MOST_VIDEOS} more in card.json"] if len(videos) > MOST_VIDEOS else []
            rows.append((kind, str(len(videos)), ", ".join([*named, *more])))
    return ["## Videos that are not whole, or left out", _table(("", "videos", "which, and why"), rows)] if rows else []


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _plain(text: object) -> str:
    """Names of the user's as they are: no mark of Markdown's counts in them."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#" else letter for letter in str(text))


def _code(text: object) -> str:
    return str(text).replace("`", "'")
