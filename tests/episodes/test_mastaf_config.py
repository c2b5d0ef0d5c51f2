"""The knobs of MASTAF: presets, overrides, refused contradictions; the builder's errors."""

from typing import Any

import pytest
import torch

from contracts.head_cases import FAMILY
from episodes.build import build_head, head_config
from episodes.heads.mastaf import MastafHead
from episodes.heads.mastaf_config import PRESETS, MastafConfig


def test_reference_is_the_default_and_has_the_published_constants() -> None:
    config = MastafConfig()
    assert config == MastafConfig(preset="reference")
    assert (config.scale, config.alpha, config.tau, config.hidden) == (7.0, 1.0, 0.025, 6)
    assert (config.lambda_global, config.lambda_few) == (1.0, 0.5)


def test_paper_differs_from_the_reference_in_the_rows_of_the_golden_reading() -> None:
    reference, paper = MastafConfig().model_dump(), MastafConfig(preset="paper").model_dump()
    changed = {key: value for key, value in paper.items() if value != reference[key]}
    assert changed == {
        "preset": "paper",
        "normalize_corr": False,
        "kernel_reduce": "sum",
        "meta_bn": "none",
        "scale": 1.0,
        "train_similarity": "whole_cube",
        "eval_similarity": "whole_cube",
        "fusion": "prob_mean",
        "global_input": "support_cross",
        "global_pooling": "averaged",
        "lambda_global": 2.0,
        "lambda_few": 1.0,
    }


def test_paper_stable_keeps_the_normalised_correlation() -> None:
    reference, stable = MastafConfig().model_dump(), MastafConfig(preset="paper_stable").model_dump()
    changed = {key: value for key, value in stable.items() if value != reference[key]}
    assert changed == {
        "preset": "paper_stable",
        "scale": 1.0,
        "train_similarity": "pooled",
        "fusion": "prob_mean",
        "global_input": "support_cross",
        "lambda_global": 2.0,
        "lambda_few": 1.0,
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_explicit_keys_override_the_preset_and_a_resolved_config_builds_itself_again(preset: Any) -> None:
    config = MastafConfig(preset=preset, scale=3.0, lambda_global=0.0)
    assert (config.scale, config.lambda_global) == (3.0, 0.0)
    assert MastafConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "papers"}, "preset = 'papers'"),
        ({"lambda_few": -1.0}, "lambda_few = -1.0: Input should be greater than or equal to 0"),
        ({"lambda_global": -1.0}, "lambda_global = -1.0"),
        ({"lambda_few": 0.0, "lambda_global": 0.0}, "leaves no loss"),
        ({"lambda_few": 0.0, "global_classifier": False}, "leaves no loss"),
        ({"alpha": -0.5}, "alpha = -0.5"),
        ({"tau": 0.0}, "tau = 0.0"),
        ({"scale": 0.0}, "scale = 0.0"),
        ({"hidden": 0}, "hidden = 0"),
        ({"attention_gain": -1.0}, "attention_gain = -1.0"),
        ({"attention_gain": "T"}, "attention_gain = 'T'"),
        ({"attention_gain": 0.0, "residual": False}, "leaves nothing of the cube"),
        ({"meta_bn": "always", "meta_bn_query": False}, "contradicts meta_bn_query"),
        ({"global_input": "support_cross", "cross_attention": False}, "needs cross_attention"),
        ({"lamda": 0.5}, r"no option 'lamda' \(nearest: 'lambda_few'\)"),
        ({"kernel_reduse": "sum"}, r"no option 'kernel_reduse' \(nearest: 'kernel_reduce'\)"),
    ],
)
def test_contradictions_and_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_config("mastaf", options)


def test_meta_bn_query_without_batch_normalisation_is_no_contradiction() -> None:
    assert MastafConfig(meta_bn="none", meta_bn_query=True).meta_bn_query


def test_unknown_head_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown head 'masstaf' \(nearest: 'mastaf'\)"):
        head_config("masstaf", {})


def test_an_ablation_cannot_be_turned_into_another_head() -> None:
    with pytest.raises(ValueError, match="'neighbor' has cross_attention = False by definition"):
        head_config("neighbor", {"cross_attention": True})
    with pytest.raises(ValueError, match="needs cross_attention"):
        head_config("self", {"preset": "paper"})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("neighbor", {"tau": 0.025}, "head 'neighbor': tau = 0.025 has no effect, since there is no attention"),
        ("neighbor", {"scale": 1.0, "meta_bn_query": None}, "meta_bn_query = None has no effect"),
        ("self", {"alpha": 0.5}, "head 'self': alpha = 0.5 has no effect, since there is one branch"),
        ("cross", {"alpha": 0.5}, "head 'cross': alpha = 0.5 has no effect"),
        ("cross", {"meta_bn_query": True}, "meta_bn_query = True has no effect, since there is no self attention"),
        ("mastaf", {"self_attention": False, "alpha": 0.5}, "head 'mastaf': alpha = 0.5 has no effect"),
    ],
)
def test_an_option_without_effect_is_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        head_config(name, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAMILY)
def test_a_preset_may_set_what_has_no_effect(name: str) -> None:
    config = head_config(name, {"preset": "paper", "global_input": "query_true_cross"})
    assert isinstance(config, MastafConfig)
    assert (config.meta_bn, config.kernel_reduce) == ("none", "sum")


def test_ablations_differ_from_mastaf_in_their_branches_only() -> None:
    whole = head_config("mastaf", {}).model_dump()
    for name in FAMILY:
        changed = {key: value for key, value in head_config(name, {}).model_dump().items() if value != whole[key]}
        assert set(changed) <= {"self_attention", "cross_attention"}
        assert len(changed) == {"mastaf": 0, "neighbor": 2, "self": 1, "cross": 1}[name]


@pytest.mark.parametrize("num_classes", [None, 0])
def test_without_training_classes_there_is_no_classifier(num_classes: int | None) -> None:
    head = build_head("mastaf", {}, (4, 1, 2, 2), num_classes, True)
    assert head.loss_weights == {"few_shot": 0.5}
    assert not [name for name, _ in head.named_parameters() if name.startswith("classifier")]
    with pytest.raises(ValueError, match="no global classifier"):
        build_head("mastaf", {"lambda_few": 0.0}, (4, 1, 2, 2), num_classes, True)


def test_protocol_decides_what_the_config_leaves_open() -> None:
    for given, default, expected in (
        (None, True, True),
        (None, False, False),
        (False, True, False),
        (True, False, True),
    ):
        head = build_head("mastaf", {"meta_bn_query": given}, (4, 1, 2, 2), 3, default)
        assert isinstance(head, MastafHead)
        assert head.meta_bn_query is expected


@pytest.mark.parametrize("shape", [(4, 1, 2), (4, 0, 2, 2)])
def test_a_cube_has_four_sizes(shape: Any) -> None:
    with pytest.raises(ValueError, match="cube shape"):
        build_head("mastaf", {}, shape, 3, True)


def test_same_generator_same_head() -> None:
    first, second = (
        build_head("mastaf", {}, (4, 1, 2, 2), 3, True, torch.Generator().manual_seed(9)).state_dict() for _ in range(2)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
