"""`mastaf pipeline`: all stages in order; what is finished, by the fingerprint of its output, is skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from configs.whole import PipelineFile, load_pipeline
from pipeline.console import say
from pipeline.interrupts import Stopped
from pipeline.output_folder import check_output_folder
from pipeline.provenance import code_version, hardware, library_versions
from pipeline.run_files import is_begun
from pipeline.run_lock import locked
from pipeline.settings import SetupError
from pipeline.whole_configs import load_configs
from pipeline.whole_outputs import DAMAGE
from pipeline.whole_record import Record, Records, settings_hash
from pipeline.whole_report import StepFacts, plan_text, write_report
from pipeline.whole_stages import DATA, Stage, Step, build_steps
from pipeline.whole_verdict import Redo, Verdict, judge, judge_config


def run_pipeline(
    name: str,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    redo: Sequence[str] = (),
    is_dry: bool = False,
) -> tuple[dict[str, Any], str]:
    """Do what is not finished, and report.

    Args:
        name: a pipeline's file, or the name of one that ships.
        out: folder of everything; None: runs/NAME.
        overrides: as `load_pipeline`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        redo: names of stages to make again; what they made is set aside.
        is_dry: only say what would be done.

    Returns:
        What report.json holds and report.md says; of a dry run, the plan.

    Raises:
        ConfigError, SetupError: contradictions, an output of another config, another pipeline at work in the folder.
        Stopped: a signal came; the same command goes on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SetupError("mastaf pipeline is one process, not several of torchrun. Start it without torchrun.")
    file = load_pipeline(name, overrides)
    folder = out or Path("runs") / file.path.stem
    configs = load_configs(file, folder / DATA / "videos.csv")
    steps = build_steps(file, configs, folder, device)
    wanted = _stages_to_redo(steps, redo)
    if is_dry:
        records = Records.read(folder)
        return _plan(steps, records, _with_earlier_permission(wanted, records, steps))
    check_output_folder(folder)
    if is_begun(folder):
        raise SetupError(f"--out {folder} holds a run of `mastaf train`; give a folder of the pipeline's own.")
    with _held(folder), _threads(file):
        records = Records.read(folder)
        runner = _Runner(steps, records, _with_earlier_permission(wanted, records, steps))
        runner.refuse_other_configs()
        runner.note_permission()
        facts = [runner.do(number) for number in range(len(steps))]
    return write_report(file, configs, folder, facts)


def _stages_to_redo(steps: Sequence[Step], names: Sequence[str]) -> Redo:
    known = {step.name: {stage.name for stage in step.stages} for step in steps}
    known |= {stage.name: {stage.name} for step in steps for stage in step.stages}
    for name in names:
        if name not in known:
            raise SetupError(f"--redo {name!r}: there is no such stage; the stages are {', '.join(known)}.")
    asked = {stage for name in names for stage in known[name]}
    places = [place for place, step in enumerate(steps) if asked & known[step.name]]
    later = {stage for step in steps[places[0] + 1 :] for stage in known[step.name]} if places else set()
    return Redo(frozenset(asked), frozenset(later))


def _with_earlier_permission(redo: Redo, records: Records, steps: Sequence[Step]) -> Redo:
    """With what an earlier call with `--redo` was stopped before; it was asked for with the settings of then alone."""
    stages = [stage for step in steps for stage in step.stages]
    still = {stage.name for stage in stages if records.permitted.get(stage.name) == settings_hash(dict(stage.stated))}
    return Redo(redo.asked | (still & set(records.asked)), redo.later | still)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep other pipelines out of the folder."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except SetupError as error:
            raise SetupError(
                f"another pipeline is at work in {folder}. Wait for it, stop it, or choose another --out."
            ) from error
        yield


@contextmanager
def _threads(file: PipelineFile) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(file.config.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Runner:
    """Takes the steps in order and keeps the records."""

    def __init__(self, steps: Sequence[Step], records: Records, redo: Redo) -> None:
        self.steps = steps
        self.records = records
        self.outputs: dict[str, str] = {}
        """Hash of each part of the finished outputs, as "stage.part"."""
        self._redo = redo
        self._made_with = {"code_version": code_version(), "libraries": library_versions(), "hardware": hardware()}

    def refuse_other_configs(self) -> None:
        """Before any work: refuse what belongs to another config, in whichever stage."""
        self.records.close_killed_calls({stage.name: stage.output for step in self.steps for stage in step.stages})
        for step in self.steps:
            for stage in step.stages:
                verdict = judge_config(stage, self.records.stages.get(stage.name), self._redo)
                if verdict is not None and verdict.action == "refuse":
                    raise SetupError(verdict.why)

    def note_permission(self) -> None:
        """Keep what `--redo` allows until it is done: the same command without it goes on."""
        stages = [stage for step in self.steps for stage in step.stages]
        asked = [stage.name for stage in stages if stage.name in self._redo.asked]
        permitted = {
            stage.name: settings_hash(dict(stage.stated))
            for stage in stages
            if stage.name in self._redo.asked | self._redo.later
        }
        if (asked, permitted) != (self.records.asked, self.records.permitted):
            self.records.asked, self.records.permitted = asked, permitted
            self.records.write()

    def do(self, number: int) -> StepFacts:
        """Make what is not finished of a step."""
        step = self.steps[number]
        say(f"[{number + 1}/{len(self.steps)}] {step.name}: {step.title}")
        is_read = self._is_read_later(number)
        unfinished = []
        for stage in step.stages:
            verdict = judge(stage, self.records.stages.get(stage.name), self.outputs, self._redo, is_full=is_read)
            if verdict.action == "refuse":
                raise SetupError(verdict.why)
            say(f"    {stage.name}: {self._words(verdict)}")
            if verdict.action == "skip":
                self.outputs |= _parts(stage, self.records.stages[stage.name])
                continue
            unfinished.append(stage)
            if verdict.action == "mend":
                self._mend(stage)
            elif verdict.action != "go on":
                self.records.set_aside(stage.name, stage.output)
        if unfinished:
            self._make(step, unfinished)
        names = [stage.name for stage in step.stages]
        self._end_permission(names)
        return StepFacts(
            name=step.name,
            title=step.title,
            seconds=self.records.seconds(names),
            seconds_of={name: self.records.seconds([name]) for name in names},
            made=tuple(stage.name for stage in unfinished),
            fingerprint_of={name: self.records.stages[name].fingerprint for name in names},
            output_of={name: self.records.stages[name].output or {} for name in names},
            made_with_of={name: self.records.stages[name].made_with for name in names},
        )

    def _is_read_later(self, number: int) -> bool:
        """Whether a later stage has anything to do, if this step's outputs are whole: bytes that nothing reads are not read.

        Asked only where reading every byte takes long.
        """
        if not any(stage.mend for stage in self.steps[number].stages):
            return False
        outputs = dict(self.outputs)
        for place, step in enumerate(self.steps[number:]):
            for stage in step.stages:
                record = self.records.stages.get(stage.name)
                if place and judge(stage, record, outputs, self._redo).action != "skip":
                    return True
                outputs |= _parts(stage, record)
        return False

    def _end_permission(self, names: Sequence[str]) -> None:
        if self.records.permitted.keys() & set(names):
            for name in names:
                self.records.permitted.pop(name, None)
            self.records.write()

    def _mend(self, stage: Stage) -> None:
        """Mend an output in place, or else set it aside. Its record stays, so that one that is killed here is mended again."""
        if stage.mend is None:
            return  # going on does it
        try:
            with self._working([stage]):
                stage.mend()
        except DAMAGE as error:
            say(f"    {stage.name}: cannot be mended: {error}")
            self.records.set_aside(stage.name, stage.output)

    def _make(self, step: Step, unfinished: Sequence[Stage]) -> None:
        for stage in unfinished:
            made = {part: self.outputs[part] for part in stage.reads}
            before = self.records.stages.get(stage.name)
            made_with = [each for each in before.made_with if each != self._made_with] if before else []
            self.records.stages[stage.name] = Record(dict(stage.stated), made, None, [*made_with, self._made_with])
        names = {stage.name for stage in unfinished}
        self.records.asked = [name for name in self.records.asked if name not in names]
        with self._working(unfinished):
            step.make(unfinished)
        for stage in unfinished:
            try:
                self.records.stages[stage.name].output = stage.hashes(False)
            except DAMAGE as error:
                raise SetupError(
                    f"{stage.name} has ended, but {stage.output} is not whole: {error}. Make it again: --redo {stage.name}"
                ) from error
            self.outputs |= _parts(stage, self.records.stages[stage.name])
        self.records.write()
        say(f"    {step.name}: done, {self.records.seconds([stage.name for stage in unfinished]):.1f} s in all")

    @contextmanager
    def _working(self, stages: Sequence[Stage]) -> Iterator[None]:
        try:
            with self.records.working([stage.name for stage in stages]):
                yield
        except (KeyboardInterrupt, SystemExit, Stopped) as stop:
            if isinstance(stop, Stopped):
                stop.args = (str(stop).removesuffix("; go on with --resume"),)  # an option of `mastaf train`
            say("    the same command goes on from here" + ", without --redo" * bool(self._redo.asked))
            raise

    def _words(self, verdict: Verdict) -> str:
        return verdict.why if verdict.action == "skip" else f"{_DOING[verdict.action]} ({verdict.why})"


def _parts(stage: Stage, record: Record | None) -> dict[str, str]:
    """Hash of each part of what a stage gave, as "stage.part"."""
    output = record.output if record is not None else None
    return {f"{stage.name}.{part}": value for part, value in (output or {}).items()}


_DOING = {
    "begin": "begins",
    "go on": "goes on",
    "mend": "is mended",
    "set aside": "is made again",
    "wait": "waits",
}


def _plan(steps: Sequence[Step], records: Records, redo: Redo) -> tuple[dict[str, Any], str]:
    """What would be done, without doing it."""
    outputs: dict[str, str] = {}
    rows = []
    for step in steps:
        for stage in step.stages:
            record = records.stages.get(stage.name)
            verdict = judge(stage, record, outputs, redo)
            if verdict.action == "skip":
                outputs |= _parts(stage, record)
            rows.append({"stage": stage.name, "action": verdict.action, "why": verdict.why})
    return {"stages": rows}, plan_text(rows)
