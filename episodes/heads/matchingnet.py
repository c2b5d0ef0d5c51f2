"""Matching networks: every support votes for its class.

Paper: Matching Networks for One Shot Learning, 2016, https://arxiv.org/abs/1606.04080. Code consulted for the other two
forms and the context embedding: https://github.com/wyharveychen/CloserLookFewShot, commit 6497ae4, and
https://github.com/Sha-Lab/FEAT, commit fa66901.
Deviations: batched over episodes; logits are logarithms of the class probabilities; the context embedding reads the
supports in the order of their video ids, where the code reads them class by class.
"""

# E episodes, S supports, Q queries, N classes; C channels

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.heads.protonet import cosines
from episodes.heads.support_sequence import SupportSequence, support_sequence
from episodes.losses import query_cross_entropy
from episodes.shots import video_vectors

ORDER_REASON = "with full_context a recurrent network reads the supports one after another"
"""Why the order of supports matters."""

TEMPERATURES = {"paper": 1.0, "closer_look": 0.01, "feat": 1.0}
"""What divides the similarities in each published form."""
CLOSER_LOOK_NORM_EPSILON = 1e-5
CLOSER_LOOK_PROBABILITY_EPSILON = 1e-6


class MatchingnetOptions(HeadOptions):
    """Knobs of the matching head."""

    form: Literal["paper", "closer_look", "feat"] = "paper"
    """How supports vote. "paper": softmax of the cosines over all supports, probabilities summed per class. "closer_look":
    the same with negative cosines set to zero, a factor of 100 and small constants against zero (norm + 1e-5, probability
    + 1e-6). "feat": inner products of the query with unit supports, summed per class, without a softmax over supports, so
    that there are no weights to show."""
    temperature: float | None = Field(default=None, gt=0.0)
    """Divides the similarities. None: as published, 1 in "paper" and "feat" (a flag there, 1 unless given), 0.01 in
    "closer_look"."""
    full_context: bool = False
    """Whether supports and queries are embedded in the context of all supports (FCE): a bi-directional LSTM over the
    supports, added to them, and an attention LSTM on the queries with as many steps as there are supports."""


class MatchingnetHead(HeadModule):
    """Scores by the summed votes of the supports; parameters are those of the context embedding, if it is on."""

    def __init__(self, config: MatchingnetOptions, inputs: HeadInputs) -> None:
        super().__init__()
        self.config = config
        self.cube_shape = inputs.cube_shape
        self.loss_weights = {"few_shot": 1.0}
        self.temperature = config.temperature or TEMPERATURES[config.form]
        self.context = FullContext(inputs.cube_shape[0], inputs.generator) if config.full_context else None

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W).
            with_maps: whether to hand back the share of each support in the vote, "support_weights" (E, Q, S): they sum to
                one, padding has 0. Not in the form "feat", whose supports add inner products of any size and sign.

        Returns:
            Logits (E, Q, N), logarithms of probabilities but in the form "feat"; "few_shot" losses where the batch has
            labels.
        """
        self.refuse_other_shape(batch)
        with torch.autocast(batch.query.device.type, enabled=False):
            support, query = video_vectors(batch.support), video_vectors(batch.query)
            if self.context is not None:
                sequence = support_sequence(batch)
                contextual = self.context.embed_supports(sequence.sort(support), sequence)
                query = self.context.embed_queries(query, contextual, sequence)
                support = sequence.unsort(contextual)
            votes = self.votes(self.similarity(query, support), batch.support_labels >= 0)
            logits = self.class_scores(votes, batch)
            losses = {} if batch.query_labels is None else {"few_shot": self._losses(logits, batch.query_labels)}
            maps = {"support_weights": votes.exp()} if with_maps and self.config.form != "feat" else {}
        return HeadOutput(logits, losses, maps)

    def similarity(self, query: Tensor, support: Tensor) -> Tensor:
        """Similarity (E, Q, S) of queries (E, Q, C) and supports (E, S, C), divided by the temperature."""
        if self.config.form == "paper":
            return cosines(query, support) / self.temperature
        if self.config.form == "feat":
            return query @ F.normalize(support, dim=-1).transpose(1, 2) / self.temperature
        unit_query, unit_support = (_almost_unit(vectors) for vectors in (query, support))
        return (unit_query @ unit_support.transpose(1, 2)).relu() / self.temperature

    def votes(self, similarity: Tensor, is_real: Tensor) -> Tensor:
        """What each support says, (E, Q, S): logarithms of its probability, or in "feat" the similarity itself.

        Padding says minus infinity, or 0 in "feat".
        """
        if self.config.form == "feat":
            return similarity.masked_fill(~is_real[:, None], 0.0)
        return similarity.masked_fill(~is_real[:, None], -math.inf).log_softmax(dim=-1)

    def class_scores(self, votes: Tensor, batch: EpisodeBatch) -> Tensor:
        """Votes (E, Q, S) summed per class: logits (E, Q, N)."""
        classes = torch.arange(batch.n_way, device=votes.device)
        members = batch.support_labels[:, None] == classes[:, None]  # (E, N, S)
        if self.config.form == "feat":
            return votes @ members.to(votes.dtype).transpose(1, 2)
        if self.config.form == "closer_look":
            return (votes.exp() @ members.to(votes.dtype).transpose(1, 2) + CLOSER_LOOK_PROBABILITY_EPSILON).log()
        of_class = votes[:, :, None].masked_fill(~members[:, None], -math.inf)  # (E, Q, N, S)
        return of_class.logsumexp(dim=-1)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.form == "feat":
            return query_cross_entropy(logits, labels)
        # The logits are logarithms of probabilities already, in "closer_look" of ones that sum to slightly more than one.
        return -logits.gather(2, labels[..., None]).squeeze(-1)


class FullContext(nn.Module):
    """Full context embedding: each video seen in the light of all supports."""

    def __init__(self, channels: int, generator: torch.Generator | None) -> None:
        super().__init__()
        # By way of the meta device, so that the constructors draw nothing from the global generator.
        both_ways = nn.LSTM(channels, channels, batch_first=True, bidirectional=True, device="meta")
        self.support_lstm = both_ways.to_empty(device="cpu")
        self.query_cell = nn.LSTMCell(2 * channels, channels, device="meta").to_empty(device="cpu")
        bound = 1.0 / math.sqrt(channels)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-bound, bound, generator=generator)

    def embed_supports(self, support: Tensor, sequence: SupportSequence) -> Tensor:
        """Supports (E, S, C) in the order of the sequence, plus what the LSTM says of them in both directions."""
        num_supports = support.shape[1]
        lengths = sequence.is_real.sum(dim=1).cpu()
        packed = pack_padded_sequence(support, lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(self.support_lstm(packed)[0], batch_first=True, total_length=num_supports)
        forwards, backwards = outputs.chunk(2, dim=-1)
        return support + forwards + backwards

    def embed_queries(self, query: Tensor, support: Tensor, sequence: SupportSequence) -> Tensor:
        """Queries (E, Q, C) after as many steps of attention on the supports (E, S, C) as the episode has supports."""
        num_steps = sequence.is_real.sum(dim=1)  # (E,)
        hidden, cell = query, torch.zeros_like(query)
        for step in range(int(num_steps.max())):
            attention = (hidden @ support.transpose(1, 2)).masked_fill(~sequence.is_real[:, None], -math.inf)
            read = attention.softmax(dim=-1) @ support
            inputs = torch.cat([query, read], dim=-1).flatten(0, 1)
            states = self.query_cell(inputs, (hidden.flatten(0, 1), cell.flatten(0, 1)))
            new_hidden, new_cell = (state.reshape(query.shape) for state in states)
            goes_on = (step < num_steps)[:, None, None]
            hidden, cell = torch.where(goes_on, new_hidden + query, hidden), torch.where(goes_on, new_cell, cell)
        return hidden


def _almost_unit(vectors: Tensor) -> Tensor:
    unit: Tensor = vectors / (torch.linalg.vector_norm(vectors, dim=-1, keepdim=True) + CLOSER_LOOK_NORM_EPSILON)
    return unit
