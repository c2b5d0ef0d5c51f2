"""The default of every option of every head, as literals: a changed default, or a new option without a line here, fails."""

from typing import Any

import pytest

from episodes.build import HEADS, build_head, head_config
from episodes.heads.matchingnet import MatchingnetHead

_MASTAF = {
    # Reference 1.2, 1.3 and 1.6: the released code.
    "self_attention": True,
    "cross_attention": True,
    "normalize_corr": True,
    "kernel_reduce": "mean",
    "meta_learner": True,
    "hidden": 6,
    "tau": 0.025,
    "meta_bn": "reference",
    "share_cam": True,
    "residual": True,
    "attention_gain": 1.0,
    "scale": 7.0,
    "train_similarity": "per_position",
    "eval_similarity": "pooled",
    "fusion": "logit_sum",
    "alpha": 1.0,
    "global_classifier": True,
    "global_input": "query_true_cross",
    "global_pooling": "per_position",
    "lambda_global": 1.0,
    "lambda_few": 0.5,
}
_MASTAF_OURS = {"preset": "reference", "average_time": False, "meta_bn_query": None}

_BASELINE = {
    # Reference 6: a new classifier per episode; the scale is that of Baseline++.
    "epochs": 100,
    "batch_size": 4,
    "learning_rate": 0.01,
    "momentum": 0.9,
    "dampening": 0.9,
    "weight_decay": 1e-3,
    "scale": 2.0,
}

# Their released code and its training scripts.
_MATCHING = {"projection": 1152, "eps": 0.01, "scale": 10.0, "learn_scale": True, "scale_weight": 1.0}

PUBLISHED: dict[str, dict[str, Any]] = {
    "mastaf": _MASTAF,
    "neighbor": {**_MASTAF, "self_attention": False, "cross_attention": False},
    "self": {**_MASTAF, "cross_attention": False},
    "cross": {**_MASTAF, "self_attention": False},
    # Reference 6.
    "protonet": {"distance": "euclidean"},
    "tsn_mean": {"similarity": "cosine"},
    "matchingnet": {},
    "baseline": {**_BASELINE, "classifier": "linear"},
    "baseline++": {**_BASELINE, "classifier": "cosine"},
    # Its command for ResNet on one shot.
    "feat": {
        "distance": "euclidean",
        "temperature": 64.0,
        "balance": 0.01,
        "temperature2": 64.0,
        "attention_dropout": 0.1,
        "output_dropout": 0.5,
    },
    "pal": {"norm_epsilon": 0.01, "contrast_weight": 1.0, "contrast_epsilon": 0.1},
    "arn": {"channels": 64, "attention": True, "power": 100.0, "hidden": 8, "norm_momentum": 1.0},
    "cmn": {},
    "protogan": {},
    # Reference 2.1, 3.1 and 4.1.
    "trx": {"cardinalities": (2, 3), "hidden": 1152, "dropout": 0.1},
    "strm": {"cardinalities": (2,), "hidden": 1152, "dropout": 0.1, "patches": 4, "aux_weight": 0.1},
    "ta2n": {
        "dropout": 0.5,
        "temporal_channels": (64, 128, 32),
        "offset_channels": (128, 128, 64),
        "perturb_in_evaluation": True,
        "distance": "time_step",
        "soft_dtw_gamma": 0.1,
    },
    # Reference 6: the form of HyRSM's repository.
    "otam": {"directions": "sum", "eps": 0.01, "smoothing": 0.1},
    # The released code of HyRSM, on SSv2.
    "bi_mhm": {
        "shots": "prototype",
        "frame_reduction": "sum",
        "heads": 8,
        "position_scale": 10.0,
        "position_weight": 1.0,
        "position_dropout": 0.1,
        "intra_dropout": 0.2,
        "attention_dropout": 0.1,
        "inter_dropout": 0.05,
        "global_classifier": True,
        "lambda_global": 0.6,
    },
    "chamfer": {**_MATCHING, "shots": "joint", "direction": "both"},
    "max": {**_MATCHING, "shots": "mean"},
    "diagonal": _MATCHING,
}
"""As the papers' code has them."""

OURS: dict[str, dict[str, Any]] = {
    "mastaf": _MASTAF_OURS,
    "neighbor": _MASTAF_OURS,
    "self": _MASTAF_OURS,
    "cross": _MASTAF_OURS,
    "protonet": {"temperature": 1.0, "scale": 10.0, "average": True},
    "tsn_mean": {"scale": 1.0},
    "matchingnet": {"form": "paper", "temperature": None, "full_context": False},
    "baseline": {},
    "baseline++": {},
    "feat": {},
    "pal": {},
    "arn": {"loss": "squared"},
    "cmn": {
        "num_saliencies": 5,
        "frames": "time_steps",
        "reading": "abstract",
        "abstract_size": 256,
        "writing": "slots",
        "margin": 0.5,
        "scale": 10.0,
        "lambda_margin": 1.0,
        "lambda_few": 1.0,
    },
    "protogan": {
        "num_generated": 10,
        "generated_share": 0.5,
        "prototype_size": 128,
        "noise_size": 64,
        "hidden": 512,
        "ridge": 0.1,
        "scale": 10.0,
        "penalty": 10.0,
        "lambda_made": 1.0,
        "lambda_generator": 0.1,
        "lambda_prototype": 1.0,
    },
    "trx": {"factored": True, "average_time": False},
    "strm": {"factored": True, "aux_head": "trained"},
    "ta2n": {"factored": True},
    "otam": {"projection": 0},
    "bi_mhm": {"projection": 0, "relation": False},
    "chamfer": {"tuple_length": None},
    "max": {},
    "diagonal": {},
}
"""Where the source leaves them open, or where we chose otherwise and say so."""


def test_every_head_has_its_lines() -> None:
    assert set(PUBLISHED) == set(OURS) == set(HEADS)


@pytest.mark.parametrize("name", HEADS)
def test_every_default_is_as_written(name: str) -> None:
    assert not set(PUBLISHED[name]) & set(OURS[name])
    found = head_config(name, {}).model_dump()
    assert found == {**PUBLISHED[name], **OURS[name]}
    # 1 and True are equal, but not the same default.
    written = {**PUBLISHED[name], **OURS[name]}
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in written.items()}


def test_losses_are_summed_over_queries_where_published_so() -> None:
    reductions = {name: entry.query_reduction for name, entry in HEADS.items()}
    assert reductions == {name: "sum" if name in ("trx", "strm", "ta2n") else "mean" for name in HEADS}


def test_heads_without_published_training_code_are_experimental() -> None:
    assert {name for name, entry in HEADS.items() if entry.is_experimental} == {"arn", "cmn", "protogan"}


def test_heads_whose_supports_have_an_order_say_why() -> None:
    assert {name for name, entry in HEADS.items() if entry.order_reason} == {"matchingnet", "cmn", "ta2n"}


@pytest.mark.parametrize(("form", "temperature"), [("paper", 1.0), ("closer_look", 0.01), ("feat", 1.0)])
def test_temperature_that_is_left_out_is_the_published_one(form: str, temperature: float) -> None:
    head = build_head("matchingnet", {"form": form}, (4, 2, 1, 1), None, True)
    assert isinstance(head, MatchingnetHead)
    assert head.temperature == temperature


@pytest.mark.parametrize(("num_steps", "num_tuples"), [(8, 56), (2, 1)])
def test_tuples_of_chamfer_that_are_left_out_have_three_frames_or_all(num_steps: int, num_tuples: int) -> None:
    members = dict(build_head("chamfer", {}, (4, num_steps, 1, 1), None, True).named_buffers())["frames.members"]
    assert members.shape == (num_tuples, min(3, num_steps))
