"""One discriminative region in clutter: how much attention MASTAF pays to it after training, and what that is worth.

python benchmarks/attention_in_clutter.py          prints the table; on a CPU, minutes; the same numbers on every run

Each video shows its class at one of L positions, which varies from video to video, and random vectors of the same length
elsewhere (`tests/contracts/clutter_episodes.py`). Heads train on 40 classes and are tested on new ones. "Attention on the
region" is the mean over pairs of query and support of one class; even attention has 1 / L. The interval counts queries as
independent.
"""

# C channels, T time steps, H W grid, L = THW positions

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# E402: the path above comes first, since neither the benchmarks nor the tests are packages.
from contracts.clutter_episodes import ClutterEpisodes, clutter_episodes, peaking_mastaf, planted_attention  # noqa: E402
from contracts.meaning_episodes import Shape, Sight, accuracy, build_trained  # noqa: E402
from episodes.batch import EpisodeBatch  # noqa: E402
from episodes.head import HeadModule, HeadOutput  # noqa: E402

SHAPE: Shape = (256, 1, 4, 4)
TRAINING_CLASSES = 40
NUM_STEPS = 600
LEARNING_RATE = 0.001
TEST_BATCHES = 25
TEST_SEED = 2_000_000

POOLED = {"train_similarity": "pooled"}
MASTAF: Mapping[str, Mapping[str, Any]] = {
    "mastaf, attention_gain 1, trained": {},
    "mastaf, attention_gain L, trained": {"attention_gain": "L"},
    "mastaf, attention_gain 1, trained on pooled cosines": POOLED,
    "mastaf, attention_gain L, trained on pooled cosines": {**POOLED, "attention_gain": "L"},
}


def training_batch(seed: int, shape: Shape) -> EpisodeBatch:
    """Episodes of the training classes."""
    return clutter_episodes(seed, shape, num_classes=TRAINING_CLASSES).batch


def new_batch(seed: int, shape: Shape) -> EpisodeBatch:
    """Episodes of new classes."""
    return clutter_episodes(seed, shape).batch


def build(name: str, options: Mapping[str, Any], num_steps: int) -> HeadModule:
    """A head after `num_steps` training batches."""
    sight = Sight("weak", "", options, SHAPE, LEARNING_RATE, num_steps)
    return build_trained(name, sight, training_batch, TRAINING_CLASSES)


def attention_on_region(head: HeadModule) -> str:
    """Mean attention on the planted position of queries and of supports."""
    masses: dict[str, list[float]] = {"cross_query": [], "cross_support": []}
    for index in range(TEST_BATCHES):
        episodes: ClutterEpisodes = clutter_episodes(TEST_SEED + index, SHAPE)
        with torch.no_grad():
            output: HeadOutput = head(episodes.batch, with_maps=True)
        for name, found in masses.items():
            found.append(planted_attention(output, episodes, name).mass)
    return " | ".join(f"{sum(found) / len(found):.3f}" for found in masses.values())


def row(label: str, head: HeadModule, *, attends: bool) -> str:
    """One line of the table."""
    found = accuracy(head, new_batch, SHAPE, TEST_BATCHES)
    interval = 1.96 * math.sqrt(found.mean * (1.0 - found.mean) / found.num_queries)
    return f"| {label} | {100 * found.mean:.1f} ± {100 * interval:.1f} | {attention_on_region(head) if attends else '- | -'} |"


def main() -> None:
    """Print the table."""
    num_positions = math.prod(SHAPE[1:])
    print(
        f"Cubes {SHAPE}, 4-way 1-shot, chance 25 %, even attention {1 / num_positions:.3f}; {NUM_STEPS} training batches of 8.\n"
    )
    print("| head | accuracy on new classes, % | attention on the region, query | support |")
    print("|---|---|---|---|")
    print(row("neighbor, trained", build("neighbor", {}, NUM_STEPS), attends=False), flush=True)
    print(row("mastaf, attention_gain 1, untrained", build("mastaf", {}, 0), attends=True), flush=True)
    for label, options in MASTAF.items():
        print(row(label, build("mastaf", options, NUM_STEPS), attends=True), flush=True)
    print(row("cross, hand-set weights, attention_gain 1", peaking_mastaf(SHAPE), attends=True), flush=True)
    gained = peaking_mastaf(SHAPE, attention_gain="L")
    print(row("cross, hand-set weights, attention_gain L", gained, attends=True), flush=True)
    print(row("max over pairs of positions (the best possible)", BestPair(), attends=False), flush=True)


class BestPair(HeadModule):
    """Largest cosine of any position of the query with any of the support."""

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Logits (E, Q, N) of one-shot episodes."""
        del with_maps
        query, support = (
            torch.nn.functional.normalize(cubes.flatten(3), dim=2) for cubes in (batch.query, batch.support)
        )
        pairs = torch.einsum("eqcl,escm->eqslm", query, support).amax(dim=(-2, -1))  # (E, Q, S)
        index = batch.support_labels.argsort(dim=1)[:, None].expand(pairs.shape)
        return HeadOutput(pairs.gather(2, index))


if __name__ == "__main__":
    main()
