"""TOML recipes and ``--set table.key=value`` become a `RunConfig`; whatever is wrong is one plain line."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from configs.schema import RunConfig


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message is one line that says what to do."""


def recipe_folder() -> Path:
    """The folder of the recipes that ship with the program."""
    return Path(__file__).parent


def find_recipe(name: str) -> Path:
    """A recipe file by its path, or by the name of one that ships (``mastaf list recipes``).

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = recipe_folder() / f"{path.stem}.toml"
    if shipped.is_file() and path.parent == Path():
        return shipped
    known = [file.stem for file in sorted(recipe_folder().glob("*.toml"))]
    raise ConfigError(
        f"no recipe {name!r}: no such file{nearest(path.stem, known)}; `mastaf list recipes` shows what ships."
    )


def load_config(
    path: Path | None = None, overrides: Iterable[str] = (), tables: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read a recipe, apply overrides, check everything.

    Args:
        path: TOML file; None starts from the defaults.
        overrides: ``table.key=value`` with a TOML value; a bare word is a string.
        tables: values that beat the file and are beaten by the overrides (``{"backbone": {"name": "r3d50"}}``).

    Raises:
        ConfigError: unreadable TOML, an unknown key (the nearest known one is named), a value out of range, a contradiction.
    """
    document: dict[str, Any] = {}
    if path is not None:
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"recipe {path} cannot be read: {error}") from error
    for table, value in document.items():
        if not isinstance(value, dict):
            known = ", ".join(RunConfig.model_fields)
            raise ConfigError(f"recipe {path}: {table} = {value!r} is a value, but a recipe has tables: {known}.")
    for table, values in (tables or {}).items():
        document.setdefault(table, {}).update(values)
    for override in overrides:
        apply_override(document, override)
    return parse_config(document)


def parse_config(document: Mapping[str, Any]) -> RunConfig:
    """Check a nested dict of tables.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        config = RunConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError("; ".join(describe_problem(item, RunConfig) for item in error.errors())) from error
    _check_names(config)
    return config


def _check_names(config: RunConfig) -> None:
    # Imported here, so that the recipes can be listed without torch.
    from episodes.build import head_config
    from extract.build import BACKBONES

    if config.backbone.name not in BACKBONES:
        raise ConfigError(
            f"backbone.name = {config.backbone.name!r} is not known{nearest(config.backbone.name, BACKBONES)}; "
            "`mastaf list backbones` shows all."
        )
    try:
        head_config(config.head.name, config.head.options)
    except ValueError as error:
        raise ConfigError(f"[head]: {error}") from error


def to_toml(config: RunConfig) -> str:
    """The resolved config as TOML text that `load_config` reads back to an equal config."""
    lines: list[str] = []
    for table, values in config.model_dump(mode="json").items():
        lines.append(f"[{table}]")
        nested: list[str] = []
        for key, value in values.items():
            if isinstance(value, dict):
                nested += [f"\n[{table}.{key}]"] + [
                    f"{_key(name)} = {to_literal(item)}" for name, item in value.items()
                ]
            elif value is not None:
                lines.append(f"{key} = {to_literal(value)}")
        lines += [*(nested if any("=" in line for line in nested) else []), ""]
    return "\n".join(lines)


def _key(name: str) -> str:
    """A key as TOML writes it: bare where it may be."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else to_literal(name)


def to_literal(value: Any) -> str:
    """A value as TOML writes it behind a key."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A TOML basic string escapes what JSON escapes, except that it has no surrogate pairs.
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(f"\\u{ord(c):04X}" if ord(c) < 32 or ord(c) == 127 else c for c in escaped) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(to_literal(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(name)} = {to_literal(item)}" for name, item in value.items()) + "}"
    return repr(value)


def apply_override(document: dict[str, Any], override: str) -> None:
    """Set ``table.key=value`` in a nest of tables.

    Raises:
        ConfigError: it is not of that form.
    """
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {override!r} is not of the form table.key=value, for example --set training.seed=1")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = document
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {key} is a value, not a table")
    table[keys[-1]] = value


def describe_problem(item: Any, model: type[BaseModel]) -> str:
    """One error of pydantic about a config of this type as a sentence; of an unknown key the nearest known one is named."""
    location = [str(part) for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        return f"unknown key {'.'.join(location)}{nearest(location[-1], _known_keys(location[:-1], model))}"
    if item["type"] == "value_error":
        return f"{'.'.join(location) + ': ' if location else ''}{item['ctx']['error']}"
    return f"{'.'.join(location)} = {item['input']!r}: {item['msg']}"


def _known_keys(location: list[str], model: type[BaseModel]) -> list[str]:
    for part in location:
        field = model.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that asks whether the known name was meant that is most like this one; empty where none is."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
