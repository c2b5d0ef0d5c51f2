"""The demo's pictures: which files and which numbers go into `pipeline.pictures`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from episodes.datasets import Manifest
from episodes.sampler import Episode
from extract.config import SamplingConfig
from extract.decode import read_views
from pipeline.demo_classes import MOTION_CLASSES
from pipeline.extraction import video_sources
from pipeline.model import FewShotModel
from pipeline.pictures import AccuracyRow, AttentionRow, accuracy_bars, attention_over_frames, contact_sheet
from pipeline.scoring import LoadedRun, load_run
from pipeline.setup import make_sampler
from pipeline.sources import assemble

SEARCHED_EPISODES = 50
SPLIT_TITLES = {
    "train": "training classes",
    "val": "classes to choose the checkpoint",
    "test": "unseen classes, for the test",
}


def draw_classes(manifest: Manifest, path: Path, sampling: SamplingConfig) -> None:
    """Contact sheet: the first video of every class, as the network sees it."""
    sources = video_sources(manifest)
    first: dict[str, str] = {}
    for video in manifest.videos:
        first.setdefault(video.class_name, video.video_id)
    splits = {video.class_name: SPLIT_TITLES[video.split] for video in manifest.videos}
    frames = {name: read_views(sources[video_id], sampling, [0]).clips[0] for name, video_id in first.items()}
    captions = {name: MOTION_CLASSES[name].description for name in frames}
    contact_sheet(frames, path, groups=splits, captions=captions, title="Only the motion tells the class")


def draw_bars(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy of every method with its interval, and chance."""
    rows = [AccuracyRow(row["title"], row["k_shot"], row["accuracy"], row["interval95"]) for row in results]
    accuracy_bars(
        rows, path, chance=1.0 / results[0]["n_way"], title="5-way accuracy on unseen classes, 95 % intervals"
    )


def draw_attention(run_folder: Path, path: Path, device: torch.device, sampling: SamplingConfig) -> None:
    """Cross attention of one query that is right and one that is wrong, each with the class it was taken for.

    The first such queries of the test episodes are shown, not chosen ones.
    """
    rows: list[AttentionRow] = []
    with load_run(run_folder, device) as run:
        sampler = make_sampler(run.config, run.manifest, "test")
        run.source.check(sampler.video_ids, [0])
        for is_right in (True, False):
            for number in range(SEARCHED_EPISODES):
                found = _rows_of(run, sampler.episode(number), is_right, run.manifest, device, sampling)
                if found:
                    rows += found
                    break
    attention_over_frames(
        rows, path, title="Where MASTAF looks: cross attention, first right and first wrong query of the test"
    )


def _rows_of(
    run: LoadedRun, episode: Episode, is_right: bool, manifest: Manifest, device: torch.device, sampling: SamplingConfig
) -> list[AttentionRow]:
    """Query and nearest support of the first query of an episode that is classified rightly (or wrongly); empty if none is."""
    supports = np.zeros((1, len(episode.support_ids)), dtype=np.int64)
    queries = np.zeros((1, len(episode.query_ids)), dtype=np.int64)
    batch = assemble([episode], run.source, supports, queries).to(device)
    scorer = FewShotModel(nn.Identity(), run.model.head).to(device).eval()
    with torch.no_grad():
        output = scorer(batch, with_maps=True)
    predicted = output.logits.argmax(dim=-1)[0].tolist()
    for index, (label, guess) in enumerate(zip(episode.query_labels, predicted, strict=True)):
        if (label == guess) != is_right:
            continue
        support_id = episode.support_ids[episode.support_labels.index(guess)]
        word = "right" if is_right else "wrong"
        return [
            AttentionRow(
                f"{word}: query {episode.class_names[label]}, taken for {episode.class_names[guess]}",
                _frames(manifest, episode.query_ids[index], sampling),
                output.maps["cross_query"][0, index, guess].cpu().numpy(),
            ),
            AttentionRow(
                f"the support of {episode.class_names[guess]}",
                _frames(manifest, support_id, sampling),
                output.maps["cross_support"][0, index, guess].cpu().numpy(),
            ),
        ]
    return []


def _frames(manifest: Manifest, video_id: str, sampling: SamplingConfig) -> np.ndarray:
    clips: np.ndarray = read_views(video_sources(manifest)[video_id], sampling, [0]).clips
    frames: np.ndarray = clips[0]
    return frames
