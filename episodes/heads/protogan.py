"""The ProtoGAN head: features of new classes made by a generator that is told the class's prototype.

Paper: ProtoGAN: Towards Few Shot Learning for Action Recognition, 2019, https://arxiv.org/abs/1909.07945. No code is
published; this head is written from the abstract, hence experimental.

Published: a class prototype transfer network (CPTN), trained on examples of seen classes, makes a vector per class; a
conditional generative adversarial network, told this vector, synthesises further examples of the class, as features of
a video network; a classifier is trained on real and synthetic examples.

Interpretation, everything beyond that: the networks are perceptrons of two layers; a class's prototype is the mean of
what the CPTN makes of its shots, and the CPTN is trained by the cosines of the queries' vectors to the prototypes; the
critic is told the prototype too and is trained as a Wasserstein critic with gradient penalty (Improved Training of
Wasserstein GANs, 2017, https://arxiv.org/abs/1704.00028), queries being the real examples; the classifier is ridge
regression on one-hot classes in closed form (Meta-learning with differentiable closed-form solvers, 2018,
https://arxiv.org/abs/1805.08136), so that the few-shot loss reaches the generator and all episodes pass at once; a second
such loss, of a classifier on made features alone, makes them stand for their class (beside real ones that already tell
the classes apart they would learn little); one step for the critic, one for everything else. Features are averaged over
the cube; they and the prototypes are scaled to a root mean square of one (an unbounded prototype lets the critic run
away). All sizes and weights are ours.
"""

# E episodes, S supports, Q queries, N classes, G made features per class, R rows to learn from; C channels, P prototype

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput, Phase
from episodes.initial import make_linear
from episodes.losses import query_cross_entropy
from episodes.noise import EpisodeNoise
from episodes.shots import class_means, video_vectors

SLOPE = 0.2
"""Of the leaky ReLU, below zero."""
SMALLEST_NORM = 1e-12


class ProtoganConfig(HeadOptions):
    """Knobs of the ProtoGAN head; every default is ours."""

    num_generated: int = Field(default=10, ge=1)
    """Features made per class and episode."""
    generated_share: float = Field(default=0.5, ge=0.0, le=1.0)
    """Weight of a class's made features beside its real ones in the classifier; 0: real ones alone."""
    prototype_size: int = Field(default=128, ge=1)
    """Length of a class's prototype vector."""
    noise_size: int = Field(default=64, ge=1)
    """Length of the generator's noise."""
    hidden: int = Field(default=512, ge=1)
    """Hidden units of each network."""
    ridge: float = Field(default=0.1, gt=0.0)
    """Penalty of the classifier, for features of unit length and a total weight of one per class."""
    scale: float = Field(default=10.0, gt=0.0)
    """Factor that makes logits of the classifier's outputs, which lie around 0 and 1, and of the CPTN's cosines."""
    penalty: float = Field(default=10.0, ge=0.0)
    """Weight of the critic's gradient penalty, within its loss."""
    lambda_made: float = Field(default=1.0, ge=0.0)
    """Weight of the few-shot loss of a classifier on made features alone."""
    lambda_generator: float = Field(default=0.1, ge=0.0)
    """Weight of the generator's adversarial loss."""
    lambda_prototype: float = Field(default=1.0, ge=0.0)
    """Weight of the CPTN's loss."""


class Perceptron(nn.Module):
    """Two linear layers with a leaky ReLU between."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, generator: torch.Generator | None, *, with_bias: bool = True
    ) -> None:
        super().__init__()
        self.first = make_linear(inputs, hidden, None, generator)
        self.second = make_linear(hidden, outputs, None, generator, with_bias=with_bias)

    def forward(self, values: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        found: Tensor = self.second(F.leaky_relu(self.first(values), SLOPE))
        return found


class ProtoganHead(HeadModule):
    """A prototype-conditioned generator of features, its critic, and a classifier in closed form."""

    phases: ClassVar[tuple[Phase, ...]] = (
        Phase(frozenset({"critic"}), ("critic.",)),
        Phase(frozenset({"few_shot", "made", "generator", "prototype"}), ("transfer.", "generator.")),
    )

    def __init__(self, config: ProtoganConfig, inputs: HeadInputs) -> None:
        """Build the head."""
        super().__init__()
        self.config = config
        self.cube_shape = inputs.cube_shape
        self.loss_weights = {
            "few_shot": 1.0,
            "made": config.lambda_made,
            "critic": 1.0,
            "generator": config.lambda_generator,
            "prototype": config.lambda_prototype,
        }
        channels, size, hidden, source = inputs.cube_shape[0], config.prototype_size, config.hidden, inputs.generator
        self.transfer = Perceptron(channels, hidden, size, source)
        self.generator = Perceptron(config.noise_size + size, hidden, channels, source)
        # A last bias would shift real and made alike, which the critic's loss cannot see.
        self.critic = Perceptron(channels + size, hidden, 1, source, with_bias=False)

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W); its seeds decide the noise, in evaluation too.
            with_maps: there is nothing to show.

        Returns:
            Logits (E, Q, N); where the batch has labels, "few_shot" losses, and in training "made" and "prototype" ones
            and, where gradients are recorded, "generator" and "critic".
        """
        del with_maps
        self.refuse_other_shape(batch)
        with torch.autocast(batch.query.device.type, enabled=False):
            noise = EpisodeNoise(batch.seeds)
            support, query = (unit_mean_square(video_vectors(cubes)) for cubes in (batch.support, batch.query))
            prototypes = unit_mean_square(class_means(self.transfer(support), batch))
            made = self.generate(batch, prototypes, noise)
            logits = self.classify(batch, support, made, query, self.config.generated_share)
            losses = {}
            if batch.query_labels is not None:
                losses["few_shot"] = query_cross_entropy(logits, batch.query_labels)
            if batch.query_labels is not None and self.training:
                alone = self.classify(batch, support, made, query, 1.0)
                losses["made"] = query_cross_entropy(alone, batch.query_labels)
                losses |= self._network_losses(batch.query_labels, query, prototypes, noise)
        return HeadOutput(logits, losses)

    def generate(self, batch: EpisodeBatch, prototypes: Tensor, noise: EpisodeNoise) -> Tensor:
        """Features (E, N, G, C) made for the prototypes (E, N, P).

        The noise of a class belongs to its place when classes are sorted by their first video, not to its label: names
        of classes and the order of supports change nothing.
        """
        shape = (batch.n_way, self.config.num_generated, self.config.noise_size)
        drawn = noise.normal(shape).to(prototypes.device, prototypes.dtype)
        rank = first_places(batch).argsort(dim=1).argsort(dim=1)  # (E, N)
        index = rank[..., None, None].expand(drawn.shape)
        return self._make(drawn.gather(1, index), prototypes[:, :, None])

    def classify(self, batch: EpisodeBatch, support: Tensor, made: Tensor, query: Tensor, share: float) -> Tensor:
        """Logits (E, Q, N) of a classifier in closed form.

        Args:
            batch: the episodes, for the labels.
            support: real features, (E, S, C).
            made: made features, (E, N, G, C).
            query: features to classify, (E, Q, C).
            share: weight of the made features of a class; its real ones have the rest.
        """
        classes = torch.arange(batch.n_way, device=support.device)
        real_targets = (batch.support_labels[..., None] == classes).to(support.dtype)  # (E, S, N)
        made_targets = torch.eye(batch.n_way, device=support.device, dtype=support.dtype)
        made_targets = made_targets.repeat_interleave(made.shape[2], dim=0).expand(len(support), -1, -1)
        real_weights = (1.0 - share) * (real_targets / real_targets.sum(dim=1, keepdim=True)).sum(dim=-1)
        made_weights = torch.full_like(made_targets[..., 0], share / made.shape[2])
        rows = unit_length(torch.cat([support, made.flatten(1, 2)], dim=1))  # (E, R, C)
        targets = torch.cat([real_targets, made_targets], dim=1)
        weights = torch.cat([real_weights, made_weights], dim=1)[..., None]
        scores = weighted_ridge(rows, targets, weights, unit_length(query), self.config.ridge)
        return self.config.scale * scores

    def _network_losses(
        self, labels: Tensor, query: Tensor, prototypes: Tensor, noise: EpisodeNoise
    ) -> dict[str, Tensor]:
        """The terms (E, Q) that train CPTN, generator and critic; the last two where gradients are recorded."""
        cosines = unit_length(self.transfer(query)) @ unit_length(prototypes).transpose(-1, -2)
        losses = {"prototype": query_cross_entropy(self.config.scale * cosines, labels)}
        if not torch.is_grad_enabled():
            return losses
        wanted = prototypes.gather(1, labels[..., None].expand(-1, -1, prototypes.shape[-1]))  # (E, Q, P)
        drawn = noise.normal((query.shape[1], self.config.noise_size)).to(query.device, query.dtype)
        between = noise.uniform((query.shape[1], 1)).to(query.device, query.dtype)
        made = self._make(drawn, wanted)
        losses["generator"] = -self._judge(made, wanted)
        losses["critic"] = self._critic_loss(query.detach(), made.detach(), wanted.detach(), between)
        return losses

    def _critic_loss(self, real: Tensor, made: Tensor, wanted: Tensor, between: Tensor) -> Tensor:
        """Wasserstein loss and gradient penalty of each query (E, Q), of features (E, Q, C)."""
        mixed = (between * real + (1.0 - between) * made).requires_grad_()
        (gradient,) = torch.autograd.grad(self._judge(mixed, wanted).sum(), mixed, create_graph=True)
        length = gradient.square().sum(dim=-1).clamp_min(SMALLEST_NORM).sqrt()
        penalty = self.config.penalty * (length - 1.0).square()
        return self._judge(made, wanted) - self._judge(real, wanted) + penalty

    def _make(self, noise: Tensor, prototypes: Tensor) -> Tensor:
        condition = prototypes.expand(*noise.shape[:-1], prototypes.shape[-1])
        made: Tensor = self.generator(torch.cat([noise, condition], dim=-1))
        return made

    def _judge(self, features: Tensor, prototypes: Tensor) -> Tensor:
        judged: Tensor = self.critic(torch.cat([features, prototypes], dim=-1))
        return judged.squeeze(-1)


def first_places(batch: EpisodeBatch) -> Tensor:
    """Smallest place of each class among its episode's supports sorted by video id, (E, N) int64."""
    order = batch.support_order
    if order is None:
        order = torch.arange(batch.support.shape[1], device=batch.support_labels.device).expand_as(batch.support_labels)
    classes = torch.arange(batch.n_way, device=order.device)
    members = batch.support_labels[:, None] == classes[:, None]  # (E, N, S)
    last = torch.iinfo(torch.int64).max
    return order[:, None].expand(members.shape).masked_fill(~members, last).amin(dim=-1)


def unit_mean_square(values: Tensor) -> Tensor:
    """Vectors (..., C) scaled to a root mean square of one."""
    return unit_length(values) * math.sqrt(values.shape[-1])


def unit_length(values: Tensor) -> Tensor:
    """Vectors (..., C) scaled to length one."""
    return F.normalize(values, dim=-1, eps=SMALLEST_NORM)


def weighted_ridge(rows: Tensor, targets: Tensor, weights: Tensor, queries: Tensor, ridge: float) -> Tensor:
    """Ridge regression with a free bias, by the rows' Gram matrix: R x R, however many channels there are.

    Args:
        rows: (E, R, C).
        targets: (E, R, N).
        weights: weight of each row, (E, R, 1); 0 for padding.
        queries: (E, Q, C).
        ridge: penalty on the squared weights of the solution, not on its bias.

    Returns:
        Predictions (E, Q, N).
    """
    shares = weights / weights.sum(dim=1, keepdim=True)
    middle, offset = (shares * rows).sum(dim=1, keepdim=True), (shares * targets).sum(dim=1, keepdim=True)
    roots = weights.sqrt()
    scaled = roots * (rows - middle)
    gram = scaled @ scaled.transpose(-1, -2)
    damped = gram + ridge * torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    solution: Tensor = torch.linalg.solve(damped, roots * (targets - offset))
    return (queries - middle) @ scaled.transpose(-1, -2) @ solution + offset
