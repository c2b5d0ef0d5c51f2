"""Checkpoints of the released TRX and STRM code, made here with their real names; `test_published_weights.py` has real sizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contracts import golden
from contracts.compared import Compared
from contracts.published_files import as_training_file, filled, strm_shapes, trx_shapes
from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs
from episodes.heads.strm import StrmConfig, StrmHead
from episodes.heads.trx import TrxConfig, TrxHead
from episodes.heads.trx_checkpoint import TrxCheckpointError, load_trx_head, published_head

CHANNELS, STEPS, HIDDEN = 6, 4, 5


def trx_file(**options: Any) -> dict[str, Tensor]:
    return filled(trx_shapes(**{"channels": CHANNELS, "num_steps": STEPS, "hidden": HIDDEN, **options}))


def strm_file(**options: Any) -> dict[str, Tensor]:
    return filled(strm_shapes(**{"channels": CHANNELS, "num_steps": STEPS, "hidden": HIDDEN, **options}))


def trx_head(shape: tuple[int, int, int, int] = (CHANNELS, STEPS, 1, 1), **options: Any) -> TrxHead:
    return TrxHead(TrxConfig(**{"hidden": HIDDEN, **options}), HeadInputs(shape))


def strm_head(shape: tuple[int, int, int, int] = (CHANNELS, STEPS, 7, 7), **options: Any) -> StrmHead:
    return StrmHead(StrmConfig(**{"hidden": HIDDEN, "aux_head": "frozen_random", **options}), HeadInputs(shape))


def snapshot(head: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["bare", "training"])
def test_every_tensor_of_a_trx_file_finds_its_place(tmp_path: Path, is_wrapped: bool) -> None:
    state = {**trx_file(), "resnet.0.weight": torch.zeros(1), "resnet.module.7.2.bn3.bias": torch.zeros(1)}
    torch.save(as_training_file(state) if is_wrapped else state, tmp_path / "checkpoint.pt")
    head = trx_head()
    load_trx_head(head, torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    loaded = head.state_dict()
    assert len(loaded) == len(trx_file())
    for ours, theirs in {
        "transformers.0.positions.table": "transformers.0.pe.pe",
        "transformers.0.key.weight": "transformers.0.k_linear.weight",
        "transformers.1.value.bias": "transformers.1.v_linear.bias",
        "transformers.1.key_norm.weight": "transformers.1.norm_k.weight",
        "transformers.0.value_norm.bias": "transformers.0.norm_v.bias",
    }.items():
        assert torch.equal(loaded[ours], state[theirs]), ours
    # Every tensor of the file holds another number, so nothing was copied twice or left out.
    assert len({float(value.flatten()[0]) for value in loaded.values()}) == len(loaded)


@pytest.mark.parametrize("inner", ["", ".module"])
def test_every_tensor_of_an_strm_file_finds_its_place(inner: str) -> None:
    state = strm_file(inner=inner)
    head = strm_head()
    frozen = {name: value for name, value in snapshot(head).items() if name.startswith("auxiliary")}
    load_trx_head(head, {"model_state_dict": state})
    loaded = head.state_dict()
    for ours, theirs in {
        "patches.gamma": "gamma",
        "patches.positions.table": "pe.pe",
        "patches.query.weight": "query_proj.weight",
        "patches.key.bias": "key_proj.bias",
        "patches.value.weight": "value_conv.weight",
        "patches.mixer.0.weight": "Bot_MLP.inp_fc.weight",
        "patches.mixer.2.bias": "Bot_MLP.hid_fc.bias",
        "patches.mixer.4.weight": "Bot_MLP.out_fc.weight",
    }.items():
        assert torch.equal(loaded[ours], state[f"attn_pat{inner}.{theirs}"]), ours
    for ours, theirs in {
        "frames.positions.table": "pe.pe",
        "frames.time_mixer.0.weight": "Tok_MLP.inp_fc.weight",
        "frames.time_mixer.2.bias": "Tok_MLP.out_fc.bias",
        "frames.channel_mixer.0.bias": "Bot_MLP.inp_fc.bias",
        "frames.channel_mixer.2.weight": "Bot_MLP.out_fc.weight",
    }.items():
        assert torch.equal(loaded[ours], state[f"fr_enrich{inner}.{theirs}"]), ours
    # What published files lack stays as drawn.
    assert all(torch.equal(loaded[name], value) for name, value in frozen.items())
    assert len({float(value.flatten()[0]) for value in loaded.values()}) == len(loaded)


@golden.each_file("strm_")
def test_published_strm_file_gives_the_golden_tuple_logits_parity(golden_file: Path) -> None:
    # A real file has no auxiliary projections; what they do not touch is as in the golden arrays.
    file = Compared(golden_file, torch.float64)
    tensors = {**file.group("param"), **file.group("buffer")}
    state = {name: value for name, value in tensors.items() if not name.startswith("new_dist_loss")}
    state = {
        name.replace(".", ".module.", 1) if name.startswith(("attn_pat", "fr_enrich")) else name: value
        for name, value in state.items()
    }
    support, query = (file.tensor(f"in/{name}").transpose(1, 2)[None] for name in ("support", "query"))
    labels = file.tensor("in/support_labels")[None]
    batch = EpisodeBatch(support, labels, query, None, int(labels.max()) + 1, seeds=torch.tensor([5]))
    channels, steps, height, width = query.shape[2:]
    hidden, cardinalities = len(tensors["transformers.0.k_linear.bias"]), file.arrays["const/temp_set"].tolist()
    head = strm_head((channels, steps, height, width), hidden=hidden, cardinalities=cardinalities).double().eval()
    load_trx_head(head, as_training_file(state))
    tuples = head.stages(batch).tuples
    for each, cardinality in zip(tuples, cardinalities, strict=True):
        file.matches(f"out/logits_card{cardinality}", each.logits)


def test_tables_of_another_number_of_frames_stay_ours() -> None:
    head = trx_head((CHANNELS, 6, 1, 1))
    before = snapshot(head)
    load_trx_head(head, trx_file())
    after = head.state_dict()
    assert torch.equal(after["transformers.0.positions.table"], before["transformers.0.positions.table"])
    assert torch.equal(after["transformers.0.key.weight"], trx_file()["transformers.0.k_linear.weight"])


@pytest.mark.parametrize(
    ("head", "state", "message"),
    [
        (trx_head(cardinalities=[2]), trx_file(), r"2 tuple transformers.*head\.cardinalities = \[2\]"),
        (trx_head(hidden=7), trx_file(), r"set head\.hidden = 5 \(here 7\)"),
        (trx_head((9, STEPS, 1, 1)), trx_file(), r"takes 12 numbers per tuple.*18 \(2 frames of 9 channels\)"),
        (trx_head(cardinalities=[3, 2]), trx_file(), r"takes 12 numbers.*18 \(3 frames.*cardinalities in its order"),
        (trx_head(cardinalities=[2]), strm_file(), r"frames\.\w.*TRX head here has no place"),
        (strm_head(), trx_file(cardinalities=[2]), r"lacks frames\..*no published STRM checkpoint"),
        (strm_head((CHANNELS, 6, 7, 7)), strm_file(), r"is for 4 frames.*\(6, 6, 7, 7\).*sampling\.num_frames"),
        (strm_head(aux_head="trained"), strm_file(), r'no auxiliary projections.*head\.aux_head = "frozen_random"'),
    ],
    ids=["cardinalities", "hidden", "channels", "order", "strm in trx", "trx in strm", "frames", "auxiliary"],
)
def test_another_size_is_one_clear_error_and_copies_nothing(
    head: TrxHead | StrmHead, state: Mapping[str, Tensor], message: str
) -> None:
    before = snapshot(head)
    with pytest.raises(TrxCheckpointError, match=message) as caught:
        load_trx_head(head, state)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_auxiliary_projections_that_weigh_nothing_may_be_missing() -> None:
    load_trx_head(strm_head(aux_head="trained", aux_weight=0.0), strm_file())


def test_a_damaged_shape_is_named_before_anything_is_copied() -> None:
    head, state = trx_head(), trx_file()
    before = snapshot(head)
    state["transformers.1.norm_v.bias"] = torch.zeros(7)
    with pytest.raises(TrxCheckpointError, match=r"transformers\.1\.value_norm\.bias is \(7,\) in .*\(5,\) here"):
        load_trx_head(head, state)
    state["transformers.1.norm_v.bias"] = torch.zeros(1).expand(2**34)
    with pytest.raises(TrxCheckpointError, match="17179869184"):
        load_trx_head(head, state)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer1.0.conv1.weight": torch.zeros(1)}, r"'layer1\.0\.conv1\.weight'.*resnet\.\* and transformers\.\*"),
        ({"transformers.0.q_linear.weight": torch.zeros(1)}, "q_linear"),
        ({"transformers.0.k_linear.running_mean": torch.zeros(1)}, "running_mean"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({"model_state_dict": [1]}, "model_state_dict is a list"),
    ],
)
def test_another_checkpoint_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrxCheckpointError, match=message):
        published_head({**trx_file(), **change})


def test_missing_tensors_are_named() -> None:
    state = trx_file()
    del state["transformers.1.v_linear.bias"]
    with pytest.raises(TrxCheckpointError, match=r"lacks transformers\.1\.value\.bias"):
        load_trx_head(trx_head(), state)
