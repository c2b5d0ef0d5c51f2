"""One run in the making: its folder, its position, what happens after a step and between two."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn

from configs.training import TrainingConfig
from episodes.sampler import EpisodeSampler
from pipeline.batches import TrainingBatches
from pipeline.checkpoint import write_file, writing
from pipeline.classify_score import HeldOutScore, score_held_out
from pipeline.evaluation import Accuracy, evaluate_model
from pipeline.interrupts import Stopped, StopRequest
from pipeline.learning import StepRecord, StepSpeed, TrainingError
from pipeline.model import ClipEncoder, FewShotModel
from pipeline.optimisation import Stepper
from pipeline.outcomes import outcomes_digest, write_outcomes
from pipeline.ranks import Ranks
from pipeline.run_card import VALIDATION_OUTCOMES
from pipeline.run_files import Progress, save_run
from pipeline.run_log import RunLog
from pipeline.setup import Workplace
from pipeline.sources import EncodedClips, LiveClips, Source


@dataclass(frozen=True, slots=True)
class DecodingFaults:
    """What a source has counted since this call began."""

    second_tries: int = 0
    """Videos that were decoded anew after a fault that may pass."""
    lost_processes: int = 0
    """Decoding processes that died or were late."""

    @classmethod
    def of(cls, source: Source) -> Self:
        """Nothing where no video is decoded."""
        if not isinstance(source, LiveClips):
            return cls()
        return cls(source.num_second_tries, source._decoder.num_restarts)


@dataclass(slots=True)
class TrainingJob:
    """One call of `train`, on one rank."""

    place: Workplace
    folder: Path
    stepper: Stepper
    validation: EpisodeSampler | None
    test: EpisodeSampler | None
    report: Callable[[Mapping[str, Any]], None]
    progress: Progress
    stop: StopRequest
    ranks: Ranks
    cubes_digest: str | None = None
    """Of the cubes that the run reads, on the cache."""
    log: RunLog | None = None
    """Of the first rank, once the folder is this job's."""
    _clock: float = field(default_factory=time.monotonic)
    _saved: float = field(default_factory=time.monotonic)
    _seconds: dict[str, float] = field(default_factory=dict)
    """What came between steps since the last line, by name."""
    _counted: DecodingFaults = field(default_factory=DecodingFaults)
    """Of this call, as far as the progress has them."""

    @property
    def training(self) -> TrainingConfig:
        """The config's `[training]` table."""
        return self.place.config.training

    def save(self, name: str) -> None:
        """Write a checkpoint of the present state, on the first rank."""
        began = time.monotonic()
        self.progress.seconds += began - self._clock
        self._clock = self._saved = began
        self._note_source()
        if self.log is not None:
            with writing(self.folder / "metrics.jsonl"):
                self.log.sync()
        if self.ranks.is_first:
            save_run(self.folder / name, self.place, self.stepper, self.progress, self.cubes_digest)
        self._seconds["seconds_saving"] = self._seconds.get("seconds_saving", 0.0) + time.monotonic() - began

    def _note_source(self) -> None:
        """Take over into the progress what the source has met since the last time."""
        progress, faults = self.progress, DecodingFaults.of(self.place.source)
        progress.degraded = dict(sorted((progress.degraded | self.place.source.degraded).items()))
        progress.second_tries += faults.second_tries - self._counted.second_tries
        progress.lost_decoding_processes += faults.lost_processes - self._counted.lost_processes
        self._counted = faults

    def gather_sources(self) -> None:
        """Take over what the sources of the other ranks have met, at the end of training."""
        self._note_source()
        degraded, faults = self.ranks.gather(self.progress.degraded), self.ranks.gather(self._counted)
        for rank, (videos, counts) in enumerate(zip(degraded, faults, strict=True)):
            if rank != self.ranks.rank:
                theirs = cast(DecodingFaults, counts)
                self.progress.degraded = dict(sorted((self.progress.degraded | cast(dict[str, str], videos)).items()))
                self.progress.second_tries += theirs.second_tries
                self.progress.lost_decoding_processes += theirs.lost_processes

    def after_step(self, record: StepRecord, speed: StepSpeed) -> None:
        """Note a step."""
        self.progress.episode = record.episode
        line: dict[str, Any] = {"kind": "step", "episode": record.episode, "loss": record.loss}
        line |= {f"loss_{name}": value for name, value in record.terms.items()}
        line |= {"accuracy": record.accuracy, "learning_rate": record.learning_rate}
        line |= {f"learning_rate_{name}": rate for name, rate in list(record.learning_rates.items())[1:]}
        line["gradient_norm"] = record.gradient_norm
        if record.was_skipped:
            line["was_skipped"] = True
        measured = {
            "clips_per_second": speed.clips * self.ranks.world_size / max(speed.seconds, 1e-9),
            "seconds_step": speed.seconds,
            "seconds_waiting": speed.seconds_waiting,
            **self._seconds,
        }
        if self.place.device.type == "cuda":
            measured["gpu_memory_bytes"] = float(torch.cuda.max_memory_allocated(self.place.device))
        self._seconds = {}
        self.write(line, measured)

    def between_steps(self) -> None:
        """Validate where it is due; save then, and now and then."""
        if self.is_validation_due():
            self.save("last.pt")
            self.validate()
        elif time.monotonic() - self._saved >= self.training.save_seconds:
            self.save("last.pt")

    def has_something_left(self) -> bool:
        """Whether there is anything to compute: steps, or the last validation."""
        return self.progress.episode < self.training.episodes or self.is_validation_due()

    def is_validation_due(self) -> bool:
        """Whether the run has passed a place where it is validated."""
        progress, every = self.progress, self.training.validate_every
        if progress.validated_episode >= progress.episode:
            return self.training.episodes == 0 and progress.validated_episode < 0
        return (
            progress.episode >= self.training.episodes
            or progress.episode // every > max(0, progress.validated_episode) // every
        )

    def validate(self) -> None:
        """Score the run, and keep it as the best where it is."""
        progress, began = self.progress, time.monotonic()
        line: dict[str, Any] = {"kind": "validation", "episode": progress.episode}
        place = replace(self.place, model=self.stepper.averaged_model() or self.place.model)
        source = evaluation_source(place, self.ranks, self._refuse_to_go_on)
        held_out = (
            score_held_out(place, self.ranks, self._refuse_to_go_on) if self.training.mode == "classify" else None
        )
        score = self._score(place, source, self.validation) if self.validation is not None else None
        line |= held_out.line if held_out is not None else {}
        if score is not None:
            line |= {"val_accuracy": score.accuracy, "val_interval95": score.interval95, "val_episodes": score.episodes}
        tested = self._score(place, source, self.test) if self.test is not None else None
        # From here on nothing stops halfway: progress that is saved knows of this validation, or of none of it.
        is_best = self._is_best(score, held_out)
        if tested is not None:
            line |= {"test_accuracy_not_for_selection": tested.accuracy, "test_interval95": tested.interval95}
            if progress.test_selected_accuracy is None or tested.accuracy > progress.test_selected_accuracy:
                progress.test_selected_accuracy = tested.accuracy
        progress.validated_episode = progress.episode
        if is_best:
            progress.best_episode = progress.episode
            if score is not None and self.ranks.is_first:
                write_outcomes(self.folder / VALIDATION_OUTCOMES, score)
            self.save("best.pt")
        self.write(line, {"seconds_validation": time.monotonic() - began})
        self.save("last.pt")

    def _is_best(self, score: Accuracy | None, held_out: HeldOutScore | None) -> bool:
        """Whether the run has never been better; where nothing may choose, the best checkpoint is the last one."""
        progress = self.progress
        if score is None and held_out is None:
            return True
        accuracy = score.accuracy if score is not None else held_out.top1 if held_out is not None else 0.0
        if progress.best_accuracy is not None and accuracy <= progress.best_accuracy:
            return False
        progress.best_accuracy = accuracy
        progress.best_interval95 = score.interval95 if score is not None else None
        progress.best_outcomes_digest = outcomes_digest(score) if score is not None else None
        progress.best_episode_hash = score.episode_hash if score is not None else None
        return True

    def _score(self, place: Workplace, source: Source, sampler: EpisodeSampler) -> Accuracy:
        scorer = FewShotModel(nn.Identity(), place.model.few_shot_head)
        count = self.training.validation_episodes
        return evaluate_model(scorer, source, sampler, count, place.device, self._refuse_to_go_on, self.ranks)

    def _refuse_to_go_on(self, done: int, total: int) -> None:
        """Called while validating: leave at once when a signal came; the state was saved before. Ranks validate to the end."""
        del done, total
        if self.stop.signal_number is not None and not self.ranks.are_several:
            raise self.stopped()

    def leave_before_training(self, done: int, total: int) -> None:
        """Called while videos are tried: leave at once when a signal came."""
        del done, total
        if self.stop.signal_number is not None:
            raise Stopped(
                self.stop.signal_number, f"nothing new was trained in {self.folder}; start the same command again"
            )

    def stopped(self) -> Stopped:
        """The error that ends a stopped run after it was saved."""
        assert self.stop.signal_number is not None
        return Stopped(
            self.stop.signal_number,
            f"{self.folder / 'last.pt'} holds {self.progress.episode} episodes; go on with --resume",
        )

    def write(self, line: dict[str, Any], measured: Mapping[str, float]) -> None:
        """A line to the logs and to whoever listens, on the first rank."""
        if self.log is not None:
            with writing(self.folder / "metrics.jsonl"):
                self.log.write(line, measured)
            self.report(line)

    def write_not_finite(self, error: TrainingError, batches: TrainingBatches) -> None:
        """Write down the episodes of a step that could not be taken, for replay."""
        if not self.ranks.is_first:
            return
        document = {
            "error": str(error),
            "split_hash": batches.sampler.split_hash,
            "seed": batches.sampler.seed,
            "episodes": [batches.describe(index) for index in error.episodes],
        }
        write_file(self.folder / "not_finite.json", (json.dumps(document, indent=2) + "\n").encode())


def evaluation_source(
    place: Workplace, ranks: Ranks, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Source:
    """Where validation and test cubes come from: the store, or every video once through the backbone."""
    if isinstance(place.source, LiveClips):
        assert isinstance(place.model.encoder, ClipEncoder)
        return EncodedClips(place.source, place.model.encoder, place.device, ranks, on_progress)
    return place.source
