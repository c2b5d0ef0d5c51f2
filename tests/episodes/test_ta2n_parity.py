"""TA2N compared with the golden arrays, number by number."""

# E episodes (1 here), N classes, M queries; C channels, T time steps, H W grid

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from contracts import golden
from contracts.compared import Compared, both_modes, both_precisions
from episodes.batch import EpisodeBatch
from episodes.episode_norm import EpisodeBatchNorm
from episodes.head import HeadInputs
from episodes.heads.ta2n import TA2NHead, TA2NOptions
from episodes.heads.ta2n_alignment import TemporalSpatialAlignment
from episodes.heads.ta2n_checkpoint import published_alignment
from episodes.heads.ta2n_coordination import OFFSET_SCALE, ActionCoordination
from episodes.heads.ta2n_masks import PERTURBATIONS, window
from episodes.heads.ta2n_softdtw import soft_dtw
from episodes.heads.ta2n_temporal import TemporalTransformation

both_forms = pytest.mark.parametrize("is_factored", [True, False], ids=["factored", "published"])


def published(file: Compared, stage: str) -> dict[str, Tensor]:
    """Parameters and buffers of a file by the names of a published checkpoint; `stage` is what they belong to."""
    tensors = {**file.group("param"), **file.group("buffer")}
    return {f"align.{stage}{name}": value for name, value in tensors.items()}


def of_part(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Our tensors of one part of the alignment, by their names within it."""
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}


def load(module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    found = module.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in found.missing_keys)


def match_gradients(file: Compared, module: torch.nn.Module, stage: str = "", part: str = "") -> None:
    """Every stored gradient of a parameter, found by way of the published name."""
    owners = dict(module.named_parameters())
    for name in golden.group(file.arrays, "grad"):
        if name.endswith((".weight", ".bias")):
            (ours,) = published_alignment({f"align.{stage}{name}": torch.zeros(1)})
            owner = owners[ours.removeprefix(f"{part}.")]
            # One shot leaves the fusion out.
            file.matches(f"grad/{name}", torch.zeros_like(owner) if owner.grad is None else owner.grad)


def match_running_statistics(file: Compared, module: torch.nn.Module, stage: str, part: str) -> None:
    buffers = dict(module.named_buffers())
    for name in golden.group(file.arrays, "buffer_after_train"):
        (ours,) = published_alignment({f"align.{stage}{name}": torch.zeros(1)})
        file.matches(f"buffer_after_train/{name}", buffers[ours.removeprefix(f"{part}.")])


@golden.each_file("ta2n_ttm")
@both_precisions
@both_modes
def test_temporal_transformation_parity(golden_file: Path, dtype: torch.dtype, mode: str) -> None:
    file = Compared(golden_file, dtype)
    features = file.tensor("in/features").requires_grad_()
    state = of_part(published_alignment(published(file, "firststage.")), "temporal")
    widths = tuple(len(state[f"network.{layer}.bias"]) for layer in ("first", "second", "hidden"))
    assert len(widths) == 3
    stage = TemporalTransformation(features.shape[1], widths, None).to(dtype)
    load(stage, state)
    for norm in stage.modules():
        if isinstance(norm, EpisodeBatchNorm):
            norm.eps, norm.momentum = file.number("const/bn_eps"), file.number("const/bn_momentum")
    warped = stage.train(mode == "train")(features[None])
    file.matches(f"out_{mode}/aligned", warped.cubes)
    file.matches(f"out_{mode}/theta", warped.warp)
    if mode == "eval":
        loss = (warped.cubes[0] * file.tensor("in/probe_weights")).sum()
        file.matches("out_eval/probe_loss", loss)
        torch.autograd.backward(loss)
        assert features.grad is not None
        file.matches("grad/input", features.grad)
        match_gradients(file, stage, "firststage.", "temporal")
        file.assert_all_seen("out_eval", "grad")
    else:
        stage.network.update([warped.moments])
        match_running_statistics(file, stage, "firststage.", "temporal")
        file.assert_all_seen("out_train", "buffer_after_train")


@golden.each_file("ta2n_acm")
@both_precisions
@both_modes
@both_forms
def test_action_coordination_parity(golden_file: Path, dtype: torch.dtype, mode: str, is_factored: bool) -> None:
    file = Compared(golden_file, dtype)
    support, query = (file.tensor(f"in/{name}").requires_grad_() for name in ("support", "query"))
    state = of_part(published_alignment(published(file, "secondstage.")), "coordination")
    widths = tuple(len(state[f"network.{layer}.bias"]) for layer in ("first", "second", "hidden"))
    assert len(widths) == 3
    stage = ActionCoordination(support.shape[1], widths, is_factored=is_factored, generator=None).to(dtype)
    load(stage, state)
    pair = stage.train(mode == "train")(support[None], query[None], perturb=True)
    pooled = torch.cat([pair.support, pair.query], dim=-1).transpose(-1, -2)  # (1, N, M, 2C, T)
    distance = (1.0 - torch.nn.functional.cosine_similarity(pair.support, pair.query, dim=-1)).sum(dim=-1)
    file.matches(f"out_{mode}/pairs", pooled)
    file.matches(f"out_{mode}/offsets", pair.offsets)
    file.matches(f"out_{mode}/timewise_cos_distance", distance)
    if mode == "train":
        stage.network.update([pair.moments])
        match_running_statistics(file, stage, "secondstage.", "coordination")
        file.assert_all_seen("out_train", "buffer_after_train")
        return
    file.matches("out_eval/support_projected", support + pair.support_shift[0].transpose(-1, -2)[..., None, None])
    aligned = query + pair.query_shift[0].transpose(-1, -2)[..., None, None]  # (N, M, C, T, H, W)
    file.matches("out_eval/query_aligned", aligned)
    torch.autograd.backward((distance[0] * file.tensor("in/probe_weights")).sum())
    for name, cubes in (("support", support), ("query", query)):
        assert cubes.grad is not None
        file.matches(f"grad/{name}", cubes.grad)
    match_gradients(file, stage, "secondstage.", "coordination")
    file.assert_all_seen("out_eval", "grad", without=("out_eval/mask_probe",))


@golden.each_file("ta2n_acm")
@both_precisions
def test_region_windows_parity(golden_file: Path, dtype: torch.dtype) -> None:
    file = Compared(golden_file, dtype)
    offsets = file.tensor("in/mask_probe_offsets")
    height, width = file.arrays["out_eval/mask_probe"].shape[-2:]
    file.matches(
        "out_eval/mask_probe", window(offsets[:, 1], height)[:, :, None] * window(offsets[:, 0], width)[:, None]
    )
    # The mean over the perturbations does not know their order.
    published_shifts, ours = (
        np.round(np.asarray(each, dtype=np.float64), 6).tolist()
        for each in (file.arrays["const/perturb"], PERTURBATIONS)
    )
    assert sorted(ours) == sorted(published_shifts)
    assert pytest.approx(file.number("const/offset_scale")) == OFFSET_SCALE


def full_head(file: Compared, mode: str, *, is_factored: bool = True) -> TA2NHead:
    """The head of a full file, with the stage parameters that lie beside it."""
    directory = file.path.parent
    stages = {name: Compared(directory / f"ta2n_{name}.npz", file.dtype) for name in ("ttm", "acm")}
    state = published_alignment(
        published(stages["ttm"], "firststage.") | published(stages["acm"], "secondstage.") | published(file, "")
    )
    temporal, offset = (
        tuple(len(state[f"{part}.network.{layer}.bias"]) for layer in ("first", "second", "hidden"))
        for part in ("temporal", "coordination")
    )
    config = TA2NOptions.model_validate(
        {"dropout": 0.0, "temporal_channels": temporal, "offset_channels": offset, "factored": is_factored}
    )
    channels, steps, height, width = file.arrays["in/query"].shape[1:]
    head = TA2NHead(config, HeadInputs((channels, steps, height, width))).to(file.dtype)
    load(head.alignment, state)
    return head.train(mode == "train")


def full_batch(file: Compared) -> EpisodeBatch:
    """The one episode of a full file: supports class by class, inputs that want a gradient."""
    way, shot = int(file.number("const/way")), int(file.number("const/shot"))
    return EpisodeBatch(
        file.tensor("in/support")[None].requires_grad_(),
        torch.arange(way).repeat_interleave(shot)[None],
        file.tensor("in/query")[None].requires_grad_(),
        file.tensor("in/query_labels")[None],
        way,
    )


@golden.each_file("ta2n_full_")
@both_precisions
@both_modes
@both_forms
def test_head_parity(golden_file: Path, dtype: torch.dtype, mode: str, is_factored: bool) -> None:
    file = Compared(golden_file, dtype)
    head, batch = full_head(file, mode, is_factored=is_factored), full_batch(file)
    output = head(batch, with_maps=True)
    file.matches(f"out_{mode}/logits", output.logits)
    file.matches(f"out_{mode}/loss_sum", output.losses["few_shot"].sum())
    file.matches(f"out_{mode}/theta_support", output.maps["warp_support"])
    file.matches(f"out_{mode}/theta_query", output.maps["warp_query"])
    file.matches(f"out_{mode}/offsets", output.maps["offset"].transpose(1, 2))
    if mode == "eval":
        torch.autograd.backward(output.losses["few_shot"].sum())
        for name, cubes in (("support", batch.support), ("query", batch.query)):
            assert cubes.grad is not None
            file.matches(f"grad/{name}", cubes.grad)
        match_gradients(file, head.alignment)
        file.assert_all_seen("grad")
    made_alone = {f"out_{mode}/pairs", "out_eval/prototype"} & set(file.arrays)
    file.assert_all_seen(f"out_{mode}", without=tuple(name for name in made_alone if name.startswith(f"out_{mode}")))


@golden.each_file("ta2n_full_")
@both_precisions
@both_modes
def test_alignment_alone_gives_pairs_and_offsets_parity(golden_file: Path, dtype: torch.dtype, mode: str) -> None:
    file = Compared(golden_file, dtype)
    head, batch = full_head(file, mode), full_batch(file)
    align: TemporalSpatialAlignment = head.alignment
    pairs, offsets = align(batch.support[0], batch.query[0], int(file.number("const/shot")))
    expected = file.arrays[f"out_{mode}/pairs"]
    assert tuple(pairs.shape) == expected.shape
    assert tuple(offsets.shape) == file.arrays[f"out_{mode}/offsets"].shape
    file.matches(f"out_{mode}/pairs", pairs)
    file.matches(f"out_{mode}/offsets", offsets)
    if "out_eval/prototype" in file.arrays and mode == "eval":
        shots = torch.arange(len(batch.support[0])).reshape(1, batch.n_way, -1)
        warped = align.temporal(batch.support).cubes[:, shots[0]]
        file.matches("out_eval/prototype", align.fusion(warped, torch.ones_like(shots, dtype=torch.bool)))


@golden.each_file("ta2n_softdtw")
@both_precisions
def test_soft_dtw_parity(golden_file: Path, dtype: torch.dtype) -> None:
    file = Compared(golden_file, dtype)
    for name in golden.group(file.arrays, "out"):
        gamma = name.removeprefix("distance_gamma")
        first, second = (file.tensor(f"in/{letter}").requires_grad_() for letter in ("x", "y"))
        cost = soft_dtw(first, second, float(gamma))
        file.matches(f"out/{name}", cost)
        torch.autograd.backward(cost.sum())
        for letter, sequence in (("x", first), ("y", second)):
            assert sequence.grad is not None
            file.matches(f"grad/{letter}_gamma{gamma}", sequence.grad)
    file.assert_all_seen("out", "grad")
