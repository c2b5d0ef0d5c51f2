"""Batch normalisation inside the meta-learner: which uses, which batches, which order."""

from typing import Any

import pytest
import torch

from contracts.head_cases import make_batch, mastaf_head, part
from episodes.episode_norm import BatchMoments, EpisodeBatchNorm
from episodes.heads.mastaf import MastafHead
from episodes.heads.mastaf_attention import MetaLearner

AnyOptions = dict[str, Any]


def norm_of(head: MastafHead) -> EpisodeBatchNorm:
    assert isinstance(head.cam, MetaLearner)
    assert head.cam.norm is not None
    return head.cam.norm


@pytest.mark.parametrize(
    ("n_query", "meta_bn_query", "updates"), [(1, False, 3), (4, True, 4), (4, False, 3)], ids=["one", "many", "off"]
)
def test_running_statistics_are_updated_once_per_normalised_use(
    n_query: int, meta_bn_query: bool, updates: int
) -> None:
    head = mastaf_head(meta_bn_query=meta_bn_query).train()
    head(make_batch(num_episodes=1, n_query=n_query))
    assert int(norm_of(head).num_batches_tracked) == updates
    head(make_batch(num_episodes=3, n_query=n_query))
    assert int(norm_of(head).num_batches_tracked) == 4 * updates


def test_with_one_class_only_the_querys_self_map_is_normalised() -> None:
    batch = make_batch(num_episodes=1, n_way=1)
    head = mastaf_head().train()
    head(batch)
    assert int(norm_of(head).num_batches_tracked) == 1
    head = mastaf_head(meta_bn_query=False).train()
    head(batch)
    assert int(norm_of(head).num_batches_tracked) == 0


def test_normalisation_of_the_querys_self_map_is_never_read_off_a_shape() -> None:
    batch = make_batch(num_episodes=1)
    for meta_bn_query in (False, True):
        head = mastaf_head(meta_bn_query=meta_bn_query).eval()
        torch.testing.assert_close(head(part(batch, queries=slice(2, 3))).logits, head(batch).logits[:, 2:3])
    assert not torch.allclose(
        mastaf_head(meta_bn_query=False)(batch).logits, mastaf_head(meta_bn_query=True)(batch).logits
    )


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"meta_bn": "always"}, {"n_query": 1}),
        ({"meta_bn": "always"}, {"n_way": 1}),
        ({"meta_bn_query": True}, {"n_query": 1}),
    ],
    ids=str,
)
def test_a_single_map_cannot_be_normalised_in_training(options: AnyOptions, sizes: AnyOptions) -> None:
    batch = make_batch(num_episodes=2, **sizes)
    with pytest.raises(ValueError, match="two or more samples per episode, got 1"):
        mastaf_head(**options).train()(batch)
    assert mastaf_head(**options).eval()(batch).logits.isfinite().all()


def test_always_normalises_where_the_reference_does_not() -> None:
    batch = make_batch(num_episodes=1)
    one_class = make_batch(num_episodes=1, n_way=1)
    assert torch.equal(mastaf_head(meta_bn="always").eval()(batch).logits, mastaf_head().eval()(batch).logits)
    always, reference = (mastaf_head(meta_bn=name).eval() for name in ("always", "reference"))
    assert not torch.equal(
        always(one_class, with_maps=True).maps["self_support"],
        reference(one_class, with_maps=True).maps["self_support"],
    )


def test_episode_norm_is_torchs_norm_on_each_episode_in_turn() -> None:
    source = torch.Generator().manual_seed(0)
    uses = [torch.randn(3, size, 4, generator=source, dtype=torch.float64) for size in (5, 2, 7)]
    ours, theirs = EpisodeBatchNorm(4).double(), torch.nn.BatchNorm1d(4).double()
    results = [ours.normalize(use) for use in uses]
    for episode in range(3):
        for use, (found, _) in zip(uses, results, strict=True):
            torch.testing.assert_close(found[episode], theirs(use[episode]))
    moments = [moment for _, moment in results]
    ours.update([moment for moment in moments if isinstance(moment, BatchMoments)])
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours.normalize(uses[0])[0][1], theirs(uses[0][1]))
