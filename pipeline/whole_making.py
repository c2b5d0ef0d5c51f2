"""How each stage of a pipeline makes its output; all of them go on where an earlier call was stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.schema import RunConfig
from configs.whole import PipelineConfig
from episodes.datasets import exclude
from pipeline.checkpoint import write_file
from pipeline.compare_command import compare_folders
from pipeline.console import progress, say
from pipeline.demo import render_videos
from pipeline.extract_command import extract_to_store
from pipeline.run_files import is_begun
from pipeline.scoring import LoadedRun, evaluate_run, load_run
from pipeline.settings import SetupError
from pipeline.setup import choose_device
from pipeline.sources import SourceError
from pipeline.store_commands import repair_store
from pipeline.train_command import describe_validation
from pipeline.training import train, train_together
from pipeline.whole_cards import note_comparison, note_live, scored_manifest
from pipeline.whole_configs import PipelineConfigs

COMPARISON_TABLE = "table.txt"
NUM_COMPARISON_FILES = 5
"""compare.json, .csv, .png, episodes.npz and the table."""
LIVE_FILE = "live.json"


@dataclass(frozen=True, slots=True)
class Places:
    """Where a pipeline's outputs are."""

    out: Path
    cubes: Path
    """The store."""

    @property
    def data(self) -> Path:
        """Rendered videos with their manifest."""
        return self.out / "data"

    @property
    def pretrain(self) -> Path:
        """The run of the classification that comes first."""
        return self.out / "pretrain"

    @property
    def backbone(self) -> Path:
        """The run that trains the backbone."""
        return self.out / "backbone"

    @property
    def live(self) -> Path:
        """Scores of the backbone's run by decoding."""
        return self.out / "live"

    def head(self, name: str) -> Path:
        """The run of a head on the cubes."""
        return self.out / "heads" / name

    def comparison(self, k_shot: int) -> Path:
        """The comparison for a number of shots."""
        return self.out / f"comparison_{k_shot}shot"


@dataclass(frozen=True, slots=True)
class Workshop:
    """What all stages share."""

    asked: PipelineConfig
    overrides: tuple[str, ...]
    """Of the extraction."""
    configs: PipelineConfigs
    places: Places
    device: str
    """As the command line gave it."""

    @property
    def manifest(self) -> str:
        """Path of the manifest."""
        return str(self.configs.train.data.manifest)


def render(shop: Workshop) -> None:
    """Render the demo's videos and write their manifest."""
    shop.places.data.mkdir(parents=True, exist_ok=True)
    render_videos(shop.places.data, shop.asked.demo_videos)


def train_run(shop: Workshop, config: RunConfig, folder: Path, name: str) -> None:
    """Train a backbone, from the pre-trained one where there is one."""
    if shop.configs.pretrain is not None and folder != shop.places.pretrain:
        weights = str(shop.places.pretrain / "backbone.pt")
        config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"weights": weights})})
    with progress(f"train {name}") as on_progress:

        def report(line: Mapping[str, Any]) -> None:
            if line["kind"] == "step":
                on_progress(int(line["episode"]), config.training.episodes)
            elif line["kind"] == "validation":
                say(f"    {name}: {describe_validation(line)}")

        train(config, folder, choose_device(shop.device), is_begun(folder), report)


def extract(shop: Workshop) -> None:
    """Fill the store with the cubes of the run's backbone; what is in there is skipped."""
    extract_to_store(
        manifest=Path(shop.manifest),
        backbone=None,
        weights=None,
        store=str(shop.places.cubes),
        store_kind=None,
        recipe=None,
        from_run=shop.places.backbone,
        device=shop.device,
        overrides=shop.overrides,
    )


def mend_store(shop: Workshop) -> None:
    """Drop damaged shards of the store; they are extracted anew."""
    allow_outside = shop.configs.train.data.allow_outside
    repair_store(str(shop.places.cubes), Path(shop.manifest), None, shop.device, 2, allow_outside)


def train_all_heads(shop: Workshop, names: Sequence[str]) -> None:
    """Train heads on one pass of the cubes; those that were begun go on, the others begin."""
    runs = [(_head_config(shop, name), shop.places.head(name)) for name in names]
    resumed = [run for run in runs if is_begun(run[1])]
    begun = [run for run in runs if run not in resumed]
    try:
        for together, resume in ((resumed, True), (begun, False)):
            if together:
                _train_together(together, resume, shop.device)
    except SourceError as error:
        again = "--redo pretrain --redo train" if shop.configs.pretrain is not None else "--redo train"
        raise SetupError(
            f"{error} Inside a pipeline either raise extraction.seconds_per_video or decode_memory_bytes, where that stopped them, with "
            f"--redo extract; or repair them, with {again} --redo extract; or give the manifest without them: --set "
            f"data.manifest=NEW.csv {again}, which trains the backbone without them too."
        ) from error


def _head_config(shop: Workshop, name: str) -> RunConfig:
    config = shop.configs.heads[name]
    changes: dict[str, Any] = {"store": config.store.model_copy(update={"path": str(shop.places.cubes), "kind": None})}
    if name == shop.configs.continued_head:
        start = {"initial_weights": str(shop.places.backbone / "best.pt")}
        changes["training"] = config.training.model_copy(update=start)
    return config.model_copy(update=changes)


def _train_together(runs: Sequence[tuple[RunConfig, Path]], resume: bool, device: str) -> None:
    total = sum(config.training.episodes for config, _ in runs)
    done = {folder.name: 0 for _, folder in runs}
    with progress(f"train {len(runs)} heads") as on_progress:

        def report(folder: Path, line: Mapping[str, Any]) -> None:
            if line["kind"] == "step":
                done[folder.name] = int(line["episode"])
                on_progress(sum(done.values()), total)
            elif line["kind"] == "validation":
                say(f"    {folder.name}: {describe_validation(line)}")

        train_together(runs, choose_device(device), resume, report)


def compared_runs(shop: Workshop) -> list[Path]:
    """Folders of the runs of a comparison, the backbone's first."""
    return [shop.places.backbone, *(shop.places.head(name) for name in shop.configs.heads)]


def compare(shop: Workshop, shots: Sequence[int]) -> None:
    """Score the backbone's run through its cubes and all heads, on the same episodes for each number of shots."""
    asked = shop.asked.compare
    runs = compared_runs(shop)
    for k_shot in shots:
        folder = shop.places.comparison(k_shot)
        folder.mkdir(exist_ok=True)
        _, table = compare_folders(
            runs,
            split=asked.split,
            episodes=asked.episodes,
            shots=k_shot,
            queries=shop.configs.n_query,
            seed=asked.seed,
            store_path=str(shop.places.cubes),
            manifest=shop.manifest,
            out=folder,
            device=shop.device,
            on_scored=partial(note_comparison, store=shop.places.cubes, manifest=Path(shop.manifest), folder=folder),
        )
        write_file(folder / COMPARISON_TABLE, (table + "\n").encode())


def score_live(shop: Workshop) -> None:
    """Score the backbone's run on the same episodes by decoding the videos, and hold every answer against that on the cubes."""
    asked, device = shop.asked.compare, choose_device(shop.device)
    results = {}
    with load_run(shop.places.backbone, device, manifest_path=shop.manifest) as run:
        for k_shot in asked.shots:
            results[str(k_shot)] = _score_live(shop, run, k_shot, device)
    shop.places.live.mkdir(exist_ok=True)
    write_file(shop.places.live / LIVE_FILE, (json.dumps(results, indent=2) + "\n").encode())


def _score_live(shop: Workshop, run: LoadedRun, k_shot: int, device: torch.device) -> dict[str, Any]:
    asked, folder = shop.asked.compare, shop.places.comparison(k_shot)
    compared = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    left_out = {row["video_id"]: row["reason"] for row in compared["left_out"]}
    with progress(f"score live, {k_shot}-shot") as on_progress:
        result, score = evaluate_run(
            _on_episodes_of(run, left_out, asked.seed), asked.split, asked.episodes, device, on_progress,
            k_shot=k_shot, n_query=shop.configs.n_query,
        )  # fmt: skip
    if score.episode_hash != compared["episode_hash"]:
        raise SetupError(f"{folder} was made on other episodes than those of now. Make it again: --redo compare")
    with np.load(folder / "episodes.npz", allow_pickle=False) as arrays:
        on_cubes = arrays["accuracy"][0]  # (N,), the backbone's run comes first
    note_live(shop.places.backbone, result, score, scored_manifest(Path(shop.manifest), folder, bool(left_out)))
    return {
        **result,
        "accuracy_on_cubes": compared["runs"][0]["accuracy"],
        "episodes_that_differ": int((on_cubes != np.array(score.per_episode)).sum()),
    }


def _on_episodes_of(run: LoadedRun, left_out: Mapping[str, str], seed: int) -> LoadedRun:
    """The run on the videos and with the seed of the comparison."""
    evaluation = run.config.evaluation.model_copy(update={"seed": seed})
    return replace(
        run,
        config=run.config.model_copy(update={"evaluation": evaluation}),
        manifest=exclude(run.manifest, left_out) if left_out else run.manifest,
    )
