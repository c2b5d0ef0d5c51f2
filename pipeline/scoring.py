"""Evaluate a finished run: on its store, or with each video passed once through its backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from cache.cube import Spec
from cache.open import open_store
from cache.store import SpecMismatch
from configs.load import load_config
from configs.schema import RunConfig
from episodes.datasets import Manifest
from pipeline.ancestry import SeenClasses
from pipeline.checkpoint import load_checkpoint
from pipeline.classify import build_scorer
from pipeline.evaluation import Accuracy, evaluate_model
from pipeline.extraction import build_spec, video_sources
from pipeline.model import FewShotModel
from pipeline.provenance import code_version
from pipeline.ranks import ALONE, Ranks
from pipeline.run_files import is_begun, load_for_resume, refuse_lost_best, resolved_head_options
from pipeline.settings import SetupError, open_configured_store
from pipeline.setup import build_encoder, build_model, encoder_cube_shape, load_manifest, make_sampler
from pipeline.sources import CachedCubes, EncodedClips, LiveClips, Source


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A trained run, ready to score or to look into. A context manager: it holds a store, or processes that decode."""

    config: RunConfig
    manifest: Manifest
    model: FewShotModel
    """Head with its encoder (identity on the cache)."""
    source: Source
    """Gives cubes."""
    store_fingerprint: str
    """Of the store, or of the store that this backbone would fill."""
    classes: Mapping[str, Sequence[str]]
    """Classes of each split when the run was trained."""
    inherited: SeenClasses = field(default_factory=SeenClasses)
    """Classes that the weights it started from had seen."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the store, or end the decoding processes at once; the exit of Python would wait for one that hangs."""
        if isinstance(self.source, CachedCubes):
            self.source.store.close()
        elif isinstance(self.source, EncodedClips):
            self.source.clips.close()


def load_run(
    folder: Path,
    device: torch.device,
    store_path: str | None = None,
    manifest_path: str | None = None,
    ranks: Ranks = ALONE,
) -> LoadedRun:
    """Open a run at its best checkpoint; whoever opens it closes it.

    Args:
        folder: written by `train`.
        device: where the model runs.
        store_path: score on this store; for an end-to-end run it must be filled by the run's own backbone.
        manifest_path: another manifest, for instance one without rejected videos.
        ranks: of this job; each encodes its share of the videos, where there is no store.

    Raises:
        SetupError: no run there, or not one that this version reads as it was meant.
        SpecMismatch: the store's cubes are not those of the run.
    """
    config, content = read_run(folder, device, manifest_path)
    manifest = load_manifest(config)
    if config.training.mode == "cached":
        store = open_configured_store(config, store_path)
        differing = Spec.from_json(content["store_spec"]).differences(store.spec)
        if differing:
            store.close()
            raise SpecMismatch(
                f"the run was trained on other cubes: {'; '.join(differing)}. Evaluate on the run's own store."
            )
        source = CachedCubes(store, config.head.array, config.training.cube_cache_bytes)
        model = build_model(config, nn.Identity(), source.cube_shape, content["num_classes"], device)
        model.load_state_dict(content["model"])
        return LoadedRun(
            config, manifest, model, source, store.spec.fingerprint, content["classes"], _inherited(content)
        )
    return _end_to_end(config, manifest, content, device, store_path, ranks)


def _inherited(content: Mapping[str, Any]) -> SeenClasses:
    return SeenClasses.from_json(content.get("inherited_classes"))


def read_run(folder: Path, device: torch.device, manifest_path: str | None = None) -> tuple[RunConfig, dict[str, Any]]:
    """Config and best checkpoint of a run.

    Raises:
        SetupError: no run there, an unfinished first stretch, or head options whose defaults have changed since.
    """
    if not (folder / "config.toml").is_file():
        raise SetupError(f"{folder} holds no run (no config.toml). Train one: `mastaf train RECIPE --out {folder}`.")
    if not (folder / "best.pt").is_file():
        if is_begun(folder):
            refuse_lost_best(folder, load_for_resume(folder).content)
        raise SetupError(
            f"{folder} has not come to its first validation (no best.pt). Go on with `mastaf train RECIPE --out {folder} --resume`."
        )
    tables = {"data": {"manifest": manifest_path}} if manifest_path else {}
    config = load_config(folder / "config.toml", tables=tables)
    content = load_checkpoint(folder / "best.pt", device)
    now, then = resolved_head_options(config), content["head_options"]
    if now != then:
        changed = [key for key in sorted({*now, *then}) if now.get(key) != then.get(key)]
        raise SetupError(
            f"{folder} was trained with other values of {', '.join(changed)} than its config gives in this version. "
            "State them in its config.toml."
        )
    return config, content


def _end_to_end(
    config: RunConfig,
    manifest: Manifest,
    content: dict[str, Any],
    device: torch.device,
    store_path: str | None,
    ranks: Ranks,
) -> LoadedRun:
    encoder = build_encoder(config, device, content)
    shape = encoder_cube_shape(config, encoder, device)
    if config.training.mode == "classify":
        # The linear classifier knows the training classes alone; other classes are scored by a head without weights.
        model = FewShotModel(encoder, build_scorer(config, shape)).to(device)
    else:
        model = build_model(config, encoder, shape, content["num_classes"], device)
        model.load_state_dict(content["model"])
    model.eval()
    spec = build_spec(config, encoder.backbone, device)
    if store_path is None:
        clips = LiveClips.of(config, video_sources(manifest, config.data.allow_outside), device)
        source: Source = EncodedClips(clips, encoder, device, ranks)
        return LoadedRun(config, manifest, model, source, spec.fingerprint, content["classes"], _inherited(content))
    store = open_store(store_path)
    # The store may hold half precision; everything else must be the run's own.
    dtype = store.spec.arrays[config.head.array].dtype if config.head.array in store.spec.arrays else config.store.dtype
    as_stored = config.model_copy(update={"store": config.store.model_copy(update={"dtype": dtype})})
    differing = store.spec.differences(build_spec(as_stored, encoder.backbone, device))
    if differing:
        store.close()
        raise SpecMismatch(
            f"{store_path} does not hold cubes of the run's backbone: {'; '.join(differing)}. "
            "Extract them with `mastaf extract --from-run RUN --store NEW`."
        )
    source = CachedCubes(store, config.head.array, config.training.cube_cache_bytes)
    return LoadedRun(config, manifest, model, source, store.spec.fingerprint, content["classes"], _inherited(content))


def evaluate_run(
    run: LoadedRun,
    split: str,
    episodes: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    k_shot: int | None = None,
    n_query: int | None = None,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Any], Accuracy]:
    """Score a run on fixed episodes of a split.

    Args:
        run: from `load_run`.
        split: "train", "val" or "test".
        episodes: how many, at least 1.
        device: where the model runs.
        on_progress: called with (episodes done, episodes in all).
        k_shot: another number of shots than the run was trained with.
        n_query: another number of queries; runs are compared on the same episodes only if both numbers agree.
        ranks: of this job; each scores its share.

    Returns:
        The JSON-able result with everything that made it, and the accuracy with its episodes.
    """
    changes = {key: value for key, value in (("k_shot", k_shot), ("n_query", n_query)) if value is not None}
    config = run.config.model_copy(update={"episodes": run.config.episodes.model_copy(update=changes)})
    manifest = run.manifest
    refuse_seen_classes(run, split)
    sampler = make_sampler(config, manifest, split)
    scorer = FewShotModel(nn.Identity(), run.model.head).to(device)
    score = evaluate_model(scorer, run.source, sampler, episodes, device, on_progress, ranks)
    return result_of(replace(run, config=config), split, score), score


def result_of(run: LoadedRun, split: str, score: Accuracy) -> dict[str, Any]:
    """A score with everything that made it, as a JSON object.

    Args:
        run: its config and manifest are those of the episodes.
        split: where they were drawn from.
        score: of the run.
    """
    config = run.config
    return {
        "accuracy": score.accuracy,
        "interval95": score.interval95,
        "episodes": score.episodes,
        "split": split,
        "protocol": config.episodes.protocol,
        "n_way": config.episodes.n_way,
        "k_shot": config.episodes.k_shot,
        "n_query": config.episodes.n_query,
        "seed": config.evaluation.seed,
        "head": config.head.name,
        "mode": config.training.mode,
        "split_hash": run.manifest.split_hash,
        "episode_hash": score.episode_hash,
        "store_fingerprint": run.store_fingerprint,
        "code_version": code_version(),
    }


def refuse_seen_classes(run: LoadedRun, split: str) -> None:
    """A class that the run was trained on, or chosen by, may not be scored as a class of another split."""
    for other in ("train", "val"):
        shared = sorted(set(run.manifest.classes(split)) & set(run.classes[other]))
        if other != split and shared:
            raise SetupError(
                f"{len(shared)} classes of split {split!r} were in the run's {other} split: {', '.join(shared[:5])}. "
                "Their accuracy would not be one on unseen classes; use the manifest that the run was trained with."
            )
    leaked = run.inherited.leaked_into(split, run.manifest.classes(split))
    if leaked:
        raise SetupError(
            f"{len(leaked)} classes of split {split!r} were trained on, or chosen by, in a run that this one's weights come from: "
            f"{', '.join(leaked[:5])}. Their accuracy would not be one on unseen classes; start from weights that have not seen them."
        )
