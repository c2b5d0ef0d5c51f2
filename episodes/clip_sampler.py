"""Labelled clips of the training classes one by one, as episodes that have one query and no supports: for classification.

Clip i depends on the split hash, the holdout, the seed and i alone, as an episode does.
"""

import math
import operator

from episodes.datasets import Manifest
from episodes.draws import Draws, key_of
from episodes.sampler import Episode, SamplerError

_EPOCHS_KEPT = 2
"""Orders in memory: a step may end one epoch and begin the next."""


class ClipSampler:
    """Goes through the training videos in a new random order each epoch; any clip of any epoch at any time and in any process."""

    split = "train"

    def __init__(self, manifest: Manifest, holdout: float = 0.0, seed: int = 0) -> None:
        """Put videos aside for scoring, the others in order.

        Which videos are held out depends on the manifest and the share alone, not on the seed: runs with other seeds are scored on
        the same videos, and a larger share adds to a smaller one's.

        Args:
            manifest: its split "train" is used.
            holdout: share of the videos of each class that `episode` never gives, in [0, 1); at least one where it is above 0.
            seed: of the orders.

        Raises:
            SamplerError: no training class, or with a holdout one that has a single video.
        """
        if not 0.0 <= holdout < 1.0:
            raise ValueError(f"holdout = {holdout} is not a share of the videos; it must lie in 0 .. 1, without 1")
        self.seed = operator.index(seed)
        self.split_hash = manifest.split_hash
        self.class_names = tuple(manifest.classes(self.split))
        """(Z,) the training classes by name; a label is a place in here."""
        training, held_out = _separated(manifest, self.class_names, holdout)
        self.video_ids = tuple(video_id for video_id, _ in training)
        """(n,) of training, by class and id."""
        self.held_out_ids = tuple(video_id for video_id, _ in held_out)
        """(V,) the videos that are kept out of training."""
        self.held_out_labels = tuple(label for _, label in held_out)
        """(V,) their classes."""
        self._labels = tuple(label for _, label in training)
        self._key = key_of("mastaf clips 1", self.split_hash, self.seed)
        self._orders: dict[int, list[int]] = {}

    @property
    def num_classes(self) -> int:
        """Z."""
        return len(self.class_names)

    def episode(self, index: int) -> Episode:
        """Clip `index`, from 0 on: every video comes once in each n of them."""
        epoch, place = divmod(index, len(self.video_ids))
        video = self._order(epoch)[place]
        return Episode(
            index=index,
            class_names=self.class_names,
            support_ids=(),
            support_labels=(),
            query_ids=(self.video_ids[video],),
            query_labels=(self._labels[video],),
        )

    def _order(self, epoch: int) -> list[int]:
        orders = self._orders
        order = orders.get(epoch)
        if order is None:
            order = Draws(self._key, epoch).shuffled(range(len(self.video_ids)))
            kept = {number: orders[number] for number in orders if abs(number - epoch) < _EPOCHS_KEPT}
            # One assignment: another thread sees the old orders or the new ones.
            self._orders = {**kept, epoch: order}
        return order


def _separated(
    manifest: Manifest, class_names: tuple[str, ...], holdout: float
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Ids and labels for training, and those held out."""
    if not class_names:
        raise SamplerError('split "train" has no class to learn; give the manifest training classes.')
    ids_of: dict[str, list[str]] = {name: [] for name in class_names}
    for video in manifest.videos_of(ClipSampler.split):
        ids_of[video.class_name].append(video.video_id)
    single = [name for name, ids in ids_of.items() if len(ids) < 2]
    if holdout and single:
        raise SamplerError(
            f"classify.holdout = {holdout} keeps a video of each training class out, but {len(single)} classes have only one: "
            f"{', '.join(single[:5])}. Set classify.holdout = 0, or exclude these classes."
        )
    training, held_out = [], []
    for label, name in enumerate(class_names):
        ids = sorted(ids_of[name])
        # Half is rounded up, and some video must be left to learn from.
        num_out = min(max(1, math.floor(holdout * len(ids) + 0.5)), len(ids) - 1) if holdout else 0
        out = set(Draws(key_of("mastaf holdout 1", manifest.split_hash, name)).shuffled(ids)[:num_out])
        training += [(video_id, label) for video_id in ids if video_id not in out]
        held_out += [(video_id, label) for video_id in ids if video_id in out]
    return training, held_out
