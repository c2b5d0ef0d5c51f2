"""What the heads that compare videos frame by frame share."""

# E episodes, Q queries, S supports, N classes; C channels, T U time steps of query and support
# K members of a tuple, M tuples of a video, P channels after the projection

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor, nn

from episodes.batch import EpisodeBatch
from episodes.initial import make_linear
from episodes.shots import class_means

SMALLEST_NORM = 1e-6
"""Frames shorter than this count as this long, so that the cosine of a zero frame with anything is zero."""


def frame_cosines(query: Tensor, support: Tensor, eps: float) -> Tensor:
    """Cosine of every frame of each query with every frame of each support.

    Args:
        query: frame vectors, (E, Q, T, C).
        support: frame vectors, (E, S, U, C); or (E, Q, S, U, C), where each query sees supports of its own.
        eps: added to the product of the norms (0: the plain cosine).

    Returns:
        (E, Q, S, T, U).
    """
    of_support = "esuc" if support.ndim == 4 else "eqsuc"
    # The result is the largest tensor of its heads, and what stands beside it stays for the backward pass: the plain cosine
    # is one product of unit vectors, and the constant is added in place.
    if eps == 0.0:
        units = (nn.functional.normalize(frames, dim=-1, eps=SMALLEST_NORM) for frames in (query, support))
        return torch.einsum(f"eqtc,{of_support}->eqstu", *units)
    products = torch.einsum(f"eqtc,{of_support}->eqstu", query, support)
    norms = torch.einsum(
        f"eqt,{of_support[:-1]}->eqstu", *(torch.linalg.vector_norm(x, dim=-1) for x in (query, support))
    )
    return products / norms.add_(max(eps, SMALLEST_NORM**2))


def class_average(values: Tensor, batch: EpisodeBatch) -> Tensor:
    """Mean over the supports of each class: (E, Q, S, ...) to (E, Q, N, ...)."""
    return class_means(values.transpose(1, 2), batch).transpose(1, 2)


def weight_of_pairs(score: Callable[[Tensor], Tensor], pairs: Tensor) -> Tensor:
    """How much each pair of frames counts in the scores: the gradient of their sum, in evaluation too.

    Of a minimum or maximum this is the match itself, of a path the pairs that it visits, of their smooth forms the
    expected ones.

    Args:
        score: scores of a tensor like `pairs`; each pair belongs to one score.
        pairs: similarities or distances of frames, (..., T, U).

    Returns:
        Weights of the shape of `pairs`, without gradient.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = pairs.detach().clone().requires_grad_()
        (weights,) = torch.autograd.grad(score(leaf).sum(), leaf)
    return weights


class FrameTuples(nn.Module):
    """What is matched: the frames of a video or its ordered tuples of frames, plain or projected and normalised."""

    members: Tensor

    def __init__(
        self,
        channels: int,
        num_steps: int,
        tuple_length: int,
        projection: int,
        generator: torch.Generator | None,
    ) -> None:
        """Build the projection, where there is one.

        Args:
            channels: channels C of a frame.
            num_steps: time steps T of a video, at least `tuple_length`.
            tuple_length: members K of a tuple; 1 matches single frames.
            projection: width P of a linear layer with layer normalisation; 0: none.
            generator: randomness of the first weights.
        """
        super().__init__()
        self.num_steps = num_steps
        self.width = projection or channels * tuple_length
        members = torch.tensor(list(combinations(range(num_steps), tuple_length)))
        self.register_buffer("members", members, persistent=False)  # (M, K)
        self.linear = make_linear(channels * tuple_length, projection, None, generator) if projection else None
        self.norm = nn.LayerNorm(projection) if projection else None

    def forward(self, frames: Tensor) -> Tensor:
        """Vectors of the tuples: frames (..., T, C) to (..., M, P), or (..., M, K C) without a projection."""
        if self.linear is None or self.norm is None:
            return frames[..., self.members, :].flatten(-2)
        # The layer on concatenated members is a sum of layers on each member, which are applied once per frame.
        weight = self.linear.weight.reshape(self.width, self.members.shape[1], -1)  # (P, K, C)
        parts = torch.einsum("...tc,pkc->k...tp", frames, weight)
        chosen = [part.index_select(-2, member) for part, member in zip(parts, self.members.unbind(1), strict=True)]
        values: Tensor = self.norm(torch.stack(chosen).sum(dim=0) + self.linear.bias)
        return values

    def spread(self, weights: Tensor) -> Tensor:
        """Weights of pairs of tuples (..., M, M) on the pairs of their members, first with first: (..., T, T)."""
        is_member = nn.functional.one_hot(self.members, self.num_steps).to(weights.dtype)  # (M, K, T)
        return torch.einsum("...ab,akt,bku->...tu", weights, is_member, is_member) / self.members.shape[1]
