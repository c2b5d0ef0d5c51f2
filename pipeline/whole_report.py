"""What a pipeline found: a table of accuracies, one of times, and what made the numbers; as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.whole import PipelineFile
from pipeline.checkpoint import write_file
from pipeline.console import say
from pipeline.whole_configs import PipelineConfigs
from pipeline.whole_making import COMPARISON_TABLE, LIVE_FILE, Places

SEVERAL = "several"
"""In place of a version or machine that is not the same for all stages."""


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What a step took and gave."""

    name: str
    title: str
    seconds: float
    """Wall clock of all calls that made what is there now, resumptions together."""
    seconds_of: Mapping[str, float]
    """The same by stage; stages that are made together share their time."""
    made: tuple[str, ...]
    """Stages that this call began or went on with; the others were skipped."""
    fingerprint_of: Mapping[str, str]
    """Hash of all that went into each stage."""
    output_of: Mapping[str, Mapping[str, str]]
    """Hashes of the parts of each stage's output."""
    made_with_of: Mapping[str, Sequence[Mapping[str, Any]]]
    """Code version, libraries and hardware of the calls that worked on each stage."""


def plan_text(rows: Sequence[Mapping[str, str]]) -> str:
    """A dry run as text, one line for each stage."""
    width = max(len(row["stage"]) for row in rows)
    words = {"skip": "done", "begin": "to do", "go on": "to finish", "set aside": "to do again", "mend": "to mend"}
    return "\n".join(
        f"{row['stage']:<{width}}  {words.get(row['action'], row['action'])}: {row['why']}" for row in rows
    )


def write_report(
    file: PipelineFile, configs: PipelineConfigs, folder: Path, steps: Sequence[StepFacts]
) -> tuple[dict[str, Any], str]:
    """Write report.json and report.md; gives both back."""
    places = Places(folder, folder)
    shots = file.config.compare.shots
    compared = {k: _read(places.comparison(k) / "compare.json") for k in shots}
    live = _read(places.live / LIVE_FILE)
    first = compared[shots[0]]
    facts = {
        "pipeline": str(file.path),
        **{key: first[key] for key in ("split", "protocol", "n_way", "n_query", "episodes", "seed", "split_hash")},
        "episode_hash": {str(k): compared[k]["episode_hash"] for k in shots},
        "left_out": first["left_out"],
        "store_fingerprint": first["runs"][0]["store_fingerprint"],
        "store_dtype": configs.extraction.store.dtype,
        "rows": _rows(
            configs, compared, live, {name: value for step in steps for name, value in step.seconds_of.items()}
        ),
        "live": live,
        "stages": [asdict(step) for step in steps],
        **_made_with(steps),
    }
    text = _text(facts, shots, [(places.comparison(k) / COMPARISON_TABLE).read_text(encoding="utf-8") for k in shots])
    write_file(folder / "report.json", (json.dumps(facts, indent=2) + "\n").encode())
    write_file(folder / "report.md", text.encode())
    say(f"report: {folder / 'report.md'}")
    return facts, text


def _made_with(steps: Sequence[StepFacts]) -> dict[str, Any]:
    """What all stages were made with, or "several"; each stage has its own."""
    calls = [call for step in steps for made_with in step.made_with_of.values() for call in made_with]
    found: dict[str, Any] = {}
    for what in ("code_version", "libraries", "hardware"):
        values = {json.dumps(call[what], sort_keys=True): call[what] for call in calls}
        found[what] = next(iter(values.values())) if len(values) == 1 else SEVERAL
    return found


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _rows(
    configs: PipelineConfigs,
    compared: Mapping[int, Mapping[str, Any]],
    live: Mapping[str, Any],
    seconds_of: Mapping[str, float],
) -> list[dict[str, Any]]:
    rows = []
    heads = list(configs.heads)
    training = seconds_of["train"] + seconds_of.get("pretrain", 0.0)
    runs = {k: list(report["runs"]) for k, report in compared.items()}
    own = {k: found.pop(0) for k, found in runs.items()}
    title = (
        f"{next(iter(own.values()))['head']} {'after classification' if configs.is_classification else 'end to end'}"
    )
    for how, scores in (
        ("by decoding", {str(k): _score(live[str(k)]) for k in compared}),
        ("through its cubes", {str(k): _score(found) for k, found in own.items()}),
    ):
        rows.append({"name": f"{title}, {how}", "training_seconds": training, "results": scores})
    for place, name in enumerate(heads):
        start = ", from the run's head" if name == configs.continued_head else ""
        scores = {str(k): _score(runs[k][place]) for k in compared}
        seconds = seconds_of[f"heads/{name}"]
        rows.append({"name": f"{name} on the cubes{start}", "training_seconds": seconds, "results": scores})
    return rows


def _score(found: Mapping[str, Any]) -> dict[str, float]:
    return {"accuracy": found["accuracy"], "interval95": found["interval95"]}


def _text(facts: Mapping[str, Any], shots: Sequence[int], tables: Sequence[str]) -> str:
    titles = [f"{facts['n_way']}-way {k}-shot" for k in shots]
    lines = [
        "# mastaf pipeline",
        "",
        f"| on {facts['split']} | {' | '.join(titles)} | training, s |",
        "|---|" + "---|" * len(shots) + "---|",
        *(
            f"| {row['name']} | {' | '.join(_cell(row['results'][str(k)]) for k in shots)} | {row['training_seconds']:.1f} |"
            for row in facts["rows"]
        ),
        "",
        f"Mean over {facts['episodes']} episodes with 95 % interval, {facts['n_query']} queries "
        f"{'of every class' if facts['protocol'] == 'per_class' else 'of one class'}; chance is {100 / facts['n_way']:.0f} %. "
        "All rows are scored on the same episodes. Heads on the cubes train on one pass and share its time.",
        *_live_lines(facts, shots),
        *_left_out_lines(facts),
        "",
        "| stage | s | now |",
        "|---|---|---|",
        *(f"| {step['name']}: {step['title']} | {step['seconds']:.1f} | {_now(step)} |" for step in facts["stages"]),
        f"| all | {sum(step['seconds'] for step in facts['stages']):.1f} | |",
        "",
        "Times are those of the calls that did the work, resumptions together.",
        f"Split {facts['split_hash'][:12]}, episodes {', '.join(value[:12] for value in facts['episode_hash'].values())} "
        f"(seed {facts['seed']}), store {facts['store_fingerprint'][:12]}, code {facts['code_version']}.",
        *_made_with_lines(facts),
    ]
    for title, table in zip(titles, tables, strict=True):
        lines += ["", f"## {title}, paired", "", "```", table.rstrip("\n"), "```"]
    return "\n".join([*lines, ""])


def _made_with_lines(facts: Mapping[str, Any]) -> list[str]:
    what = {"code_version": "versions of the code", "libraries": "versions of libraries", "hardware": "machines"}
    several = [words for key, words in what.items() if facts[key] == SEVERAL]
    if not several:
        libraries, machine = facts["libraries"], facts["hardware"]
        return [f"Made with torch {libraries.get('torch')} on {machine.get('gpu') or machine.get('processor')}."]
    return [f"Stages were made with several {' and '.join(several)}; report.json has each (made_with_of)."]


def _cell(score: Mapping[str, float]) -> str:
    return f"{100 * score['accuracy']:.2f} ± {100 * score['interval95']:.2f} %"


def _now(step: Mapping[str, Any]) -> str:
    made, names = list(step["made"]), list(step["seconds_of"])
    if not made:
        return "skipped"
    return "done" if len(made) == len(names) else f"done: {', '.join(made)}; the others skipped"


def _live_lines(facts: Mapping[str, Any], shots: Sequence[int]) -> list[str]:
    """Say for each number of shots whether the cubes give the end-to-end run's own answers."""
    lines = []
    for k_shot in shots:
        live = facts["live"][str(k_shot)]
        which, count = f"The backbone's run, {k_shot}-shot", live["episodes_that_differ"]
        if count:
            points = 100 * (live["accuracy_on_cubes"] - live["accuracy"])
            lines.append(
                f"{which}: through the cubes {points:+.3f} points, other answers in {count} of {live['episodes']} episodes "
                f"(cubes are stored in {facts['store_dtype']})."
            )
        else:
            lines.append(f"{which}: by decoding and through the cubes the same in each of {live['episodes']} episodes.")
    return lines


def _left_out_lines(facts: Mapping[str, Any]) -> list[str]:
    count = len(facts["left_out"])
    return [f"{count} videos of {facts['split']} are not in the store and in no episode."] if count else []
