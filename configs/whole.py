"""`mastaf pipeline`: one TOML file with the table ``[pipeline]`` says what is trained, cached, trained again and compared."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from configs.load import ConfigError, apply_override, describe_problem, find_recipe, nearest, recipe_folder, to_literal

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class CompareConfig(BaseModel):
    """What all heads, and the end-to-end run itself, are scored on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    episodes: int = Field(default=2_000, ge=2)
    """How many, for each number of shots; the same for all heads."""
    shots: tuple[int, ...] = (1, 5)
    """Labelled videos of each class; one table column for each."""
    queries: int | None = Field(default=None, ge=1)
    """Queries of each class; None: episodes.n_query of the heads' recipe."""
    split: Literal["val", "test"] = "test"
    """Where they are drawn from."""
    seed: int = Field(default=0, ge=0)
    """Of these episodes."""

    @field_validator("shots")
    @classmethod
    def _refuse_odd_shots(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if not shots or min(shots) < 1 or len(set(shots)) < len(shots):
            raise ValueError(f"shots = {list(shots)}: give one or more different numbers from 1 on.")
        return shots


class PipelineConfig(BaseModel):
    """The table ``[pipeline]``. Recipes are names of shipped ones, or paths relative to the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    backbone: str
    """Recipe that trains the backbone; its training.mode is "end_to_end" or "classify"."""
    heads_recipe: str
    """Recipe that trains the heads on the cubes of that backbone; its training.mode is "cached"."""
    heads: tuple[str, ...] = Field(min_length=1)
    """Names from `mastaf list heads`; they train together on one pass of the cubes, each a run of its own."""
    pretrain: str | None = None
    """Recipe with training.mode "classify" that comes first; the backbone's training starts from its weights."""
    start_from_run_head: bool = False
    """Whether the head of the same name and options as the end-to-end run's starts from that run's; the others start fresh."""
    demo_videos: int = Field(default=0, ge=0, le=10_000)
    """Render this many videos of each demo class first, where no data.manifest is given; 0: none."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; None: as it chooses."""
    compare: CompareConfig = CompareConfig()
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of all recipes, as `--set` writes them: `data.manifest = "videos.csv"`."""
    set_pretrain: dict[str, Any] = Field(default_factory=dict)
    """Overrides of `pretrain`; these beat `set`."""
    set_train: dict[str, Any] = Field(default_factory=dict)
    """Overrides of `backbone`; these beat `set`."""
    set_extract: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the extraction, which otherwise goes by the run: `store.dtype = "float16"`."""
    set_heads: dict[str, Any] = Field(default_factory=dict)
    """Overrides of `heads_recipe`; `heads.NAME.key` is for one of them, as in `mastaf train --heads`."""

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> PipelineConfig:
        repeated = [name for name in self.heads if self.heads.count(name) > 1]
        if repeated:
            raise ValueError(f"heads names {repeated[0]!r} twice; each is trained once.")
        return self


@dataclass(frozen=True, slots=True)
class PipelineFile:
    """A pipeline's config with where it stands and what the command line adds."""

    path: Path
    config: PipelineConfig
    overrides: tuple[str, ...]
    """``table.key=value`` of the command line, for all recipes (``heads.NAME.key`` for one head); these beat the file."""

    def overrides_of(self, stage: Literal["pretrain", "train", "extract", "heads"]) -> tuple[str, ...]:
        """What overrides the recipe of a stage, the strongest last."""
        own: dict[str, Any] = getattr(self.config, f"set_{stage}")
        for_all = (
            (*self.overrides,)
            if stage == "heads"
            else (each for each in self.overrides if not each.startswith("heads."))
        )
        return (*_flat(self.config.set), *_flat(own), *for_all)

    def recipe(self, name: str) -> Path:
        """A recipe by its path relative to this file, or by its name.

        Raises:
            ConfigError: there is neither.
        """
        beside = self.path.parent / name
        return beside if beside.is_file() else find_recipe(name)


def pipeline_folder() -> Path:
    """The folder of the pipelines that ship with the program."""
    return recipe_folder() / "pipelines"


def load_pipeline(name: str, overrides: Iterable[str] = ()) -> PipelineFile:
    """Read a pipeline's file.

    Args:
        name: a TOML file, or the name of one that ships (``mastaf list pipelines``).
        overrides: ``pipeline.key=value`` changes the file itself; every other ``table.key=value`` is for all recipes.

    Raises:
        ConfigError: no such file, unreadable TOML, an unknown key (the nearest known one is named), a value out of range.
    """
    path = _find(name)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"pipeline {path} cannot be read: {error}") from error
    others = [table for table in document if table != "pipeline"]
    if others or not isinstance(document.get("pipeline"), dict):
        what = f"has {others[0]!r}" if others else "has no such table"
        raise ConfigError(
            f"pipeline {path} {what}, but all of it stands in [pipeline]; what changes recipes in [pipeline.set] and [pipeline.set_train]. "
            "A recipe is trained by `mastaf train`."
        )
    own = [override for override in overrides if override.startswith("pipeline.")]
    for override in own:
        apply_override(document, override)
    try:
        config = PipelineConfig.model_validate(document["pipeline"])
    except ValidationError as error:
        raise ConfigError("; ".join(_problem(item) for item in error.errors())) from error
    _check_heads(config)
    return PipelineFile(path, config, tuple(override for override in overrides if override not in own))


def _problem(item: Any) -> str:
    if item["type"] == "missing":
        return f"pipeline.{'.'.join(map(str, item['loc']))} is not set; docs/pipeline.md shows a whole file"
    return f"[pipeline] {describe_problem(item, PipelineConfig)}"


def _check_heads(config: PipelineConfig) -> None:
    # Imported here, so that the pipelines can be listed without torch.
    from episodes.build import HEADS

    for name in config.heads:
        if name not in HEADS:
            raise ConfigError(f"pipeline.heads: no head {name!r}{nearest(name, HEADS)}; `mastaf list heads` shows all.")


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    shipped = pipeline_folder() / f"{path.stem}.toml"
    if shipped.is_file() and path.parent == Path():
        return shipped
    known = [file.stem for file in sorted(pipeline_folder().glob("*.toml"))]
    raise ConfigError(
        f"no pipeline {name!r}: no such file{nearest(path.stem, known)}; `mastaf list pipelines` shows what ships."
    )


def _flat(table: Mapping[str, Any], prefix: str = "") -> tuple[str, ...]:
    """A nest of tables as overrides; a table whose keys are no bare words (patterns of parameter names) is a value."""
    found: list[str] = []
    for key, value in table.items():
        is_table = isinstance(value, dict) and value and all(BARE_KEY.fullmatch(name) for name in value)
        found += _flat(value, f"{prefix}{key}.") if is_table else [f"{prefix}{key}={to_literal(value)}"]
    return tuple(found)
