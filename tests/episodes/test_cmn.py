"""CMN compared with a plain loop over frames, saliencies and slots; its memory writes; its options."""

# E episodes, S supports, Q queries, N classes, M saliencies

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contracts.head_cases import HeadCase, make_batch, make_head, reordered
from episodes.batch import EpisodeBatch
from episodes.build import HEADS, build_head
from episodes.head import HeadOutput
from episodes.heads.cmn import CmnHead

SHAPE = (6, 3, 2, 2)


def cmn(**options: Any) -> CmnHead:
    head = make_head(HeadCase("cmn", options), SHAPE)
    assert isinstance(head, CmnHead)
    return head


def plain_keys(head: CmnHead, video: Tensor) -> Tensor:
    """Constituent keys (M, C) of one cube (C, T, H, W)."""
    if head.config.frames == "time_steps":
        frames = [video[:, step].mean(dim=(1, 2)) for step in range(video.shape[1])]
    else:
        frames = list(video.flatten(1).T)
    rows = torch.zeros_like(head.saliencies)
    for frame in frames:
        weights = torch.softmax(head.saliencies @ frame / math.sqrt(len(frame)), dim=0)
        for index, saliency in enumerate(head.saliencies):
            rows[index] += weights[index] * (frame - saliency)
    return F.normalize(rows, dim=1)


def plain_similarity(head: CmnHead, first: Tensor, second: Tensor) -> Tensor:
    if head.abstract is None:
        return F.cosine_similarity(first, second, dim=1).mean()
    return F.cosine_similarity(head.abstract(first.flatten()), head.abstract(second.flatten()), dim=0)


def plain_slots(head: CmnHead, batch: EpisodeBatch, episode: int) -> list[tuple[int, Tensor]]:
    """Label and keys of each slot of one episode, written in the order of the video ids."""
    assert batch.support_order is not None
    slots: list[tuple[int, Tensor]] = []
    for place in batch.support_order[episode].argsort().tolist():
        label = int(batch.support_labels[episode, place])
        if label < 0:
            continue
        keys = plain_keys(head, batch.support[episode, place])
        if head.config.writing == "merge" and slots:
            best = int(torch.stack([plain_similarity(head, keys, stored) for _, stored in slots]).argmax())
            if slots[best][0] == label:
                slots[best] = (label, F.normalize(slots[best][1] + keys, dim=1))
                continue
        slots.append((label, keys))
    return slots


@pytest.mark.parametrize("reading", ["abstract", "constituent"])
@pytest.mark.parametrize("frames", ["time_steps", "positions"])
@pytest.mark.parametrize("writing", ["slots", "merge"])
def test_equals_a_plain_loop_over_slots(reading: str, frames: str, writing: str) -> None:
    head = cmn(reading=reading, frames=frames, writing=writing, num_saliencies=3)
    batch = make_batch(k_shot=3, cube_shape=SHAPE, noise=0.3)
    batch = replace(batch, support=batch.support - 0.6, query=batch.query - 0.6)
    output: HeadOutput = head(batch)
    assert batch.query_labels is not None
    for episode in range(2):
        slots = plain_slots(head, batch, episode)
        for index, (video, true) in enumerate(
            zip(batch.query[episode], batch.query_labels[episode].tolist(), strict=True)
        ):
            keys = plain_keys(head, video)
            found: dict[int, list[Tensor]] = {}
            for label, stored in slots:
                found.setdefault(label, []).append(plain_similarity(head, keys, stored))
            nearest = torch.stack([torch.stack(found[label]).max() for label in range(3)])
            torch.testing.assert_close(output.logits[episode, index], 10.0 * nearest)
            wrong = max(nearest[label] for label in range(3) if label != true)
            margin = torch.relu(0.5 - nearest[true] + wrong)
            torch.testing.assert_close(output.losses["margin"][episode, index], margin)
            soft = torch.stack([torch.stack(found[label]).mul(10.0).exp().mean().log() for label in range(3)])
            expected = -torch.log_softmax(soft, dim=0)[true]
            torch.testing.assert_close(output.losses["few_shot"][episode, index], expected)


def test_merging_joins_videos_of_a_class() -> None:
    head = cmn(writing="merge")
    batch = make_batch(k_shot=3, cube_shape=SHAPE, noise=0.05)
    memory = head.write(head.constituent_keys(batch.support - 0.6), batch.support_labels)
    in_use = (memory.labels >= 0).sum(dim=1)
    assert in_use.lt(9).all()
    assert in_use.ge(3).all()
    torch.testing.assert_close(
        memory.keys[memory.labels >= 0].norm(dim=-1),
        torch.ones((), dtype=torch.float64).expand(int(in_use.sum()), 5),
    )


def test_a_video_nearest_to_another_class_gets_a_slot_of_its_own() -> None:
    head = cmn(writing="merge")
    videos = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.8, 0.2]], dtype=torch.float64)
    keys = F.pad(videos, (0, 4))[None, :, None].expand(1, 4, 5, 6)
    memory = head.write(F.normalize(keys, dim=-1), torch.tensor([[0, 1, 1, 1]]))
    # The third is nearest to the first, of the other class; the fourth then joins the third.
    assert memory.labels.tolist() == [[0, 1, 1, -1]]
    assert memory.slot_of_support.tolist() == [[0, 1, 2, 2]]


@pytest.mark.parametrize("writing", ["slots", "merge"])
def test_shares_of_the_supports_follow_the_order_of_the_batch(writing: str) -> None:
    head = cmn(writing=writing).eval()
    batch = make_batch(k_shot=3, cube_shape=SHAPE, noise=0.05)
    order = torch.tensor([3, 0, 8, 5, 1, 4, 7, 2, 6])
    shares = head(batch, with_maps=True).maps["support_weights"]
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(2, 4, dtype=torch.float64))
    torch.testing.assert_close(
        head(reordered(batch, order), with_maps=True).maps["support_weights"], shares[..., order]
    )
    best = batch.support_labels.gather(1, shares.argmax(dim=-1))
    assert torch.equal(best, head(batch).logits.argmax(dim=-1))


def test_a_single_class_has_no_margin_to_keep() -> None:
    output: HeadOutput = cmn()(make_batch(n_way=1, cube_shape=SHAPE))
    assert not output.losses["margin"].any()
    assert output.logits.isfinite().all()


def test_margin_alone_trains() -> None:
    head = cmn(lambda_few=0.0)
    assert head.loss_weights == {"few_shot": 0.0, "margin": 1.0}


def test_no_loss_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="lambda_margin = 0 and lambda_few = 0"):
        build_head("cmn", {"lambda_few": 0.0, "lambda_margin": 0.0}, SHAPE, None, True)


def test_size_of_a_key_that_is_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="abstract_size = 8 has no effect"):
        build_head("cmn", {"reading": "constituent", "abstract_size": 8}, SHAPE, None, True)


def test_is_marked_experimental_and_names_its_order() -> None:
    assert HEADS["cmn"].is_experimental
    assert "merge" in HEADS["cmn"].order_reason
