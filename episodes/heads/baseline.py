"""A classifier trained on the supports of each episode: Baseline (linear) and Baseline++ (cosine).

Paper: A Closer Look at Few-shot Classification, 2019, https://arxiv.org/abs/1904.04232. Code consulted:
https://github.com/wyharveychen/CloserLookFewShot, `methods/baselinefinetune.py` (commit 8074c34) and `backbone.py`
(commit 1fe5275).
Deviations: the classifiers of all episodes are trained together, by written-out gradients, so that they train under
`torch.no_grad` as well; first weights and shuffles come from the episode's seed and the order of the video ids, so that
neither the order of the supports nor the numbering of the classes matters. The code trains backbones by classification
over all training classes; here a backbone that is trained through this head learns from the queries alone.
"""

# E episodes, S supports, Q queries, N classes, B samples of a step; C channels

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.heads.support_sequence import support_sequence
from episodes.losses import query_cross_entropy
from episodes.noise import EpisodeNoise
from episodes.shots import video_vectors

COSINE_NORM_EPSILON = 1e-5


class BaselineOptions(HeadOptions):
    """Knobs of the classifier that is trained per episode; defaults are those of the code consulted."""

    classifier: Literal["linear", "cosine"] = "linear"
    """What is trained: a linear map with bias, or a cosine to each class with a learnt norm per class."""
    epochs: int = Field(default=100, ge=0)
    """How often each support is seen; 0 leaves the first weights."""
    batch_size: int = Field(default=4, ge=1)
    """Supports per step; the last step of an epoch takes what is left."""
    learning_rate: float = Field(default=0.01, gt=0.0)
    """Of SGD."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Of SGD."""
    dampening: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Of SGD's momentum: gradients after the first count 1 - dampening."""
    weight_decay: float = Field(default=1e-3, ge=0.0)
    """Of SGD, on every number of the classifier."""
    scale: float = Field(default=2.0, gt=0.0)
    """Factor of the cosine classifier's scores."""

    def without_effect(self) -> dict[str, str]:
        """What a linear classifier, or one without training, has no use for."""
        unused = {"scale": "the classifier is linear"} if self.classifier == "linear" else {}
        if self.epochs == 0:
            of_training = ("batch_size", "learning_rate", "momentum", "dampening", "weight_decay")
            unused.update(dict.fromkeys(of_training, "there are no epochs"))
        return unused


@dataclass(frozen=True, slots=True)
class Samples:
    """Supports to learn from, in the order in which they are drawn."""

    features: Tensor
    """(E, S, C)."""
    labels: Tensor
    """(E, S, N) one-hot."""
    is_real: Tensor
    """(E, S) bool; padding stands at the end."""


class BaselineHead(HeadModule):
    """Scores by a classifier trained on the supports in this call; it has no parameters of its own."""

    def __init__(self, config: BaselineOptions, inputs: HeadInputs) -> None:
        super().__init__()
        self.config = config
        self.cube_shape = inputs.cube_shape
        self.loss_weights = {"few_shot": 1.0}

    # ARG002: every head takes `with_maps`; this one has nothing to show.
    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:  # noqa: ARG002
        """Score the queries of E episodes; gradients reach the queries, not the supports.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W), with seeds.
            with_maps: without effect; there is nothing to see.

        Returns:
            Logits (E, Q, N); "few_shot" losses where the batch has labels.

        Raises:
            ValueError: the batch has no seeds for first weights and shuffles.
        """
        self.refuse_other_shape(batch)
        with torch.autocast(batch.query.device.type, enabled=False):
            logits = self.scores(self.trained(batch), self.features(batch.query))
            losses = {} if batch.query_labels is None else {"few_shot": query_cross_entropy(logits, batch.query_labels)}
        return HeadOutput(logits, losses)

    def features(self, cubes: Tensor) -> Tensor:
        """What is classified: cubes (E, S, C, T, H, W) to their averages (E, S, C), for the cosine of length `scale`."""
        averages = video_vectors(cubes)
        if self.config.classifier == "linear":
            return averages
        return self.config.scale * averages / (_lengths(averages) + COSINE_NORM_EPSILON)

    @torch.no_grad()
    def trained(self, batch: EpisodeBatch) -> Tensor:
        """The classifiers after their training on the supports, (E, N, C+1) as `first_weights` has them."""
        noise = EpisodeNoise(batch.seeds)
        sequence = support_sequence(batch)
        classes = torch.arange(batch.n_way, device=batch.support_labels.device)
        labels = sequence.sort(batch.support_labels)[:, :, None] == classes  # (E, S, N)
        # Rows of padding only would be steps of nothing: leave them out.
        most = int(sequence.is_real.sum(dim=1).max())
        features = sequence.sort(self.features(batch.support))[:, :most]
        samples = Samples(features, labels[:, :most].to(features.dtype), sequence.is_real[:, :most])
        weights = self.first_weights(noise, labels, features)
        return self._train(weights, samples, shuffles(noise, samples.is_real, self.config.epochs))

    def first_weights(self, noise: EpisodeNoise, labels: Tensor, features: Tensor) -> Tensor:
        """Torch's default weights of a linear layer, a row for each class in the order of the classes' first videos.

        Args:
            noise: the draws of each episode.
            labels: (E, S, N) bool, in the order of the sequence.
            features: (E, S, C), for type and device.

        Returns:
            (E, N, C+1): the weight of each class and its bias; of the cosine classifier its direction and norm.
        """
        num_classes, channels = labels.shape[-1], features.shape[-1]
        drawn = noise.uniform((num_classes, channels + 1)).to(features)
        drawn = (2.0 * drawn - 1.0) / math.sqrt(channels)
        place = labels.to(torch.int8).argmax(dim=1).argsort(dim=1).argsort(dim=1)  # (E, N)
        drawn = drawn.gather(1, place[..., None].expand(-1, -1, channels + 1))
        return drawn if self.config.classifier == "linear" else _joined(drawn[..., :-1], _lengths(drawn[..., :-1]))

    def scores(self, weights: Tensor, features: Tensor) -> Tensor:
        """Logits (E, Q, N) of features (E, Q, C)."""
        rows, numbers = weights[..., :-1], weights[:, None, :, -1]
        if self.config.classifier == "linear":
            return features @ rows.transpose(1, 2) + numbers
        return numbers * (features @ _unit(rows).transpose(1, 2))

    def gradient(self, weights: Tensor, samples: Samples) -> Tensor:
        """Of the mean cross-entropy over the real samples of each episode, (E, N, C+1)."""
        counts = samples.is_real.sum(dim=1).clamp(min=1)[:, None, None]
        errors = self.scores(weights, samples.features).softmax(dim=-1) - samples.labels
        errors = (errors * samples.is_real[..., None] / counts).transpose(1, 2)  # (E, N, B)
        of_rows = errors @ samples.features  # (E, N, C)
        if self.config.classifier == "linear":
            return _joined(of_rows, errors.sum(dim=-1, keepdim=True))
        # The weight is norm * direction / |direction|: its gradient falls apart into the part along the direction, which moves
        # the norm, and the part across it, which turns the direction.
        rows, norms = weights[..., :-1], weights[..., -1:]
        lengths = _lengths(rows)
        unit = rows / lengths
        along = (of_rows * unit).sum(dim=-1, keepdim=True)
        return _joined(norms / lengths * (of_rows - along * unit), along)

    def _train(self, weights: Tensor, samples: Samples, orders: Tensor) -> Tensor:
        """Epochs of SGD; orders (epochs, E, S) say in which order each one takes the samples."""
        config, velocity = self.config, None
        for order in orders:
            for chosen in _steps(samples, order, config.batch_size):
                slope = self.gradient(weights, chosen) + config.weight_decay * weights
                faster = slope if velocity is None else config.momentum * velocity + (1.0 - config.dampening) * slope
                # An episode with fewer supports than its neighbours has fewer steps; all take part in the first one.
                takes_part = chosen.is_real[:, :1, None]
                velocity = slope if velocity is None else torch.where(takes_part, faster, velocity)
                weights = torch.where(takes_part, weights - config.learning_rate * velocity, weights)
        return weights


def shuffles(noise: EpisodeNoise, is_real: Tensor, epochs: int) -> Tensor:
    """Random orders of the real samples, padding last.

    Args:
        noise: the draws of each episode.
        is_real: (E, S) bool.
        epochs: number of orders.

    Returns:
        (epochs, E, S) int64, for each epoch a permutation of the places of the samples.
    """
    # Drawn sample by sample: the numbers of one do not depend on how many, or how much padding, follow it.
    keys = torch.stack([noise.uniform((epochs,)) for _ in range(is_real.shape[1])], dim=-1)  # (E, epochs, S)
    keys = keys.to(is_real.device).masked_fill(~is_real[:, None], 2.0)
    return keys.argsort(dim=-1, stable=True).transpose(0, 1)


def _steps(samples: Samples, order: Tensor, batch_size: int) -> Iterator[Samples]:
    for start in range(0, order.shape[1], batch_size):
        index = order[:, start : start + batch_size]
        features, labels = (
            values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
            for values in (samples.features, samples.labels)
        )
        yield Samples(features, labels, samples.is_real.gather(1, index))


def _joined(rows: Tensor, numbers: Tensor) -> Tensor:
    return torch.cat([rows, numbers], dim=-1)


def _lengths(vectors: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return lengths


def _unit(vectors: Tensor) -> Tensor:
    return vectors / _lengths(vectors)
