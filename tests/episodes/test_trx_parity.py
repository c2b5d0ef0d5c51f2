"""TRX compared with the golden arrays, number by number, by way of the checkpoint import."""

# E episodes (1 here), S supports, Q queries, N classes; C channels, T time steps

from pathlib import Path

import torch
from torch import Tensor

from contracts import golden
from contracts.compared import Compared, both_precisions
from contracts.tuple_heads import golden_videos, published_gradients
from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs
from episodes.heads.sine_table import sine_table
from episodes.heads.trx import TrxConfig, TrxHead, TupleTransformer, mean_logits
from episodes.heads.trx_checkpoint import load_trx_head
from episodes.losses import combine


def trx_head(file: Compared, factored: bool = True) -> TrxHead:
    """The head of a file, in evaluation mode, since dropout is inactive there."""
    num_steps, channels = file.arrays["in/query"].shape[1:]
    config = TrxConfig(
        cardinalities=tuple(file.arrays["const/temp_set"].tolist()),
        hidden=len(file.arrays["param/transformers.0.k_linear.bias"]),
        factored=factored,
    )
    head = TrxHead(config, HeadInputs((channels, num_steps, 1, 1))).to(file.dtype).eval()
    load_trx_head(head, {**file.group("param"), **file.group("buffer")})
    for transformer in head.transformers:
        assert isinstance(transformer, TupleTransformer)
        assert transformer.key_norm.eps == round(file.number("const/ln_eps"), 9)
    return head


def trx_batch(file: Compared, videos: dict[str, Tensor]) -> EpisodeBatch:
    """The one episode of a file, each frame a map of one position."""
    support, query = (videos[name].transpose(1, 2)[None, ..., None, None] for name in ("support", "query"))
    labels = file.tensor("in/support_labels")
    n_way = int(labels.max()) + 1
    return EpisodeBatch(support, labels[None], query, file.tensor("in/query_labels")[None], n_way)


@golden.each_file("trx_")
@both_precisions
def test_trx_parity_with_the_released_code(golden_file: Path, dtype: torch.dtype) -> None:
    for factored in (True, False):
        file = Compared(golden_file, dtype)
        head, videos = trx_head(file, factored), golden_videos(file)
        batch = trx_batch(file, videos)
        scores = head.tuple_scores(batch)
        for cardinality, each in zip(head.config.cardinalities, scores, strict=True):
            file.matches(f"out/logits_card{cardinality}", each.logits)
        file.matches("out/logits", mean_logits(each.logits for each in scores))
        output = head(batch)
        file.matches("out/logits", output.logits)
        loss = combine(output.losses, head.loss_weights, "sum").sum()
        file.matches("out/loss_sum", loss)
        torch.autograd.backward(loss)
        for name, gradient in published_gradients(file, head, videos).items():
            file.matches(f"grad/{name}", gradient)
        file.assert_all_seen("out", "grad")


@golden.each_file("trx_")
def test_positional_table_has_the_published_length_and_numbers_parity(golden_file: Path) -> None:
    # Computed in single precision there, so it is compared in single precision.
    file = Compared(golden_file, torch.float32)
    num_steps, channels = file.arrays["in/query"].shape[1:]
    for name in file.group("buffer"):
        file.matches(f"buffer/{name}", sine_table(int(1.5 * num_steps), channels))
    file.assert_all_seen("buffer")


@golden.each_file("trx_")
@both_precisions
def test_trx_parity_does_not_depend_on_the_order_of_supports(golden_file: Path, dtype: torch.dtype) -> None:
    file = Compared(golden_file, dtype)
    head, videos = trx_head(file), golden_videos(file)
    batch = trx_batch(file, videos)
    order = torch.randperm(batch.support.shape[1], generator=torch.Generator().manual_seed(3))
    shuffled = EpisodeBatch(
        batch.support[:, order], batch.support_labels[:, order], batch.query, batch.query_labels, batch.n_way
    )
    file.matches("out/logits", head(shuffled).logits)
