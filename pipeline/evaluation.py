"""Score a model on fixed episodes: mean accuracy with its 95 % interval, and the hashes that say on what.

E episodes, S supports, Q queries, N classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from episodes.sampler import Episode, EpisodeSampler, draw_noise_seed, episode_hash
from pipeline.model import FewShotModel
from pipeline.sources import Source, assemble

# Inputs of one forward pass; larger gains nothing on a CPU and episodes are independent, so this changes no number.
BATCH_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy over episodes, as fractions."""

    accuracy: float
    """Mean over episodes of the share of right queries."""
    interval95: float
    """Half width: 1.96 times the population standard deviation over episodes, over the root of their number (reference 8.1)."""
    episodes: int
    episode_hash: str
    """SHA-256 over the ids and labels of the episodes."""
    per_episode: tuple[float, ...]
    """Accuracy of each episode, for paired comparisons."""

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.2f} ± {100 * self.interval95:.2f} %"


def mean_and_interval(per_episode: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % interval of per-episode accuracies."""
    values = np.asarray(per_episode, dtype=np.float64)
    return float(values.mean()), float(1.96 * values.std() / math.sqrt(len(values)))


def evaluate_model(
    model: FewShotModel,
    source: Source,
    sampler: EpisodeSampler,
    num_episodes: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Score episodes 0 .. num_episodes - 1 in the evaluation view (view 0), without gradients.

    Args:
        model: left in the mode that it came in.
        source: where the inputs come from; its rows are checked first.
        sampler: draws the episodes of one split.
        num_episodes: at least 1.
        device: where the model runs.
        on_progress: called with (episodes done, episodes in all).
    """
    was_training = model.training
    model.eval()
    source.check(sampler.video_ids, [0])
    per_episode: list[float] = []
    drawn: list[Episode] = []
    batch_size = 1
    with torch.no_grad():
        while len(drawn) < num_episodes:
            episodes = [
                sampler.episode(index) for index in range(len(drawn), min(len(drawn) + batch_size, num_episodes))
            ]
            seeds = [draw_noise_seed(sampler.split_hash, sampler.seed, episode.index) for episode in episodes]
            per_episode += _score(model, source, episodes, seeds, device)
            drawn += episodes
            if batch_size == 1:
                batch_size = episodes_per_batch(source, episodes[0])
            on_progress(len(drawn), num_episodes)
    model.train(was_training)
    accuracy, interval95 = mean_and_interval(per_episode)
    return Accuracy(accuracy, interval95, num_episodes, episode_hash(drawn), tuple(per_episode))


def episodes_per_batch(source: Source, episode: Episode) -> int:
    """How many episodes of this size fill `BATCH_BYTES`."""
    one = source.read([episode.query_ids[0]], [0])
    # Cubes are scored in float32, clips are bytes: count what the model will hold.
    item_bytes = one.numel() * (1 if one.dtype == torch.uint8 else 4)
    videos = len(episode.support_ids) + len(episode.query_ids)
    return max(1, min(256, BATCH_BYTES // (item_bytes * videos)))


def _score(
    model: FewShotModel, source: Source, episodes: list[Episode], seeds: list[int], device: torch.device
) -> list[float]:
    num_supports, num_queries = len(episodes[0].support_ids), len(episodes[0].query_ids)
    batch = assemble(
        episodes,
        source,
        np.zeros((len(episodes), num_supports), dtype=np.int64),
        np.zeros((len(episodes), num_queries), dtype=np.int64),
        seeds=seeds,
    ).to(device)
    logits = model(batch).logits  # (E, Q, N)
    assert batch.query_labels is not None
    right = (logits.argmax(dim=-1) == batch.query_labels).double().mean(dim=1)
    return [float(value) for value in right.cpu()]
