"""Sorts the training checkpoints of the released MASTAF code (https://github.com/lxhit/STAF, commit 10c7d9a).

They hold a backbone (`base.*`), the meta-learner (`cam.*`) and the global classifier (`classifier.*`), each with an
extra `.module` when trained on several GPUs; alone, or as `model_state_dict` beside the optimiser's state.
"""

# C channels, L positions, U hidden units, Z classes of the global classifier

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from episodes.heads.mastaf import MastafHead
from episodes.heads.mastaf_attention import MetaLearner

# Published name -> ours. Their layers are 1 x 1 convolutions, ours linear.
_CAM_NAMES = {
    "cam.conv1.conv.weight": "reduce.weight",
    "cam.conv1.conv.bias": "reduce.bias",
    "cam.conv1.bn.weight": "norm.weight",
    "cam.conv1.bn.bias": "norm.bias",
    "cam.conv1.bn.running_mean": "norm.running_mean",
    "cam.conv1.bn.running_var": "norm.running_var",
    "cam.conv1.bn.num_batches_tracked": "norm.num_batches_tracked",
    "cam.conv2.weight": "expand.weight",
    "cam.conv2.bias": "expand.bias",
}
_CLASSIFIER_NAMES = {"classifier.weight": "weight", "classifier.bias": "bias"}
# Older torch versions did not count the batches.
_OPTIONAL = "num_batches_tracked"


class StafCheckpointError(ValueError):
    """The checkpoint is not a published one, or does not fit the head."""


@dataclass(frozen=True, slots=True)
class StafCheckpoint:
    """The tensors of a published checkpoint by part."""

    cam: dict[str, Tensor]
    """The meta-learner by our names: `reduce.weight` (U, L) and so on."""
    classifier: dict[str, Tensor]
    """The global classifier by our names: `weight` (Z, C), `bias` (Z,)."""
    backbone: dict[str, Tensor]
    """The backbone by its own names, without `base.`; as in a checkpoint of the backbone alone."""


def split_staf_state(content: Mapping[str, Any]) -> StafCheckpoint:
    """Sort the tensors of a published checkpoint into its three parts.

    Args:
        content: a bare state dict, or the dict of a training checkpoint with its `model_state_dict`.
    """
    state = content.get("model_state_dict", content)
    if not isinstance(state, Mapping):
        raise StafCheckpointError(f"model_state_dict is a {type(state).__name__}, but a state dict is needed")
    cam: dict[str, Tensor] = {}
    classifier: dict[str, Tensor] = {}
    backbone: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise StafCheckpointError(
                f"entry {key!r} is a {type(value).__name__}: this is no published STAF checkpoint"
            )
        part, name = _without_module(str(key))
        if part == "base":
            backbone[name.removeprefix("base.")] = value
        elif name in _CAM_NAMES:
            cam[_CAM_NAMES[name]] = _as_linear(value)
        elif name in _CLASSIFIER_NAMES:
            classifier[_CLASSIFIER_NAMES[name]] = _as_linear(value)
        else:
            raise StafCheckpointError(
                f"the checkpoint has a tensor {key!r}; a published STAF checkpoint has base.*, cam.* and classifier.* "
                "only. Weights of a backbone alone are given as [backbone] weights"
            )
    wanted = {name for name in _CAM_NAMES.values() if not name.endswith(_OPTIONAL)}
    missing = sorted(wanted - set(cam)) + sorted(set(_CLASSIFIER_NAMES.values()) - set(classifier))
    if missing:
        raise StafCheckpointError(f"the checkpoint lacks {', '.join(missing)}: it is no published STAF checkpoint")
    return StafCheckpoint(cam, classifier, backbone)


def load_staf_head(head: MastafHead, checkpoint: StafCheckpoint) -> None:
    """Copy the meta-learner and the classifier into a head; nothing is copied when a shape differs.

    A head with separate meta-learners for self and cross attention gets the published one in both. The classifier is
    left out where the head has none (it is not needed to evaluate).

    Args:
        head: a head with a learnt, normalised meta-learner, for cubes of the checkpoint's number of positions.
        checkpoint: what `split_staf_state` returned.
    """
    cams = [cam for cam in (head.cam, head.cam_self, head.cam_cross) if isinstance(cam, MetaLearner)]
    if not cams or any(cam.norm is None for cam in cams):
        raise StafCheckpointError(
            "a published checkpoint holds a meta-learner with batch normalisation, and this head has none: set "
            'head.meta_bn = "reference" and head.meta_learner = true, and keep an attention branch'
        )
    _check_shapes(head, cams[0], checkpoint)
    for cam in cams:
        current = cam.state_dict()
        cam.load_state_dict({**current, **checkpoint.cam})
    if head.classifier is not None:
        head.classifier.load_state_dict(checkpoint.classifier)


def _check_shapes(head: MastafHead, cam: MetaLearner, checkpoint: StafCheckpoint) -> None:
    hidden, positions = checkpoint.cam["reduce.weight"].shape
    if positions != head.num_positions:
        raise StafCheckpointError(
            f"the checkpoint is for cubes of {positions} positions, but here a cube is {head.cube_shape} "
            f"({head.num_positions} positions); use its sampling.num_frames and sampling.crop_size"
        )
    if hidden != head.config.hidden:
        raise StafCheckpointError(
            f"the checkpoint's meta-learner has {hidden} hidden units, here head.hidden = {head.config.hidden}"
        )
    _check_exact_shapes(cam, checkpoint.cam, "meta-learner")
    if head.classifier is None:
        return
    num_classes, channels = checkpoint.classifier["weight"].shape
    if channels != head.cube_shape[0]:
        raise StafCheckpointError(
            f"the checkpoint is for cubes of {channels} channels, but here a cube is {head.cube_shape}; "
            "use its backbone"
        )
    if num_classes != head.classifier.out_features:
        raise StafCheckpointError(
            f"the checkpoint's classifier knows {num_classes} classes, but here there are "
            f"{head.classifier.out_features} training classes. The released code numbers all class folders: set "
            'data.global_labels = "all", or leave the classifier out with head.global_classifier = false'
        )
    _check_exact_shapes(head.classifier, checkpoint.classifier, "classifier")


def _check_exact_shapes(module: torch.nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name, value in tensors.items():
        if tuple(value.shape) != shapes[name]:
            raise StafCheckpointError(f"{what} {name} is {tuple(value.shape)} in the checkpoint, {shapes[name]} here")


def _without_module(key: str) -> tuple[str, str]:
    """The part a key belongs to, and the key without the `.module` that several GPUs leave behind."""
    key = key.removeprefix("module.")
    part, _, rest = key.partition(".")
    return part, f"{part}.{rest.removeprefix('module.')}"


def _as_linear(value: Tensor) -> Tensor:
    return value.flatten(1) if value.ndim > 2 else value
