"""`mastaf extract` in one process or many: finds the way that the options and the environment ask for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from configs.schema import RunConfig
from pipeline.console import progress, say
from pipeline.extract_command import extract_config, extract_to_store, wanted_videos
from pipeline.extraction_report import ExtractionReport, report_json, say_report
from pipeline.interrupts import Stopped
from pipeline.job import Job
from pipeline.launch import (
    WORKER,
    LaunchError,
    Place,
    device_name,
    find_place,
    find_ranks,
    num_cores,
    refuse_nested_workers,
)
from pipeline.shares import Share

CONFIG_OPTIONS = ("manifest", "backbone", "weights", "store", "store_kind", "recipe", "from_run", "overrides")


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """The options of `mastaf extract` about processes and machines."""

    program: Sequence[str]
    """Words that run `mastaf extract`."""
    options: Mapping[str, Sequence[str]]
    """All options as they would be typed, by their names."""
    shard: str | None
    workers: int | None
    engine: Literal["local", "ray"]
    ray_timeout: float | None
    slurm: Literal["print", "submit"] | None
    slurm_tasks: int | None
    slurm_options: tuple[str, ...]

    @classmethod
    def names_of_options(cls) -> list[str]:
        """The fields that are options themselves."""
        return [each.name for each in fields(cls) if each.name not in ("program", "options")]

    def command(self, *left_out: str) -> list[str]:
        """The whole command again, without some of its options."""
        return [
            *self.program,
            *(word for name, words in self.options.items() if name not in left_out for word in words),
        ]

    def __post_init__(self) -> None:
        if self.engine == "ray" and (self.workers is not None or self.slurm is not None):
            other = "--workers" if self.workers is not None else "--slurm"
            raise LaunchError(f"--engine ray with {other}: both spread the work. Use one of them.")
        if self.ray_timeout is not None and self.engine != "ray":
            raise LaunchError("--ray-timeout is for --engine ray.")
        if self.slurm is None and (self.slurm_tasks is not None or self.slurm_options):
            raise LaunchError("--slurm-tasks and --slurm-option are for --slurm print or --slurm submit.")
        if self.slurm is not None and self.slurm_tasks is None:
            raise LaunchError("--slurm needs --slurm-tasks N, the number of tasks of the array.")
        if self.slurm is not None and self.shard is not None:
            raise LaunchError("--slurm with --shard: each task of the array is a share. Leave --shard out.")


def run_extraction(options: dict[str, Any], launch: LaunchOptions) -> dict[str, Any] | str:
    """Extract as the options say; the report as a JSON-able dict, or the text that `--slurm` prints.

    Args:
        options: of `extract_to_store`, without the share.

    Raises:
        LaunchError: the options and the environment do not say one thing.
    """
    if launch.slurm is not None:
        return _slurm(options, launch)
    if WORKER in os.environ:
        report = _in_this_process(options, find_place(launch.shard, os.environ))
        # All of the job, from each process: the parent reads them in the ledger.
        report.pop("problems", None)
        return report
    place = find_place(launch.shard, os.environ)
    if options["retry_failed"] and place.share.count > 1:
        raise LaunchError(
            f"--retry-failed in share {place.share.index} of {place.share.count}: every process would plan the rejected videos "
            "anew. Run it once, in one process or with --workers."
        )
    if launch.engine == "ray":
        return _by_ray(options, launch, place)
    if launch.workers is not None:
        refuse_nested_workers(os.environ)
        if launch.workers > 1:
            return _by_workers(options, launch, place.share, launch.workers)
    return _in_this_process(options, place)


def _in_this_process(options: dict[str, Any], place: Place) -> dict[str, Any]:
    import torch

    if place.num_local > 1:
        torch.set_num_threads(num_cores())
    device = device_name(options["device"], place, torch.cuda.device_count())
    return extract_to_store(**{**options, "device": device}, share=place.share)


def _by_workers(options: dict[str, Any], launch: LaunchOptions, share: Share, num_workers: int) -> dict[str, Any]:
    from pipeline.workers import run_workers

    _, job = _job(options, Share(share.index * num_workers, share.count * num_workers, True, num_workers))
    say(f"{num_workers} processes")
    first_only = ["--retry-failed"] if options["retry_failed"] else []
    command = [*launch.command("workers", "retry_failed", "strict", "as_json"), "--json"]
    with progress("extract") as on_progress:
        report = run_workers(command, num_workers, job, on_progress, first_only)
    return _said(report, job)


def _by_ray(options: dict[str, Any], launch: LaunchOptions, place: Place) -> dict[str, Any]:
    from pipeline.ray_engine import extract_with_ray
    from pipeline.reextraction import build_extraction_backbone, make_origin

    is_array_task = launch.shard is None and place.share.count > 1
    if is_array_task or find_ranks(os.environ).share.count > 1:
        raise LaunchError("--engine ray in one of several processes: Ray has one driver. Start it once.")
    config, job = _job(options, place.share)
    run = options["from_run"] if options["weights"] is None else None
    backbone = build_extraction_backbone(config, run)
    try:
        with progress("extract") as on_progress:
            report = extract_with_ray(
                job,
                wanted_videos(config),
                backbone,
                config,
                origin=make_origin(config, run),
                retry=options["retry_failed"],
                timeout=launch.ray_timeout,
                wants_gpu=options["device"] != "cpu",
                on_progress=on_progress,
            )
    except Stopped as stopped:
        say(f"mastaf: {stopped}")
        # At once: Ray's native threads, whose processes are gone, would end this one with a code of their own.
        os._exit(stopped.exit_code)
    return _said(report, job)


def _slurm(options: Mapping[str, Any], launch: LaunchOptions) -> str:
    from pipeline.slurm import SlurmJob, parse_options, submit

    if options["retry_failed"]:
        raise LaunchError(
            "--slurm with --retry-failed: every task would plan the rejected videos anew. Run it once with --workers."
        )
    config = _config(options)
    assert launch.slurm_tasks is not None
    store = str(config.store.path)
    log = Path.cwd() / "mastaf-extract" if "://" in store else Path(store).absolute()
    command = launch.command("slurm", "slurm_tasks", "slurm_options")
    job = SlurmJob(command, launch.slurm_tasks, log, Path.cwd(), parse_options(launch.slurm_options))
    return job.script() if launch.slurm == "print" else submit(job.script())


def _config(options: Mapping[str, Any]) -> RunConfig:
    return extract_config(**{name: options[name] for name in CONFIG_OPTIONS})


def _job(options: Mapping[str, Any], share: Share) -> tuple[RunConfig, Job]:
    config = _config(options)
    names = [video.video_id for video in wanted_videos(config)]
    return config, Job(str(config.store.path), config.store.kind, names, list(range(config.sampling.num_views)), share)


def _said(report: ExtractionReport, job: Job) -> dict[str, Any]:
    say_report(report, job.store)
    store = job.open()
    assert store is not None  # the report was counted in it
    with store:
        fingerprint = store.spec.fingerprint
    return {"store": job.store, "fingerprint": fingerprint, **report_json(report)}
