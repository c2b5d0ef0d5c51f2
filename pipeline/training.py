"""Stage 2, and end-to-end training: prepare, run the loop, validate, keep the best, write the run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.load import to_toml
from configs.schema import RunConfig, TrainingConfig
from episodes.sampler import EpisodeSampler
from pipeline.checkpoint import write_file
from pipeline.evaluation import evaluate_model
from pipeline.initial_weights import load_initial_weights
from pipeline.interrupts import Stopped, StopRequest
from pipeline.loop import Learner, StepRecord, TrainingBatches, run_loop
from pipeline.model import ClipEncoder, FewShotModel
from pipeline.run_files import (
    Progress,
    export_backbone,
    load_for_resume,
    refuse_other_config,
    refuse_other_data,
    refuse_wrong_folder,
    save_run,
    trim_metrics,
    write_card,
)
from pipeline.setup import Workplace, global_index, make_sampler, prepare
from pipeline.sources import EncodedClips, LiveClips, Source

READ_AHEAD = 32
"""Videos decoded at a time when the validation files are tried before training."""


@dataclass(slots=True)
class _Job:
    """One call of `train`."""

    place: Workplace
    folder: Path
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    validation: EpisodeSampler | None
    test: EpisodeSampler | None
    report: Callable[[Mapping[str, Any]], None]
    progress: Progress
    started: float
    stop: StopRequest

    @property
    def training(self) -> TrainingConfig:
        """The config's `[training]` table."""
        return self.place.config.training

    def save(self, name: str) -> None:
        """Write a checkpoint of the present state."""
        self.progress.seconds += time.monotonic() - self.started
        self.started = time.monotonic()
        save_run(self.folder / name, self.place, self.optimizer, self.scheduler, self.progress)

    def refuse_to_go_on(self, done: int, total: int) -> None:
        """Called while validating: leave at once when a signal came; the state was saved before."""
        del done, total
        if self.stop.signal_number is not None:
            raise self.stopped()

    def stopped(self) -> Stopped:
        """The error that ends a stopped run after it was saved."""
        assert self.stop.signal_number is not None
        return Stopped(
            self.stop.signal_number,
            f"{self.folder / 'last.pt'} holds {self.progress.episode} episodes; go on with --resume",
        )


def train(
    config: RunConfig,
    folder: Path,
    device: torch.device,
    resume: bool = False,
    report: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Train as the config says and write the run.

    Args:
        config: resolved config.
        folder: gets config.toml, metrics.jsonl, best.pt, last.pt, card.json, and backbone.pt end to end.
        device: where the model runs.
        resume: go on from ``folder/last.pt``.
        report: called with every line that goes to metrics.jsonl.

    Returns:
        The run card.

    Raises:
        SetupError, SourceError, TrainingError: bad input, one line each.
        Stopped: a signal came; last.pt is written.
    """
    return train_together([(config, folder)], device, resume, lambda _, record: report(record))[0]


def train_together(
    runs: Sequence[tuple[RunConfig, Path]],
    device: torch.device,
    resume: bool = False,
    report: Callable[[Path, Mapping[str, Any]], None] = lambda folder, record: None,
) -> list[dict[str, Any]]:
    """Train several heads on one pass of the same episodes; each run is what `train` alone would make of it.

    Args:
        runs: resolved config and folder of each; configs may differ in ``[head]`` and `OWN_TRAINING`, several on the cache only.
        device: where the models are.
        resume: go on from each folder's last.pt, each from its own position.
        report: called with the folder and every line that goes to its metrics.jsonl.

    Returns:
        The run cards.

    Raises:
        SetupError, SourceError, TrainingError: bad input, one line each.
        Stopped: a signal came; every last.pt is written.
    """
    places: list[Workplace] = []
    checkpoints = []
    for config, folder in runs:
        refuse_wrong_folder(folder, resume)
        checkpoint = load_for_resume(folder, device) if resume else None
        place = prepare(config, device, checkpoint, beside=places[0] if places else None)
        if checkpoint is not None:
            refuse_other_config(folder, place.config)
            refuse_other_data(checkpoint, place)
        elif config.training.initial_weights:
            load_initial_weights(place.model, Path(config.training.initial_weights))
        places.append(place)
        checkpoints.append(checkpoint)
    jobs = []
    with StopRequest() as stop:
        for (_, folder), place, checkpoint in zip(runs, places, checkpoints, strict=True):
            job = _make_job(place, folder, partial(report, folder), stop)
            if checkpoint is not None:
                _restore(job, checkpoint)
            _check_sources(job)
            _begin(job, is_new=checkpoint is None)
            jobs.append(job)
        _run(jobs, stop)
    return [_finish(job, len(jobs)) for job in jobs]


def _make_job(place: Workplace, folder: Path, report: Callable[[Mapping[str, Any]], None], stop: StopRequest) -> _Job:
    training = place.config.training
    optimizer = _make_optimizer(place.model, training)
    num_steps = max(1, -(-training.episodes // training.episodes_per_step))
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if training.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    else:
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    validation = make_sampler(place.config, place.manifest, "val") if place.manifest.classes("val") else None
    test = make_sampler(place.config, place.manifest, "test") if training.track_test else None
    return _Job(place, folder, optimizer, scheduler, validation, test, report, Progress(), time.monotonic(), stop)


def _make_optimizer(model: FewShotModel, training: TrainingConfig) -> torch.optim.Optimizer:
    groups = model.parameter_groups(training.learning_rate, training.backbone_learning_rate)
    if not groups:
        # Neighbor without its classifier has nothing to learn; torch wants a parameter all the same.
        groups = [{"params": [nn.Parameter(torch.zeros(()))], "lr": training.learning_rate}]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=training.momentum, weight_decay=training.weight_decay)
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, weight_decay=training.weight_decay)


def _restore(job: _Job, checkpoint: Mapping[str, Any]) -> None:
    job.place.model.load_state_dict(checkpoint["model"])
    job.optimizer.load_state_dict(checkpoint["optimizer"])
    job.scheduler.load_state_dict(checkpoint["scheduler"])
    job.progress = Progress(**checkpoint["progress"])
    trim_metrics(job.folder / "metrics.jsonl", job.progress.episode, job.progress.validated_episode)


def _check_sources(job: _Job) -> None:
    """Refuse, before any work, what an episode would stumble over."""
    config, manifest = job.place.config, job.place.manifest
    source = job.place.source
    train_ids = [video.video_id for video in manifest.videos_of("train")]
    source.check(train_ids, range(config.episodes.train_views))
    for sampler in (job.validation, job.test):
        if sampler is None:
            continue
        source.check(sampler.video_ids, [0])
        if isinstance(source, LiveClips):
            # A file that does not decode should show now, not at the first validation.
            for start in range(0, len(sampler.video_ids), READ_AHEAD):
                part = sampler.video_ids[start : start + READ_AHEAD]
                source.read(part, [0] * len(part))


def _begin(job: _Job, is_new: bool) -> None:
    if not is_new:
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "best.pt", "card.json", "backbone.pt"):
        (job.folder / name).unlink(missing_ok=True)  # of a run that never finished its first step
    write_file(job.folder / "config.toml", to_toml(job.place.config).encode())
    job.save("last.pt")


def _run(jobs: Sequence[_Job], stop: StopRequest) -> None:
    place = jobs[0].place
    batches = TrainingBatches(
        make_sampler(place.config, place.manifest, "train"),
        place.source,
        global_index(place.config, place.manifest),
        place.config.episodes.train_views,
    )
    learners = [
        Learner(
            job.place.model,
            job.optimizer,
            job.scheduler,
            job.training,
            partial(_after_step, job),
            partial(_between_steps, job),
            job.progress.episode,
            job.folder.name if len(jobs) > 1 else "",
        )
        for job in jobs
    ]
    try:
        for job in jobs:
            if _is_validation_due(job):
                _validate(job)
        run_loop(learners, batches, place.device, stop)
    except Stopped:
        # Within the validation of one head; all of them stand between two steps.
        _save_unfinished(jobs)
        raise
    unfinished = _save_unfinished(jobs) if stop.signal_number is not None else []
    if unfinished:
        raise unfinished[0].stopped()


def _save_unfinished(jobs: Sequence[_Job]) -> list[_Job]:
    unfinished = [job for job in jobs if job.progress.episode < job.training.episodes]
    for job in unfinished:
        job.save("last.pt")
    return unfinished


def _after_step(job: _Job, record: StepRecord) -> None:
    job.progress.episode = record.episode
    terms = {f"loss_{name}": value for name, value in record.terms.items()}
    line = {"kind": "step", "episode": record.episode, "loss": record.loss, **terms}
    _log(job, {**line, "accuracy": record.accuracy, "learning_rate": record.learning_rate})


def _between_steps(job: _Job) -> None:
    if _is_validation_due(job):
        job.save("last.pt")
        _validate(job)


def _is_validation_due(job: _Job) -> bool:
    progress, every = job.progress, job.training.validate_every
    if progress.validated_episode >= progress.episode:
        return job.training.episodes == 0 and progress.validated_episode < 0
    return (
        progress.episode >= job.training.episodes
        or progress.episode // every > max(0, progress.validated_episode) // every
    )


def _validate(job: _Job) -> None:
    progress = job.progress
    line: dict[str, Any] = {"kind": "validation", "episode": progress.episode}
    source, device = _evaluation_source(job.place), job.place.device
    scorer = FewShotModel(nn.Identity(), job.place.model.head)
    count = job.training.validation_episodes
    is_best = True
    if job.validation is not None:
        score = evaluate_model(scorer, source, job.validation, count, device, job.refuse_to_go_on)
        line |= {"val_accuracy": score.accuracy, "val_interval95": score.interval95, "val_episodes": score.episodes}
        is_best = progress.best_accuracy is None or score.accuracy > progress.best_accuracy
        if is_best:
            progress.best_accuracy, progress.best_interval95 = score.accuracy, score.interval95
    if job.test is not None:
        score = evaluate_model(scorer, source, job.test, count, device, job.refuse_to_go_on)
        line |= {"test_accuracy_not_for_selection": score.accuracy, "test_interval95": score.interval95}
        if progress.test_selected_accuracy is None or score.accuracy > progress.test_selected_accuracy:
            progress.test_selected_accuracy = score.accuracy
    progress.validated_episode = progress.episode
    if is_best:
        # Without a validation split nothing may be selected: the best checkpoint is the last one.
        progress.best_episode = progress.episode
        job.save("best.pt")
    _log(job, line)
    job.save("last.pt")


def _evaluation_source(place: Workplace) -> Source:
    if isinstance(place.source, LiveClips):
        assert isinstance(place.model.encoder, ClipEncoder)
        return EncodedClips(place.source, place.model.encoder, place.device)
    return place.source


def _log(job: _Job, line: dict[str, Any]) -> None:
    with (job.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    job.report(line)


def _finish(job: _Job, num_together: int) -> dict[str, Any]:
    job.save("last.pt")
    if isinstance(job.place.model.encoder, ClipEncoder):
        export_backbone(job.folder)
    return write_card(job.folder / "card.json", job.place, job.progress, job.validation is not None, num_together)
