"""Where a run starts from when it does not start from scratch: a checkpoint of ours, or a published one (`FORMATS`)."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cache.cube import Spec
from episodes.head import HeadModule
from episodes.heads.mastaf import MastafHead
from episodes.heads.staf_checkpoint import load_staf_head, split_staf_state
from episodes.heads.strm import StrmHead
from episodes.heads.ta2n import TA2NHead
from episodes.heads.ta2n_checkpoint import load_ta2n_head
from episodes.heads.trx import TrxHead
from episodes.heads.trx_checkpoint import load_trx_head
from extract.backbones.r3d import published_state_dict as r3d_trunk
from extract.backbones.tsn import published_state_dict as tsn_trunk
from extract.weights import copy_weights, state_digest
from pipeline.checkpoint import FORMAT, CheckpointError, load_weights
from pipeline.classify_model import ClassifierModel
from pipeline.console import say
from pipeline.model import ClipEncoder, FewShotModel


@dataclass(frozen=True, slots=True)
class PublishedFormat:
    """A kind of checkpoint that a released code writes: a head and its backbone in one file."""

    name: str
    """The code, for messages."""
    marks: tuple[str, ...]
    """Beginnings of tensor names (without `module.`) that tell this kind from those after it in `FORMATS`."""
    head: type[HeadModule]
    """The head that takes it."""
    head_name: str
    """That head's name in a config."""
    load_head: Callable[[Any, Mapping[str, Any]], None]
    """Copies the head's part of a file's content; a ValueError where it does not fit."""
    trunk: Callable[[Mapping[str, Any], Path], Mapping[str, Tensor]]
    """The backbone's part of a file's content, by our backbone's own names."""
    backbone: str
    """The published backbone's name here."""

    def is_kind_of(self, names: list[str]) -> bool:
        """Whether a file with tensors of these names is of this kind."""
        return any(name.startswith(self.marks) for name in names)


def _load_staf(head: MastafHead, content: Mapping[str, Any]) -> None:
    load_staf_head(head, split_staf_state(content))


FORMATS: list[PublishedFormat] = [
    PublishedFormat("STAF", ("cam.", "base."), MastafHead, "mastaf", _load_staf, r3d_trunk, "r3d50"),
    PublishedFormat("STRM", ("attn_pat.", "fr_enrich."), StrmHead, "strm", load_trx_head, tsn_trunk, "tsn_resnet50"),
    PublishedFormat("TRX", ("transformers.",), TrxHead, "trx", load_trx_head, tsn_trunk, "tsn_resnet50"),
    PublishedFormat("TA2N", ("align.",), TA2NHead, "ta2n", load_ta2n_head, tsn_trunk, "tsn_resnet50"),
]
"""The published kinds, tried in this order."""


def load_initial_weights(
    model: FewShotModel, path: Path, train_classes: Sequence[str] = (), cubes: Spec | None = None
) -> None:
    """Copy a checkpoint into a model.

    A checkpoint of ours gives the parts that the model has: an end-to-end run's checkpoint also starts a head on the cache. Between
    classification and a few-shot head only the backbone goes over, either way. A published one (`FORMATS`) gives the head, and the
    backbone where the model has one.

    Args:
        model: changed in place.
        path: the checkpoint.
        train_classes: of the run that begins; a classification run over others gives its backbone only.
        cubes: what the run that begins reads on the cache; a warning where the head has learned on those of another backbone.

    Raises:
        CheckpointError: unreadable, of no known kind, or a part of the model is missing in it or has another shape.
        ValueError: a published checkpoint that does not fit the head or the backbone.
    """
    if path.is_dir():
        raise CheckpointError(
            f"training.initial_weights = {str(path)!r} is a folder. Give a file: {path / 'best.pt'}, for a run."
        )
    content = load_weights(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint.")
    if content.get("format") == FORMAT and "model" in content:
        is_of_classes = _is_classification(content)
        has_other_classes = is_of_classes and set(content["classes"]["train"]) != set(train_classes)
        if is_of_classes == isinstance(model, ClassifierModel) and not has_other_classes:
            _load_ours(model, content, path)
            _warn_of_other_cubes(content, cubes, path)
        else:
            _load_backbone_of_ours(model, content["model"], path, is_of_classes)
    else:
        _load_published(model, content, path)


def _load_ours(model: FewShotModel, content: Mapping[str, Any], path: Path) -> None:
    own, state = model.state_dict(), content["model"]
    if not own:
        say(f"warning: {path} gives nothing here: this head has no weights, and on the cache there is no backbone")
        return
    _refuse_misfit(own, state, path, "Start from a run with the same head, cubes and classes.")
    model.load_state_dict({name: state[name] for name in own})
    parts = "backbone and head" if isinstance(model.encoder, ClipEncoder) else "the head"
    head = tomllib.loads(content["config"])["head"]["name"]
    say(f"starting from {path} (head {head}, after {content['progress']['episode']} episodes): {parts}")


def _warn_of_other_cubes(content: Mapping[str, Any], cubes: Spec | None, path: Path) -> None:
    """A head fits whatever has the right shape: whether it knows these cubes is told by the weights that made them."""
    if cubes is None or not content["model"]:
        return
    if content["store_spec"]:
        learned_on = Spec.from_json(content["store_spec"]).weights_digest
    else:
        state, prefix = content["model"], "encoder.backbone."
        learned_on = state_digest({name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)})
    if learned_on != cubes.weights_digest:
        say(
            f"warning: the head of {path} has learned on the backbone {learned_on[:12]}, but these cubes are of "
            f"{cubes.weights_digest[:12]}: it starts on features that it does not know"
        )


def _load_backbone_of_ours(model: FewShotModel, state: Mapping[str, Tensor], path: Path, is_of_classes: bool) -> None:
    """The part that a classification run and one with a few-shot head have in common; the head stays as it is."""
    if not isinstance(model.encoder, ClipEncoder):
        raise CheckpointError(
            f"{path} is of a classification run: a backbone and a linear classifier, so it has nothing for a head on the cache. Train "
            "that head on its cubes (`mastaf extract --from-run RUN`), or end to end."
        )
    own = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    _refuse_misfit(own, state, path, "Start from a run with the same backbone.")
    model.load_state_dict({name: state[name] for name in own}, strict=False)
    there = "classifies other things" if is_of_classes else "has a few-shot head"
    say(f"{path} {there}: only its backbone is taken, the head begins anew")


def _refuse_misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, way_out: str) -> None:
    missing = sorted(own.keys() - state.keys())
    wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
    if missing or wrong:
        raise CheckpointError(
            f"{path} does not fit this model: it lacks {missing[:3] or 'nothing'}, other shapes in {wrong[:3] or 'nothing'}. {way_out}"
        )


def _is_classification(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of ours is of a classification run."""
    return bool(tomllib.loads(content["config"])["training"].get("mode") == "classify")


def _load_published(model: FewShotModel, content: Mapping[str, Any], path: Path) -> None:
    kind = _kind_of(content, path)
    if not isinstance(model.head, kind.head):
        raise CheckpointError(
            f'{path} is a {kind.name} checkpoint, but the head is {type(model.head).__name__}; set head.name = "{kind.head_name}".'
        )
    kind.load_head(model.head, content)
    if isinstance(model.encoder, ClipEncoder):
        hint = f". The published backbone is {kind.backbone}."
        copy_weights(model.encoder.backbone, kind.trunk(content, path), str(path), hint)


def _kind_of(content: Mapping[str, Any], path: Path) -> PublishedFormat:
    inner = content.get("model_state_dict")
    state = inner if isinstance(inner, Mapping) else content
    names = [str(name).replace("module.", "") for name in state]
    for kind in FORMATS:
        if kind.is_kind_of(names):
            return kind
    known = ", ".join(kind.name for kind in FORMATS)
    raise CheckpointError(
        f"{path} is no checkpoint that a run can start from: its tensors begin with {names[:3]}. A run starts from a run of "
        f"ours, or from a published checkpoint of {known}. Weights of a backbone alone are given as [backbone] weights."
    )
