"""Evaluate a finished run: on its store, or with each video passed once through its backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache.store import FeatureStore, SpecMismatch
from configs.load import load_config
from configs.schema import RunConfig
from pipeline.checkpoint import load_checkpoint
from pipeline.evaluation import Accuracy, evaluate_model
from pipeline.extraction import build_spec, video_sources
from pipeline.model import ClipEncoder, FewShotModel
from pipeline.provenance import code_version
from pipeline.setup import (
    SetupError,
    build_encoder,
    build_model,
    encoder_cube_shape,
    global_index,
    load_manifest,
    make_sampler,
    open_configured_store,
)
from pipeline.sources import CachedCubes, LiveClips, Source


class EncodedClips:
    """Each clip passed once through a backbone in evaluation mode; a video is encoded once however many episodes draw it.

    With running statistics a cube is a constant of its video (reference 12.8), so the scores are those of the whole model.
    """

    def __init__(self, clips: LiveClips, encoder: nn.Module, device: torch.device) -> None:
        self.clips = clips
        self.encoder = encoder
        self.device = device
        self._cubes: dict[tuple[str, int], Tensor] = {}

    def check(self, video_ids: Sequence[str], views: Sequence[int]) -> None:
        """Decode and encode every video in each of the views."""
        self.clips.check(video_ids, views)
        self._encode([(video_id, view) for video_id in video_ids for view in views])

    def _encode(self, rows: Sequence[tuple[str, int]], chunk: int = 32) -> None:
        rows = [row for row in dict.fromkeys(rows) if row not in self._cubes]
        was_training = self.encoder.training
        self.encoder.eval()
        with torch.no_grad():
            for start in range(0, len(rows), chunk):
                part = rows[start : start + chunk]
                clips = self.clips.read([row[0] for row in part], [row[1] for row in part]).to(self.device)
                for row, cube in zip(part, self.encoder(clips[None])[0].cpu(), strict=True):
                    self._cubes[row] = cube
        self.encoder.train(was_training)

    def read(self, video_ids: Sequence[str], views: Sequence[int]) -> Tensor:
        """Cubes (V, C, T, H, W) float32."""
        rows = list(zip(video_ids, views, strict=True))
        self._encode(rows)
        return torch.stack([self._cubes[row] for row in rows])


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A trained run, ready to score or to look into."""

    config: RunConfig
    model: FewShotModel
    """Head with its encoder (identity on the cache)."""
    source: Source
    """Gives cubes."""
    store_fingerprint: str
    """Of the store, or of the store that this backbone would fill."""


def load_run(
    folder: Path,
    device: torch.device,
    store_path: str | None = None,
    manifest_path: str | None = None,
    checkpoint: str = "best.pt",
) -> LoadedRun:
    """Open a run.

    Args:
        folder: written by `train`.
        device: where the model runs.
        store_path: score on this store; for an end-to-end run it must be filled by the run's own backbone.
        manifest_path: another place of the manifest.
        checkpoint: "best.pt" or "last.pt".

    Raises:
        SetupError: no run there.
        SpecMismatch: the store's cubes are not those of the run.
    """
    if not (folder / "config.toml").is_file():
        raise SetupError(f"{folder} holds no run (no config.toml). Train one: `mastaf train RECIPE --out {folder}`.")
    overrides = [f'data.manifest="{manifest_path}"'] if manifest_path else []
    config = load_config(folder / "config.toml", overrides)
    content = load_checkpoint(folder / checkpoint, device)
    num_classes = len(global_index(config, load_manifest(config)))
    if config.training.mode == "cached":
        store = open_configured_store(config, store_path)
        if store.spec.fingerprint != content["store_fingerprint"]:
            raise SpecMismatch(
                f"the run was trained on cubes of {content['store_fingerprint'][:12]}, the store holds {store.spec.fingerprint[:12]}. "
                "Evaluate on the run's own store."
            )
        model, source = _on_store(config, store, num_classes, device)
        model.load_state_dict(content["model"])
        return LoadedRun(config, model, source, store.spec.fingerprint)
    return _end_to_end(config, content, num_classes, device, store_path)


def _on_store(
    config: RunConfig, store: FeatureStore, num_classes: int, device: torch.device
) -> tuple[FewShotModel, CachedCubes]:
    source = CachedCubes(store, config.head.array, config.training.cube_cache_bytes)
    return build_model(config, nn.Identity(), source.cube_shape, num_classes, device), source


def _end_to_end(
    config: RunConfig, content: dict[str, Any], num_classes: int, device: torch.device, store_path: str | None
) -> LoadedRun:
    # The run's weights replace whatever the backbone started from, so that file need not be there any more.
    fresh = config.model_copy(update={"backbone": config.backbone.model_copy(update={"weights": "random:0"})})
    encoder = build_encoder(fresh, device)
    model = build_model(config, encoder, encoder_cube_shape(config, encoder, device), num_classes, device)
    model.load_state_dict(content["model"])
    model.eval()
    spec = build_spec(config, encoder.backbone, device)
    if store_path is None:
        clips = LiveClips(
            video_sources(load_manifest(config)),
            config.sampling,
            config.training.decode_threads,
            config.training.clip_cache_bytes,
        )
        return LoadedRun(config, model, EncodedClips(clips, encoder, device), spec.fingerprint)
    store = open_configured_store(config, store_path)
    if store.spec.weights_digest != spec.weights_digest:
        raise SpecMismatch(
            f"{store_path} holds cubes of weights {store.spec.weights_digest[:12]}, the run's backbone is {spec.weights_digest[:12]}. "
            "Extract with `mastaf extract --from-run RUN --store NEW`."
        )
    source = CachedCubes(store, config.head.array, config.training.cube_cache_bytes)
    return LoadedRun(config, model, source, store.spec.fingerprint)


def evaluate_run(
    run: LoadedRun,
    split: str,
    episodes: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    k_shot: int | None = None,
    n_query: int | None = None,
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

    Returns:
        The JSON-able result with everything that made it, and the accuracy with its episodes.
    """
    changes = {key: value for key, value in (("k_shot", k_shot), ("n_query", n_query)) if value is not None}
    config = run.config.model_copy(update={"episodes": run.config.episodes.model_copy(update=changes)})
    manifest = load_manifest(config)
    sampler = make_sampler(config, manifest, split)
    scorer = FewShotModel(nn.Identity(), run.model.head).to(device)
    score = evaluate_model(scorer, run.source, sampler, episodes, device, on_progress)
    result = {
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
        "split_hash": manifest.split_hash,
        "episode_hash": score.episode_hash,
        "store_fingerprint": run.store_fingerprint,
        "code_version": code_version(),
    }
    return result, score


def encoder_of(model: FewShotModel) -> ClipEncoder | None:
    """The backbone of an end-to-end model, None on the cache."""
    return model.encoder if isinstance(model.encoder, ClipEncoder) else None
