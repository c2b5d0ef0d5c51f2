"""The heads by name, and how one is built from the options of a config."""

# C channels, T time steps, H W grid, Z classes of the global classifier

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError

from episodes.head import HeadInputs, HeadModule, HeadOptions
from episodes.heads.arn import ArnConfig, ArnHead
from episodes.heads.baseline import BaselineHead, BaselineOptions
from episodes.heads.bi_mhm import BiMhmConfig, BiMhmHead
from episodes.heads.cmn import ORDER_REASON as CMN_ORDER_REASON
from episodes.heads.cmn import CmnConfig, CmnHead
from episodes.heads.feat import FeatHead, FeatOptions
from episodes.heads.mastaf import MastafHead
from episodes.heads.mastaf_config import MastafConfig
from episodes.heads.matchingnet import ORDER_REASON as MATCHINGNET_ORDER_REASON
from episodes.heads.matchingnet import MatchingnetHead, MatchingnetOptions
from episodes.heads.otam import OtamConfig, OtamHead
from episodes.heads.pal import PalHead, PalOptions
from episodes.heads.protogan import ProtoganConfig, ProtoganHead
from episodes.heads.protonet import ProtonetHead, ProtonetOptions
from episodes.heads.set_matching import (
    ChamferConfig,
    ChamferHead,
    DiagonalHead,
    MatchingConfig,
    MaxConfig,
    MaxHead,
)
from episodes.heads.strm import StrmConfig, StrmHead
from episodes.heads.ta2n import TA2NHead, TA2NOptions
from episodes.heads.trx import TrxConfig, TrxHead
from episodes.heads.tsn_mean import TsnMeanHead, TsnMeanOptions
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
    is_backbone_called_twice: bool = False
    """Whether the released code passes supports and queries through its backbone in two calls, so that BatchNorm takes statistics of
    each; `training.backbone_batchnorm = "published"` follows it."""
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
    "protonet": HeadEntry("Squared distance (or cosine) to the mean of each class.", ProtonetOptions, ProtonetHead),
    "tsn_mean": HeadEntry(
        "Mean cosine to the shots of each class, frames averaged (TSN++).",
        TsnMeanOptions,
        TsnMeanHead,
        is_backbone_called_twice=True,
    ),
    "matchingnet": HeadEntry(
        "Every support votes for its class by its cosine, with or without full context embedding.",
        MatchingnetOptions,
        MatchingnetHead,
        order_reason=MATCHINGNET_ORDER_REASON,
    ),
    "baseline": HeadEntry(
        "A linear classifier trained on the supports of each episode.",
        BaselineOptions,
        BaselineHead,
        fixed={"classifier": "linear"},
    ),
    "baseline++": HeadEntry(
        "A cosine classifier trained on the supports of each episode.",
        BaselineOptions,
        BaselineHead,
        fixed={"classifier": "cosine"},
    ),
    "feat": HeadEntry("Prototypes adapt to each other by self-attention (FEAT).", FeatOptions, FeatHead),
    "pal": HeadEntry(
        "Supports and queries attend to the supports; prototypes are contrasted with the queries (PAL).",
        PalOptions,
        PalHead,
        is_backbone_called_twice=True,
    ),
    "arn": HeadEntry(
        "Second-order pooling under spatial attention and a relation network on pairs (ARN).",
        ArnConfig,
        ArnHead,
        is_experimental=True,
    ),
    "cmn": HeadEntry(
        "The nearest key of a compound memory of the supports (CMN).",
        CmnConfig,
        CmnHead,
        is_experimental=True,
        order_reason=CMN_ORDER_REASON,
    ),
    "protogan": HeadEntry(
        "A classifier on real features and on those that a prototype-conditioned GAN adds (ProtoGAN).",
        ProtoganConfig,
        ProtoganHead,
        is_experimental=True,
    ),
    "trx": HeadEntry(
        "Ordered tuples of query frames against mixtures of each class's tuples.",
        TrxConfig,
        TrxHead,
        query_reduction="sum",
        is_backbone_called_twice=True,
    ),
    "strm": HeadEntry(
        "Patches and frames enriched by their neighbours, then tuples of frames as in trx.",
        StrmConfig,
        StrmHead,
        query_reduction="sum",
        is_backbone_called_twice=True,
    ),
    "ta2n": HeadEntry(
        "Warps each video in time, then moves attended regions of query and class towards each other, frame by frame.",
        TA2NOptions,
        TA2NHead,
        query_reduction="sum",
        order_reason="the first shot of a class is the one that its other shots are laid onto",
        is_backbone_called_twice=True,
    ),
    "otam": HeadEntry(
        "Cheapest ordered alignment of query and support frames, soft or hard, in both directions.",
        OtamConfig,
        OtamHead,
        is_backbone_called_twice=True,
    ),
    "bi_mhm": HeadEntry(
        "Each frame's distance to the nearest frame of the other video (HyRSM), with the hybrid relation module as an option.",
        BiMhmConfig,
        BiMhmHead,
        is_backbone_called_twice=True,
    ),
    "chamfer": HeadEntry(
        "Each tuple of frames finds its best match among all shots of the class, and the other way round (Chamfer++).",
        ChamferConfig,
        ChamferHead,
    ),
    "max": HeadEntry("The most similar pair of frames speaks for the video.", MaxConfig, MaxHead),
    "diagonal": HeadEntry("Frames are compared with those at the same time step.", MatchingConfig, DiagonalHead),
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
