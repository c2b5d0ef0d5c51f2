"""`verify` finds every change, `repair` mends it and touches nothing else."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.disk_store import DiskStore
from cache.document import SPEC, copy_of, seal
from cache.errors import RowNotReady, StoreDamaged
from cache.open import FORMATS, open_files, open_store
from cache.records import ShardRecord, checksum, decode_line, encode_line
from cache.repair import RepairReport, repair
from cache.rows import FileRecord
from cache.store import RowKey, StoreError
from cache.verify import VerifyReport, verify
from contracts.flips import contents, flip_many, make_store
from contracts.store_examples import CUBE, commit_example, example_row, expected_hash

KINDS = ("zarr", "hdf5")


def verified(path: Path, is_full: bool = True) -> VerifyReport:
    return verify(open_files(path), FORMATS.__getitem__, is_full)


def repaired(path: Path) -> RepairReport:
    return repair(open_files(path), FORMATS.__getitem__)


def data_file(path: Path) -> Path:
    return next(iter(sorted([*path.glob("cube/c.0.*"), *path.glob("parts/000000.h5")])))


@pytest.fixture(params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A full store that grew, retried a row and lost a video, closed."""
    make_store(tmp_path / "S", request.param)
    return tmp_path / "S"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "num_flips", [15, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.campaign, pytest.mark.timeout(900)])]
)
def test_every_bit_flip_is_found_and_mended_and_nothing_else_is_touched(
    kind: str, num_flips: int, tmp_path: Path
) -> None:
    results = flip_many(tmp_path, kind, num_flips, seed=num_flips)
    assert sum(results.flips.values()) == num_flips
    assert results.bad == []


def test_whole_store_is_whole_and_nothing_is_changed(path: Path) -> None:
    before = contents(path)
    for is_full in (True, False):
        report = verified(path, is_full)
        assert report.is_whole
        assert (report.num_pending_shards, report.notes) == (0, ())
    assert repaired(path).damages == ()
    after = contents(path)
    # Opening for writing makes a log only when something is appended.
    assert before == after


def test_progress_counts_every_committed_shard(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(open_files(path), FORMATS.__getitem__, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, report.num_shards) for done in range(1, report.num_shards + 1)]


def test_fast_mode_finds_missing_and_cut_files_but_does_not_read_data(path: Path) -> None:
    file = data_file(path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert verified(path, is_full=False).is_whole
    assert not verified(path).is_whole
    file.write_bytes(data[:-1])
    (damage,) = verified(path, is_full=False).damages
    assert f"{len(data) - 1} bytes instead of {len(data)}" in damage.what
    file.unlink()
    (damage,) = verified(path, is_full=False).damages
    assert damage.what == "missing"
    assert damage.shard_index == 0
    assert RowKey("walk/b", 0) in damage.rows


def test_damaged_shard_is_dropped_and_its_rows_raise_until_they_are_made_anew(path: Path) -> None:
    data_file(path).write_bytes(b"")
    report = repaired(path)
    assert report.dropped == (0,)
    assert report.hashes[RowKey("walk/b", 0)].keys() == {"cube", "pooled"}
    with open_store(path, mode="a") as store:
        with pytest.raises(RowNotReady, match="'walk/b'"):
            store.read(["walk/b"], [0])
        (shard,) = store.pending()
        commit_example(store, shard)
        np.testing.assert_array_equal(store.read(["walk/b"], [0])[0], example_row(RowKey("walk/b", 0), "cube", CUBE))
        assert store.content_hash() == expected_hash(store.spec, store.rows())
    assert verified(path).is_whole
    # A second drop of the same shard is told from the first by its generation.
    data_file(path).write_bytes(b"")
    assert repaired(path).dropped == (0,)
    with open_store(path, mode="a") as store:
        (shard,) = store.pending()
        commit_example(store, shard)
    assert verified(path).is_whole


def test_shard_of_rows_that_left_the_store_is_not_made_anew(path: Path) -> None:
    with open_store(path, mode="a") as store:
        store.remove(store.ids())
    data_file(path).unlink()
    assert repaired(path).dropped == (0,)
    with open_store(path, mode="a") as store:
        assert store.pending() == []
    assert verified(path).is_whole


@pytest.mark.parametrize("name", [SPEC, copy_of(SPEC), "ledger/plan-000001.json", "ledger/plan-000001.copy.json"])
def test_lost_document_comes_back_from_its_copy(path: Path, name: str) -> None:
    before = contents(path)
    (path / name).unlink()
    assert {damage.file for damage in verified(path).damages} == {name}
    assert repaired(path).restored == (name,)
    assert contents(path) == before


def test_both_copies_lost_is_said_and_nothing_is_written(path: Path) -> None:
    for name in (SPEC, copy_of(SPEC)):
        (path / name).write_bytes(b"{}")
    before = contents(path)
    for call in (verified, repaired):
        with pytest.raises(StoreDamaged, match=r"spec\.json and its copy are both lost"):
            call(path)
    assert contents(path) == before


def test_line_of_another_store_is_damage_and_is_taken_out(path: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "T", "zarr")
    (stranger,) = (tmp_path / "T" / "ledger").glob("*.jsonl")
    shutil.copy(stranger, path / "ledger")
    assert {damage.file for damage in verified(path).damages} == {f"ledger/{stranger.name}"}
    repaired(path)
    assert verified(path).is_whole


def test_torn_last_line_is_a_note_and_a_flipped_newline_is_damage(path: Path) -> None:
    (log,) = (path / "ledger").glob("*.jsonl")
    data = log.read_bytes()
    log.write_bytes(data[:-20])
    report = verified(path)
    assert report.is_whole
    assert report.num_pending_shards == 1
    assert "was killed" in report.notes[0]
    log.write_bytes(data[:-1] + b"\x0b")
    assert [damage.part for damage in verified(path).damages] == ["ledger"]


def test_repair_refuses_while_a_writer_is_alive(path: Path) -> None:
    with open_store(path, mode="a") as store:
        store.plan(["one more"], [0])
        (shard,) = store.pending()
        assert store.claim(shard).state == "ours"
        with pytest.raises(StoreError, match=r"is being written by process \d+ on"):
            repaired(path)
        store.release(shard)
    repaired(path)


def test_file_of_a_shard_without_rows_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "S.zarr"
    make_store(path, "zarr")
    with open_store(path, mode="a") as store:
        (index,) = [i for i in range(20) if not (path / "cube" / f"c.{i}.0.0.0.0").exists()][:1]
        del store
    shutil.copy(path / "cube/c.0.0.0.0.0", path / f"cube/c.{index}.0.0.0.0")
    damages = verified(path).damages
    assert [damage.shard_index for damage in damages] == [index]
    assert "every row of the shard was rejected" in damages[0].what


def test_index_of_another_hdf5_version_is_a_note_and_a_damaged_one_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "S.h5"
    make_store(path, "hdf5")
    index, seal = path / "index.h5", path / "index.h5.crc32"
    good = index.read_bytes()
    index.write_bytes(good + bytes(8))
    assert [damage.file for damage in verified(path).damages] == ["index.h5"]
    seal.write_bytes(checksum(index.read_bytes()).encode() + b"\n")
    report = verified(path)
    assert report.is_whole
    assert "another version" in report.notes[0]
    with open_store(path, mode="a"):
        pass
    assert index.read_bytes() == good
    assert verified(path).notes == ()


def test_commit_that_lost_against_another_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "S.zarr"
    make_store(path, "zarr")
    (log,) = (path / "ledger").glob("*.jsonl")
    lines = log.read_bytes().splitlines(keepends=True)
    record = decode_line(lines[0][:-1])
    assert isinstance(record, ShardRecord)
    # As of a writer that stalled for longer than a lease: the same shard, other files.
    lost = replace(record, files={name: FileRecord(7, "00000000") for name in record.files})
    for name in ("aaa-1-00000000.jsonl", "zzz-1-00000000.jsonl"):
        (path / "ledger" / name).write_bytes(encode_line(lost))
        os.utime(path / "ledger" / name, (0, 0))
        report = verified(path)
        assert report.is_whole
        assert "committed twice" in report.notes[0]
        with open_store(path) as store:
            np.testing.assert_array_equal(
                store.read(["walk/b"], [0])[0], example_row(RowKey("walk/b", 0), "cube", CUBE)
            )
        (path / "ledger" / name).unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_store_whose_growth_was_interrupted_is_whole(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "S"
    make_store(path, kind)
    with open_store(path, mode="a") as store, monkeypatch.context() as patch:
        patch.setattr(DiskStore, "_write_derived", lambda self: None)
        store.plan([f"new/{index}" for index in range(9)], [0])
    report = verified(path)
    assert report.is_whole
    assert "before the plan" in " ".join(report.notes)
    assert report.num_pending_shards == 3


def test_hostile_lines_and_documents_are_damage_and_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "S.zarr"
    make_store(path, "zarr")
    (log,) = (path / "ledger").glob("*.jsonl")
    good = log.read_bytes()
    lines: list[dict[str, Any]] = [
        {"store": None}, {"shard": "0"}, {"shard": None}, {"generation": -1}, {"files": []}, {"rows": []}, {"kind": "x"}, {"rows": 3},
        {"files": {"a": {}}},
    ]  # fmt: skip
    for change in lines:
        document = json.loads(good.splitlines()[0])["record"]
        rows = {**document, **change}.pop("rows")
        text = json.dumps(
            {**{k: v for k, v in {**document, **change}.items() if k != "rows"}, "rows": rows}, separators=(",", ":")
        )
        line = f'{{"crc32":"{checksum(text.encode())}","record":{text}}}\n'.encode()
        log.write_bytes(line + good)
        with pytest.raises(StoreDamaged, match=r"ledger|another store"):
            open_store(path)
    log.write_bytes(good)
    plan = path / "ledger/plan-000000.json"
    for change in ({"rows": 7}, {"rows": [["a"]]}, {"rows": [["a", -1]]}, {"removed": None}, {"rows": [["\ud800", 0]]}):
        document = {**json.loads(plan.read_bytes())["document"], **change}
        for name in (plan, copy_of(str(plan))):
            Path(name).write_bytes(seal(document))
        with pytest.raises(StoreDamaged, match="cannot be read by this version"):
            open_store(path)
