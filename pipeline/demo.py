"""`mastaf demo`: the whole pipeline on generated videos, ending in a table, pictures and a short report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cache.open import open_store
from configs.load import find_recipe, load_config
from configs.schema import RunConfig
from episodes.datasets import Manifest, read_manifest, write_manifest
from extract.build import build_backbone
from pipeline.console import progress, say
from pipeline.demo_pictures import draw_attention, draw_bars, draw_classes
from pipeline.demo_videos import write_demo_videos
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.provenance import code_version, hardware
from pipeline.scoring import evaluate_run, load_run
from pipeline.settings import SetupError
from pipeline.statistics import paired_difference
from pipeline.train_command import describe_validation
from pipeline.training import train

SHOTS = (1, 5)
NUM_QUERIES = 3
"""Per class in the test, for every row: runs with other numbers would be scored on other episodes."""
SEED = 0


@dataclass(frozen=True, slots=True)
class DemoSize:
    """How much the demo does."""

    videos_per_class: int
    test_episodes: int
    overrides: tuple[str, ...]
    """For every recipe."""
    training_episodes: int | None
    """At most; None: what the recipes say."""


FULL = DemoSize(videos_per_class=32, test_episodes=2000, overrides=(), training_episodes=None)
QUICK = DemoSize(
    videos_per_class=8,
    test_episodes=50,
    overrides=("training.validate_every=8", "training.validation_episodes=20"),
    training_episodes=8,
)


@dataclass(slots=True)
class _Demo:
    folder: Path
    size: DemoSize
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def manifest(self) -> Path:
        """Where the manifest is written."""
        return self.folder / "videos.csv"

    def store(self, name: str) -> Path:
        """Where a store is written."""
        return self.folder / f"{name}.zarr"

    def run(self, name: str) -> Path:
        """Where a run is written."""
        return self.folder / "runs" / name

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and note its seconds."""
        say(f"[{len(self.seconds) + 1}] {name}")
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started
        say(f"    {self.seconds[name]:.0f} s")

    def config(self, recipe: str, **tables: dict[str, Any]) -> RunConfig:
        """A shipped recipe on the demo's manifest, in the demo's size."""
        tables.setdefault("data", {})["manifest"] = str(self.manifest)
        config = load_config(find_recipe(recipe), self.size.overrides, tables)
        if self.size.training_episodes is None or config.training.episodes <= self.size.training_episodes:
            return config
        shorter = config.training.model_copy(update={"episodes": self.size.training_episodes})
        return config.model_copy(update={"training": shorter})


def run_demo(folder: Path, quick: bool = False) -> dict[str, Any]:
    """Render videos, train end to end, cache, train heads on the cache, score on unseen classes, draw, report.

    Args:
        folder: new or empty; everything is written below it.
        quick: a run of every step on little data, for tests; its numbers mean nothing.

    Returns:
        What report.json holds.

    Raises:
        SetupError: the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise SetupError(f"{folder} is not empty. Choose another --out, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    num_threads = torch.get_num_threads()
    # One thread: so small a network gains nothing from a second one, and training does not collapse on a busy machine.
    torch.set_num_threads(1)
    try:
        return _run_stages(folder, quick)
    finally:
        torch.set_num_threads(num_threads)


def _run_stages(folder: Path, quick: bool) -> dict[str, Any]:
    demo = _Demo(folder, QUICK if quick else FULL)
    started = time.monotonic()
    with demo.stage("render the videos"):
        manifest = render_videos(folder, demo.size.videos_per_class)
    with demo.stage("train MASTAF end to end"):
        _train(demo, "end_to_end", demo.config("demo_end_to_end"))
    with demo.stage("extract cubes, untrained and trained backbone"):
        _extract(demo, "untrained", demo.config("demo_end_to_end"))
        weights = str(demo.run("end_to_end") / "backbone.pt")
        _extract(demo, "trained", demo.config("demo_end_to_end", backbone={"weights": weights}))
    with demo.stage("train heads on the cache"):
        for name, store, recipe in (
            ("untrained", "untrained", "demo_untrained"),
            ("neighbor", "trained", "demo_neighbor"),
            ("mastaf", "trained", "demo_mastaf"),
        ):
            _train(demo, name, demo.config(recipe, store={"path": str(demo.store(store))}))
    with demo.stage("evaluate on unseen classes"):
        results = _evaluate(demo)
    with demo.stage("draw"):
        sampling = demo.config("demo_end_to_end").sampling
        draw_classes(manifest, folder / "classes.png", sampling)
        draw_attention(demo.run("mastaf"), folder / "attention.png", demo.device, sampling)
        draw_bars(results, folder / "accuracy.png")
    return _report(demo, manifest, results, time.monotonic() - started)


def render_videos(folder: Path, videos_per_class: int) -> Manifest:
    """Write the demo's videos into ``folder/videos`` and their manifest, ``folder/videos.csv``; gives it back."""
    with progress("render") as on_progress:
        rows = write_demo_videos(folder / "videos", videos_per_class, SEED, on_progress)
    videos = tuple(replace(row, path=f"videos/{row.path}") for row in rows)
    write_manifest(Manifest(videos, folder), folder / "videos.csv")
    return read_manifest(folder / "videos.csv")


def _train(demo: _Demo, name: str, config: RunConfig) -> dict[str, Any]:
    with progress(f"train {name}") as on_progress:

        def report(line: Mapping[str, Any]) -> None:
            if line["kind"] == "step":
                on_progress(int(line["episode"]), config.training.episodes)
            else:
                say(f"    {name}: {describe_validation(line)}")

        return train(config, demo.run(name), demo.device, report=report)


def _extract(demo: _Demo, name: str, config: RunConfig) -> None:
    backbone = build_backbone(config.backbone, config.sampling).to(demo.device)
    spec = build_spec(config, backbone, demo.device)
    sources = video_sources(read_manifest(demo.manifest))
    with (
        open_store(demo.store(name), spec=spec, mode="a", shard_rows=config.store.shard_rows) as store,
        progress(f"extract {name}") as on_progress,
    ):
        report = extract_videos(store, list(sources.values()), backbone, config, demo.device, on_progress=on_progress)
    say(
        f"    {name}: {report.num_ok} ok, {report.num_degraded} degraded, {report.num_rejected} rejected, "
        f"{report.clips_per_second:.0f} clips/s"
    )


ROWS = (
    ("untrained backbone", "untrained", None),
    ("Neighbor, cached", "neighbor", None),
    ("MASTAF, cached", "mastaf", None),
    ("MASTAF, end to end", "end_to_end", "trained"),
)


def _evaluate(demo: _Demo) -> list[dict[str, Any]]:
    results = []
    for title, name, store in ROWS:
        with load_run(demo.run(name), demo.device, str(demo.store(store)) if store else None) as run:
            for k_shot in SHOTS:
                result, score = evaluate_run(
                    run, "test", demo.size.test_episodes, demo.device, k_shot=k_shot, n_query=NUM_QUERIES
                )
                say(f"    {title}, 5-way {k_shot}-shot: {score}")
                results.append({"title": title, **result, "per_episode": score.per_episode})
    return results


def _report(demo: _Demo, manifest: Manifest, results: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    facts = {
        "results": [{key: value for key, value in row.items() if key != "per_episode"} for row in results],
        "seconds": {**demo.seconds, "total": seconds},
        "videos": len(manifest.videos),
        "classes": {split: len(manifest.classes(split)) for split in ("train", "val", "test")},
        "hardware": hardware(),
        "code_version": code_version(),
    }
    (demo.folder / "report.json").write_text(json.dumps(facts, indent=2) + "\n")
    text = _report_text(facts, results)
    (demo.folder / "report.md").write_text(text)
    say("\n" + text)
    say(f"report: {demo.folder / 'report.md'}, pictures beside it ({seconds:.0f} s in all)")
    return facts


def _report_text(facts: dict[str, Any], results: list[dict[str, Any]]) -> str:
    by_title: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        by_title.setdefault(result["title"], {})[result["k_shot"]] = result
    classes = facts["classes"]
    lines = [
        "# mastaf demo",
        "",
        f"{facts['videos']} generated H.264 videos; {classes['train']} classes to train on, {classes['val']} to choose the checkpoint, "
        f"{classes['test']} unseen ones to test. Only the motion tells the class.",
        "",
        "| on unseen classes | 5-way 1-shot | 5-way 5-shot |",
        "|---|---|---|",
    ]
    for title, shots in by_title.items():
        cells = [f"{100 * shots[k]['accuracy']:.1f} ± {100 * shots[k]['interval95']:.1f} %" for k in SHOTS]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        f"Mean over {results[0]['episodes']} episodes with 95 % interval; chance is 20 %. All rows are scored on the same episodes.",
        f"Split {results[0]['split_hash'][:12]}, episodes {results[0]['episode_hash'][:12]} (1-shot), code {facts['code_version']}.",
        "",
        *_honest_lines(by_title),
        "",
        "![classes](classes.png)",
        "![accuracy](accuracy.png)",
        "![attention](attention.png)",
        "",
        "| stage | seconds |",
        "|---|---|",
        *[f"| {name} | {value:.0f} |" for name, value in facts["seconds"].items()],
        "",
    ]
    return "\n".join(lines)


def _honest_lines(by_title: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """Say for each number of shots whether MASTAF beats Neighbor on the same cubes by more than the paired interval."""
    lines = []
    for k_shot in SHOTS:
        for title in ("MASTAF, cached", "MASTAF, end to end"):
            row, neighbor = by_title[title][k_shot], by_title["Neighbor, cached"][k_shot]
            assert row["episode_hash"] == neighbor["episode_hash"]
            found = paired_difference(row["per_episode"], neighbor["per_episode"])
            verdict = (
                "better than"
                if found.mean > found.interval95
                else "worse than"
                if found.mean < -found.interval95
                else "not distinguishable from"
            )
            lines.append(
                f"- {title}, {k_shot}-shot: {verdict} Neighbor on the same cubes "
                f"({100 * found.mean:+.2f} ± {100 * found.interval95:.2f} points, paired over the episodes)."
            )
    return lines
