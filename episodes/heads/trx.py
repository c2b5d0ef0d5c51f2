"""TRX: each tuple of query frames against a mixture of the support tuples of a class.

Paper: Temporal-Relational CrossTransformers for Few-Shot Action Recognition, CVPR 2021, https://arxiv.org/abs/2101.06184.
Code consulted: https://github.com/tobyperrett/trx, commit 390c20a.
Deviations: tuples are mapped frame by frame (an exact identity, `tuples.py`; `factored = false` concatenates them first, as
published); batched over episodes and classes, with unequal shots; dropout masks come from the episode's own seed; the
value normalisation, which the code keeps and never uses, is in the state dict as a buffer, so that nothing trains it.
"""

# E episodes, S supports, Q queries, N classes, K shots; C channels, T time steps, H W grid; P tuples, M frames of a tuple, D width

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.heads.sine_table import SineTable
from episodes.heads.tuples import EpisodeFrames, frame_tuples, project_tuples, query_slices, refuse_short_cubes
from episodes.initial import make_linear
from episodes.losses import query_cross_entropy
from episodes.noise import EpisodeNoise
from episodes.shots import ClassShots, class_shots, frame_vectors


class TupleOptions(HeadOptions):
    """Knobs of the heads on tuples of frames; defaults are those of the released code of TRX."""

    cardinalities: tuple[int, ...] = (2, 3)
    """Frames in a tuple, one transformer for each number (code: pairs and triples). Logits are averaged over them."""
    hidden: int = Field(default=1152, ge=1)
    """Width of keys and values, the released flag `trans_linear_out_dim` (code: 1152)."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the frame features set to zero in training (code: 0.1)."""
    factored: bool = True
    """Whether frames are mapped before tuples are made (the same numbers, faster), or concatenated as in the code."""

    @field_validator("cardinalities")
    @classmethod
    def _refuse_odd_cardinalities(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values or min(values) < 1 or len(set(values)) < len(values):
            raise ValueError("give one or more different numbers of 1 or more, as in [2, 3]")
        return values


class TrxConfig(TupleOptions):
    """Knobs of the TRX head."""

    average_time: bool = False
    """Whether a cube is averaged over its time steps first, which leaves single "frames": one representation per video,
    as the MASTAF paper's TRX rows on R3D and ViViT have it (reference 2.2)."""


@dataclass(frozen=True, slots=True)
class EncodedTuples:
    """Keys and values of the tuples of videos or classes."""

    keys: Tensor
    """(E, videos, P, D), or (E, N, K P, D)."""
    values: Tensor
    """Of the same shape."""


@dataclass(frozen=True, slots=True)
class TupleScores:
    """What the tuples of one cardinality say."""

    logits: Tensor
    """(E, Q, N)."""
    maps: dict[str, Tensor] = field(default_factory=dict)
    """On request, the tuples that matched best: "tuple_query_2" and so on (`episodes.maps`)."""


class UnusedNorm(nn.Module):
    """Weight and bias of a layer normalisation that published files hold and nothing computes with."""

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))


class TupleTransformer(nn.Module):
    """Attention of query tuples to the support tuples of each class, for tuples of one cardinality."""

    tuples: Tensor

    def __init__(self, cardinality: int, config: TupleOptions, inputs: HeadInputs) -> None:
        super().__init__()
        channels, num_steps = inputs.cube_shape[:2]
        self.cardinality = cardinality
        self.dropout = config.dropout
        self.factored = config.factored
        self.positions = SineTable(num_steps, channels)
        self.key = make_linear(cardinality * channels, config.hidden, None, inputs.generator)
        self.value = make_linear(cardinality * channels, config.hidden, None, inputs.generator)
        self.key_norm = nn.LayerNorm(config.hidden)
        self.value_norm = UnusedNorm(config.hidden)
        self.register_buffer("tuples", frame_tuples(num_steps, cardinality), persistent=False)

    def forward(
        self, frames: EpisodeFrames, shots: ClassShots, noise: EpisodeNoise, with_maps: bool = False
    ) -> TupleScores:
        """Score queries: minus the mean squared difference of their tuples to what the class makes of them.

        Args:
            frames: vectors of all frames.
            shots: where the supports of each class are.
            noise: the episode's dropout in training.
            with_maps: whether to name the best tuples.
        """
        support, query = (self.encode(values, noise) for values in (frames.support, frames.query))
        # Distances are differences of large sums, and the softmax an exponential: never in half precision.
        with torch.autocast(frames.query.device.type, enabled=False):
            classes = EncodedTuples(*(shots.take(each).flatten(2, 3) for each in (support.keys, support.values)))
            is_present = shots.is_present.repeat_interleave(len(self.tuples), dim=-1)  # (E, N, K P)
            differences = self._differences(query, classes, is_present)
            maps = self._best_tuples(differences, query, classes, is_present, shots) if with_maps else {}
        return TupleScores(-differences.mean(dim=-1), maps)

    def encode(self, frames: Tensor, noise: EpisodeNoise) -> EncodedTuples:
        """Keys and values of the tuples of each video: frames (E, V, T, C) to (E, V, P, D)."""
        placed = noise.dropout(self.positions(frames), self.dropout, is_on=self.training)
        keys, values = (
            project_tuples(placed, layer.weight, layer.bias, self.tuples, self.factored)
            for layer in (self.key, self.value)
        )
        return EncodedTuples(self.key_norm(keys), values)

    def _differences(self, query: EncodedTuples, classes: EncodedTuples, is_present: Tensor) -> Tensor:
        """Squared difference of each query tuple to its prototype in each class, (E, Q, N, P)."""
        (_, num_queries, num_tuples, width), n_way = query.keys.shape, classes.keys.shape[1]
        numbers_per_query = len(query.keys) * n_way * num_tuples * width
        parts = []
        for part in query_slices(num_queries, numbers_per_query):
            keys, values = query.keys[:, part].flatten(1, 2), query.values[:, part].flatten(1, 2)  # (E, q P, D)
            # Softmax over all tuples of all shots of the class, scaled by 1/sqrt(D), without storing the weights.
            prototypes = F.scaled_dot_product_attention(
                keys[:, None].expand(-1, n_way, -1, -1), classes.keys, classes.values, is_present[:, :, None]
            )  # (E, N, q P, D)
            squares = (values[:, None] - prototypes).square().sum(dim=-1)
            parts.append(squares.reshape(len(squares), n_way, -1, num_tuples).transpose(1, 2))
        return torch.cat(parts, dim=1)

    def _best_tuples(
        self,
        differences: Tensor,
        query: EncodedTuples,
        classes: EncodedTuples,
        is_present: Tensor,
        shots: ClassShots,
    ) -> dict[str, Tensor]:
        """The query tuple nearest to its prototype, the support tuple that it attends to most, and of which support."""
        best = differences.argmin(dim=-1)  # (E, Q, N)
        index = best[..., None].expand(-1, -1, -1, query.keys.shape[-1])
        scores = torch.einsum("eqnd,enpd->eqnp", query.keys.gather(2, index), classes.keys)
        attended = scores.masked_fill(~is_present[:, None], -torch.inf).argmax(dim=-1)  # (E, Q, N), of K P
        shot, place = attended // len(self.tuples), attended % len(self.tuples)
        videos = shots.index.gather(2, shot.transpose(1, 2)).transpose(1, 2)
        number = self.cardinality
        return {
            f"tuple_query_{number}": self.tuples[best],
            f"tuple_support_{number}": self.tuples[place],
            f"tuple_video_{number}": videos,
        }


def make_transformers(config: TupleOptions, inputs: HeadInputs) -> nn.ModuleList:
    """One transformer per cardinality.

    Raises:
        ValueError: a cube has fewer time steps than a tuple has frames.
    """
    refuse_short_cubes(config.cardinalities, inputs.cube_shape)
    return nn.ModuleList(TupleTransformer(cardinality, config, inputs) for cardinality in config.cardinalities)


def mean_logits(scores: Iterable[Tensor]) -> Tensor:
    """Average over the cardinalities, (E, Q, N)."""
    return torch.stack(list(scores)).mean(dim=0)


class TrxHead(HeadModule):
    """Tuples of frames, matched in order by cross attention."""

    def __init__(self, config: TrxConfig, inputs: HeadInputs) -> None:
        super().__init__()
        self.config = config
        self.cube_shape = inputs.cube_shape
        self.loss_weights = {"few_shot": 1.0}
        if config.average_time:
            channels, _, height, width = inputs.cube_shape
            inputs = replace(inputs, cube_shape=(channels, 1, height, width))
        self.transformers = make_transformers(config, inputs)

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Score the queries of E episodes.

        Args:
            batch: cubes (E, S, C, T, H, W) and (E, Q, C, T, H, W), averaged over space; in training with seeds, for dropout.
            with_maps: whether to hand back the best tuples of each cardinality.

        Returns:
            Logits (E, Q, N), and "few_shot" losses where the batch has labels.
        """
        scores = self.tuple_scores(batch, with_maps)
        logits = mean_logits(each.logits for each in scores)
        losses = {} if batch.query_labels is None else {"few_shot": query_cross_entropy(logits, batch.query_labels)}
        return HeadOutput(logits, losses, {name: values for each in scores for name, values in each.maps.items()})

    def tuple_scores(self, batch: EpisodeBatch, with_maps: bool = False) -> list[TupleScores]:
        """What the tuples say, by cardinality."""
        self.refuse_other_shape(batch)
        frames = EpisodeFrames(self._frames(batch.support), self._frames(batch.query))
        shots, noise = class_shots(batch), EpisodeNoise(batch.seeds)
        return [transformer(frames, shots, noise, with_maps) for transformer in self.transformers]

    def _frames(self, cubes: Tensor) -> Tensor:
        """Frame vectors (E, V, T, C), T is 1 where time is averaged."""
        vectors = frame_vectors(cubes)
        return vectors.mean(dim=-2, keepdim=True) if self.config.average_time else vectors
