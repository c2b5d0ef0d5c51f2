"""Score several runs on the same episodes: what they must share, which videos all of them have, one pass for each store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cache.open import is_address
from episodes.batch import EpisodeBatch
from episodes.datasets import Manifest, exclude
from episodes.sampler import EpisodeProtocol, EpisodeSampler
from pipeline.evaluation import Accuracy, episodes_per_batch, evaluate_models, evaluating, evaluation_batch
from pipeline.head_cost import HeadCost, measure_heads
from pipeline.model import FewShotModel
from pipeline.scoring import LoadedRun, load_run, refuse_seen_classes
from pipeline.settings import SetupError
from pipeline.sources import CachedCubes, Source

TIMED_EPISODES = 16
"""Episodes of one timed call of a head, or fewer where they would not fit into one evaluation batch."""
TIMED_CALLS = 7
"""Calls whose median is reported; one more comes first and is not counted."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command asks for; None: what the runs' configs say, on which they must agree."""

    split: str | None = None
    """"train", "val" or "test"."""
    episodes: int | None = None
    """How many, at least 2."""
    k_shot: int | None = None
    n_query: int | None = None
    seed: int | None = None
    """Of the episodes."""
    store_path: str | None = None
    """One store for all runs."""
    manifest_path: str | None = None
    """One manifest for all runs."""


@dataclass(frozen=True, slots=True)
class SharedEpisodes:
    """The episodes that all runs are scored on."""

    split: str
    num_episodes: int
    protocol: EpisodeProtocol
    seed: int
    manifest: Manifest
    """Without the videos that a store does not have."""
    left_out: Mapping[str, str]
    """Reason by video id, of the videos of the split that a store does not have."""
    whole_split_hash: str
    """Of the manifest before videos were left out."""

    @property
    def sampler(self) -> EpisodeSampler:
        """Draws them."""
        return EpisodeSampler(self.manifest, self.split, self.protocol, self.seed)


@dataclass(frozen=True, slots=True)
class ScoredRun:
    """One run with its score and its head's cost."""

    name: str
    """Its folder's name, or the whole path where two names agree."""
    folder: Path
    run: LoadedRun
    score: Accuracy
    cost: HeadCost


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs scored on the same episodes."""

    episodes: SharedEpisodes
    runs: tuple[ScoredRun, ...]
    """In the order asked for; differences are taken to the first."""
    device: torch.device


def compare_runs(
    folders: Sequence[Path],
    asked: Asked,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Score runs on the same episodes, reading each store once for all runs on it.

    Args:
        folders: of the runs.
        asked: what to score them on.
        device: where the heads run.
        on_progress: called with (episodes done, episodes in all), over all stores.

    Raises:
        SetupError: the runs cannot share episodes (every differing field is named), a run is given twice, or no video of the
            split is in all stores.
        SamplerError: the videos that all stores have are too few for such episodes.
    """
    names = _names(folders)
    scored: dict[str, ScoredRun] = {}
    with _loaded(names, asked, device) as runs:
        groups = _groups(runs, asked)
        episodes = _shared_episodes(runs, asked, [runs[group[0]].source for group in groups])
        for number, group in enumerate(groups):

            def report(done: int, total: int, before: int = number) -> None:
                on_progress(before * total + done, len(groups) * total)

            members = {name: runs[name] for name in group}
            for name, (score, cost) in _score_group(members, episodes, device, report).items():
                scored[name] = ScoredRun(name, names[name], runs[name], score, cost)
    assert len({each.score.episode_hash for each in scored.values()}) == 1
    return Comparison(episodes, tuple(scored[name] for name in names), device)


def _score_group(
    runs: Mapping[str, LoadedRun],
    episodes: SharedEpisodes,
    device: torch.device,
    on_progress: Callable[[int, int], None],
) -> dict[str, tuple[Accuracy, HeadCost]]:
    """Score and cost of runs that read the same cubes, on one pass of them."""
    source, sampler = next(iter(runs.values())).source, episodes.sampler
    models = [FewShotModel(nn.Identity(), run.model.head).to(device) for run in runs.values()]
    scores = evaluate_models(models, source, sampler, episodes.num_episodes, device, on_progress)
    size = min(TIMED_EPISODES, episodes_per_batch(source, sampler.episode(0)))
    with evaluating(models):
        costs = measure_heads([model.head for model in models], _timed_batches(source, sampler, size), device)
    return dict(zip(runs, zip(scores, costs, strict=True), strict=True))


def _timed_batches(source: Source, sampler: EpisodeSampler, size: int) -> Iterator[EpisodeBatch]:
    for call in range(TIMED_CALLS + 1):
        yield evaluation_batch(source, sampler, [sampler.episode(call * size + place) for place in range(size)])


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by what they are called in the table."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise SetupError("a run is given twice; give each once.")
    short = [folder.resolve().name for folder in folders]
    return {
        name if short.count(name) == 1 else str(folder): folder for name, folder in zip(short, folders, strict=True)
    }


@contextmanager
def _loaded(folders: Mapping[str, Path], asked: Asked, device: torch.device) -> Iterator[dict[str, LoadedRun]]:
    """The runs by name; they are closed in the end."""
    with ExitStack() as held:
        yield {
            name: held.enter_context(load_run(folder, device, asked.store_path, asked.manifest_path))
            for name, folder in folders.items()
        }


def _groups(runs: Mapping[str, LoadedRun], asked: Asked) -> list[list[str]]:
    """Names of runs that read the same cubes; a run that makes its own is alone."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, run in runs.items():
        key: tuple[str, ...] = ("live", name)
        if isinstance(run.source, CachedCubes):
            path = str(asked.store_path or run.config.store.path)
            key = ("cached", path if is_address(path) else str(Path(path).resolve()), run.source.array)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _shared_episodes(runs: Mapping[str, LoadedRun], asked: Asked, sources: Sequence[Source]) -> SharedEpisodes:
    _refuse_differences(runs, asked)
    first = next(iter(runs.values()))
    evaluation, config = first.config.evaluation, first.config.episodes
    split = asked.split or evaluation.split
    if split not in ("train", "val", "test"):
        raise SetupError(f"--split {split!r} is not known; use train, val or test.")
    for run in runs.values():
        refuse_seen_classes(run, split)
    left_out = _left_out(first.manifest, split, sources)
    if len(left_out) == len(first.manifest.videos_of(split)):
        raise SetupError(f"no video of split {split!r} is in all stores. Run `mastaf extract` on this manifest first.")
    return SharedEpisodes(
        split=split,
        num_episodes=asked.episodes or evaluation.episodes,
        protocol=EpisodeProtocol(
            config.protocol, config.n_way, asked.k_shot or config.k_shot, asked.n_query or config.n_query
        ),
        seed=evaluation.seed if asked.seed is None else asked.seed,
        manifest=exclude(first.manifest, left_out) if left_out else first.manifest,
        left_out=left_out,
        whole_split_hash=first.manifest.split_hash,
    )


@dataclass(frozen=True, slots=True)
class _Shared:
    """Something that makes an episode what it is."""

    name: str
    option: str
    """Gives all runs the same; empty: there is none."""
    of_run: Callable[[LoadedRun], object]
    asked: Callable[[Asked], object] = lambda asked: None


_SHARED = (
    _Shared("split hash", "--manifest", lambda run: run.manifest.split_hash[:12]),
    _Shared("episodes.protocol", "", lambda run: run.config.episodes.protocol),
    _Shared("episodes.n_way", "", lambda run: run.config.episodes.n_way),
    _Shared("episodes.k_shot", "--shots", lambda run: run.config.episodes.k_shot, lambda asked: asked.k_shot),
    _Shared("episodes.n_query", "--queries", lambda run: run.config.episodes.n_query, lambda asked: asked.n_query),
    _Shared("evaluation.seed", "--seed", lambda run: run.config.evaluation.seed, lambda asked: asked.seed),
    _Shared("evaluation.split", "--split", lambda run: run.config.evaluation.split, lambda asked: asked.split),
    _Shared(
        "evaluation.episodes", "--episodes", lambda run: run.config.evaluation.episodes, lambda asked: asked.episodes
    ),
)


def _refuse_differences(runs: Mapping[str, LoadedRun], asked: Asked) -> None:
    """Refuse runs that do not agree on what makes an episode, naming every such field with its values."""
    differing, options = [], []
    for shared in _SHARED:
        names_of: dict[str, list[str]] = {}
        for name, run in runs.items():
            names_of.setdefault(str(shared.of_run(run)), []).append(name)
        if shared.asked(asked) is None and len(names_of) > 1:
            values = [f"{value} ({', '.join(names)})" for value, names in names_of.items()]
            differing.append(f"{shared.name} is {' and '.join(values)}")
            options += [shared.option] if shared.option else []
    if differing:
        way_out = f" {', '.join(options)} would give all the same." if options else ""
        raise SetupError(
            f"these runs cannot share episodes: {'; '.join(differing)}.{way_out} Otherwise compare runs of one protocol on one manifest."
        )


def _left_out(manifest: Manifest, split: str, sources: Sequence[Source]) -> dict[str, str]:
    """Reason by id, of the videos of a split that a store rejected or does not have."""
    video_ids = [video.video_id for video in manifest.videos_of(split)]
    reasons: dict[str, str] = {}
    for source in sources:
        if not isinstance(source, CachedCubes):
            continue
        found = {key.video_id: outcome for key, outcome in source.store.outcomes(set(video_ids)) if key.view == 0}
        for video_id in video_ids:
            outcome = found.get(video_id)
            if outcome is None:
                reasons.setdefault(video_id, "not in a store")
            elif outcome.status == "rejected":
                reasons.setdefault(video_id, f"rejected: {outcome.reason}")
    return reasons
