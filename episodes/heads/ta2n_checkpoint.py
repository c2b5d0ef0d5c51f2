"""Reads the training checkpoints of the released TA2N code into our head.

Code consulted: https://github.com/R00Kie-Liu/TA2N, commit 2becdd8. Its files hold a backbone (`resnet.*`), the alignment
(`align.*`) and, when trained with it, a layer norm over class distances (`protypicalNet.norm_layer.*`), some with an extra
`.module` when trained on several GPUs; alone, or as `model_state_dict` beside the optimiser's state.
"""

# C channels

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from episodes.heads.ta2n import TA2NHead

# Published layer -> ours; both networks number theirs alike.
_NETWORK_LAYERS = {
    "0": "first",
    "1": "first_norm",
    "4": "second",
    "5": "second_norm",
    "10": "hidden",
    "12": "out",
}
_LAYERS = {
    **{f"firststage.locnet.{theirs}": f"temporal.network.{ours}" for theirs, ours in _NETWORK_LAYERS.items()},
    **{f"secondstage.mvnet.{theirs}": f"coordination.network.{ours}" for theirs, ours in _NETWORK_LAYERS.items()},
    **{f"secondstage.{kind}net": f"coordination.{kind}" for kind in ("key", "query", "value")},
    **{f"{kind}net_multi": f"fusion.{kind}" for kind in ("key", "query", "value")},
}
# Older torch versions did not count the batches.
_OPTIONAL = "num_batches_tracked"
_DISTANCE_NORM = "protypicalNet.norm_layer."


class TA2NCheckpointError(ValueError):
    """The checkpoint is not a published one, or does not fit the head."""


def load_ta2n_head(head: TA2NHead, content: Mapping[str, Any]) -> None:
    """Copy the alignment of a published checkpoint into a head; nothing is copied when a shape differs.

    Args:
        head: for cubes of the checkpoint's channels.
        content: a bare state dict, or the dict of a training checkpoint with its `model_state_dict`.

    Raises:
        TA2NCheckpointError: another kind of checkpoint, a missing tensor, another size, or a trained layer norm over class
            distances, which the head does not have.
    """
    given = published_alignment(content)
    current = head.alignment.state_dict()
    missing = sorted(name for name in set(current) - set(given) if not name.endswith(_OPTIONAL))
    unknown = sorted(set(given) - set(current))
    if missing or unknown:
        wrong = f"lacks {', '.join(missing[:3])}" if missing else f"holds {', '.join(unknown[:3])}"
        raise TA2NCheckpointError(f"the checkpoint {wrong} (our names): it is no published TA2N checkpoint")
    _check_sizes(head, given)
    for name, value in given.items():
        if value.shape != current[name].shape:
            raise TA2NCheckpointError(
                f"{name} is {tuple(value.shape)} in the checkpoint, {tuple(current[name].shape)} here"
            )
    head.alignment.load_state_dict({**current, **given})


def published_alignment(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The alignment of a published checkpoint by the names of `TemporalSpatialAlignment`, without the backbone."""
    state = content.get("model_state_dict", content)
    if not isinstance(state, Mapping):
        raise TA2NCheckpointError(f"model_state_dict is a {type(state).__name__}, but a state dict is needed")
    given: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TA2NCheckpointError(
                f"entry {key!r} is a {type(value).__name__}: this is no published TA2N checkpoint"
            )
        name = str(key).removeprefix("module.").replace(".module.", ".")
        if name.startswith(_DISTANCE_NORM):
            _refuse_trained_norm(name, value)
        elif not name.startswith("resnet."):
            given[_our_name(name, str(key))] = value
    # 1x1 convolutions over time are linear layers here.
    return {name: value[..., 0] if _is_pointwise(name, value) else value for name, value in given.items()}


def _our_name(name: str, key: str) -> str:
    layer, _, kind = name.removeprefix("align.").rpartition(".")
    if not name.startswith("align.") or layer not in _LAYERS:
        raise TA2NCheckpointError(
            f"the checkpoint has a tensor {key!r}; a published TA2N checkpoint has resnet.*, align.* and "
            f"{_DISTANCE_NORM}* only"
        )
    return f"{_LAYERS[layer]}.{kind}"


def _is_pointwise(name: str, value: Tensor) -> bool:
    return name.endswith(".weight") and value.ndim == 3 and value.shape[-1] == 1


def _refuse_trained_norm(name: str, value: Tensor) -> None:
    """A layer norm at its first values keeps the order of the classes; a trained one does not, and we have none."""
    untouched = torch.ones_like(value) if name.endswith("weight") else torch.zeros_like(value)
    if not torch.equal(value, untouched):
        raise TA2NCheckpointError(
            f"the checkpoint has a trained {name} (--dist_norm), a layer norm over the distances to its {len(value)} classes; "
            "this head has none, so that the checkpoint would score otherwise here. Train without --dist_norm"
        )


def _check_sizes(head: TA2NHead, given: Mapping[str, Tensor]) -> None:
    """The usual mismatches, each with the option that answers it."""
    channels = given["coordination.key.weight"].shape[0]
    if channels != head.cube_shape[0]:
        raise TA2NCheckpointError(
            f"the checkpoint is for cubes of {channels} channels, but here a cube is {head.cube_shape}; use its backbone"
        )
    for option, network in (("temporal_channels", "temporal"), ("offset_channels", "coordination")):
        theirs = tuple(len(given[f"{network}.network.{layer}.bias"]) for layer in ("first", "second", "hidden"))
        ours = getattr(head.config, option)
        if theirs != ours:
            raise TA2NCheckpointError(
                f"the checkpoint's network has {theirs} channels; set head.{option} = {list(theirs)} (here {list(ours)})"
            )
