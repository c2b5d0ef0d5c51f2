"""The simple metric heads compared with the golden arrays, number by number."""

# Q queries, S supports, N classes; C channels

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from contracts import golden
from contracts.compared import Compared, both_precisions
from episodes.batch import EpisodeBatch
from episodes.build import build_head
from episodes.head import HeadModule
from episodes.heads.feat import FeatHead
from episodes.heads.protonet import ProtonetHead
from episodes.noise import EpisodeNoise
from episodes.shots import class_means, video_vectors

FEAT_PARAMETERS = {
    "feat_w_q": "query.weight",
    "feat_w_k": "key.weight",
    "feat_w_v": "value.weight",
    "feat_w_o": "output.weight",
    "feat_b_o": "output.bias",
    "feat_ln_weight": "norm.weight",
    "feat_ln_bias": "norm.bias",
}


def vector_batch(file: Compared) -> EpisodeBatch:
    """The one episode of a file; vectors become cubes of one position, which want a gradient."""
    support, query = (file.tensor(f"in/{name}")[None, :, :, None, None, None] for name in ("support", "query"))
    labels, query_labels = (file.tensor(f"in/{name}_labels")[None] for name in ("support", "query"))
    n_way = len(file.arrays["out/prototypes"])
    return EpisodeBatch(support.requires_grad_(), labels, query.requires_grad_(), query_labels, n_way)


def evaluated(name: str, file: Compared, batch: EpisodeBatch, **options: Any) -> HeadModule:
    return build_head(name, options, (batch.query.shape[2], 1, 1, 1), None, True).to(file.dtype).eval()


def compare_protonet(file: Compared) -> None:
    batch = vector_batch(file)
    head = evaluated("protonet", file, batch)
    assert isinstance(head, ProtonetHead)
    output = head(batch)
    loss = output.losses["few_shot"].mean()
    file.matches("out/prototypes", head.prototypes(batch))
    file.matches("out/protonet_logits", output.logits)
    file.matches("out/protonet_logp", output.logits.log_softmax(dim=-1))
    file.matches("out/protonet_loss_mean", loss)
    torch.autograd.backward(loss)
    for name, cubes in (("support", batch.support), ("query", batch.query)):
        assert cubes.grad is not None
        file.matches(f"grad/protonet_{name}", cubes.grad)


def compare_cosine(file: Compared) -> None:
    batch = vector_batch(file)
    for array, scale in (("similarity", 1.0), ("logits_scale10", 10.0)):
        head = evaluated("protonet", file, batch, distance="cosine", scale=scale)
        file.matches(f"out/cosine_proto_{array}", head(batch).logits)


def compare_matchingnet(file: Compared) -> None:
    batch = vector_batch(file)
    output = evaluated("matchingnet", file, batch)(batch, with_maps=True)
    file.matches("out/matchingnet_attention", output.maps["support_weights"])
    file.matches("out/matchingnet_prob", output.logits.exp())
    file.matches("out/matchingnet_loss_mean", output.losses["few_shot"].mean())


def compare_feat(file: Compared) -> None:
    batch = vector_batch(file)
    head = evaluated("feat", file, batch, temperature=file.number("const/feat_temperature"))
    assert isinstance(head, FeatHead)
    head.attention.norm.eps = file.number("const/ln_eps")
    head.attention.load_state_dict({ours: file.tensor(f"param/{name}") for name, ours in FEAT_PARAMETERS.items()})
    prototypes = class_means(video_vectors(batch.support), batch)
    output = head(batch)
    file.matches("out/feat_attention", head.attention.weights(prototypes))
    file.matches("out/feat_prototypes", head.attention(prototypes, EpisodeNoise(None)))
    file.matches("out/feat_logits", output.logits)
    file.matches("out/feat_loss_mean", output.losses["few_shot"].mean())


COMPARISONS = [compare_protonet, compare_cosine, compare_matchingnet, compare_feat]


@golden.each_file("metric_heads_")
@both_precisions
@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda each: each.__name__.removeprefix("compare_"))
def test_parity_with_the_formulas(golden_file: Path, dtype: torch.dtype, compare: Callable[[Compared], None]) -> None:
    compare(Compared(golden_file, dtype))


@golden.each_file("metric_heads_")
@both_precisions
def test_parity_leaves_no_array_out(golden_file: Path, dtype: torch.dtype) -> None:
    file = Compared(golden_file, dtype)
    for compare in COMPARISONS:
        compare(file)
    file.assert_all_seen("out", "grad")
