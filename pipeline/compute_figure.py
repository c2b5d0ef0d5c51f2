"""`mastaf bench compute`: FLOPs and inference time of whole systems against the number of frames (MASTAF paper, Figures 4 and 5).

The paper draws TRX against MASTAF on UCF101, 5-way 1-shot with one query, for 8 to 16 frames, without numbers in the text. Here the
tuple projections of TRX come as published (every tuple concatenated) and factored (every frame projected once, the same logits): most
of the growth that the figure holds against TRX is the former.

F frames, H W pixels; V clips of an episode (supports and queries); C channels, T time steps.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.table import Table
from torch import nn

from episodes.batch import EpisodeBatch
from episodes.build import build_head
from episodes.head import HeadModule
from extract.build import build_backbone
from extract.config import BackboneConfig, SamplingConfig
from pipeline.compute_cost import count_macs, median_milliseconds
from pipeline.console import say, stderr_console
from pipeline.pictures import GROUP_COLOURS
from pipeline.provenance import code_version, hardware
from pipeline.settings import SetupError
from pipeline.setup import choose_device
from pipeline.strips import DOTS_PER_INCH, GRID, INK, MUTED, save_figure


@dataclass(frozen=True, slots=True)
class System:
    """A backbone with a head."""

    name: str
    backbone: str
    head: str
    options: Mapping[str, Any]
    """Of the head."""


SYSTEMS = (
    System("MASTAF-R3D", "r3d50", "mastaf", {}),
    System("MASTAF-TSN", "tsn_resnet50", "mastaf", {"average_time": True}),
    System("TRX, as published", "tsn_resnet50", "trx", {"cardinalities": [2, 3], "factored": False}),
    System("TRX, factored", "tsn_resnet50", "trx", {"cardinalities": [2, 3], "factored": True}),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """One system at one number of frames, for one episode."""

    system: str
    num_frames: int
    backbone_macs: int
    """Multiply-accumulates of all clips of the episode."""
    head_macs: int
    milliseconds: float | None
    """Measured for the whole episode, backbone and head; None: not measured."""
    head_milliseconds: float | None

    @property
    def teraflops(self) -> float:
        """Floating point operations of the episode, in 10^12; two for each multiply-accumulate."""
        return 2e-12 * (self.backbone_macs + self.head_macs)


def measure_costs(
    frames: Sequence[int],
    k_shot: int,
    crop_size: int,
    repeats: int,
    device: torch.device,
    systems: Sequence[System] = SYSTEMS,
    on_cost: Callable[[Cost], None] = lambda cost: None,
) -> list[Cost]:
    """Cost of every system at every number of frames: 5-way, `k_shot` supports of each class, one query.

    Args:
        frames: numbers of frames F.
        k_shot: labelled videos per class.
        crop_size: H and W of the frames.
        repeats: timed runs of an episode; 0 counts without measuring.
        device: where it runs.
        systems: what is measured.
        on_cost: called with each result.
    """
    costs = []
    for num_frames in frames:
        for system in systems:
            costs.append(_cost(system, num_frames, k_shot, crop_size, repeats, device))
            on_cost(costs[-1])
    return costs


def _cost(system: System, num_frames: int, k_shot: int, crop_size: int, repeats: int, device: torch.device) -> Cost:
    sampling = SamplingConfig(num_frames=num_frames, crop_size=crop_size, resize_size=max(256, crop_size))
    backbone = build_backbone(BackboneConfig(name=system.backbone, weights="random:0"), sampling).to(device).eval()
    num_clips = 5 * k_shot + 1
    clips = torch.rand(num_clips, 3, num_frames, crop_size, crop_size, generator=_randomness()).to(device)
    with torch.no_grad():
        cubes = backbone(clips[:1])["cube"]
    head = _head(system, cubes).to(device).eval()
    batch = _episode(cubes, k_shot)
    milliseconds = head_milliseconds = None
    if repeats:
        head_milliseconds = median_milliseconds(lambda: head(batch), device, max(repeats, 5))
        milliseconds = median_milliseconds(lambda: backbone(clips), device, repeats) + head_milliseconds
    return Cost(
        system.name,
        num_frames,
        backbone_macs=num_clips * _backbone_macs(backbone, num_frames, crop_size),
        head_macs=count_macs(lambda: head(batch)),
        milliseconds=milliseconds,
        head_milliseconds=head_milliseconds,
    )


def _backbone_macs(backbone: nn.Module, num_frames: int, crop_size: int) -> int:
    # Shapes decide the count, so that nothing need be computed.
    shadow = backbone.to("meta")
    return count_macs(lambda: shadow(torch.zeros(1, 3, num_frames, crop_size, crop_size, device="meta")))


def _head(system: System, cubes: torch.Tensor) -> HeadModule:
    _, channels, time_steps, height, width = cubes.shape
    shape = (channels, time_steps, height, width)
    return build_head(system.head, system.options, shape, None, default_meta_bn_query=False, generator=_randomness())


def _episode(cubes: torch.Tensor, k_shot: int) -> EpisodeBatch:
    """One episode of random cubes like these."""
    shape, device = cubes.shape[1:], cubes.device
    return EpisodeBatch(
        support=torch.rand(1, 5 * k_shot, *shape, generator=_randomness()).to(device),
        support_labels=torch.arange(5 * k_shot, device=device)[None] % 5,
        query=torch.rand(1, 1, *shape, generator=_randomness()).to(device),
        query_labels=None,
        n_way=5,
        seeds=torch.zeros(1, dtype=torch.int64),
    )


def _randomness() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draw_costs(costs: Sequence[Cost], path: Path, title: str) -> Figure:
    """Two panels against the number of frames: operations of an episode, and its time where that was measured.

    Args:
        costs: of one or more systems.
        path: the PNG to write.
        title: over the picture.
    """
    panels: list[tuple[str, Callable[[Cost], float]]] = [("TFLOPs per episode", lambda cost: cost.teraflops)]
    if all(cost.milliseconds is not None for cost in costs):
        panels.append(("seconds per episode", lambda cost: (cost.milliseconds or 0.0) / 1000.0))
    figure = Figure(
        figsize=(5.4 * len(panels), 4.2), dpi=DOTS_PER_INCH, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    )
    for place, (label, value) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for index, name in enumerate(dict.fromkeys(cost.system for cost in costs)):
            own = [cost for cost in costs if cost.system == name]
            axes.plot(
                [cost.num_frames for cost in own],
                [value(cost) for cost in own],
                marker="os^D"[index % 4],
                color=GROUP_COLOURS[index % len(GROUP_COLOURS)],
                linestyle=("-", "--", ":", "-.")[index % 4],
                label=name if place == 1 else None,
            )
        axes.set_ylim(bottom=0.0)
        axes.set_xticks(sorted({cost.num_frames for cost in costs}))
        axes.set_xlabel("frames", fontsize=10, color=MUTED)
        axes.set_title(label, fontsize=11, color=INK, loc="left")
        axes.tick_params(labelsize=9, colors=MUTED, length=0)
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines[:].set_visible(False)
    figure.suptitle(title, x=0.015, ha="left", fontsize=13, weight="bold", color=INK)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9.5, labelcolor=INK)
    return save_figure(figure, path)


def bench_compute(
    frames: str, k_shot: int, crop_size: int, repeats: int, device: str, out: Path | None
) -> dict[str, Any]:
    """`mastaf bench compute`: count, measure, print; with `out` also compute.json, compute.csv and compute.png there."""
    chosen = choose_device(device)
    say("counting" + (f" and timing {repeats} episodes each" if repeats else "") + "; this takes minutes on a CPU")
    costs = measure_costs(
        _numbers(frames),
        k_shot,
        crop_size,
        repeats,
        chosen,
        on_cost=lambda cost: say(f"{cost.system}, {cost.num_frames} frames: {cost.teraflops:.3f} TFLOPs"),
    )
    stderr_console().print(_table(costs))
    rows: list[dict[str, Any]] = [{**asdict(cost), "teraflops": cost.teraflops} for cost in costs]
    result = {
        "protocol": f"5-way {k_shot}-shot, 1 query, {crop_size} x {crop_size} pixels",
        "costs": rows,
        "device": str(chosen),
        "hardware": hardware(),
        "code_version": code_version(),
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compute.json").write_text(json.dumps(result, indent=2) + "\n")
        with (out / "compute.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        draw_costs(costs, out / "compute.png", f"One episode, {result['protocol']}")
        say(f"table and picture: {out}")
    return result


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise SetupError(f"--frames {text!r} is not a list of numbers such as 8,12,16.") from error
    if min(numbers) < 4:
        raise SetupError(
            f"--frames {text!r}: 4 or more are needed, since TRX takes triples of frames and R3D halves time."
        )
    return numbers


def _table(costs: Sequence[Cost]) -> Table:
    table = Table("system", "frames", "backbone GMACs", "head GMACs", "TFLOPs", "ms", "head ms")
    for cost in costs:
        table.add_row(
            cost.system,
            str(cost.num_frames),
            f"{cost.backbone_macs / 1e9:,.1f}",
            f"{cost.head_macs / 1e9:,.3f}",
            f"{cost.teraflops:.3f}",
            *["-" if value is None else f"{value:,.1f}" for value in (cost.milliseconds, cost.head_milliseconds)],
        )
    return table
