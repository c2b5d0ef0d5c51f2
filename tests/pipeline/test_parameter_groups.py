"""Which parameters learn and how fast, for every shipped backbone. Networks are built without values: names and shapes decide."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from configs.training import TrainingConfig
from episodes.build import build_head
from extract.build import BACKBONES, build_backbone
from extract.config import BackboneConfig, SamplingConfig
from pipeline.model import ClipEncoder, FewShotModel
from pipeline.optimisation import make_optimizer
from pipeline.parameter_groups import OptimisationError, backbone_layers, freeze_parameters, parameter_groups

RESNET = (r"(conv1|bn1|stem)\.", r"layer1\.", r"layer2\.", r"layer3\.", r"layer4\.")
VIVIT = (r"embeddings\.", *(rf"layers\.{block}\." for block in range(11)), r"(layers\.11|layernorm)\.")
LAYERS = {
    "r3d18": RESNET,
    "r3d34": RESNET,
    "r3d50": RESNET,
    "r3d101": RESNET,
    "tv_r3d_18": RESNET,
    "tv_mc3_18": RESNET,
    "tv_r2plus1d_18": RESNET,
    "tsn_resnet18": RESNET,
    "tsn_resnet34": RESNET,
    "tsn_resnet50": RESNET,
    "tsn_resnet101": RESNET,
    "vivit": VIVIT,
    "small3d": (r"stem\.", r"stage1\.", r"stage2\."),
}
"""How the names of each backbone's layers begin, from the lowest up."""
FAMILIES = ["r3d18", "tv_r2plus1d_18", "tsn_resnet50", "vivit", "small3d"]
KNOBS: list[dict[str, Any]] = [
    {},
    {"backbone_learning_rate": 0.001, "weight_decay": 0.1},
    {"layer_decay": 0.75, "weight_decay": 0.1, "decay_norm_and_bias": False},
    {"layer_decay": 0.5, "freeze": ("*bias", "head.cam.*"), "weight_decay": 0.1},
    {"rates": {"encoder.*.weight": 0.2, "head.*": 0.0, "*": 0.3}, "layer_decay": 0.5},
    {"backbone_learning_rate": 0.0},
]


def untouched(name: str | None) -> FewShotModel:
    """A model with a shipped backbone, or on the cache without one, and the MASTAF head."""
    encoder: nn.Module = nn.Identity()
    if name is not None:
        with torch.device("meta"):
            backbone = build_backbone(BackboneConfig(name=name, weights="none"), SamplingConfig())
        encoder = ClipEncoder(backbone, SamplingConfig())
    head = build_head("mastaf", {}, (8, 1, 3, 3), 5, default_meta_bn_query=True, generator=torch.Generator())
    return FewShotModel(encoder, head).requires_grad_(True)


def knobs(**settings: Any) -> TrainingConfig:
    return TrainingConfig(**({"mode": "end_to_end"} | settings))


def named_groups(model: FewShotModel, training: TrainingConfig) -> dict[str, list[str]]:
    """Group name -> names of its parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        group["name"]: [names[id(parameter)] for parameter in group["params"]]
        for group in parameter_groups(model, training)
    }


def rates(model: FewShotModel, training: TrainingConfig) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in parameter_groups(model, training)}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> FewShotModel:
    return untouched(request.param)


@pytest.mark.parametrize("name", BACKBONES)
def test_layers_of_every_backbone_are_those_of_the_field(name: str) -> None:
    model = untouched(name)
    layers = backbone_layers(model.encoder)
    assert list(layers) == [name for name, _ in model.encoder.named_parameters()]
    assert set(layers.values()) == set(range(len(LAYERS[name])))
    for parameter, layer in layers.items():
        assert re.match(rf"backbone\.(model\.)?{LAYERS[name][layer]}", parameter), (parameter, layer)


def test_default_knobs_give_the_head_and_then_the_backbone_in_the_models_order(model: FewShotModel) -> None:
    training = knobs(backbone_learning_rate=0.002)
    assert freeze_parameters(model, training) == []
    head, backbone = parameter_groups(model, training)
    assert (head["name"], head["lr"], head["weight_decay"]) == ("head", 0.01, 0.0)
    assert (backbone["name"], backbone["lr"], backbone["weight_decay"]) == ("backbone", 0.002, 0.0)
    for group, part in ((head, model.head), (backbone, model.encoder)):
        assert [id(each) for each in group["params"]] == [id(each) for each in part.parameters()]
    assert rates(model, knobs()) == {"head": 0.01, "backbone": 0.01}


def test_on_the_cache_there_is_one_group() -> None:
    model = untouched(None)
    (group,) = parameter_groups(model, TrainingConfig(learning_rate=0.3))
    assert (group["name"], group["lr"]) == ("head", 0.3)
    assert len(group["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("settings", KNOBS)
def test_every_parameter_is_frozen_or_in_exactly_one_group(model: FewShotModel, settings: dict[str, Any]) -> None:
    training = knobs(**settings)
    frozen = freeze_parameters(model, training)
    in_groups = [name for names in named_groups(model, training).values() for name in names]
    assert sorted([*frozen, *in_groups]) == sorted(name for name, _ in model.named_parameters())
    assert frozen == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert freeze_parameters(model, training) == frozen


def test_each_layer_learns_slower_than_the_one_above_it() -> None:
    model = untouched("r3d18")
    training = knobs(layer_decay=0.5, learning_rate=0.1, backbone_learning_rate=0.016)
    expected = {f"backbone layer {layer}": 0.016 * 0.5 ** (4 - layer) for layer in range(5)}
    assert rates(model, training) == {"head": 0.1, **expected}
    names = named_groups(model, training)
    assert names["backbone layer 0"] == [
        f"encoder.backbone.{name}" for name in ("conv1.weight", "bn1.weight", "bn1.bias")
    ]
    assert all(name.startswith("encoder.backbone.layer3.") for name in names["backbone layer 3"])


def test_last_normalisation_of_a_transformer_is_of_its_highest_layer_and_its_tokens_of_the_lowest() -> None:
    model = untouched("vivit")
    names = named_groups(model, knobs(layer_decay=0.75))
    assert len(names) == 14
    assert "encoder.backbone.model.layernorm.bias" in names["backbone layer 12"]
    assert names["backbone layer 0"][:2] == [
        f"encoder.backbone.model.embeddings.{name}" for name in ("cls_token", "position_embeddings")
    ]


def test_layers_above_a_frozen_one_keep_their_rates() -> None:
    model = untouched("small3d")
    training = knobs(layer_decay=0.5, learning_rate=1.0, freeze=("encoder.backbone.stage2.*",))
    freeze_parameters(model, training)
    assert rates(model, training) == {"head": 1.0, "backbone layer 0": 0.25, "backbone layer 1": 0.5}


def test_first_pattern_that_fits_gives_the_rate() -> None:
    model = untouched("r3d18")
    patterns = {"encoder.backbone.layer4.1.*": 0.5, "encoder.backbone.layer4.*": 0.25, "head.classifier.*": 2.0}
    training = knobs(rates=patterns, layer_decay=0.5, learning_rate=0.1)
    found = named_groups(model, training)
    assert {name: rates(model, training)[name] for name in patterns} == patterns
    assert len(found["encoder.backbone.layer4.1.*"]) == 6
    assert all(".layer4.0." in name for name in found["encoder.backbone.layer4.*"])
    assert found["head.classifier.*"] == ["head.classifier.weight", "head.classifier.bias"]
    assert rates(model, training)["backbone layer 3"] == 0.05


def test_normalisations_biases_and_tokens_are_left_undecayed_where_the_config_says_so(model: FewShotModel) -> None:
    training = knobs(weight_decay=0.1, decay_norm_and_bias=False)
    groups = parameter_groups(model, training)
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "head": 0.1,
        "head, no decay": 0.0,
        "backbone": 0.1,
        "backbone, no decay": 0.0,
    }
    names = named_groups(model, training)
    tokens = (".cls_token", ".position_embeddings")
    for name, parameter in model.named_parameters():
        part = "head" if name.startswith("head.") else "backbone"
        is_undecayed = parameter.ndim == 1 or name.endswith(tokens)
        assert name in names[f"{part}, no decay" if is_undecayed else part]
    undivided = parameter_groups(model, knobs(weight_decay=0.1))
    assert [(group["name"], group["weight_decay"]) for group in undivided] == [("head", 0.1), ("backbone", 0.1)]


def test_patterns_rates_of_zero_and_a_backbone_rate_of_zero_freeze() -> None:
    model = untouched("r3d18")
    frozen = freeze_parameters(model, knobs(freeze=("encoder.backbone.conv1.*",), rates={"head.classifier.bias": 0.0}))
    assert frozen == ["encoder.backbone.conv1.weight", "head.classifier.bias"]
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen

    model = untouched("r3d18")
    frozen = freeze_parameters(model, knobs(backbone_learning_rate=0))
    assert frozen == [f"encoder.{name}" for name, _ in model.encoder.named_parameters()]
    assert list(rates(model, knobs(backbone_learning_rate=0))) == ["head"]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"freeze": ("encoder.backbone.layer5.*",)},
            ("training.freeze: 'encoder.backbone.layer5.*' fits no parameter", "encoder.backbone.layer4.*"),
        ),
        ({"freeze": ("backbone.conv1.*",)}, ("'backbone.conv1.*' fits no", "encoder.backbone.conv1.*")),
        ({"rates": {"head.classifer.*": 0.1}}, ("training.rates: 'head.classifer.*'", "head.classifier.*")),
        ({"freeze": ("x",)}, ("'x' fits no parameter", "encoder.")),
        (
            {"rates": {"encoder.*": 0.1, "encoder.backbone.conv1.*": 0.2}},
            ("'encoder.backbone.conv1.*' decides nothing", "'encoder.*' before it", "narrower pattern first"),
        ),
        (
            {"rates": {"encoder.backbone.layer4.*": 0.2}, "backbone_learning_rate": 0.0},
            ("'encoder.backbone.layer4.*' has rate 0.2", "training.freeze"),
        ),
    ],
)
def test_pattern_without_effect_is_refused(settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    model = untouched("r3d18")
    with pytest.raises(OptimisationError) as error:
        freeze_parameters(model, knobs(**settings))
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_model_with_nothing_to_learn_has_an_optimizer_all_the_same() -> None:
    model = untouched("small3d")
    training = knobs(backbone_learning_rate=0.0)
    freeze_parameters(model, training)
    model.head.requires_grad_(False)  # such as a head without parameters
    assert parameter_groups(model, training) == []
    (group,) = make_optimizer(model, training).param_groups
    assert (group["name"], group["lr"], len(group["params"])) == ("nothing", 0.01, 1)


@pytest.mark.parametrize(
    ("optimizer", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_groups_reach_the_optimizer(optimizer: str, kind: type[torch.optim.Optimizer]) -> None:
    model = untouched("small3d")
    extra = {"momentum": 0.9, "nesterov": True} if optimizer == "sgd" else {}
    training = knobs(optimizer=optimizer, weight_decay=0.1, decay_norm_and_bias=False, layer_decay=0.5, **extra)
    made = make_optimizer(model, training)
    assert type(made) is kind
    wanted = parameter_groups(model, training)
    for group, expected in zip(made.param_groups, wanted, strict=True):
        assert {key: group[key] for key in ("name", "lr", "weight_decay")} == {
            key: expected[key] for key in ("name", "lr", "weight_decay")
        }
        assert [id(each) for each in group["params"]] == [id(each) for each in expected["params"]]
        assert optimizer != "sgd" or (group["momentum"], group["nesterov"]) == (0.9, True)


@pytest.mark.parametrize("settings", [{"mode": "cached"}, {"mode": "end_to_end", "backbone_learning_rate": 0.0}])
def test_layer_decay_without_a_learning_backbone_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"layer_decay = 0\.9 has no effect"):
        TrainingConfig(layer_decay=0.9, **settings)


@pytest.mark.parametrize(
    "settings", [{"freeze": ("encoder.*",)}, {"rates": {"encoder.*": 0.0}}, {"backbone_learning_rate": 0.0}]
)
def test_a_backbone_that_is_frozen_whole_stays_in_evaluation_mode_whichever_knob_froze_it(
    settings: dict[str, Any],
) -> None:
    model = untouched("small3d").train()
    freeze_parameters(model, knobs(**settings))
    assert isinstance(model.encoder, ClipEncoder)
    for _ in range(2):
        assert not any(module.training for module in model.encoder.backbone.modules())
        assert model.head.training
        model.train()


def test_patterns_that_freeze_everything_are_refused() -> None:
    with pytest.raises(OptimisationError, match="nothing would learn"):
        freeze_parameters(untouched("small3d"), knobs(freeze=("*",)))
