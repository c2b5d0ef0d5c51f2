"""The configs of a pipeline's stages, and what contradicts itself between them: refused before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.load import ConfigError, load_config
from configs.schema import RunConfig
from configs.whole import PipelineFile
from episodes.datasets import Manifest
from episodes.sampler import EpisodeProtocol, EpisodeSampler, SamplerError
from episodes.video import Video
from extract.config import BackboneConfig, SamplingConfig
from pipeline.demo_classes import MOTION_CLASSES
from pipeline.run_files import resolved_head_options
from pipeline.settings import SetupError
from pipeline.setup import episode_protocol, load_manifest
from pipeline.train_heads import head_configs


@dataclass(frozen=True, slots=True)
class PipelineConfigs:
    """The config of each stage."""

    pretrain: RunConfig | None
    train: RunConfig
    extraction: RunConfig
    """Of the run that `train` makes, with the extraction's overrides."""
    heads: Mapping[str, RunConfig]
    """By name of the head."""
    renders: bool
    """Whether the manifest is one that the pipeline renders itself."""
    continued_head: str | None
    """The head that starts from the end-to-end run's."""
    n_query: int
    """Of the comparison."""

    @property
    def is_classification(self) -> bool:
        """Whether the backbone is trained without a few-shot head; one without weights then measures."""
        return self.train.training.mode == "classify"


def load_configs(file: PipelineFile, rendered: Path) -> PipelineConfigs:
    """Load the recipes of a pipeline and hold them against each other.

    Args:
        file: the pipeline's file.
        rendered: where a manifest is, or will be, if the pipeline renders the videos.

    Raises:
        ConfigError: a recipe that cannot be used, or a contradiction between two.
        ManifestError, SamplerError, SetupError: the manifest cannot be used for this.
    """
    asked = file.config
    train_path = file.recipe(asked.backbone)
    with _naming("pipeline.backbone", train_path):
        train = load_config(train_path, file.overrides_of("train"))
    heads_path = file.recipe(asked.heads_recipe)
    with _naming("pipeline.heads_recipe", heads_path):
        heads = head_configs(heads_path, asked.heads, file.overrides_of("heads"))
    first = heads[asked.heads[0]]
    renders = bool(asked.demo_videos) and not train.data.manifest
    if not renders:
        load_manifest(train)  # refused now where there is none
    manifest = str(rendered) if renders else str(train.data.manifest)
    _refuse_other_manifest(first, manifest)
    train = with_manifest(train, manifest)
    with _naming("pipeline.backbone with [pipeline.set_extract]", train_path):
        extraction = load_config(train_path, (*file.overrides_of("train"), *file.overrides_of("extract")))
    pretrain = None
    if asked.pretrain is not None:
        pretrain_path = file.recipe(asked.pretrain)
        with _naming("pipeline.pretrain", pretrain_path):
            pretrain = load_config(pretrain_path, file.overrides_of("pretrain"))
        pretrain = with_manifest(pretrain, pretrain.data.manifest or manifest)
    configs = PipelineConfigs(
        pretrain=pretrain,
        train=train,
        extraction=with_manifest(extraction, manifest),
        heads={name: _without_weights(with_manifest(config, manifest)) for name, config in heads.items()},
        renders=renders,
        continued_head=_continued_head(train, heads) if asked.start_from_run_head else None,
        n_query=asked.compare.queries or first.episodes.n_query,
    )
    _refuse_contradictions(configs)
    _refuse_small_splits(file, configs, rendered.parent)
    return configs


@contextmanager
def _naming(key: str, path: Path) -> Iterator[None]:
    """Say of what is wrong with a recipe, or with its overrides, which one it is."""
    try:
        yield
    except (ConfigError, SetupError) as error:
        raise type(error)(f"{key} ({path.name}): {error}") from error


def with_manifest(config: RunConfig, manifest: str) -> RunConfig:
    """The config on a manifest."""
    return config.model_copy(update={"data": config.data.model_copy(update={"manifest": manifest})})


def _without_weights(config: RunConfig) -> RunConfig:
    """What the recipes say of the weights that the backbone's training starts from is no statement about its cubes."""
    stated = config.backbone.model_dump(exclude_unset=True, exclude={"weights"})
    return config.model_copy(update={"backbone": BackboneConfig.model_validate(stated)})


def _refuse_other_manifest(heads: RunConfig, manifest: str) -> None:
    own = heads.data.manifest
    if own and Path(own).resolve() != Path(manifest).resolve():
        raise ConfigError(
            f"the heads' recipe has data.manifest = {own!r}, the backbone's {manifest!r}, but both are scored on the same episodes. "
            "Set one for both: --set data.manifest=FILE.csv"
        )


def _continued_head(train: RunConfig, heads: Mapping[str, RunConfig]) -> str:
    name = train.head.name
    if train.training.mode != "end_to_end":
        raise ConfigError(
            "pipeline.start_from_run_head = true, but classification trains no few-shot head to start from."
        )
    if name not in heads:
        raise ConfigError(
            f"pipeline.start_from_run_head = true, but the end-to-end run's head {name!r} is none of pipeline.heads = {list(heads)}."
        )
    own, run = resolved_head_options(heads[name]), resolved_head_options(train)
    differing = [f"{key} (run {run[key]!r}, head {own[key]!r})" for key in own if own[key] != run[key]]
    if differing or heads[name].head.array != train.head.array:
        raise ConfigError(
            f"pipeline.start_from_run_head = true, but {name} has other options than in the end-to-end run: "
            f"{', '.join(differing) or 'head.array'}. Give both the same, or leave it out."
        )
    return name


def _refuse_contradictions(configs: PipelineConfigs) -> None:
    problems = [
        _problem_of_modes(configs),
        _problem_of_pretraining(configs),
        _problem_of_cubes(configs),
        _problem_of_episodes(configs),
    ]
    for problem in problems:
        if problem:
            raise ConfigError(problem)


def _problem_of_modes(configs: PipelineConfigs) -> str | None:
    heads = next(iter(configs.heads.values()))
    if configs.train.training.mode == "cached":
        return (
            'pipeline.backbone is a recipe with training.mode = "cached", which trains no backbone. Give one with "end_to_end" or '
            '"classify", or use `mastaf extract` and `mastaf train --heads`.'
        )
    if heads.training.mode != "cached":
        return f'pipeline.heads_recipe has training.mode = "{heads.training.mode}"; heads train on the cubes: "cached".'
    if configs.pretrain is not None and configs.pretrain.training.mode != "classify":
        return f'pipeline.pretrain has training.mode = "{configs.pretrain.training.mode}", not "classify".'
    return None


def _problem_of_pretraining(configs: PipelineConfigs) -> str | None:
    if configs.pretrain is None:
        return None
    theirs, ours = configs.pretrain.backbone, configs.train.backbone
    if (theirs.name, theirs.options) != (ours.name, ours.options):
        return (
            f"pipeline.pretrain trains backbone {theirs.name} {theirs.options}, but pipeline.backbone {ours.name} {ours.options}: "
            "weights go from one to the other, so give both the same."
        )
    return None


def _problem_of_cubes(configs: PipelineConfigs) -> str | None:
    """What the heads' recipe states about the cubes must hold for those that the run will give."""
    heads, run = next(iter(configs.heads.values())), configs.extraction
    for table, keys in (
        ("sampling", set(SamplingConfig.model_fields) - {"num_views"}),
        ("backbone", {"name", "options"}),
        ("extraction", {"compute_dtype", "forward_batch"}),
        ("store", {"dtype"}),
    ):
        stated, made = getattr(heads, table), getattr(run, table)
        for key in sorted(stated.model_fields_set & keys):
            if getattr(stated, key) != getattr(made, key):
                return (
                    f"the heads' recipe states {table}.{key} = {getattr(stated, key)!r}, but the cubes are made with "
                    f"{getattr(made, key)!r}. Leave it out there, or change the backbone's recipe."
                )
    if heads.episodes.train_views > run.sampling.num_views:
        return (
            f"the heads' recipe has episodes.train_views = {heads.episodes.train_views}, but sampling.num_views = "
            f"{run.sampling.num_views} of each video are cached. Set sampling.num_views in [pipeline.set_extract]."
        )
    return None


def _problem_of_episodes(configs: PipelineConfigs) -> str | None:
    """The backbone's run and the heads are scored on the same episodes."""
    heads, train = next(iter(configs.heads.values())), configs.train
    for key in ("protocol", "n_way"):
        ours, theirs = getattr(train.episodes, key), getattr(heads.episodes, key)
        if ours != theirs:
            return (
                f"episodes.{key} is {ours!r} in the backbone's recipe and {theirs!r} in the heads', but both are compared on the same "
                f"episodes. Set one for both: --set episodes.{key}=..."
            )
    return None


def _refuse_small_splits(file: PipelineFile, configs: PipelineConfigs, data: Path) -> None:
    """Draw no episode, but let the samplers of training and of the comparison look at their splits."""
    asked, heads = file.config, next(iter(configs.heads.values()))
    manifest = _manifest_to_be(asked.demo_videos, data) if configs.renders else load_manifest(configs.train)
    way_out = f" Or raise pipeline.demo_videos = {asked.demo_videos}." if configs.renders else ""
    wanted = []
    for key, config in (("backbone", configs.train), ("heads_recipe", heads)):
        is_read = {
            "train": config.training.mode != "classify",
            "val": bool(manifest.classes("val")),
            "test": config.training.track_test,
        }
        wanted += [(key, split, episode_protocol(config)) for split, is_so in is_read.items() if is_so]
    for k_shot in asked.compare.shots:
        protocol = EpisodeProtocol(heads.episodes.protocol, heads.episodes.n_way, k_shot, configs.n_query)
        wanted.append(("compare", asked.compare.split, protocol))
    for key, split, protocol in wanted:
        try:
            EpisodeSampler(manifest, split, protocol)
        except SamplerError as error:
            raise SamplerError(f"pipeline.{key}: {error}{way_out}") from error


def _manifest_to_be(videos_per_class: int, data: Path) -> Manifest:
    """Of the demo's videos before they are rendered: all that episodes depend on."""
    rows = [
        Video(f"{name}_{number:03d}", f"videos/{name}/{name}_{number:03d}.mp4", name, motion_class.split)
        for name, motion_class in MOTION_CLASSES.items()
        for number in range(videos_per_class)
    ]
    return Manifest(tuple(rows), data)
