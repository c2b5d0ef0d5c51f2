"""Videos damaged at random: none ends the process or takes long, and none is "ok" with frames missing."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fuzz_decoder
from benchmarks.fuzz_decoder import FORMS, MUTATIONS, is_failure, mutants, run, write_forms
from contracts.corpus_reader import Outcome, Reader, read_one
from extract.errors import REASONS

NUM_MUTANTS = 18 * 9
"""Each of the 18 forms under each of the 7 mutations, and two of them once more."""


def test_no_damaged_video_crashes_hangs_or_is_ok_with_fewer_frames_than_declared() -> None:
    results = run(NUM_MUTANTS, seed=0)
    assert len(results) == NUM_MUTANTS
    assert {(mutant.form, mutant.mutation) for mutant, _ in results} == {(f, m) for f in FORMS for m in MUTATIONS}
    assert [(mutant.number, outcome) for mutant, outcome in results if is_failure(outcome)] == []
    assert {outcome.reason for _, outcome in results} - {None} <= set(REASONS)
    assert {outcome.status for _, outcome in results} == {"ok", "degraded", "rejected"}


@pytest.mark.parametrize("form", FORMS)
def test_cut_video_is_never_ok_with_fewer_frames(form: str, tmp_path: Path) -> None:
    content = write_forms(tmp_path, [form])[form]
    draws = np.random.default_rng(len(content))
    places = {*draws.integers(len(content) // 10, len(content), 12).tolist(), len(content) - 1, len(content) - 2}
    # Between two packets of a transport stream, two packs of a program stream, two sectors of a disk.
    places |= {int(share * len(content)) // step * step for step in (188, 2048, 512) for share in (0.3, 0.6, 0.9)}
    path = tmp_path / f"cut{Path(form).suffix}"
    for place in sorted(places):
        path.write_bytes(content[:place])
        outcome = read_one(path)
        assert outcome.status != "ok" or outcome.num_frames == FORMS[form].num_frames, (place, outcome)


def test_mutants_depend_on_their_seed_and_number_alone(tmp_path: Path) -> None:
    originals = write_forms(tmp_path)
    first, again, other = (list(mutants(originals, 40, seed)) for seed in (1, 1, 2))
    assert first == again == list(mutants(originals, 50, 1))[:40]
    assert all(mutant.content != originals[mutant.form] for mutant in first)
    assert [mutant.content for mutant in first] != [mutant.content for mutant in other]


def test_a_crash_and_a_hang_are_counted_as_failures(tmp_path: Path) -> None:
    good = tmp_path / "good.mp4"
    good.write_bytes(write_forms(tmp_path)["index_behind.mp4"])
    with Reader() as reader:
        assert reader.read(good, 20.0).status == "ok"
        for signal_number, status in ((signal.SIGKILL, "crash"), (signal.SIGSTOP, "hang")):
            os.kill(reader.process.pid, signal_number)
            outcome = reader.read(good, 1.0)
            assert (outcome.status, is_failure(outcome)) == (status, True)
            assert reader.read(good, 20.0).status == "ok"
    assert is_failure(Outcome("ok", num_lacking=1))
    assert not is_failure(Outcome("rejected", "corrupt"))
    assert fuzz_decoder.HANG_SECONDS == 4 * fuzz_decoder.SLOW_SECONDS
