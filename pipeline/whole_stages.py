"""The stages of a pipeline, in order: what each reads, what decides its output, how it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from configs.whole import PipelineFile
from pipeline import whole_making as making
from pipeline.run_files import CHANGEABLE, resolved_head_options
from pipeline.setup import load_manifest
from pipeline.weights_files import weights_name
from pipeline.whole_cards import refuse_unnoted_comparison, refuse_unnoted_live
from pipeline.whole_configs import PipelineConfigs
from pipeline.whole_outputs import (
    changed_inputs,
    files_hashes,
    is_mended_by_going_on,
    manifest_hashes,
    run_hashes,
    store_hashes,
    video_files_hash,
)

BACKBONE, CUBES, HEADS, DATA, PRETRAIN, LIVE = "backbone", "cubes", "heads", "data", "pretrain", "live"
"""Folders of a pipeline; the store has the ending of its backend."""
FILE_SIZES = "manifest.file_sizes"
"""What a stage states of the files of the videos that it decodes; None: not to be told."""
_REJECTING = ("seconds_per_video", "decode_memory_bytes")
"""Keys of [extraction] that change no cube, but which videos have one."""
_TRAINING_TABLES = ("data", "episodes", "head", "training", "evaluation")
_BACKBONE_TABLES = (*_TRAINING_TABLES, "sampling", "backbone", "extraction", "augmentation", "classify")


@dataclass(frozen=True, slots=True)
class Stage:
    """One output of a pipeline."""

    name: str
    output: Path
    """Its folder."""
    stated: Mapping[str, Any]
    """What decides it and is the user's, by name."""
    reads: tuple[str, ...]
    """What it reads of earlier stages: "stage.part" of their outputs."""
    hashes: Callable[[bool], dict[str, str]]
    """Of its output as it is on disk now; True: read every byte of it. Raises `whole_outputs.DAMAGE` where it is not whole."""
    is_costly: bool = True
    """Whether an output of other settings is refused; otherwise it is set aside and made anew."""
    mend: Callable[[], None] | None = None
    """Makes a damaged output whole in place."""
    is_mended_by_going_on: Callable[[Mapping[str, str]], bool] = lambda recorded: False
    """Whether a damaged output, once with these hashes, comes out whole where its making goes on."""
    changed_inputs: Callable[[], Sequence[str]] = tuple
    """What in its output was made from other files than there are now, one line each."""


@dataclass(frozen=True, slots=True)
class Step:
    """Stages that are made together."""

    name: str
    title: str
    stages: tuple[Stage, ...]
    make: Callable[[Sequence[Stage]], None]
    """Begins or goes on with some of the stages."""


def build_steps(file: PipelineFile, configs: PipelineConfigs, out: Path, device: str) -> list[Step]:
    """All stages of a pipeline.

    Args:
        file: the pipeline's file.
        configs: the stages' configs.
        out: folder of everything.
        device: "auto", "cpu", "cuda" or "cuda:N".
    """
    places = making.Places(out, out / f"{CUBES}{'.h5' if configs.extraction.store.kind == 'hdf5' else '.zarr'}")
    shop = making.Workshop(file.config, file.overrides_of("extract"), configs, places, device)
    steps = [_videos_step(shop)] if configs.renders else []
    if configs.pretrain is not None:
        steps.append(_pretrain_step(shop, configs.pretrain, _videos_of(configs, configs.pretrain)))
    videos = _videos_of(configs, configs.train)
    makers = (_train_step, _extract_step, _heads_step, _compare_step)
    return [*steps, *(make(shop, videos) for make in makers), _live_step(shop)]


def _videos_step(shop: making.Workshop) -> Step:
    folder = shop.places.data
    stated = {"demo_videos": shop.asked.demo_videos}

    def hashes(_: bool) -> dict[str, str]:
        manifest = load_manifest(shop.configs.train)
        return {**files_hashes(folder, 1 + len(manifest.videos)), **manifest_hashes(manifest)}

    stage = Stage("videos", folder, stated, (), hashes)
    return Step("videos", "render the demo's videos", (stage,), lambda _: making.render(shop))


@dataclass(frozen=True, slots=True)
class _Videos:
    """The manifest: something stated, or something read where the pipeline renders it."""

    stated: Mapping[str, str]
    reads: tuple[str, ...]


def _videos_of(configs: PipelineConfigs, config: RunConfig) -> _Videos:
    if configs.renders:
        return _Videos({}, ("videos.files", "videos.split_hash", "videos.content"))
    found = manifest_hashes(load_manifest(config))
    return _Videos({f"manifest.{name}": value for name, value in found.items()}, ())


def _file_sizes(configs: PipelineConfigs, config: RunConfig, splits: Sequence[str]) -> dict[str, str | None]:
    """What a stage that decodes videos states of their files; nothing where the pipeline renders them."""
    if configs.renders:
        return {}
    return {FILE_SIZES: video_files_hash(load_manifest(config), splits, config.data.allow_outside)}


def _trained_on(config: RunConfig) -> tuple[str, ...]:
    return ("train", "val", "test") if config.training.track_test else ("train", "val")


def _pretrain_step(shop: making.Workshop, config: RunConfig, videos: _Videos) -> Step:
    stage = Stage(
        "pretrain",
        shop.places.pretrain,
        {
            **settings_of(config, _BACKBONE_TABLES),
            **videos.stated,
            **_file_sizes(shop.configs, config, _trained_on(config)),
        },
        videos.reads,
        partial(_run_hashes, shop.places.pretrain),
        is_mended_by_going_on=partial(is_mended_by_going_on, shop.places.pretrain),
    )
    make = partial(making.train_run, shop, config, stage.output, "pretrain")
    return Step("pretrain", "train the backbone by classification", (stage,), lambda _: make())


def _train_step(shop: making.Workshop, videos: _Videos) -> Step:
    config, reads = shop.configs.train, videos.reads
    sizes = _file_sizes(shop.configs, config, _trained_on(config))
    stated = {**settings_of(config, _BACKBONE_TABLES), **videos.stated, **sizes}
    if shop.configs.pretrain is not None:
        del stated["backbone.weights"]
        reads += ("pretrain.backbone",)
    stage = Stage(
        "train",
        shop.places.backbone,
        stated,
        reads,
        partial(_run_hashes, shop.places.backbone),
        is_mended_by_going_on=partial(is_mended_by_going_on, shop.places.backbone),
    )
    title = "train the backbone " + ("by classification" if shop.configs.is_classification else "end to end")
    make = partial(making.train_run, shop, config, stage.output, "backbone")
    return Step("train", title, (stage,), lambda _: make())


def _extract_step(shop: making.Workshop, videos: _Videos) -> Step:
    config, folder = shop.configs.extraction, shop.places.cubes
    limits = {f"extraction.{key}": getattr(config.extraction, key) for key in _REJECTING}

    def changed() -> Sequence[str]:
        # Rendered videos are held against their own hash.
        return () if shop.configs.renders else changed_inputs(folder, load_manifest(config), config.data.allow_outside)

    stage = Stage(
        "extract",
        folder,
        {**settings_of(config, ("sampling", "extraction", "store")), **limits, **videos.stated},
        ("train.backbone", *videos.reads),
        lambda is_full: store_hashes(folder, is_full),
        mend=partial(making.mend_store, shop),
        changed_inputs=changed,
    )
    return Step("extract", "extract the cubes of that backbone", (stage,), lambda _: making.extract(shop))


def _heads_step(shop: making.Workshop, videos: _Videos) -> Step:
    stages = []
    for name, config in shop.configs.heads.items():
        folder = shop.places.head(name)
        reads = (*videos.reads, "extract.fingerprint", "extract.content")
        reads += ("train.weights",) if name == shop.configs.continued_head else ()
        stated = {**settings_of(config, _TRAINING_TABLES), **videos.stated}
        mended = partial(is_mended_by_going_on, folder)
        hashes = partial(_run_hashes, folder)
        stages.append(Stage(f"{HEADS}/{name}", folder, stated, reads, hashes, is_mended_by_going_on=mended))

    def make(wanted: Sequence[Stage]) -> None:
        making.train_all_heads(shop, [stage.output.name for stage in wanted])

    return Step("heads", "train the heads on the cubes", tuple(stages), make)


def _compare_step(shop: making.Workshop, videos: _Videos) -> Step:
    compare, heads = shop.asked.compare, list(shop.configs.heads)
    reads = (*videos.reads, "train.weights", "extract.fingerprint", "extract.content")
    reads += tuple(f"{HEADS}/{name}.weights" for name in heads)
    stages = [
        Stage(
            f"compare/{k_shot}shot",
            folder := shop.places.comparison(k_shot),
            {**_scored_on(shop), "heads": heads, "k_shot": k_shot, **videos.stated},
            reads,
            partial(_comparison_hashes, shop, folder),
            is_costly=False,
        )
        for k_shot in compare.shots
    ]

    def make(wanted: Sequence[Stage]) -> None:
        making.compare(shop, [k_shot for stage, k_shot in zip(stages, compare.shots, strict=True) if stage in wanted])

    return Step("compare", "score all heads on the same episodes", tuple(stages), make)


def _scored_on(shop: making.Workshop) -> dict[str, Any]:
    compare, episodes = shop.asked.compare, next(iter(shop.configs.heads.values())).episodes
    return {
        **compare.model_dump(mode="json", exclude={"shots"}),
        "queries": shop.configs.n_query,
        "protocol": episodes.protocol,
        "n_way": episodes.n_way,
    }


def _run_hashes(folder: Path, _: bool) -> dict[str, str]:
    return run_hashes(folder)


def _comparison_hashes(shop: making.Workshop, folder: Path, _: bool) -> dict[str, str]:
    found = files_hashes(folder, making.NUM_COMPARISON_FILES)
    refuse_unnoted_comparison(making.compared_runs(shop), folder)
    return found


def _live_hashes(shop: making.Workshop, _: bool) -> dict[str, str]:
    found = files_hashes(shop.places.live)
    refuse_unnoted_live(shop.places.backbone, shop.places.live / making.LIVE_FILE)
    return found


def _live_step(shop: making.Workshop) -> Step:
    compare, folder = shop.asked.compare, shop.places.live
    sizes = _file_sizes(shop.configs, shop.configs.train, (compare.split,))
    stated = {**_scored_on(shop), "shots": list(compare.shots), **sizes}
    # Its answers are held against those on the cubes, episode by episode.
    reads = ("train.weights", *(f"compare/{k_shot}shot.files" for k_shot in compare.shots))
    stage = Stage("live", folder, stated, reads, partial(_live_hashes, shop), is_costly=False)
    return Step("live", "score the backbone's run by decoding", (stage,), lambda _: making.score_live(shop))


def settings_of(config: RunConfig, tables: Sequence[str]) -> dict[str, Any]:
    """The settings of some tables that change what is made, as "table.key"; files of weights stand by their content."""
    dumped = config.model_dump(mode="json", include=set(tables))
    if "head" in tables:
        dumped["head"] = {"name": config.head.name, "array": config.head.array, **resolved_head_options(config)}
    found = {
        f"{table}.{key}": value
        for table in tables
        for key, value in dumped[table].items()
        if f"{table}.{key}" not in CHANGEABLE
    }
    for table, key in (("backbone", "weights"), ("training", "initial_weights")):
        if table in tables:
            found[f"{table}.{key}"] = weights_name(dumped[table][key])
    return found
