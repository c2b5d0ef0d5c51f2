"""STRM compared with the golden arrays, number by number, by way of the checkpoint import."""

# E episodes (1 here), S supports, Q queries, N classes; C channels, T time steps, H W grid; L patches

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from contracts import golden
from contracts.compared import Compared, both_precisions
from contracts.tuple_heads import golden_videos, published_gradients
from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs
from episodes.heads.sine_table import sine_table
from episodes.heads.strm import StrmConfig, StrmHead
from episodes.heads.trx import mean_logits
from episodes.heads.trx_checkpoint import load_trx_head
from episodes.losses import combine

SMALL_PLACES = {"attn_pat.pe.pe": 16}


def strm_head(
    file: Compared, aux_head: Literal["trained", "frozen_random"] = "trained", factored: bool = True
) -> StrmHead:
    """The head of a file, in evaluation mode, since dropout is inactive there (frozen projections: share 0)."""
    num_steps, channels, height, width = file.arrays["in/query"].shape[1:]
    config = StrmConfig(
        cardinalities=tuple(file.arrays["const/temp_set"].tolist()),
        hidden=len(file.arrays["param/transformers.0.k_linear.bias"]),
        aux_weight=round(file.number("const/patch_loss_weight"), 6),
        aux_head=aux_head,
        dropout=0.0,
        factored=factored,
    )
    head = StrmHead(config, HeadInputs((channels, num_steps, height, width))).to(file.dtype).eval()
    load_trx_head(head, {**file.group("param"), **file.group("buffer")})
    return head


def strm_batch(file: Compared, videos: dict[str, Tensor]) -> EpisodeBatch:
    """The one episode of a file; its maps are (videos, T, C, H, W)."""
    support, query = (videos[name].transpose(1, 2)[None] for name in ("support", "query"))
    labels = file.tensor("in/support_labels")
    n_way = int(labels.max()) + 1
    return EpisodeBatch(support, labels[None], query, file.tensor("in/query_labels")[None], n_way)


def compare_stages(file: Compared, head: StrmHead, batch: EpisodeBatch) -> None:
    stages = head.stages(batch)
    for name in ("support", "query"):
        enriched = getattr(stages, name)
        file.matches(f"out/patches_{name}", head.patches.tokens(getattr(batch, name)))
        file.matches(f"out/patch_enriched_{name}", enriched.frames)
        file.matches(f"out/frame_enriched_{name}", getattr(stages.frames, name))
    file.matches("out/patch_enriched_tokens_query", stages.query.tokens)
    for index, cardinality in enumerate(head.config.cardinalities):
        file.matches(f"out/logits_card{cardinality}", stages.tuples[index].logits)
        file.matches(f"out/logits_post_pat_card{cardinality}", stages.auxiliary[index])
    file.matches("out/logits", mean_logits(each.logits for each in stages.tuples))
    file.matches("out/logits_post_pat", mean_logits(stages.auxiliary))


@golden.each_file("strm_")
@both_precisions
def test_strm_parity_with_the_released_code(golden_file: Path, dtype: torch.dtype) -> None:
    for factored in (True, False):
        file = Compared(golden_file, dtype)
        head, videos = strm_head(file, factored=factored), golden_videos(file)
        batch = strm_batch(file, videos)
        compare_stages(file, head, batch)
        output = head(batch)
        file.matches("out/logits_combined", output.logits)
        file.matches("out/loss_frame_sum", output.losses["few_shot"].sum())
        file.matches("out/loss_patch_sum", output.losses["patch"].sum())
        total = combine(output.losses, head.loss_weights, "sum").sum()
        file.matches("out/loss_total", total)
        torch.autograd.backward(total)
        for name, gradient in published_gradients(file, head, videos).items():
            file.matches(f"grad/{name}", gradient)
        file.assert_all_seen("out", "grad")


@golden.each_file("strm_")
@both_precisions
def test_frozen_projections_without_dropout_give_the_same_numbers_parity(golden_file: Path, dtype: torch.dtype) -> None:
    file = Compared(golden_file, dtype)
    head, videos = strm_head(file, "frozen_random"), golden_videos(file)
    assert not [name for name, _ in head.named_parameters() if name.startswith("auxiliary")]
    batch = strm_batch(file, videos)
    output = head(batch)
    file.matches("out/logits_combined", output.logits)
    # What is not trained still passes gradients on.
    torch.autograd.backward(combine(output.losses, head.loss_weights, "sum").sum())
    for name, values in videos.items():
        assert values.grad is not None
        file.matches(f"grad/{name}", values.grad)


@golden.each_file("strm_")
def test_positional_tables_have_the_published_lengths_and_numbers_parity(golden_file: Path) -> None:
    # Computed in single precision there, so they are compared in single precision.
    file = Compared(golden_file, torch.float32)
    num_steps, channels = file.arrays["in/query"].shape[1:3]
    for name in file.group("buffer"):
        num_places = SMALL_PLACES.get(name, num_steps)
        file.matches(f"buffer/{name}", sine_table(int(1.5 * num_places), channels))
    file.assert_all_seen("buffer")


@golden.each_file("strm_")
def test_attention_maps_are_those_that_make_the_tokens_parity(golden_file: Path) -> None:
    file = Compared(golden_file, torch.float64)
    head, videos = strm_head(file), golden_videos(file)
    batch = strm_batch(file, videos)
    maps = head(batch, with_maps=True).maps
    stages = head.stages(batch)
    patches = head.patches
    placed = patches.positions(patches.tokens(batch.query))
    attended = patches.gamma * (stages.query.attention @ patches.value(placed)) + placed
    file.matches("out/patch_enriched_tokens_query", attended + patches.mixer(attended))
    assert maps["patch_query"].shape == (*batch.query.shape[:2], batch.query.shape[3], 4, 4)
    assert maps["patch_query"].sum(dim=(-2, -1)).detach().numpy() == pytest.approx(1.0)
