"""The tensors of a few episodes, as every head receives them."""

# E episodes, S supports, Q queries, N classes

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EpisodeBatch:
    """The tensors of E episodes: cubes, or clips when the backbone is trained too.

    Shapes and types are checked at birth. Label values are checked too, where reading them is free (on the CPU, where
    batches are made); a batch that already lies on an accelerator is not synchronised for it.
    """

    support: Tensor
    """(E, S, ...) inputs of the labelled videos; padding rows hold any finite numbers. S is 0 in classification alone."""
    support_labels: Tensor
    """(E, S) int64, the class of each support within its episode; -1 is padding."""
    query: Tensor
    """(E, Q, ...) inputs of the videos to classify."""
    query_labels: Tensor | None
    """(E, Q) int64 classes within the episode; None when predicting."""
    n_way: int
    """Number of classes N of every episode."""
    class_global_labels: Tensor | None = None
    """(E, N) int64, the label of each class among all training classes; None outside training."""
    seeds: Tensor | None = None
    """(E,) int64 on the CPU, one for the draws of a head within each episode (`episodes.noise`); None: nothing may draw."""
    support_order: Tensor | None = None
    """(E, S) int64, the place of each support when they are sorted by video id; None: as they come. For heads whose
    numbers depend on the order of supports by definition (`in_order`)."""

    def __post_init__(self) -> None:
        self._check_inputs()
        self._check_labels("support_labels", self.support_labels, tuple(self.support.shape[:2]), -1, self.n_way)
        if self.query_labels is not None:
            self._check_labels("query_labels", self.query_labels, tuple(self.query.shape[:2]), 0, self.n_way)
        if self.class_global_labels is not None:
            shape = (self.num_episodes, self.n_way)
            self._check_labels("class_global_labels", self.class_global_labels, shape, 0, None)
        if self.seeds is not None:
            self._check_labels("seeds", self.seeds, (self.num_episodes,), 0, None)
        if self.support_order is not None:
            self._check_labels("support_order", self.support_order, tuple(self.support.shape[:2]), 0, None)
        if self.support_labels.device.type == "cpu":
            self._check_every_class_has_a_support()

    @property
    def num_episodes(self) -> int:
        """E."""
        return int(self.query.shape[0])

    @property
    def num_videos(self) -> int:
        """E (S + Q)."""
        return self.num_episodes * int(self.support.shape[1] + self.query.shape[1])

    @property
    def global_labels(self) -> Tensor | None:
        """(E, Q) int64, the label of each query among all training classes; None where either part is missing."""
        if self.class_global_labels is None or self.query_labels is None:
            return None
        return self.class_global_labels.gather(1, self.query_labels)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "EpisodeBatch":
        """The same batch with its tensors on another device (the seeds stay on the CPU)."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return replace(
            self,
            support=moved(self.support),
            support_labels=moved(self.support_labels),
            query=moved(self.query),
            query_labels=None if self.query_labels is None else moved(self.query_labels),
            class_global_labels=None if self.class_global_labels is None else moved(self.class_global_labels),
            support_order=None if self.support_order is None else moved(self.support_order),
        )

    def in_order(self) -> "EpisodeBatch":
        """The same episodes with their supports sorted by video id, for heads to which their order matters."""
        if self.support_order is None:
            return self
        order = self.support_order.argsort(dim=1)
        index = order.reshape(*order.shape, *[1] * (self.support.ndim - 2)).expand(self.support.shape)
        return replace(
            self,
            support=self.support.gather(1, index),
            support_labels=self.support_labels.gather(1, order),
            support_order=self.support_order.gather(1, order),
        )

    def _check_inputs(self) -> None:
        if self.n_way < 1:
            raise ValueError(f"n_way is {self.n_way}, but an episode has one class or more")
        support, query = tuple(self.support.shape), tuple(self.query.shape)
        if len(support) < 3 or len(query) < 3:
            raise ValueError(f"support {support} and query {query} need axes (episode, video, ...)")
        if support[0] != query[0]:
            raise ValueError(f"support has {support[0]} episodes but query has {query[0]}")
        if support[2:] != query[2:]:
            raise ValueError(f"a support is {support[2:]} but a query is {query[2:]}; both must come from one store")

    @staticmethod
    def _check_labels(name: str, labels: Tensor, shape: tuple[int, ...], lowest: int, limit: int | None) -> None:
        if tuple(labels.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(labels.shape)}, but its videos or classes need {shape}")
        if labels.dtype != torch.int64:
            raise ValueError(f"{name} is {labels.dtype}, but labels are int64")
        if labels.device.type != "cpu" or labels.numel() == 0:
            return
        smallest, largest = int(labels.min()), int(labels.max())
        if smallest < lowest or (limit is not None and largest >= limit):
            allowed = f"{lowest} to {'any' if limit is None else limit - 1}"
            raise ValueError(f"{name} reaches from {smallest} to {largest}, but {allowed} is allowed")

    def _check_every_class_has_a_support(self) -> None:
        if self.support_labels.shape[1] == 0:
            return  # classification has no supports at all
        classes = torch.arange(self.n_way)
        present = (self.support_labels[:, :, None] == classes).any(dim=1)
        if not bool(present.all()):
            episode, missing = (int(value) for value in (~present).nonzero()[0])
            raise ValueError(f"episode {episode} of the batch has no support of class {missing}; every class needs one")
