"""The heads by name, and how one is built from the options of a config."""

# C channels, T time steps, H W grid, Z classes of the global classifier

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError

from episodes.head import HeadInputs, HeadModule, HeadOptions
from episodes.heads.mastaf import MastafHead
from episodes.heads.mastaf_config import MastafConfig
from episodes.losses import QueryReduction


@dataclass(frozen=True, slots=True)
class HeadEntry:
    """One line of `HEADS`."""

    description: str
    """One sentence for `mastaf list heads`."""
    config: type[HeadOptions] = MastafConfig
    """The head's knobs."""
    make: Callable[[Any, HeadInputs], HeadModule] = MastafHead
    """Builds the head from its knobs and what it is built for."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Options that make this head what it is; the config cannot change them."""
    query_reduction: QueryReduction = "mean"
    """How the published training reduces the loss over the queries of an episode; `training.query_reduction` overrides it."""
    is_experimental: bool = False
    """Whether the source is a description without code or formulas, so that details are ours."""
    order_reason: str = ""
    """Why the order of supports matters by definition, so that the head sorts them by video id; empty: it does not."""


HEADS: dict[str, HeadEntry] = {
    "mastaf": HeadEntry("Self and cross attention over the positions of the cubes, fused, with a global classifier."),
    "neighbor": HeadEntry(
        "Cosine to the averaged prototype without attention (MASTAF-Neighbor).",
        fixed={"self_attention": False, "cross_attention": False},
    ),
    "self": HeadEntry(
        "Each video attends to itself only (MASTAF-Self).", fixed={"self_attention": True, "cross_attention": False}
    ),
    "cross": HeadEntry(
        "Query and prototype attend to each other only (MASTAF-Cross).",
        fixed={"self_attention": False, "cross_attention": True},
    ),
}


def head_config(name: str, options: Mapping[str, Any]) -> HeadOptions:
    """The checked knobs of a head.

    Args:
        name: a key of `HEADS`.
        options: its knobs by name.

    Returns:
        The head's config, with every default filled in.

    Raises:
        ValueError: an unknown head or option, a bad value, a contradiction, or an option that this head has no use for.
    """
    if name not in HEADS:
        raise ValueError(f"unknown head {name!r}{_nearest(name, HEADS)}; the heads are {', '.join(HEADS)}")
    entry = HEADS[name]
    for key, value in options.items():
        if key not in entry.config.model_fields:
            raise ValueError(f"head {name!r} has no option {key!r}{_nearest(key, entry.config.model_fields)}")
        if key in entry.fixed and value != entry.fixed[key]:
            raise ValueError(
                f"head {name!r} has {key} = {entry.fixed[key]} by definition, got {value}; use another head"
            )
    try:
        config = entry.config(**{**options, **entry.fixed})
    except ValidationError as error:
        raise ValueError(f"head {name!r}: {_one_line(error)}") from error
    for key, reason in config.without_effect().items():
        if key in options:
            raise ValueError(f"head {name!r}: {key} = {options[key]!r} has no effect, since {reason}; leave it out")
    return config


def build_head(
    name: str,
    options: Mapping[str, Any],
    cube_shape: tuple[int, int, int, int],
    num_classes: int | None,
    default_meta_bn_query: bool,
    generator: torch.Generator | None = None,
) -> HeadModule:
    """Build a head for cubes of one shape.

    Args:
        name: a key of `HEADS`.
        options: its knobs by name.
        cube_shape: (C, T, H, W).
        num_classes: training classes Z; None or 0 leaves the global classifier out.
        default_meta_bn_query: what the protocol says where `meta_bn_query` is not given: False when an episode has
            one query in all.
        generator: randomness of the initialisation; None: torch's global one.

    Returns:
        A torch module that follows the `Head` protocol.
    """
    config = head_config(name, options)
    if len(cube_shape) != 4 or min(cube_shape) < 1:
        raise ValueError(f"cube shape {tuple(cube_shape)} is not four sizes (C, T, H, W) of 1 or more")
    return HEADS[name].make(config, HeadInputs(cube_shape, num_classes, default_meta_bn_query, generator))


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f" (nearest: {found[0]!r})" if found else ""


def _one_line(error: ValidationError) -> str:
    problems = []
    for problem in error.errors():
        key = str(problem["loc"][0]) if problem["loc"] else ""
        message = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{key} = {problem['input']!r}: {message}" if key else message)
    return "; ".join(dict.fromkeys(problems))
