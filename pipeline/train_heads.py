"""`mastaf train --heads a,b,c`: several heads on one pass of the same episodes, each a run of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.load import find_recipe, load_config
from configs.schema import RunConfig
from episodes.build import HEADS, head_config
from pipeline.console import progress, say
from pipeline.ranks import joined_ranks
from pipeline.run_files import is_begun
from pipeline.settings import SetupError
from pipeline.setup import OWN_TRAINING, choose_device
from pipeline.train_command import describe_validation
from pipeline.training import train_together


def train_heads(
    recipe: str, heads: str, out: Path | None, resume: bool | None, device: str, overrides: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Train several heads with one recipe; their run cards, in the order of the names.

    Args:
        recipe: a TOML file, or the name of one that ships.
        heads: names, separated by commas; "all" is every head.
        out: folder of the runs, one below it for each head; None: runs/RECIPE.
        resume: go on from each run's last checkpoint; None: where there are runs, else begin.
        device: "auto", "cpu", "cuda" or "cuda:N".
        overrides: ``table.key=value`` for all of them; ``heads.NAME.key=value`` for one head's own option, and
            ``heads.NAME.training.key=value`` for what may differ in training.

    Raises:
        SetupError: an unknown or repeated head, or an override that belongs to none of them.
        ConfigError: as `load_config`.
    """
    path = find_recipe(recipe)
    configs = head_configs(path, _names(heads), overrides)
    folder = out or Path("runs") / path.stem
    runs = [(config, folder / name) for name, config in configs.items()]
    new = [name for name in configs if not is_begun(folder / name)]
    if resume and new:
        raise SetupError(
            f"--resume: {folder} has no run of {', '.join(new)} yet. Train {'it' if len(new) == 1 else 'them'} by "
            f"--heads {','.join(new)} without --resume (the episodes are the same), or all of them with --resume-or-start."
        )
    total = sum(config.training.episodes for config in configs.values())
    done = dict.fromkeys(configs, 0)
    with joined_ranks(choose_device(device)) as (ranks, chosen), progress(f"train {len(runs)} heads") as on_progress:

        def report(run: Path, line: Mapping[str, Any]) -> None:
            if line["kind"] == "step":
                done[run.name] = int(line["episode"])
                on_progress(sum(done.values()), total)
            else:
                say(f"{run.name}: {describe_validation(line)}")

        cards = train_together(runs, chosen, resume, report, ranks)
    # Named one by one: the first is what the others are held against, and a shell would sort them.
    say(f"Compare them on the same episodes: mastaf compare {' '.join(str(run) for _, run in runs)}")
    return cards


def head_configs(path: Path, names: Sequence[str], overrides: Sequence[str]) -> dict[str, RunConfig]:
    """The config of each head: the recipe's, with the head changed and its own overrides applied."""
    own: dict[str, list[str]] = {name: [] for name in names}
    shared = []
    for override in overrides:
        table, _, rest = override.partition(".")
        if table == "head" and not override.startswith("head.array"):
            raise SetupError(f"--set {override}: several heads are trained; say which one: heads.NAME.{rest}")
        if table != "heads":
            shared.append(override)
            continue
        name, _, rest = rest.partition(".")
        if name not in own:
            raise SetupError(f"--set {override}: {name!r} is none of the heads that are trained ({', '.join(names)}).")
        is_training = rest.startswith("training.")
        if is_training and rest.split("=")[0].strip().removeprefix("training.") not in OWN_TRAINING:
            raise SetupError(
                f"--set {override}: heads that train together differ in {', '.join(sorted(OWN_TRAINING))} only."
            )
        own[name].append(rest if is_training else f"head.{rest}")
    recipe = load_config(path, shared)
    configs = {}
    for name in names:
        # The recipe's options are those of its own head.
        options = recipe.head.options if name == recipe.head.name else {}
        head_config(name, options)
        document = recipe.model_dump(exclude_unset=True)
        document["head"] = {**options, "name": name, "array": recipe.head.array}
        if name != recipe.head.name and not any(entry.startswith("training.query_reduction") for entry in shared):
            # What the recipe says of its own head is no statement about the others: those are as published.
            document.get("training", {}).pop("query_reduction", None)
        configs[name] = load_config(None, own[name], document)
    return configs


def _names(heads: str) -> list[str]:
    names = list(HEADS) if heads == "all" else [name.strip() for name in heads.split(",")]
    unknown = [name for name in names if name not in HEADS]
    if unknown:
        raise SetupError(f"--heads: no head {unknown[0]!r}; the heads are {', '.join(HEADS)} (or all).")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise SetupError(f"--heads names {repeated[0]!r} twice; each is trained once.")
    return names
