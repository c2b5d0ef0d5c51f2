"""One optimiser step, bit for bit against plain torch loops: schedules, clipping, scaler, moving average, and going on after a break."""

from __future__ import annotations

import copy
import io
import math
from itertools import accumulate, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.training import TrainingConfig
from episodes.build import HEADS, build_head
from episodes.head import HeadModule
from pipeline.model import FewShotModel
from pipeline.optimisation import (
    Stepper,
    first_step_at,
    gradient_norm_and_clip,
    make_scaler,
    make_schedule,
    make_stepper,
)
from pipeline.parameter_groups import freeze_parameters

# B rows of a batch

CPU = torch.device("cpu")
SGD = {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
HALF = {"compute_dtype": "float16"}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sgd, cosine after warm-up": SGD | {"schedule": "cosine", "warmup_episodes": 5, "ema_decay": 0.9},
    "adamw, milestones after warm-up, clipped": {
        "optimizer": "adamw",
        "weight_decay": 0.1,
        "decay_norm_and_bias": False,
        "schedule": "multi_step",
        "milestones": (6, 11, 12),
        "warmup_episodes": 4,
        "clip_gradient_norm": 0.5,
        "ema_decay": 0.5,
    },
    "adam in float16": {"optimizer": "adam", "schedule": "constant", "ema_decay": 0.9, "layer_decay": 0.5} | HALF,
}


class TinyHead(HeadModule):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_weights = {}
        self.linear = nn.Linear(4, 3)


def tiny_model() -> FewShotModel:
    """A model whose encoder has a normalisation with running statistics; the same weights every time."""
    model = FewShotModel(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), TinyHead())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def loss_of(model: FewShotModel, step: int) -> Tensor:
    """A loss that depends on the step's number alone."""
    generator = torch.Generator().manual_seed(step)
    assert isinstance(model.head, TinyHead)
    logits = model.head.linear(model.encoder(torch.randn((6, 5), generator=generator)))  # (B, 3)
    return F.cross_entropy(logits, torch.randint(3, (6,), generator=generator))


def knobs(**settings: Any) -> TrainingConfig:
    defaults: dict[str, Any] = {"mode": "end_to_end", "episodes": 20, "episodes_per_step": 3}
    return TrainingConfig(**(defaults | settings))


def tiny_stepper(training: TrainingConfig) -> Stepper:
    model = tiny_model()
    freeze_parameters(model, training)
    return make_stepper(model, training, CPU, "float32")


def go(stepper: Stepper, steps: range) -> None:
    for step in steps:
        stepper.optimizer.zero_grad(set_to_none=True)
        stepper.backward(loss_of(stepper.model, step))
        outcome = stepper.take_step()
        assert outcome.is_finite
        assert not outcome.was_skipped


def saved(content: Any) -> Any:
    """What a checkpoint gives back."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(stepper: Stepper) -> dict[str, Any]:
    content: dict[str, Any] = saved({"model": stepper.model.state_dict(), "stepper": stepper.state_dict()})
    return content


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal to the last bit, all the way down."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (mine, yours) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, yours, f"{where}[{place}]")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def rates_of(training: TrainingConfig, num_steps: int) -> list[float]:
    """The head's rate in every step of a run."""
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=training.learning_rate)
    schedule = make_schedule(optimizer, training)
    rates = []
    for _ in range(num_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return rates


def starts_of(training: TrainingConfig) -> list[int]:
    """First episode of every step, counted one by one."""
    sizes = [training.episodes_per_step] * training.episodes
    if training.published_first_step:
        sizes[0] -= 1
    return [start for start in accumulate(sizes, initial=0) if start < training.episodes]


# Schedules


@pytest.mark.parametrize("per_step", [1, 2, 3, 5])
def test_step_of_an_episode_is_the_first_that_begins_there_or_later(per_step: int) -> None:
    for is_published, episodes in product((False, True), (1, 2, 7, 16)):
        if is_published and per_step == 1:
            continue
        training = knobs(episodes=episodes, episodes_per_step=per_step, published_first_step=is_published)
        starts = starts_of(training)
        assert first_step_at(training, episodes) == len(starts)
        for episode in range(episodes):
            expected = next((index for index, start in enumerate(starts) if start >= episode), len(starts))
            assert first_step_at(training, episode) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0] * 7),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * step / 7)) / 2 for step in range(7)]),
        # Twenty episodes after a first step of two: 0, 2, 5, 8, 11, 14, 17.
        (
            {"schedule": "cosine", "published_first_step": True},
            [(1 + math.cos(math.pi * step / 7)) / 2 for step in range(7)],
        ),
        ({"warmup_episodes": 7}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1]),
        ({"warmup_episodes": 1}, [1 / 2, 1, 1, 1, 1, 1, 1]),
        (
            {"warmup_episodes": 6, "schedule": "cosine"},
            [1 / 3, 2 / 3, *((1 + math.cos(math.pi * step / 5)) / 2 for step in range(5))],
        ),
        ({"schedule": "multi_step", "milestones": (6, 13)}, [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        ({"schedule": "multi_step", "milestones": (5,), "published_first_step": True}, [1, 1, *[0.1] * 5]),
        ({"schedule": "multi_step", "milestones": (7, 8, 1_000_000), "milestone_factor": 0.5}, [1, 1, 1, *[0.25] * 4]),
        ({"schedule": "multi_step", "milestones": (6, 9), "warmup_episodes": 6}, [1 / 3, 2 / 3, 0.1, *[0.01] * 4]),
        # The whole run is warm-up, since its last step begins within.
        ({"episodes": 5, "warmup_episodes": 4, "schedule": "cosine"}, [1 / 3, 2 / 3]),
    ],
)
def test_rates_follow_the_schedule_worked_out_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    training = knobs(learning_rate=0.02, **settings)
    assert len(starts_of(training)) == len(expected)
    assert rates_of(training, len(expected)) == pytest.approx([0.02 * factor for factor in expected], rel=1e-12)


@pytest.mark.parametrize("name", ["constant", "cosine"])
def test_schedules_without_warm_up_are_torchs_own_to_the_last_bit(name: str) -> None:
    training = knobs(learning_rate=0.013, schedule=name, episodes=100)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(()))], lr=0.013)
    schedule: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if name == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 34)
    expected = []
    for _ in range(34):
        expected.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    assert rates_of(training, 34) == expected


def test_all_groups_follow_the_schedule_from_their_own_rates() -> None:
    stepper = tiny_stepper(knobs(**RUNS["sgd, cosine after warm-up"], backbone_learning_rate=0.001, learning_rate=0.1))
    for step in range(7):
        head, backbone = (group["lr"] for group in stepper.optimizer.param_groups)
        assert backbone == pytest.approx(0.01 * head, rel=1e-12)
        go(stepper, range(step, step + 1))


def test_milestone_within_the_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"milestones: 5 lies within training\.warmup_episodes = 6"):
        knobs(schedule="multi_step", milestones=(5, 9), warmup_episodes=6)


# Whole steps


@pytest.mark.parametrize("name", RUNS)
def test_run_that_is_broken_at_any_step_goes_on_to_the_same_bits(name: str) -> None:
    training = knobs(**RUNS[name])
    whole = tiny_stepper(training)
    breaks = [everything(whole)]
    for step in range(7):
        go(whole, range(step, step + 1))
        breaks.append(everything(whole))
    for place, state in enumerate(breaks):
        stepper = tiny_stepper(training)
        stepper.model.load_state_dict(state["model"])
        stepper.load_state_dict(state["stepper"])
        assert_same(everything(stepper), state)
        go(stepper, range(place, 7))
        assert_same(everything(stepper), breaks[-1])


@pytest.mark.parametrize("clip", [None, 0.05, 1e6])
@pytest.mark.parametrize(
    ("settings", "kind", "options"),
    [
        ({}, torch.optim.SGD, {}),
        (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ({"optimizer": "adam", "weight_decay": 0.1}, torch.optim.Adam, {"weight_decay": 0.1}),
        ({"optimizer": "adamw", "weight_decay": 0.1} | HALF, torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
)
def test_steps_are_those_of_a_plain_torch_loop(
    settings: dict[str, Any], kind: Any, options: dict[str, Any], clip: float | None
) -> None:
    """Scales are powers of two, so that the scaler changes no bit of float32 gradients."""
    training = knobs(**settings, clip_gradient_norm=clip, backbone_learning_rate=0.02, schedule="cosine", ema_decay=0.9)
    stepper = tiny_stepper(training)
    assert stepper.scaler.is_enabled() == ("compute_dtype" in settings)
    model = tiny_model()
    parts = (model.head, model.encoder)
    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in zip(parts, (0.01, 0.02), strict=True)]
    optimizer = kind(groups, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    average: list[Tensor] = []
    for step in range(7):
        optimizer.zero_grad()
        loss_of(model, step).backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
        norm = float(nn.utils.clip_grad_norm_([*model.head.parameters(), *model.encoder.parameters()], clip or 1e30))
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            weights = [parameter.clone() for parameter in model.parameters()]
            average = [torch.lerp(old, new, 1 - 0.9) for old, new in zip(average or weights, weights, strict=True)]
        stepper.optimizer.zero_grad()
        stepper.backward(loss_of(stepper.model, step))
        assert stepper.take_step().gradient_norm == norm
    assert_same(dict(stepper.model.state_dict()), dict(model.state_dict()))
    averaged = stepper.averaged_model()
    assert averaged is not None
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(averaged.parameters(), average, strict=True))


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_that_is_not_finite_changes_nothing(bad: float, clip: float | None) -> None:
    stepper = tiny_stepper(knobs(**SGD, clip_gradient_norm=clip, ema_decay=0.9, schedule="cosine"))
    go(stepper, range(2))
    before = everything(stepper)
    stepper.backward(loss_of(copy.deepcopy(stepper.model), 2))
    parameter = next(stepper.model.head.parameters())
    parameter.grad = torch.full_like(parameter, bad)
    outcome = stepper.take_step()
    assert not outcome.is_finite
    assert not outcome.was_skipped
    assert_same(everything(stepper), before)


def test_overflow_in_float16_skips_a_step_and_training_goes_on() -> None:
    """Already in the first step, where torch would warn of a schedule that runs ahead of its optimiser."""
    stepper = tiny_stepper(knobs(optimizer="adamw", weight_decay=0.1, warmup_episodes=6, ema_decay=0.9, **HALF))
    first = tiny_model()
    scales = []
    for _ in range(2):
        stepper.optimizer.zero_grad(set_to_none=True)
        stepper.backward(loss_of(stepper.model, 0) * 1e38)
        outcome = stepper.take_step()
        assert outcome.was_skipped
        assert not outcome.is_finite
        scales.append(stepper.scaler.get_scale())
    assert scales == [2.0**15, 2.0**14]
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(stepper.model.parameters(), first.parameters(), strict=True)
    )
    assert not stepper.optimizer.state_dict()["state"]
    # The schedule belongs to the episodes, which are gone.
    assert stepper.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    go(stepper, range(1))
    assert not torch.equal(next(stepper.model.parameters()), next(first.parameters()))


def test_scaler_that_has_come_down_to_one_skips_no_more() -> None:
    stepper = tiny_stepper(knobs(**HALF))
    outcomes = []
    for _ in range(17):
        stepper.optimizer.zero_grad(set_to_none=True)
        stepper.backward(loss_of(stepper.model, 0) * math.nan)
        outcomes.append(stepper.take_step())
    assert [outcome.was_skipped for outcome in outcomes] == [True] * 16 + [False]
    assert not any(outcome.is_finite for outcome in outcomes)


def test_backbone_in_float16_on_the_cpu_learns_through_the_scaler() -> None:
    stepper = tiny_stepper(knobs(**HALF))
    before = copy.deepcopy(stepper.model.state_dict())
    with torch.autocast("cpu", torch.float16):
        loss = loss_of(stepper.model, 0)
    stepper.backward(loss)
    assert stepper.take_step().is_finite
    weight = "encoder.0.weight"
    assert not torch.equal(stepper.model.state_dict()[weight], before[weight])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parameters_without_a_gradient_rest(dtype: str) -> None:
    """As in heads that train their parts in turns; neither decay nor momentum moves them."""
    stepper = tiny_stepper(knobs(optimizer="adamw", weight_decay=0.1, compute_dtype=dtype, warmup_episodes=3))
    go(stepper, range(2))
    before = copy.deepcopy(stepper.model.state_dict())
    stepper.optimizer.zero_grad(set_to_none=True)
    stepper.backward(loss_of(stepper.model, 2))
    for parameter in stepper.model.head.parameters():
        parameter.grad = None
    stepper.take_step()
    after = stepper.model.state_dict()
    changed = {
        name for name, parameter in stepper.model.named_parameters() if not torch.equal(after[name], before[name])
    }
    assert changed == {name for name, _ in stepper.model.named_parameters() if name.startswith("encoder.")}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_step_without_any_gradient_only_moves_the_schedule(dtype: str) -> None:
    stepper = tiny_stepper(knobs(**SGD, schedule="cosine", compute_dtype=dtype))
    before = copy.deepcopy(stepper.model.state_dict())
    rates = []
    for _ in range(3):
        rates.append(stepper.optimizer.param_groups[0]["lr"])
        assert stepper.take_step().gradient_norm == 0.0
    assert_same(dict(stepper.model.state_dict()), dict(before))
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 3


@pytest.mark.parametrize(
    ("settings", "extraction_dtype", "is_enabled"),
    [
        ({}, "float32", False),
        ({}, "float16", True),
        ({"compute_dtype": "bfloat16"}, "float16", False),
        (HALF, "float32", True),
        (HALF | {"mode": "classify"}, "float32", True),
        ({"backbone_learning_rate": 0.0}, "float16", False),
        ({"mode": "cached"}, "float16", False),
    ],
)
def test_scaler_is_for_backbones_that_learn_in_float16(
    settings: dict[str, Any], extraction_dtype: str, is_enabled: bool
) -> None:
    assert make_scaler(CPU, knobs(**settings), extraction_dtype).is_enabled() is is_enabled


# Norm and clipping


def gradients(*values: float) -> list[nn.Parameter]:
    """Parameters with these gradients, and one without."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor([value, -value])
    return [*parameters, nn.Parameter(torch.zeros(3))]


@pytest.mark.parametrize("values", [(0.3, -0.7, 1e-20), (1e-30,), (3e18, 1.0), (math.inf, 1.0), (math.nan,), ()])
def test_norm_alone_changes_no_gradient(values: tuple[float, ...]) -> None:
    parameters = gradients(*values)
    before = [None if each.grad is None else each.grad.clone() for each in parameters]
    norm = gradient_norm_and_clip(iter(parameters), None)
    expected = float(nn.utils.clip_grad_norm_(gradients(*values), 1.0))
    assert norm == expected or (math.isnan(norm) and math.isnan(expected))
    for parameter, old in zip(parameters, before, strict=True):
        assert (parameter.grad is None and old is None) or torch.equal(
            parameter.grad.view(torch.int32),  # type: ignore[union-attr]  # None on both sides or on neither
            old.view(torch.int32),  # type: ignore[union-attr]
        )


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e9])
def test_clipping_is_torchs_own_to_the_last_bit(max_norm: float) -> None:
    ours, theirs = gradients(0.3, -0.7, 5.0), gradients(0.3, -0.7, 5.0)
    norm = gradient_norm_and_clip(iter(ours), max_norm)
    assert norm == float(nn.utils.clip_grad_norm_(theirs, max_norm))
    for one, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
    assert gradient_norm_and_clip(ours, None) <= min(norm, max_norm) * (1 + 1e-6)  # float32


# The moving average


def test_average_has_the_models_names_its_frozen_weights_and_its_newest_statistics() -> None:
    training = knobs(ema_decay=0.9, freeze=("encoder.0.*",), learning_rate=0.3)
    stepper = tiny_stepper(training)
    untrained = tiny_model().state_dict()
    go(stepper, range(4))
    # Running statistics may settle when the step is taken.
    running_mean = stepper.model.get_buffer("encoder.1.running_mean")
    running_mean += 1.0
    averaged = stepper.averaged_model()
    assert averaged is not None
    assert not averaged.training
    state, weights = averaged.state_dict(), stepper.model.state_dict()
    assert list(state) == list(weights)
    for name in ("encoder.0.weight", "encoder.0.bias"):
        assert torch.equal(state[name], untrained[name])
    for name, _ in stepper.model.named_buffers():
        assert torch.equal(state[name], weights[name])
    assert not torch.equal(state["head.linear.weight"], weights["head.linear.weight"])
    assert not any(parameter.requires_grad for parameter in averaged.parameters())
    tiny_model().load_state_dict(state)


def test_average_is_the_model_until_the_first_step_and_after_it() -> None:
    stepper = tiny_stepper(knobs(ema_decay=0.999))
    for _ in range(2):
        averaged = stepper.averaged_model()
        assert averaged is not None
        assert_same(dict(averaged.state_dict()), dict(stepper.model.state_dict()))
        go(stepper, range(1))
    assert tiny_stepper(knobs()).averaged_model() is None


@pytest.mark.parametrize("name", HEADS)
def test_every_head_can_be_averaged(name: str) -> None:
    """Those with nothing to learn need no average."""
    head = build_head(name, {}, (8, 4, 4, 4), 5, default_meta_bn_query=True, generator=torch.Generator().manual_seed(0))
    model = FewShotModel(nn.Identity(), head)
    stepper = make_stepper(model, TrainingConfig(ema_decay=0.9), CPU, "float32")
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        stepper.take_step()
    averaged = stepper.averaged_model()
    assert (averaged is None) == (not list(head.parameters()))
    assert_same(dict((averaged or model).state_dict()), dict(before))
