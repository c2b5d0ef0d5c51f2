"""Stage 2, and end-to-end training: prepare, run the loop, validate, keep the best, write the run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from configs.load import load_config, to_toml
from configs.schema import RunConfig
from episodes.sampler import EpisodeSampler
from pipeline.checkpoint import load_checkpoint, save_checkpoint, write_file
from pipeline.evaluation import evaluate_model
from pipeline.initial_weights import load_initial_weights
from pipeline.interrupts import Stopped, StopRequest
from pipeline.loop import StepRecord, TrainingBatches, run_loop
from pipeline.model import FewShotModel
from pipeline.provenance import code_version, hardware, library_versions
from pipeline.scoring import EncodedClips
from pipeline.setup import SetupError, Workplace, global_index, make_sampler, prepare
from pipeline.sources import LiveClips, Source

# May differ between a run and its resumption: they change no number of the training.
CHANGEABLE = frozenset(
    {
        "training.decode_threads",
        "training.clip_cache_bytes",
        "training.cube_cache_bytes",
        "extraction.decode_threads",
        "evaluation.episodes",
        "evaluation.split",
        "store.path",
        "data.manifest",
    }
)


@dataclass(slots=True)
class _Progress:
    """What the loop has reached; goes into the checkpoint."""

    episode: int = 0
    best_accuracy: float = -1.0
    best_episode: int = 0
    best_interval95: float = 0.0
    test_selected_accuracy: float = -1.0
    test_selected_episode: int = 0
    seconds: float = 0.0


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
    progress: _Progress = field(default_factory=_Progress)
    started: float = field(default_factory=time.monotonic)


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
    _refuse_wrong_folder(folder, resume)
    place = prepare(config, device)
    config = place.config
    if resume:
        _refuse_other_config(folder, config)
    if config.training.initial_weights and not resume:
        load_initial_weights(place.model, Path(config.training.initial_weights))
    job = _make_job(place, folder, report)
    if resume and (folder / "last.pt").is_file():
        _restore(job)
    _check_sources(job)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "config.toml", to_toml(config).encode())
    with StopRequest() as stop:
        done = run_loop(
            place.model,
            _batches(place),
            job.optimizer,
            job.scheduler,
            config.training,
            device,
            job.progress.episode,
            stop,
            lambda record: _after_step(job, record),
        )
        job.progress.episode = done
        if stop.signal_number is not None and done < config.training.episodes:
            _save(job, "last.pt")
            raise Stopped(stop.signal_number, f"{folder / 'last.pt'} holds {done} episodes; go on with --resume")
    return _finish(job)


def _refuse_wrong_folder(folder: Path, resume: bool) -> None:
    holds_run = (folder / "config.toml").is_file()
    if holds_run and not resume:
        raise SetupError(f"{folder} holds a run already. Go on with --resume, or choose another --out.")
    if resume and not holds_run:
        raise SetupError(f"{folder} holds no run to resume (no config.toml).")


def _refuse_other_config(folder: Path, config: RunConfig) -> None:
    differing = config_differences(load_config(folder / "config.toml"), config)
    if differing:
        raise SetupError(
            f"--resume with another config: {'; '.join(differing)}. Use the run's own settings, or start a new --out."
        )


def config_differences(stored: RunConfig, wanted: RunConfig) -> list[str]:
    """Fields that differ between two configs and may not, as ``table.key: run X, now Y``."""
    ours, theirs = stored.model_dump(mode="json"), wanted.model_dump(mode="json")
    return [
        f"{table}.{key}: run {ours[table].get(key)!r}, now {theirs[table].get(key)!r}"
        for table in ours
        for key in sorted({*ours[table], *theirs[table]})
        if ours[table].get(key) != theirs[table].get(key) and f"{table}.{key}" not in CHANGEABLE
    ]


def _make_job(place: Workplace, folder: Path, report: Callable[[Mapping[str, Any]], None]) -> _Job:
    config = place.config
    training = config.training
    groups = place.model.parameter_groups(training.learning_rate, training.backbone_learning_rate)
    if not groups:
        # A head without parameters on the cache has nothing to learn; the loop still measures it.
        groups = [{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": training.learning_rate}]
    optimizer: torch.optim.Optimizer
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=training.momentum, weight_decay=training.weight_decay)
    else:
        kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
        optimizer = kind(groups, weight_decay=training.weight_decay)
    num_steps = max(1, -(-training.episodes // training.episodes_per_step))
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if training.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    else:
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    validation = make_sampler(config, place.manifest, "val") if place.manifest.classes("val") else None
    test = make_sampler(config, place.manifest, "test") if training.track_test else None
    return _Job(place, folder, optimizer, scheduler, validation, test, report)


def _batches(place: Workplace) -> TrainingBatches:
    config = place.config
    return TrainingBatches(
        make_sampler(config, place.manifest, "train"),
        place.source,
        global_index(config, place.manifest),
        config.episodes.train_views,
        config.training.seed,
    )


def _check_sources(job: _Job) -> None:
    config, manifest = job.place.config, job.place.manifest
    job.place.source.check(
        [video.video_id for video in manifest.videos_of("train")], range(config.episodes.train_views)
    )
    for sampler in (job.validation, job.test):
        if sampler is not None:
            job.place.source.check(sampler.video_ids, [0])


def _after_step(job: _Job, record: StepRecord) -> None:
    training = job.place.config.training
    before, job.progress.episode = job.progress.episode, record.episode
    _log(
        job,
        {
            "kind": "step",
            "episode": record.episode,
            "loss": record.loss,
            **{f"loss_{name}": value for name, value in record.terms.items()},
            "accuracy": record.accuracy,
            "learning_rate": record.learning_rate,
        },
    )
    if (
        record.episode // training.validate_every > before // training.validate_every
        or record.episode >= training.episodes
    ):
        _validate(job)
        _save(job, "last.pt")


def _validate(job: _Job) -> None:
    training, progress = job.place.config.training, job.progress
    line: dict[str, Any] = {"kind": "validation", "episode": progress.episode}
    source = _evaluation_source(job.place)
    if job.validation is not None:
        score = evaluate_model(
            _scorer(job.place), source, job.validation, training.validation_episodes, job.place.device
        )
        line |= {"val_accuracy": score.accuracy, "val_interval95": score.interval95, "val_episodes": score.episodes}
        if score.accuracy > progress.best_accuracy:
            progress.best_accuracy, progress.best_interval95 = score.accuracy, score.interval95
            progress.best_episode = progress.episode
            _save(job, "best.pt")
    else:
        # Without a validation split nothing may be selected: the best checkpoint is the last one.
        progress.best_episode = progress.episode
        _save(job, "best.pt")
    if job.test is not None:
        score = evaluate_model(_scorer(job.place), source, job.test, training.validation_episodes, job.place.device)
        line |= {"test_accuracy_not_for_selection": score.accuracy, "test_interval95": score.interval95}
        if score.accuracy > progress.test_selected_accuracy:
            progress.test_selected_accuracy, progress.test_selected_episode = score.accuracy, progress.episode
    _log(job, line)


def _evaluation_source(place: Workplace) -> Source:
    if isinstance(place.source, LiveClips):
        return EncodedClips(place.source, place.model.encoder, place.device)
    return place.source


def _scorer(place: Workplace) -> FewShotModel:
    """The part of the model that scores cubes; what encodes clips has done so in the source."""
    return FewShotModel(torch.nn.Identity(), place.model.head)


def _save(job: _Job, name: str) -> None:
    progress = job.progress
    save_checkpoint(
        job.folder / name,
        {
            "model": job.place.model.state_dict(),
            "optimizer": job.optimizer.state_dict(),
            "scheduler": job.scheduler.state_dict(),
            "progress": {**_as_dict(progress), "seconds": progress.seconds + time.monotonic() - job.started},
            "config": to_toml(job.place.config),
            "split_hash": job.place.manifest.split_hash,
            "store_fingerprint": job.place.store.spec.fingerprint if job.place.store else None,
        },
    )


def _restore(job: _Job) -> None:
    content = load_checkpoint(job.folder / "last.pt", job.place.device)
    fingerprint = job.place.store.spec.fingerprint if job.place.store else None
    for name, stored, found in (
        ("split hash", content["split_hash"], job.place.manifest.split_hash),
        ("store fingerprint", content["store_fingerprint"], fingerprint),
    ):
        if stored != found:
            raise SetupError(
                f"--resume: the run's {name} is {stored}, now it is {found}. Restore the data, or start a new --out."
            )
    job.place.model.load_state_dict(content["model"])
    job.optimizer.load_state_dict(content["optimizer"])
    job.scheduler.load_state_dict(content["scheduler"])
    job.progress = _Progress(**content["progress"])
    _trim_metrics(job.folder / "metrics.jsonl", job.progress.episode)


def _trim_metrics(path: Path, episode: int) -> None:
    """Drop lines from after the checkpoint; the resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["episode"] <= episode:
                kept.append(line)
        except json.JSONDecodeError:
            break  # the line that the kill tore; nothing after it can be from before the checkpoint
    write_file(path, "".join(f"{line}\n" for line in kept).encode())


def _log(job: _Job, line: dict[str, Any]) -> None:
    with (job.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    job.report(line)


def _finish(job: _Job) -> dict[str, Any]:
    place, progress = job.place, job.progress
    if not (job.folder / "best.pt").exists():
        progress.best_episode = progress.episode
        _save(job, "best.pt")
    _save(job, "last.pt")
    if place.config.training.mode == "end_to_end":
        best = load_checkpoint(job.folder / "best.pt")["model"]
        prefix = "encoder.backbone."
        save_checkpoint(
            job.folder / "backbone.pt",
            {
                "state_dict": {
                    name.removeprefix(prefix): value for name, value in best.items() if name.startswith(prefix)
                }
            },
        )
    card = {
        "mode": place.config.training.mode,
        "head": place.config.head.name,
        "episodes": progress.episode,
        "best_episode": progress.best_episode,
        "selected_on": "val" if job.validation is not None else "nothing (no validation split: last checkpoint)",
        "val_accuracy": progress.best_accuracy if job.validation is not None else None,
        "val_interval95": progress.best_interval95 if job.validation is not None else None,
        "test_selected_accuracy_published_protocol": progress.test_selected_accuracy if job.test is not None else None,
        "seconds": progress.seconds + time.monotonic() - job.started,
        "split_hash": place.manifest.split_hash,
        "store_fingerprint": place.store.spec.fingerprint if place.store else None,
        "num_parameters": sum(parameter.numel() for parameter in place.model.parameters()),
        "code_version": code_version(),
        "libraries": library_versions(),
        "hardware": hardware(),
    }
    write_file(job.folder / "card.json", (json.dumps(card, indent=2) + "\n").encode())
    return card


def _as_dict(progress: _Progress) -> dict[str, Any]:
    return {name: getattr(progress, name) for name in progress.__slots__}
