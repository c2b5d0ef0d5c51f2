"""Score models on fixed episodes: mean accuracy with its 95 % interval, and the hashes that say on what.

E episodes, S supports, Q queries, N classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from episodes.batch import EpisodeBatch
from episodes.sampler import Episode, EpisodeSampler, draw_noise_seed, episode_hash
from pipeline.call_size import LargestTensor, parts_of
from pipeline.model import FewShotModel
from pipeline.ranks import ALONE, Ranks
from pipeline.sources import Source, assemble
from pipeline.statistics import mean_and_interval

# Inputs of one forward pass; larger gains nothing on a CPU and episodes are independent, so this changes no number.
BATCH_BYTES = 128 << 20
MOST_EPISODES = 256


@dataclass(frozen=True, slots=True)
class QueryOutcomes:
    """What became of every query, for statistics over classes."""

    is_right: npt.NDArray[np.bool_]
    """(E, Q) whether the query got its own class."""
    query_classes: npt.NDArray[np.int64]
    """(E, Q) class of the query, a place in `class_names`."""
    episode_classes: npt.NDArray[np.int64]
    """(E, N) the classes of each episode, places in `class_names`."""
    class_names: tuple[str, ...]
    """(C,) the classes that the episodes drew, sorted."""


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
    outcomes: QueryOutcomes | None = field(default=None, compare=False, repr=False)
    """Each query by itself."""

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.2f} ± {100 * self.interval95:.2f} %"


def evaluate_model(
    model: FewShotModel,
    source: Source,
    sampler: EpisodeSampler,
    num_episodes: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> Accuracy:
    """Score episodes 0 .. num_episodes - 1 in the evaluation view (view 0), without gradients.

    Args:
        model: left in the mode that it came in.
        source: where the inputs come from; its rows are checked first.
        sampler: draws the episodes of one split.
        num_episodes: at least 1.
        device: where the model runs.
        on_progress: called with (episodes done, episodes in all).
        ranks: of this job; each scores its share, and all get the same answer, bit for bit that of one process.

    Raises:
        ScoreError: a score is not finite.
    """
    return evaluate_models([model], source, sampler, num_episodes, device, on_progress, ranks)[0]


def evaluate_models(
    models: Sequence[FewShotModel],
    source: Source,
    sampler: EpisodeSampler,
    num_episodes: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> list[Accuracy]:
    """As `evaluate_model`, for several models on one pass: each batch is read once and scored by all of them.

    Returns:
        One accuracy for each model, in their order; each is what `evaluate_model` gives.
    """
    source.check(sampler.video_ids, [0])
    episodes = [sampler.episode(index) for index in range(num_episodes)]
    answers: list[list[npt.NDArray[np.bool_]]] = [[] for _ in models]
    with evaluating(models), torch.no_grad():
        # Every rank asks the first episode how large a call may be; whole batches are shared, so that each is what it is alone.
        first = evaluation_batch(source, sampler, episodes[:1]).to(device)
        firsts = [_first_call(model, first) for model in models]
        for answered, (is_right, _) in zip(answers, firsts, strict=True):
            answered += [is_right] if ranks.is_first else []
        size = episodes_per_batch(source, episodes[0])
        parts = [range(start, min(start + size, num_episodes)) for start in range(1, num_episodes, size)]
        own = ranks.slice_of(parts)
        on_progress(1, num_episodes)
        for number, part in enumerate(own, start=1):
            batch = evaluation_batch(source, sampler, [episodes[index] for index in part]).to(device)
            for answered, model, (_, call_size) in zip(answers, models, firsts, strict=True):
                begins = part.start
                for each in parts_of(batch, call_size):
                    answered.append(_is_right(model, each, begins))
                    begins += each.num_episodes
            on_progress(num_episodes * number // len(own), num_episodes)
    digest = episode_hash(episodes)
    shape = (0, len(episodes[0].query_ids))
    together = [np.concatenate([np.zeros(shape, dtype=np.bool_), *_all_ranks(answered, ranks)]) for answered in answers]
    return [_accuracy(episodes, digest, answered) for answered in together]


def _all_ranks(answered: list[npt.NDArray[np.bool_]], ranks: Ranks) -> list[npt.NDArray[np.bool_]]:
    """What all ranks answered, one rank after another, which is the order of the episodes."""
    together: list[npt.NDArray[np.bool_]] = []
    for given in ranks.gather(answered):
        assert isinstance(given, list)
        together += given
    return together


@contextmanager
def evaluating(models: Sequence[FewShotModel]) -> Iterator[None]:
    """Models in evaluation mode; each gets its own mode back."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def evaluation_batch(source: Source, sampler: EpisodeSampler, episodes: Sequence[Episode]) -> EpisodeBatch:
    """The tensors of episodes of a sampler in the evaluation view, with the seeds of what a head may draw."""
    num_supports, num_queries = len(episodes[0].support_ids), len(episodes[0].query_ids)
    return assemble(
        episodes,
        source,
        np.zeros((len(episodes), num_supports), dtype=np.int64),
        np.zeros((len(episodes), num_queries), dtype=np.int64),
        seeds=[draw_noise_seed(sampler.split_hash, sampler.seed, episode.index) for episode in episodes],
    )


class ScoreError(ValueError):
    """A model gives no numbers to choose by."""


def _first_call(model: FewShotModel, batch: EpisodeBatch) -> tuple[npt.NDArray[np.bool_], int]:
    """What became of the queries of the first episode, and how many episodes the next calls may hold."""
    with LargestTensor() as largest:
        is_right = _is_right(model, batch, 0)
    # A backbone takes clips in batches of its own, and of clips only a few episodes come at a time.
    return is_right, largest.episodes_per_call if isinstance(model.encoder, nn.Identity) else MOST_EPISODES


def _is_right(model: FewShotModel, batch: EpisodeBatch, first: int) -> npt.NDArray[np.bool_]:
    """Which queries are answered right; `first` is the index of the batch's first episode.

    Raises:
        ScoreError: the best score of a query is not a number, which would count as an answer.
    """
    logits = model(batch).logits  # (E, Q, N)
    assert batch.query_labels is not None
    is_answer = logits.amax(dim=-1).isfinite().all(dim=1).tolist()  # (E,)
    if not all(is_answer):
        raise ScoreError(
            f"the scores of evaluation episode {first + is_answer.index(False)} are not finite: the weights, or the cubes of its "
            "videos, hold infinite numbers or none. Take an earlier checkpoint, or train with a lower learning rate."
        )
    return np.asarray((logits.argmax(dim=-1) == batch.query_labels).cpu().numpy())


def _accuracy(episodes: Sequence[Episode], digest: str, is_right: npt.NDArray[np.bool_]) -> Accuracy:
    class_names = tuple(sorted({name for episode in episodes for name in episode.class_names}))
    place_of = {name: place for place, name in enumerate(class_names)}
    episode_classes = np.array([[place_of[name] for name in episode.class_names] for episode in episodes])
    query_labels = np.array([episode.query_labels for episode in episodes])
    outcomes = QueryOutcomes(
        is_right, np.take_along_axis(episode_classes, query_labels, axis=1), episode_classes, class_names
    )
    per_episode = is_right.mean(axis=1)
    accuracy, interval95 = mean_and_interval(per_episode)
    return Accuracy(accuracy, interval95, len(episodes), digest, tuple(per_episode.tolist()), outcomes)


def episodes_per_batch(source: Source, episode: Episode) -> int:
    """How many episodes of this size fill `BATCH_BYTES`."""
    one = source.read([episode.query_ids[0]], [0])
    # Cubes are scored in float32, clips are bytes: count what the model will hold.
    item_bytes = one.numel() * (1 if one.dtype == torch.uint8 else 4)
    videos = len(episode.support_ids) + len(episode.query_ids)
    return max(1, min(MOST_EPISODES, BATCH_BYTES // (item_bytes * videos)))
