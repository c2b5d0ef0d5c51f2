"""Every kind of odd or hostile input ends as ok, degraded or rejected, for the reason that is right, and harms no neighbour."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from contracts.corpus import Kind, write_corpus
from contracts.corpus_reader import Outcome, Reader
from extract.errors import REASONS

SECONDS_PER_KIND = 20.0
NEIGHBOUR_EVERY = 10


@dataclass(frozen=True)
class Survey:
    """All kinds, read one after the other by one process."""

    kinds: list[Kind]
    outcomes: dict[str, Outcome]
    """By the name of the kind."""
    neighbours: list[Outcome]
    """Of a good video that was read again and again in between."""
    clean: Outcome
    """Of the same video, read by a process that had read nothing before."""
    as_nobody: Outcome
    """Of the same video, read with the rights of those kinds that are about permissions."""


@pytest.fixture(scope="module")
def survey() -> Iterator[Survey]:
    # Not below pytest's own folder, which nobody but its owner may enter: permissions would be refused for that alone.
    folder = Path(tempfile.mkdtemp(prefix="corpus_"))
    folder.chmod(0o755)
    kinds = write_corpus(folder)
    good = folder / "containers/good.mp4"
    try:
        with Reader() as reader:
            clean = reader.read(good, SECONDS_PER_KIND)
        with Reader() as reader:
            outcomes, neighbours = {}, []
            for number, kind in enumerate(kinds):
                outcomes[kind.name] = reader.read(kind.path, SECONDS_PER_KIND, as_nobody=kind.is_closed_to_others)
                if number % NEIGHBOUR_EVERY == 0:
                    neighbours.append(reader.read(good, SECONDS_PER_KIND))
            as_nobody = reader.read(good, SECONDS_PER_KIND, as_nobody=True)
        yield Survey(kinds, outcomes, neighbours, clean, as_nobody)
    finally:
        for kind in kinds:
            if kind.is_closed_to_others and kind.path.parent.exists() and kind.path.exists():
                kind.path.chmod(0o755)
        shutil.rmtree(folder)


def test_there_are_at_least_108_kinds_and_each_has_a_name_and_a_path_of_its_own(survey: Survey) -> None:
    assert len(survey.kinds) >= 108
    for values in ([kind.name for kind in survey.kinds], [kind.path for kind in survey.kinds]):
        assert [value for value, count in Counter(values).items() if count > 1] == []


def test_every_kind_ends_with_the_status_and_the_reason_that_are_right(survey: Survey) -> None:
    differences = [
        f"{kind.name}: {sorted(kind.statuses)} {kind.reason} expected, but {outcome.status} {outcome.reason} {outcome.detail}"
        for kind in survey.kinds
        if (outcome := survey.outcomes[kind.name]).status not in kind.statuses
        or outcome.reason != (None if outcome.status == "ok" else kind.reason)
    ]
    assert differences == []


def test_every_kind_gives_its_number_of_frames_and_none_that_is_ok_lacks_a_declared_one(survey: Survey) -> None:
    for kind in survey.kinds:
        outcome = survey.outcomes[kind.name]
        assert kind.num_frames in (None, outcome.num_frames), kind.name
        assert outcome.num_lacking == 0, kind.name


def test_rejections_say_why_in_one_line(survey: Survey) -> None:
    for name, outcome in survey.outcomes.items():
        assert (outcome.status == "rejected") == bool(outcome.detail), name
        assert "\n" not in outcome.detail, name


def test_reasons_are_at_most_twenty_and_all_are_documented(survey: Survey) -> None:
    assert len(REASONS) <= 20
    assert {outcome.reason for outcome in survey.outcomes.values()} - {None} <= set(REASONS)
    documented = (Path(__file__).parents[2] / "docs/inputs.md").read_text()
    assert [reason for reason in REASONS if f"| `{reason}` |" not in documented] == []


def test_good_neighbours_are_the_same_to_the_bit_as_in_a_clean_run(survey: Survey) -> None:
    assert survey.clean.status == "ok"
    assert len(survey.neighbours) > 10
    assert {neighbour.digest for neighbour in survey.neighbours} == {survey.clean.digest}


def test_names_of_files_change_nothing_about_their_pixels(survey: Survey) -> None:
    named = [outcome for name, outcome in survey.outcomes.items() if name.startswith("name with ") and outcome.digest]
    assert len(named) > 15
    assert {outcome.digest for outcome in named} == {survey.clean.digest}


def test_permissions_are_refused_for_themselves_and_not_for_the_folder_they_are_in(survey: Survey) -> None:
    assert (survey.as_nobody.status, survey.as_nobody.digest) == ("ok", survey.clean.digest)
    assert sum(kind.is_closed_to_others for kind in survey.kinds) >= 2
