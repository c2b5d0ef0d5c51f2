"""Which parameters learn, and how fast: freezing, rates by name, layer-wise decay, weight decay.

Layer-wise decay: "ULMFiT", ACL 2018, https://arxiv.org/abs/1801.06146 (section 3.2), and for transformers "BEiT", ICLR 2022,
https://arxiv.org/abs/2106.08254. The reference recipe decays neither biases nor what has one dimension (reference 5.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from configs.training import TrainingConfig
from pipeline.model import ClipEncoder, FewShotModel

ENCODER = "encoder."
"""What the names of a backbone's parameters begin with; all others are the head's."""
UNDECAYED = ("bias", "token", "pos_embed", "position_embed")
"""Parts of the last name of parameters that recipes for transformers leave undecayed whatever their shape."""


class OptimisationError(ValueError):
    """The knobs of training do not fit the model's parameters."""


def freeze_parameters(model: FewShotModel, training: TrainingConfig) -> list[str]:
    """Let parameters that the config freezes keep their values; call it before `parameter_groups`.

    Args:
        model: gets ``requires_grad = False`` where ``freeze``, a rate of 0 or a backbone rate of 0 says so.
        training: its ``freeze``, ``rates`` and ``backbone_learning_rate``.

    Returns:
        Full names of the frozen parameters, in the model's order.

    Raises:
        OptimisationError: a pattern that fits no parameter, or a rate that has no effect.
    """
    parameters = dict(model.named_parameters())
    _refuse_idle_patterns(list(parameters), training)
    frozen = [name for name in parameters if _is_frozen(name, training)]
    for name in frozen:
        parameters[name].requires_grad_(False)
    if frozen and len(frozen) == len(parameters) and (training.freeze or training.rates):
        raise OptimisationError(
            f"training.freeze = {list(training.freeze)} and training.rates freeze all {len(frozen)} parameters, so nothing would learn. "
            "Leave some free."
        )
    encoder = model.encoder
    if isinstance(encoder, ClipEncoder) and not any(each.requires_grad for each in encoder.parameters()):
        encoder.rest()  # whichever knob froze it all, a frozen backbone is in evaluation mode
    return frozen


def parameter_groups(model: FewShotModel, training: TrainingConfig) -> list[dict[str, Any]]:
    """What torch's optimisers take: every learning parameter in exactly one group, the head's before the backbone's.

    Each group has a ``name`` for people and logs (``head``, ``backbone``, ``backbone layer 3``, the pattern of ``rates``; with
    ``, no decay`` where weight decay leaves it out), ``params``, ``lr`` and ``weight_decay``. Empty where nothing learns.
    """
    named = list(model.named_parameters())
    ordered = [each for each in named if not each[0].startswith(ENCODER)]
    ordered += [each for each in named if each[0].startswith(ENCODER)]
    layers = backbone_layers(model.encoder) if training.layer_decay < 1 else {}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in ordered:
        if not parameter.requires_grad:
            continue
        label, rate = _label_and_rate(name, training, layers)
        decay = training.weight_decay
        if decay and not training.decay_norm_and_bias and _is_norm_or_bias(name, parameter):
            label, decay = f"{label}, no decay", 0.0
        empty = {"name": label, "params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault(label, empty)["params"].append(parameter)
    return list(groups.values())


def backbone_layers(encoder: nn.Module) -> dict[str, int]:
    """The layer of each parameter for layer-wise decay: 0 is the stem.

    Layers are the blocks of the network's one `nn.Sequential` or `nn.ModuleList` (transformers), or each of them where it has several
    (the stages of convolutional networks). What is registered before the first of them is the stem, a layer of its own; what comes
    after one (a last normalisation) belongs to it. Networks must register their parts in the order in which they apply them.

    Args:
        encoder: a backbone, or what wraps it.

    Returns:
        Parameter name within the encoder -> layer.
    """
    containers = list(_outermost_containers(encoder))
    if len(containers) == 1:
        prefix, container = containers[0]
        containers = [(f"{prefix}{name}.", child) for name, child in container.named_children()]
    layers: dict[str, int] = {}
    layer, current = -1, None
    for name, _ in encoder.named_parameters():
        inside = next((prefix for prefix, _ in containers if name.startswith(prefix)), current)
        if layer < 0 or inside != current:
            layer, current = layer + 1, inside
        layers[name] = layer
    return layers


def _outermost_containers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential | nn.ModuleList):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _outermost_containers(child, f"{prefix}{name}.")


def _label_and_rate(name: str, training: TrainingConfig, layers: dict[str, int]) -> tuple[str, float]:
    pattern = _deciding_pattern(name, training)
    if pattern is not None:
        return pattern, training.rates[pattern]
    if not name.startswith(ENCODER):
        return "head", training.learning_rate
    own = training.backbone_learning_rate
    rate = training.learning_rate if own is None else own
    if not layers:
        return "backbone", rate
    layer = layers[name.removeprefix(ENCODER)]
    return f"backbone layer {layer}", rate * training.layer_decay ** (max(layers.values()) - layer)


def _is_norm_or_bias(name: str, parameter: nn.Parameter) -> bool:
    last = name.rpartition(".")[2]
    return parameter.ndim <= 1 or any(word in last for word in UNDECAYED)


def _deciding_pattern(name: str, training: TrainingConfig) -> str | None:
    """The first pattern of ``rates`` that fits."""
    return next((pattern for pattern in training.rates if fnmatchcase(name, pattern)), None)


def _is_frozen(name: str, training: TrainingConfig) -> bool:
    if any(fnmatchcase(name, pattern) for pattern in training.freeze):
        return True
    if name.startswith(ENCODER) and training.backbone_learning_rate == 0:
        return True
    pattern = _deciding_pattern(name, training)
    return pattern is not None and training.rates[pattern] == 0


def _refuse_idle_patterns(names: Sequence[str], training: TrainingConfig) -> None:
    for table, patterns in (("freeze", training.freeze), ("rates", tuple(training.rates))):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise OptimisationError(
                    f"training.{table}: {pattern!r} fits no parameter of this model. {_what_there_is(pattern, names)}"
                )
    for pattern, rate in training.rates.items():
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        decided = [name for name in fitting if _deciding_pattern(name, training) == pattern]
        if not decided:
            first = _deciding_pattern(fitting[0], training)
            raise OptimisationError(
                f"training.rates: {pattern!r} decides nothing, since {first!r} before it fits all its parameters. "
                "The first that fits counts; write the narrower pattern first."
            )
        if rate > 0 and all(_is_frozen(name, training) for name in decided):
            raise OptimisationError(
                f"training.rates: {pattern!r} has rate {rate}, but training.freeze or training.backbone_learning_rate = 0 freezes "
                "all its parameters. Leave it out, or freeze only the others by training.freeze."
            )


def _what_there_is(pattern: str, names: Sequence[str]) -> str:
    """Names and patterns near one that fits nothing."""
    if not names:
        return "It has none."
    wider = {f"{name[:place]}.*" for name in names for place, letter in enumerate(name) if letter == "."}
    close = get_close_matches(pattern, [*sorted(wider), *names], n=3, cutoff=0.3) or sorted(wider)[:3]
    return f"Near it: {', '.join(close)}. Names are those of the model's parameters, such as {names[0]}."
