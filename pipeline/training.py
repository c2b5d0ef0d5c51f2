"""Stage 2, end-to-end training and classification: prepare, run the loop, validate, keep the best, write the run."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.load import parse_config, to_toml
from configs.schema import RunConfig
from pipeline.augmentation import Augmentation
from pipeline.batches import TrainingBatches
from pipeline.checkpoint import Newest, remove_leftovers, sync_folder, write_file
from pipeline.classify import clip_sampler
from pipeline.computed_on import computed_here, note_place
from pipeline.console import say, shortened
from pipeline.determinism import deterministic
from pipeline.evaluation import ScoreError
from pipeline.initial_weights import load_initial_weights
from pipeline.interrupts import Stopped, StopRequest
from pipeline.learning import Learner, TrainingError
from pipeline.loop import run_loop
from pipeline.model import ClipEncoder
from pipeline.optimisation import has_finite_weights, make_stepper
from pipeline.output_folder import check_output_folder
from pipeline.parameter_groups import freeze_parameters
from pipeline.ranks import ALONE, RankLost, Ranks
from pipeline.run_card import write_card
from pipeline.run_files import (
    Progress,
    digest_cubes,
    export_backbone,
    is_begun,
    load_for_resume,
    note_resumption,
    refuse_lost_best,
    refuse_other_config,
    refuse_other_data,
    refuse_wrong_folder,
    restore_generators,
    set_card_aside,
    with_first_origins,
)
from pipeline.run_lock import locked
from pipeline.run_log import RunLog
from pipeline.settings import SetupError
from pipeline.setup import Workplace, global_index, make_sampler, prepare
from pipeline.source_checks import check_sources, write_bad_videos
from pipeline.sources import LiveClips, SourceError
from pipeline.step_plan import StepPlan
from pipeline.training_job import TrainingJob
from pipeline.weights_files import started_from

Report = Callable[[Path, Mapping[str, Any]], None]


def train(
    config: RunConfig,
    folder: Path,
    device: torch.device,
    resume: bool | None = False,
    report: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train as the config says and write the run.

    Args:
        config: resolved config.
        folder: gets config.toml, metrics.jsonl and the other logs, best.pt, last.pt, the card, and backbone.pt where one learns.
        device: where the model runs.
        resume: go on from the folder's newest good checkpoint; None: where there is one, else begin.
        report: called with every line that goes to metrics.jsonl.
        ranks: of this job; the first writes.

    Returns:
        The run card; on other ranks than the first an empty dict.

    Raises:
        SetupError, SourceError, TrainingError: bad input, one line each.
        ScoreError: a score of a validation is no number.
        RankLost: another rank has ended.
        Stopped: a signal came; last.pt is written.
    """
    return train_together([(config, folder)], device, resume, lambda _, record: report(record), ranks)[0]


def train_together(
    runs: Sequence[tuple[RunConfig, Path]],
    device: torch.device,
    resume: bool | None = False,
    report: Report = lambda folder, record: None,
    ranks: Ranks = ALONE,
) -> list[dict[str, Any]]:
    """Train several heads on one pass of the same episodes; each run is what `train` alone would make of it.

    Args:
        runs: resolved config and folder of each; configs may differ in ``[head]`` and `OWN_TRAINING`, several on the cache only.
        device: where the models are.
        resume: go on from each folder's newest good checkpoint, each from its own position; None: where there is one, else begin.
        report: called with the folder and every line that goes to its metrics.jsonl.
        ranks: of this job.

    Returns:
        The run cards.

    Raises:
        As `train`.
    """
    if ranks.is_first:
        for _, folder in runs:
            check_output_folder(folder)
    with ExitStack() as held:
        held.enter_context(deterministic(runs[0][0].training.deterministic))
        places, checkpoints = _prepare_all(runs, device, resume, ranks, held)
        stop = held.enter_context(StopRequest(ranks.is_launched, is_silent=not ranks.is_first))
        jobs = []
        for (_, folder), place in zip(runs, places, strict=True):
            # Taken off the list: a second copy of the weights and the optimiser would stay in memory to the end.
            checkpoint = checkpoints.pop(0)
            job = _make_job(place, folder, partial(report, folder), stop, ranks)
            if checkpoint is not None:
                _restore(job, checkpoint)
            check_sources(job)
            if ranks.is_first:
                if checkpoint is None:
                    held.enter_context(locked(folder))
                    refuse_wrong_folder(folder, resume=False)
                _begin(job, checkpoint, held)
            jobs.append(job)
            del checkpoint
        _run(jobs, stop, ranks)
        cards = [_finish(job, len(jobs)) for job in jobs]
        ranks.wait()
        return cards


def _prepare_all(
    runs: Sequence[tuple[RunConfig, Path]], device: torch.device, resume: bool | None, ranks: Ranks, held: ExitStack
) -> tuple[list[Workplace], list[Newest | None]]:
    places: list[Workplace] = []
    checkpoints: list[Newest | None] = []
    for config, folder in runs:
        goes_on = is_begun(folder) if resume is None else resume
        refuse_wrong_folder(folder, goes_on)
        if goes_on and ranks.is_first:
            held.enter_context(locked(folder))
        checkpoint = load_for_resume(folder) if goes_on else None
        if checkpoint is not None:
            refuse_lost_best(folder, checkpoint.content)
        place = prepare(
            config, device, checkpoint.content if checkpoint else None, beside=places[0] if places else None
        )
        if isinstance(place.source, LiveClips):
            held.callback(place.source.close)
        _refuse_shares(place.config, ranks)
        if checkpoint is not None:
            refuse_other_config(place.config, checkpoint.content)
            refuse_other_data(checkpoint.content, place)
            place = replace(place, config=with_first_origins(place.config, checkpoint.content))
        elif config.training.initial_weights:
            load_initial_weights(
                place.model,
                Path(config.training.initial_weights),
                place.manifest.classes("train"),
                place.store.spec if place.store else None,
            )
        # What is written down here has to be read by every later command.
        parse_config(tomllib.loads(to_toml(place.config)))
        places.append(place)
        checkpoints.append(checkpoint)
    _refuse_unequal_positions(runs, checkpoints, ranks)
    return places, checkpoints


def _refuse_shares(config: RunConfig, ranks: Ranks) -> None:
    """Refuse, before anything is written, what cannot be shared by so many ranks."""
    plan = StepPlan(config.training, ranks)
    is_mixed = config.classify.mixup_alpha or config.classify.cutmix_alpha
    first = next(plan.steps(), None)
    if is_mixed and first is not None and min(len(part.episodes) for part in plan.parts_of(first)) < 2:
        raise SetupError(
            f"classify.mixup_alpha and cutmix_alpha mix clips of one forward pass, but with {ranks.world_size} ranks and "
            f"training.episodes_per_step = {config.training.episodes_per_step} a single one passes at a time. Raise it, or leave them out."
        )


def _refuse_unequal_positions(
    runs: Sequence[tuple[RunConfig, Path]], checkpoints: Sequence[Newest | None], ranks: Ranks
) -> None:
    """Every rank has looked at the folders, and found the same there, before the first one writes into them."""
    found = ranks.gather([None if each is None else each.content["progress"] for each in checkpoints])
    if any(each != found[0] for each in found):
        raise SetupError(
            f"the ranks of this job find different checkpoints in {', '.join(str(folder) for _, folder in runs)}. "
            "Give an --out on a file system that all machines share."
        )


def _make_job(
    place: Workplace, folder: Path, report: Callable[[Mapping[str, Any]], None], stop: StopRequest, ranks: Ranks
) -> TrainingJob:
    freeze_parameters(place.model, place.config.training)
    stepper = make_stepper(place.model, place.config.training, place.device, place.config.extraction.compute_dtype)
    validation = make_sampler(place.config, place.manifest, "val") if place.manifest.classes("val") else None
    test = make_sampler(place.config, place.manifest, "test") if place.config.training.track_test else None
    return TrainingJob(
        place, folder, stepper, validation, test, report, Progress.now(), stop, ranks, digest_cubes(place)
    )


def _restore(job: TrainingJob, checkpoint: Newest) -> None:
    content = checkpoint.content
    job.place.model.load_state_dict(content["model"])
    job.stepper.load_state_dict(content["stepper"])
    restore_generators(content["generators"])
    job.progress = Progress(**content["progress"])
    job.progress.resumptions += job.has_something_left()


def _begin(job: TrainingJob, checkpoint: Newest | None, held: ExitStack) -> None:
    """Make the folder this run's: on the first rank."""
    folder, training = job.folder, job.training
    remove_leftovers(folder)
    if checkpoint is None:
        # The checkpoints first: none of them may be found beside the new config.
        for name in (
            "last.pt",
            "previous.pt",
            "best.pt",
            "card.json",
            "card.md",
            "backbone.pt",
            "not_finite.json",
            "bad_videos.json",
        ):
            (folder / name).unlink(missing_ok=True)  # of a run that never finished its first step
        sync_folder(folder)
        _warn_of_seen_classes(job.place)
        job.progress.started_from = started_from(job.place.config)
    else:
        note_resumption(checkpoint)
        if job.progress.episode < training.episodes:
            set_card_aside(folder, job.progress.episode)
    _note_place(job)
    write_file(folder / "config.toml", to_toml(job.place.config).encode())
    job.log = held.enter_context(
        RunLog(folder, training.loggers, job.place.config.model_dump(mode="json"), folder.name)
    )
    if checkpoint is None:
        job.log.begin()
        job.save("last.pt")
    else:
        job.log.resume_at(job.progress.episode, job.progress.validated_episode)


def _note_place(job: TrainingJob) -> None:
    """Write down what computes the run from here on, and say where that has changed."""
    if not job.has_something_left():
        return
    here = computed_here(job.place.device, job.ranks.world_size)
    change = note_place(job.progress.computed_on, job.progress.episode, here)
    if change:
        say(f"warning: {change}: bits may differ from those of a run that was never stopped")


def _warn_of_seen_classes(place: Workplace) -> None:
    for split, effect in (
        ("val", "its accuracy will choose among weights that know them"),
        ("test", "it cannot be scored"),
    ):
        leaked = place.inherited.leaked_into(split, place.manifest.classes(split))
        if leaked:
            say(
                f"warning: {len(leaked)} classes of split {split!r} were used by a run that the weights come from "
                f"({shortened(leaked)}): {effect}"
            )


def _run(jobs: Sequence[TrainingJob], stop: StopRequest, ranks: Ranks) -> None:
    place = jobs[0].place
    is_live = isinstance(place.source, LiveClips)
    is_classification = place.config.training.mode == "classify"
    batches = TrainingBatches(
        clip_sampler(place.config, place.manifest)
        if is_classification
        else make_sampler(place.config, place.manifest, "train"),
        place.source,
        global_index(place.config, place.manifest),
        place.config.episodes.train_views,
        augment=Augmentation.of(place.config) if is_live else None,
        device=place.device,
        num_ahead=place.config.training.batches_ahead,
        # Threads that wait for decoding processes help; threads that gather cubes would only be in the way.
        num_threads=place.config.training.batches_ahead if is_live else 1,
    )
    learners = [
        Learner(
            job.place.model,
            job.stepper,
            job.training,
            job.after_step,
            job.between_steps,
            job.progress.episode,
            job.folder.name if len(jobs) > 1 else "",
        )
        for job in jobs
    ]
    try:
        for job in jobs:
            if job.is_validation_due():
                job.validate()
        run_loop(learners, batches, place.device, stop, ranks)
    except TrainingError as error:
        _save_unfinished(jobs)
        for job in jobs:
            job.write_not_finite(error, batches)
        _let_first_finish(ranks)
        raise
    except (SourceError, ScoreError) as error:
        _save_unfinished(jobs)
        if isinstance(error, SourceError):
            write_bad_videos(jobs[0])
        raise
    except (Stopped, RankLost):
        # Stopped within the validation of one head, or a step that is not begun: all of them stand between two steps.
        _save_unfinished(jobs)
        raise
    unfinished = _save_unfinished(jobs) if stop.signal_number is not None else []
    if unfinished:
        _let_first_finish(ranks)
        raise unfinished[0].stopped()


def _let_first_finish(ranks: Ranks) -> None:
    """Stay until the first rank has saved: a launcher ends all ranks when one has left with an error."""
    with suppress(RankLost):
        ranks.wait()


def _save_unfinished(jobs: Sequence[TrainingJob]) -> list[TrainingJob]:
    """Save the runs that are not at their end, but none whose weights have just ceased to be numbers."""
    unfinished = [job for job in jobs if job.progress.episode < job.training.episodes]
    for job in unfinished:
        if has_finite_weights(job.place.model):
            job.save("last.pt")
    return unfinished


def _finish(job: TrainingJob, num_together: int) -> dict[str, Any]:
    job.gather_sources()
    if not job.ranks.is_first:
        return {}
    if job.place.store is not None:
        job.progress.store_content_hash = job.place.store.content_hash()
    job.save("last.pt")
    for name in ("not_finite.json", "bad_videos.json"):
        (job.folder / name).unlink(missing_ok=True)  # of a stop that was mended
    if isinstance(job.place.model.encoder, ClipEncoder):
        export_backbone(job.folder)
    return write_card(
        job.folder, job.place, job.progress, job.validation is not None, num_together, job.ranks.world_size
    )
