"""The CMN head: a compound memory of the supports, read by the nearest key.

Papers: Compound Memory Networks for Few-shot Video Classification, 2018,
https://openaccess.thecvf.com/content_ECCV_2018/html/Linchao_Zhu_Compound_Memory_Networks_ECCV_2018_paper.html; the
journal version (CMN-J), Label Independent Memory for Semi-Supervised Few-shot Video Classification, 2020,
https://doi.org/10.1109/TPAMI.2020.3007511. No code is published (https://github.com/ffmpbgrnn/CMN has the splits); this
head is written from the abstracts and from readers' notes on the first paper, hence experimental.

Published: a multi-saliency embedding turns the frames of a video into a matrix, one row per learnt saliency, each the
weighted sum of the residuals between the frames and the saliency; these rows are the constituent keys of a memory
slot; an abstract memory above them compresses each slot into one vector, the nearest of which is searched for; the
value stored there, a label, is the prediction.

Interpretation: a frame's weights are a softmax over the saliencies of its inner products, divided by sqrt(C); rows and
abstract keys have unit length, and similarity is their cosine; the abstract key is a linear layer over the rows. An
episode starts with an empty memory, and each support gets a slot of its own, or, with `writing = "merge"`, is averaged
into the nearest slot where that has its label (one shot per class: the same thing, unless a class is nearest to
itself). The loss is a margin between the nearest slot of the true class and the nearest of another, as in the memory that
the paper builds on (Learning to Remember Rare Events, 2017, https://arxiv.org/abs/1703.03129), plus a cross-entropy
over all slots so that every support learns. All sizes and weights are ours.

Left out: optical flow and its jointly trained memory, the label-independent memory of unlabelled videos, the age of
slots and their eviction (an episode's memory never fills).
"""

# E episodes, S supports, Q queries, N classes, M saliencies, F frames (or positions); C channels, U abstract key; T H W

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.initial import make_linear
from episodes.losses import query_cross_entropy
from episodes.shots import at_least_float32, frame_vectors

SMALLEST_NORM = 1e-12
ORDER_REASON = 'with head.writing = "merge" a support is averaged into the slot that earlier ones have written'


class CmnConfig(HeadOptions):
    """Knobs of the CMN head."""

    num_saliencies: int = Field(default=5, ge=1)
    """Saliencies M, hence constituent keys per video (ours)."""
    frames: Literal["time_steps", "positions"] = "time_steps"
    """What is embedded: the time steps of a cube, averaged over the grid, or each of its positions (ours; of use where a
    cube has one time step)."""
    reading: Literal["abstract", "constituent"] = "abstract"
    """Which keys are searched: the abstract ones, or the constituent ones by their mean cosine."""
    abstract_size: int = Field(default=256, ge=1)
    """Length of an abstract key (ours)."""
    writing: Literal["slots", "merge"] = "slots"
    """Whether each support gets a slot, or is averaged into the nearest one where that has its label."""
    margin: float = Field(default=0.5, gt=0.0)
    """By how much the true class must be nearer, as a difference of cosines (ours)."""
    scale: float = Field(default=10.0, gt=0.0)
    """Factor of the cosines in logits and cross-entropy (ours)."""
    lambda_margin: float = Field(default=1.0, ge=0.0)
    """Weight of the margin loss (ours)."""
    lambda_few: float = Field(default=1.0, ge=0.0)
    """Weight of the cross-entropy over all slots (ours)."""

    def without_effect(self) -> dict[str, str]:
        """The abstract key's size where constituent keys are read."""
        return {"abstract_size": "the constituent keys are read"} if self.reading == "constituent" else {}

    @model_validator(mode="after")
    def _refuse_no_loss(self) -> "CmnConfig":
        if self.lambda_margin == 0.0 and self.lambda_few == 0.0:
            raise ValueError("lambda_margin = 0 and lambda_few = 0 leave no loss to train with; raise one of them")
        return self


@dataclass(frozen=True, slots=True)
class Memory:
    """The slots of E episodes; as many places as supports, not all of them in use."""

    keys: Tensor
    """(E, S, M, C) constituent keys, each of unit length."""
    labels: Tensor
    """(E, S) int64, the value of each slot; -1 where it is not in use."""
    slot_of_support: Tensor
    """(E, S) int64, where each support was written; of padding its own place."""


class CmnHead(HeadModule):
    """A compound memory of the supports."""

    def __init__(self, config: CmnConfig, inputs: HeadInputs) -> None:
        """Build the head."""
        super().__init__()
        self.config = config
        self.cube_shape = inputs.cube_shape
        self.loss_weights = {"few_shot": config.lambda_few, "margin": config.lambda_margin}
        channels, count = inputs.cube_shape[0], config.num_saliencies
        first = torch.empty(count, channels).normal_(0.0, 1.0 / math.sqrt(channels), generator=inputs.generator)
        self.saliencies = nn.Parameter(first)
        reads_abstract = config.reading == "abstract"
        size = config.abstract_size
        self.abstract = make_linear(count * channels, size, None, inputs.generator) if reads_abstract else None

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W).
            with_maps: whether to hand back the share (E, Q, S) of each support in a softmax over the slots.

        Returns:
            Logits (E, Q, N), the scaled cosine to the nearest slot of each class; "few_shot" and "margin" losses where
            the batch has labels.
        """
        self.refuse_other_shape(batch)
        place = None
        if self.config.writing == "merge":
            place = None if batch.support_order is None else batch.support_order.argsort(dim=1).argsort(dim=1)
            batch = batch.in_order()
        with torch.autocast(batch.query.device.type, enabled=False):
            memory = self.write(self.constituent_keys(batch.support), batch.support_labels)
            similarity = self.similarity(self.constituent_keys(batch.query), memory.keys)
            members = memory.labels[:, :, None] == torch.arange(batch.n_way, device=memory.labels.device)  # (E, S, N)
            of_class = similarity[..., None].masked_fill(~members[:, None], -torch.inf)  # (E, Q, S, N)
            nearest = of_class.amax(dim=2)
            losses = self._losses(batch, of_class, nearest, members)
        maps = {"support_weights": self._shares(similarity, memory, place)} if with_maps else {}
        return HeadOutput(self.config.scale * nearest, losses, maps)

    def constituent_keys(self, cubes: Tensor) -> Tensor:
        """The multi-saliency embedding: cubes (E, V, C, T, H, W) of V videos to unit rows (E, V, M, C)."""
        by_step = self.config.frames == "time_steps"
        frames = frame_vectors(cubes) if by_step else at_least_float32(cubes).flatten(-3).transpose(-1, -2)
        weights = torch.softmax(frames @ self.saliencies.T / math.sqrt(frames.shape[-1]), dim=-1)  # (E, V, F, M)
        # The sum of a (p - h) over the frames p, without a residual per frame and saliency.
        sums = weights.transpose(-1, -2) @ frames - weights.sum(dim=-2)[..., None] * self.saliencies
        return F.normalize(sums, dim=-1, eps=SMALLEST_NORM)

    def similarity(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Cosines (E, Q, S) of constituent keys (E, Q, M, C) and (E, S, M, C), by the level that is read."""
        queries, keys = queries.flatten(2), keys.flatten(2)
        if self.abstract is None:
            return queries @ keys.transpose(-1, -2) / self.config.num_saliencies
        queries, keys = (F.normalize(self.abstract(each), dim=-1, eps=SMALLEST_NORM) for each in (queries, keys))
        return queries @ keys.transpose(-1, -2)

    def write(self, keys: Tensor, labels: Tensor) -> Memory:
        """Fill an empty memory with the supports, keys (E, S, M, C) and labels (E, S) with -1 for padding."""
        places = torch.arange(labels.shape[1], device=labels.device).expand(labels.shape)
        if self.config.writing == "slots":
            return Memory(keys, labels, places)
        stored, values, slots = torch.zeros_like(keys), torch.full_like(labels, -1), []
        for index in range(labels.shape[1]):
            key, label = keys[:, index : index + 1], labels[:, index : index + 1]
            found = self.similarity(key, stored).squeeze(1).masked_fill(values < 0, -torch.inf)
            best = found.argmax(dim=1, keepdim=True)
            merges = (values.gather(1, best) == label) & (label >= 0)
            slot = torch.where(merges, best, places[:, index : index + 1])  # (E, 1)
            is_slot = places == slot
            old = (stored * is_slot[..., None, None]).sum(dim=1, keepdim=True)
            joined = torch.where(merges[..., None, None], F.normalize(old + key, dim=-1, eps=SMALLEST_NORM), key)
            stored = torch.where(is_slot[..., None, None], joined, stored)
            values = torch.where(is_slot, label, values)
            slots.append(slot)
        return Memory(stored, values, torch.cat(slots, dim=1))

    def _losses(self, batch: EpisodeBatch, of_class: Tensor, nearest: Tensor, members: Tensor) -> dict[str, Tensor]:
        if batch.query_labels is None:
            return {}
        # Mean, not sum, over the slots of a class: with unequal shots no class is likelier from the start.
        counts = members.sum(dim=1)[:, None].to(nearest.dtype)
        soft = torch.logsumexp(self.config.scale * of_class, dim=2) - counts.log()
        is_true = F.one_hot(batch.query_labels, batch.n_way).bool()
        right = nearest.masked_fill(~is_true, -torch.inf).amax(dim=-1)
        # With one class there is no wrong one: its similarity of -inf makes the loss zero.
        wrong = nearest.masked_fill(is_true, -torch.inf).amax(dim=-1)
        margin = F.relu(self.config.margin - right + wrong)
        return {"few_shot": query_cross_entropy(soft, batch.query_labels), "margin": margin}

    def _shares(self, similarity: Tensor, memory: Memory, place: Tensor | None) -> Tensor:
        """Share (E, Q, S) of each support, in the order of the caller's batch; supports in one slot share alike."""
        unused = (memory.labels < 0)[:, None]
        of_slot = torch.softmax((self.config.scale * similarity).masked_fill(unused, -torch.inf), dim=-1)
        slots = memory.slot_of_support
        writers = torch.zeros_like(slots).scatter_add(1, slots, torch.ones_like(slots)).gather(1, slots)
        shares = of_slot.gather(2, slots[:, None].expand(of_slot.shape)) / writers[:, None]
        return shares if place is None else shares.gather(2, place[:, None].expand(shares.shape))
