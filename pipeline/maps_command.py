"""`mastaf maps`: what the head of a run sees in one seeded episode, as pictures and as numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from episodes.head import HeadOutput
from episodes.maps import axes_of
from episodes.sampler import Episode, EpisodeSampler, draw_noise_seed
from pipeline.console import progress, shortened
from pipeline.extraction import video_sources
from pipeline.head_pictures import EpisodeView, ShownVideo, draw_maps
from pipeline.model import FewShotModel
from pipeline.output_folder import check_output_folder
from pipeline.provenance import code_version
from pipeline.scoring import LoadedRun, load_run
from pipeline.settings import SetupError
from pipeline.setup import choose_device, make_sampler
from pipeline.sources import LiveClips, assemble


def draw_run_maps(
    run: Path,
    split: str | None,
    episode: int,
    query: int | None,
    store_path: str | None,
    manifest: str | None,
    out: Path | None,
    with_gifs: bool,
    device: str,
) -> tuple[dict[str, Any], list[Path]]:
    """Draw what a run's head sees in one of the episodes that `mastaf evaluate` scores.

    Args:
        run: folder written by `train`.
        split: train, val or test; None: evaluation.split of the run.
        episode: number of the episode, from 0 on.
        query: place of the query to draw; None: all.
        store_path: read the cubes there, as in `load_run`.
        manifest: another manifest, for instance one that knows where the videos are now.
        out: folder for the files; None: maps/SPLIT_EPISODE within the run.
        with_gifs: also write GIFs.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        What was written to maps.json, and all files written.

    Raises:
        SetupError: the head gives no maps, there is no such query, video files are missing, or `out` is no folder to write
            into.
    """
    if out is not None:
        check_output_folder(out)
    chosen_device = choose_device(device)
    with load_run(run, chosen_device, store_path, manifest) as loaded:
        split = split or loaded.config.evaluation.split
        folder = out or run / "maps" / f"{split}_{episode}"
        if out is None:
            check_output_folder(folder)
        sampler = make_sampler(loaded.config, loaded.manifest, split)
        drawn = sampler.episode(episode)
        queries = _queries_to_draw(drawn, query)
        output = _score(loaded, drawn, sampler, chosen_device)
    if not output.maps:
        raise SetupError(
            f"head {loaded.config.head.name!r} of {run} gives no maps: it has nothing to show. "
            "docs/maps.md lists what the heads give."
        )
    maps = {name: _as_array(values[0]) for name, values in output.maps.items()}
    view = _view(loaded, drawn, queries, _as_array(output.logits[0]))
    with progress("draw") as on_progress:
        gif_frames = loaded.config.sampling.num_frames if with_gifs else 0
        pictures = draw_maps(view, maps, folder, queries, gif_frames, on_progress)
    np.savez_compressed(folder / "maps.npz", **maps)  # type: ignore[arg-type]  # its stub takes a map's name for a flag
    record = _record(run, loaded, split, sampler, drawn, view, maps, [picture.name for picture in pictures])
    (folder / "maps.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record, [*pictures, folder / "maps.npz", folder / "maps.json"]


def _queries_to_draw(episode: Episode, query: int | None) -> list[int]:
    num_queries = len(episode.query_ids)
    if query is None:
        return list(range(num_queries))
    if query >= num_queries:
        raise SetupError(
            f"--query {query}, but episode {episode.index} has {num_queries} queries: 0 to {num_queries - 1}."
        )
    return [query]


def _score(run: LoadedRun, episode: Episode, sampler: EpisodeSampler, device: torch.device) -> HeadOutput:
    """The head on one episode, as in the evaluation, with its maps."""
    run.source.check([*episode.support_ids, *episode.query_ids], [0])
    supports = np.zeros((1, len(episode.support_ids)), dtype=np.int64)
    queries = np.zeros((1, len(episode.query_ids)), dtype=np.int64)
    seeds = [draw_noise_seed(sampler.split_hash, sampler.seed, episode.index)]
    batch = assemble([episode], run.source, supports, queries, seeds=seeds).to(device)
    scorer = FewShotModel(nn.Identity(), run.model.head).to(device).eval()
    with torch.no_grad():
        output: HeadOutput = scorer(batch, with_maps=True)
    return output


def _as_array(values: torch.Tensor) -> np.ndarray:
    values = values.detach().cpu()
    # NumPy has no bfloat16.
    return np.asarray((values.float() if values.dtype == torch.bfloat16 else values).numpy())


def _view(run: LoadedRun, episode: Episode, queries: list[int], scores: np.ndarray) -> EpisodeView:
    """The episode with the frames of its supports and of the queries to draw.

    Raises:
        SetupError: files are missing.
        SourceError: a file cannot be decoded.
    """
    ids = [*episode.support_ids, *(episode.query_ids[query] for query in queries)]
    sources = video_sources(run.manifest, run.config.data.allow_outside)
    missing = [f"{video_id} ({sources[video_id].path})" for video_id in ids if not sources[video_id].path.exists()]
    if missing:
        raise SetupError(
            f"{len(missing)} of the {len(ids)} videos to draw have no file: {shortened(missing, 2)}. Their cubes do not hold "
            "their frames; bring the files back, or give --manifest of where they are."
        )
    with LiveClips.of(run.config, sources) as source:
        clips = source.read(ids, [0] * len(ids))
    return EpisodeView(
        class_names=episode.class_names,
        supports=tuple(map(ShownVideo, episode.support_ids, episode.support_labels)),
        queries=tuple(map(ShownVideo, episode.query_ids, episode.query_labels)),
        scores=scores,
        frames=dict(zip(ids, clips.numpy(), strict=True)),
        num_steps=run.model.head.cube_shape[1],
    )


def _record(
    run_folder: Path,
    run: LoadedRun,
    split: str,
    sampler: EpisodeSampler,
    episode: Episode,
    view: EpisodeView,
    maps: dict[str, np.ndarray],
    pictures: list[str],
) -> dict[str, Any]:
    """What maps.json says: which video is which, what came out, and what made it."""
    names = episode.class_names
    return {
        "run": str(run_folder),
        "head": run.config.head.name,
        "split": split,
        "episode": episode.index,
        "seed": sampler.seed,
        "split_hash": sampler.split_hash,
        "store_fingerprint": run.store_fingerprint,
        "code_version": code_version(),
        "class_names": list(names),
        "supports": [
            {"video_id": video.video_id, "class_name": names[video.label], "label": video.label}
            for video in view.supports
        ],
        "queries": [
            {
                "video_id": video.video_id,
                "class_name": names[video.label],
                "label": video.label,
                "predicted_class_name": names[view.predicted(place)],
                "predicted": view.predicted(place),
                "scores": [float(score) for score in view.scores[place]],
            }
            for place, video in enumerate(view.queries)
        ],
        "maps": {
            name: {"axes": " ".join(axes_of(name).split()[1:]), "shape": list(values.shape)}
            for name, values in maps.items()
        },
        "pictures": pictures,
    }
