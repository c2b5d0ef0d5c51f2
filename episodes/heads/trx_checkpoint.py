"""Reads the training checkpoints of the released TRX and STRM code into our heads.

Code consulted: https://github.com/tobyperrett/trx, commit 390c20a; https://github.com/Anirudh257/strm, commit 54368fe. Their
files hold a backbone (`resnet.*`), the tuple transformers (`transformers.*`) and, of STRM, the enrichments (`attn_pat.*`,
`fr_enrich.*`), some with an extra `.module` when trained on several GPUs; alone, or as `model_state_dict` beside the
optimiser's state. STRM's auxiliary projections (`new_dist_loss_post_pat.*`) were never registered, so its files lack them.
"""

# C channels, T time steps, M frames of a tuple, D width of keys and values

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from episodes.heads.strm import StrmHead
from episodes.heads.trx import TrxHead, TupleTransformer

# Published layer -> ours.
_TUPLE_LAYERS = {
    "pe.pe": "positions.table",
    "k_linear": "key",
    "v_linear": "value",
    "norm_k": "key_norm",
    "norm_v": "value_norm",
}
_STRM_LAYERS = {
    "attn_pat.pe.pe": "patches.positions.table",
    "attn_pat.gamma": "patches.gamma",
    "attn_pat.query_proj": "patches.query",
    "attn_pat.key_proj": "patches.key",
    "attn_pat.value_conv": "patches.value",
    "attn_pat.Bot_MLP.inp_fc": "patches.mixer.0",
    "attn_pat.Bot_MLP.hid_fc": "patches.mixer.2",
    "attn_pat.Bot_MLP.out_fc": "patches.mixer.4",
    "fr_enrich.pe.pe": "frames.positions.table",
    "fr_enrich.Tok_MLP.inp_fc": "frames.time_mixer.0",
    "fr_enrich.Tok_MLP.out_fc": "frames.time_mixer.2",
    "fr_enrich.Bot_MLP.inp_fc": "frames.channel_mixer.0",
    "fr_enrich.Bot_MLP.out_fc": "frames.channel_mixer.2",
}
_NUMBERED = re.compile(r"(transformers|new_dist_loss_post_pat)\.(\d+)\.(.+)")
_TABLE = "positions.table"
_AUXILIARY = "auxiliary."
_FIRST_KEY = "transformers.0.key.weight"
_FIRST_TIME_LAYER = "frames.time_mixer.0.weight"


class TrxCheckpointError(ValueError):
    """The checkpoint is not a published one, or does not fit the head."""


def load_trx_head(head: TrxHead | StrmHead, content: Mapping[str, Any]) -> None:
    """Copy the head of a published checkpoint of TRX or STRM; nothing is copied when a shape differs.

    Args:
        head: a TRX head for a TRX checkpoint, an STRM head for an STRM checkpoint. Auxiliary projections that the file lacks
            stay as drawn where they are `frozen_random`.
        content: a bare state dict, or the dict of a training checkpoint with its `model_state_dict`.

    Raises:
        TrxCheckpointError: another kind of checkpoint, a missing tensor, or another size.
    """
    given = published_head(content)
    current = head.state_dict()
    # A table is a formula of place and channel: where ours is for another number of frames, ours stays.
    given = {
        name: value
        for name, value in given.items()
        if not (name.endswith(_TABLE) and _other_length(value, current, name))
    }
    _check_sizes(head, given)
    _check_names(head, given, current)
    for name, value in given.items():
        if value.shape != current[name].shape:
            raise TrxCheckpointError(
                f"{name} is {tuple(value.shape)} in the checkpoint, {tuple(current[name].shape)} here"
            )
    head.load_state_dict({**current, **given})


def published_head(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a published checkpoint by our names, without its backbone."""
    state = content.get("model_state_dict", content)
    if not isinstance(state, Mapping):
        raise TrxCheckpointError(f"model_state_dict is a {type(state).__name__}, but a state dict is needed")
    given: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TrxCheckpointError(f"entry {key!r} is a {type(value).__name__}: this is no published checkpoint")
        name = str(key).removeprefix("module.").replace(".module.", ".")
        if name.startswith("resnet."):
            continue
        ours = _our_name(name)
        if ours is None:
            raise TrxCheckpointError(
                f"the checkpoint has a tensor {key!r}; a published TRX checkpoint has resnet.* and transformers.* only, an "
                "STRM checkpoint attn_pat.* and fr_enrich.* as well"
            )
        given[ours] = value
    return given


def _our_name(name: str) -> str | None:
    found = _NUMBERED.fullmatch(name)
    if found is None:
        return _renamed(name, _STRM_LAYERS)
    part, number, rest = found.groups()
    is_tuple = part == "transformers"
    inner = _renamed(rest, _TUPLE_LAYERS if is_tuple else {"clsW": "projection"})
    return inner and f"{part if is_tuple else 'auxiliary'}.{number}.{inner}"


def _renamed(name: str, layers: Mapping[str, str]) -> str | None:
    """A layer's own name, or that of its weight or bias, in our words; None where no layer has it."""
    layer, _, kind = name.rpartition(".")
    if name in layers:
        return layers[name]
    return f"{layers[layer]}.{kind}" if layer in layers and kind in ("weight", "bias") else None


def _other_length(table: Tensor, current: Mapping[str, Tensor], name: str) -> bool:
    return name in current and table.ndim == 3 and table.shape[1] != current[name].shape[1]


def _check_sizes(head: TrxHead | StrmHead, given: Mapping[str, Tensor]) -> None:
    """The usual mismatches, each with the option that answers it."""
    count = len({name.split(".")[1] for name in given if name.startswith("transformers.")})
    cardinalities = list(head.config.cardinalities)
    if count != len(cardinalities):
        raise TrxCheckpointError(
            f"the checkpoint has {count} tuple transformers, one for each cardinality it was trained with, but here "
            f"head.cardinalities = {cardinalities}; the released settings are [2, 3] for TRX and [2] for STRM"
        )
    for index, (transformer, cardinality) in enumerate(zip(head.transformers, cardinalities, strict=True)):
        assert isinstance(transformer, TupleTransformer)
        key = given.get(_FIRST_KEY.replace("0", str(index), 1))
        if key is None or key.ndim != 2:
            continue
        hidden, columns = key.shape
        if hidden != head.config.hidden:
            raise TrxCheckpointError(
                f"the checkpoint's keys have {hidden} numbers; set head.hidden = {hidden} (here {head.config.hidden})"
            )
        if columns != transformer.key.in_features:
            raise TrxCheckpointError(
                f"transformer {index} of the checkpoint takes {columns} numbers per tuple, but here they are "
                f"{transformer.key.in_features} ({cardinality} frames of {head.cube_shape[0]} channels); use its backbone, and "
                "head.cardinalities in its order"
            )
    time_layer = given.get(_FIRST_TIME_LAYER)
    if isinstance(head, StrmHead) and time_layer is not None and len(time_layer) != head.cube_shape[1]:
        raise TrxCheckpointError(
            f"the checkpoint is for {len(time_layer)} frames, but here a cube is {head.cube_shape} ({head.cube_shape[1]} time "
            "steps), and STRM's layer over time has one size; use its sampling.num_frames"
        )


def _check_names(head: TrxHead | StrmHead, given: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    """Refuse tensors that the head has no place for, or that it lacks."""
    kind = "STRM" if isinstance(head, StrmHead) else "TRX"
    unknown = sorted(set(given) - set(current))
    if unknown:
        raise TrxCheckpointError(
            f"the checkpoint holds {', '.join(unknown[:3])}, which the {kind} head here has no place for"
        )
    missing = sorted(name for name in set(current) - set(given) if not name.endswith(_TABLE))
    if isinstance(head, StrmHead) and not any(name.startswith(_AUXILIARY) for name in given):
        if head.config.aux_head == "trained" and head.config.aux_weight > 0.0:
            raise TrxCheckpointError(
                "the checkpoint has no auxiliary projections (the released code never trained or saved them); set "
                'head.aux_head = "frozen_random" to score as it did, or head.aux_weight = 0'
            )
        missing = [name for name in missing if not name.startswith(_AUXILIARY)]
    if missing:
        raise TrxCheckpointError(
            f"the checkpoint lacks {', '.join(missing[:3])} (our names): it is no published {kind} checkpoint"
        )
