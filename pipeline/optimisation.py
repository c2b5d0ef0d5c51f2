"""One optimiser step: optimiser, learning-rate schedule, gradient scaler, clipping and the moving average, all torch's own.

A step is: gradients unscaled, their norm, clipping, the optimiser, the scaler, the schedule, the average. Position in the schedule is the
number of steps so far, so that a rate belongs to a training episode whatever happened on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from configs.training import TrainingConfig
from pipeline.model import FewShotModel
from pipeline.parameter_groups import parameter_groups


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What became of a step."""

    gradient_norm: float
    """2-norm of all gradients together before clipping, unscaled; infinite or NaN where one of them is."""
    was_skipped: bool = False
    """float16 gradients overflowed: weights and moments stay, the scaler lowers its scale, and training goes on."""

    @property
    def is_finite(self) -> bool:
        """Whether all gradients are; where not, and the step was not skipped, nothing was changed and training should stop."""
        return math.isfinite(self.gradient_norm)


@dataclass(slots=True)
class Stepper:
    """What turns gradients into steps of one model, and what of it a checkpoint keeps.

    The loop calls ``optimizer.zero_grad(set_to_none=True)``, `backward` for each share of the step's loss, sets gradients of parameters
    that rest in this step to None, then `take_step`.
    """

    model: FewShotModel
    """Itself, not what DistributedDataParallel makes of it."""
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    """Disabled unless the backbone learns in float16."""
    average: AveragedModel | None = None
    """Moving average of the weights; read it by `averaged_model`."""
    clip_gradient_norm: float | None = None
    """Longest gradient."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a share of the step's loss."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped

    def take_step(self) -> StepOutcome:
        """Use the gradients that are there; parameters without one stay as they are.

        Gradients that are not finite never reach the weights. With a scaler whose scale is above 1 they may be an overflow of its
        making: the step is skipped, and counts as one for the schedule and the average. Otherwise nothing at all is changed.
        """
        parameters = [
            parameter
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if not parameters:  # neither scaled nor unscaled: the scaler has nothing to look at
            self._go_on()
            return StepOutcome(0.0)
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm_and_clip(parameters, self.clip_gradient_norm)
        if math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self._go_on(is_stepped=True)
            return StepOutcome(norm)
        is_overflow = not all(bool(torch.isfinite(each.grad).all()) for each in parameters if each.grad is not None)
        # A scale of 1: the scaler is disabled, or at its end. Finite gradients whose norm is not: no scale would help.
        if self.scaler.get_scale() <= 1 or not is_overflow:
            return StepOutcome(norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self._go_on()
        return StepOutcome(norm, was_skipped=True)

    def _go_on(self, is_stepped: bool = False) -> None:
        if not is_stepped:
            # Without gradients it changes nothing, and tells torch that the schedule does not run ahead of the optimiser.
            self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def averaged_model(self) -> FewShotModel | None:
        """The average of the weights with the model's present running statistics, in evaluation mode; None without one."""
        if self.average is None:
            return None
        averaged = cast(FewShotModel, self.average.module)
        with torch.no_grad():
            # torch copies them with every step too, but those of the last step may settle after it.
            for own, current in zip(averaged.buffers(), self.model.buffers(), strict=True):
                own.copy_(current)
        return averaged

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: tensors, numbers and strings, as ``torch.load(weights_only=True)`` takes them. The model is not in it."""
        self.averaged_model()
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of the same config; the following steps are bit-equal to those without a break."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def make_stepper(model: FewShotModel, training: TrainingConfig, device: torch.device, extraction_dtype: str) -> Stepper:
    """All that steps need, for a model with its first weights, on its device, after `freeze_parameters`.

    Args:
        model: not wrapped.
        training: the ``[training]`` table.
        device: where the model is.
        extraction_dtype: ``extraction.compute_dtype``, the backbone's number format where training names none.
    """
    optimizer = make_optimizer(model, training)
    return Stepper(
        model,
        optimizer,
        make_schedule(optimizer, training),
        make_scaler(device, training, extraction_dtype),
        make_average(model, training),
        training.clip_gradient_norm,
    )


def make_optimizer(model: FewShotModel, training: TrainingConfig) -> torch.optim.Optimizer:
    """The config's optimiser over `parameter_groups`."""
    groups = parameter_groups(model, training)
    if not groups:
        # Neighbor without its classifier has nothing to learn; torch wants a parameter all the same.
        groups = [
            {
                "name": "nothing",
                "params": [nn.Parameter(torch.zeros(()))],
                "lr": training.learning_rate,
                "weight_decay": 0.0,
            }
        ]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=training.momentum, nesterov=training.nesterov)
    return torch.optim.Adam(groups) if training.optimizer == "adam" else torch.optim.AdamW(groups)


def first_step_at(training: TrainingConfig, episode: int) -> int:
    """Index of the first step whose episodes begin at this training episode or later."""
    # The published first step is one episode short, and all others begin one episode earlier.
    shift = 1 if training.published_first_step and episode > 0 else 0
    return -(-(episode + shift) // training.episodes_per_step)


def make_schedule(optimizer: torch.optim.Optimizer, training: TrainingConfig) -> LRScheduler:
    """The config's learning rates, for one call of ``step`` after every optimiser step.

    Episodes count by the step that they belong to: a milestone takes effect at the first step that begins there or later. W steps of
    warm-up have 1, 2, ... W parts of W + 1 of the rate; the schedule itself begins after them.
    """
    num_steps = first_step_at(training, training.episodes)
    num_warmup = first_step_at(training, training.warmup_episodes)
    schedule: LRScheduler
    if training.schedule == "cosine":
        schedule = CosineAnnealingLR(optimizer, max(1, num_steps - num_warmup))
    elif training.schedule == "multi_step":
        milestones = [first_step_at(training, episode) - num_warmup for episode in training.milestones]
        schedule = MultiStepLR(optimizer, milestones, training.milestone_factor)
    else:
        schedule = ConstantLR(optimizer, factor=1.0)
    if num_warmup == 0:
        return schedule
    rising = LinearLR(optimizer, start_factor=1 / (num_warmup + 1), total_iters=num_warmup)
    return SequentialLR(optimizer, [rising, schedule], [num_warmup])


def make_scaler(device: torch.device, training: TrainingConfig, extraction_dtype: str) -> torch.amp.GradScaler:
    """torch's gradient scaler, enabled where gradients pass a backbone in float16 (on the CPU too).

    Args:
        device: where the model is.
        training: its ``mode``, ``compute_dtype`` and ``backbone_learning_rate``.
        extraction_dtype: ``extraction.compute_dtype``.
    """
    learns = training.mode != "cached" and training.backbone_learning_rate != 0
    dtype = training.compute_dtype or extraction_dtype
    return torch.amp.GradScaler(device.type, enabled=learns and dtype == "float16")


def make_average(model: FewShotModel, training: TrainingConfig) -> AveragedModel | None:
    """The exponential moving average of the weights as torch takes it, or None without ``ema_decay`` or anything that learns.

    It begins as the weights after the first step. Running statistics are not averaged, but those of the model. Until the first step it
    is a copy of the model, so make it when the first weights are loaded.
    """
    if training.ema_decay is None or not any(parameter.requires_grad for parameter in model.parameters()):
        return None
    update = get_ema_multi_avg_fn(training.ema_decay)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    average = AveragedModel(model, multi_avg_fn=update)
    return average.requires_grad_(False).eval()


def has_finite_weights(model: nn.Module) -> bool:
    """Whether every weight that learns is a number; the device is waited for once."""
    # An empty tensor has no largest element.
    learning = [each.detach() for each in model.parameters() if each.requires_grad and each.numel()]
    return math.isfinite(float(torch.nn.utils.get_total_norm(learning, norm_type=math.inf)))


def gradient_norm_and_clip(parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
    """2-norm of all gradients together, and gradients shortened to a largest norm; the device is waited for once.

    Args:
        parameters: those without a gradient are left out.
        max_norm: None changes no gradient, and neither does a norm that is not finite.

    Returns:
        The norm before clipping, as torch's ``clip_grad_norm_`` gives it; 0 without gradients, infinite or NaN where one of them is.
    """
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    total = torch.nn.utils.get_total_norm([each.grad for each in learning if each.grad is not None])
    norm = float(total)
    if max_norm is not None and math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(learning, max_norm, total)
    return norm
