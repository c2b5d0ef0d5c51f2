"""Several writers on one store, readers beside them: what each may see and touch, for every backend."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.disk_store import DiskStore
from cache.document import SPEC, read_sealed, seal
from cache.files import LocalFiles, _LocalLog
from cache.leases import lease_name
from cache.open import FORMATS, open_disk_store
from cache.store import FeatureStore, RowKey, Shard, ShardHeld, StoreError
from contracts.attacks import Nursery
from contracts.attacks_processes import four_at_once
from contracts.store_examples import (
    CUBE,
    OK,
    VIDEO_IDS,
    commit_example,
    example_arrays,
    example_row,
    example_spec,
    expected_hash,
    fill,
)


@pytest.fixture(params=FORMATS)
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "S"


@pytest.fixture
def full_store(path: Path, kind: str) -> None:
    """A full store, closed."""
    with open_disk_store(path, kind, example_spec(), "a", 4) as store:
        fill(store, VIDEO_IDS, [0, 1])


def other_arrays(shard: Shard, store: FeatureStore) -> dict[str, Any]:
    """Values that no example row has."""
    return {name: values + 1 for name, values in example_arrays(shard, store.spec).items()}


@pytest.mark.usefixtures("full_store")
def test_opening_for_reading_changes_no_byte(path: Path, kind: str) -> None:
    (path / "ledger" / "plan-000009.json.x.partial").write_bytes(b"litter")
    ledger = next((path / "ledger").glob("*.jsonl"))
    ledger.write_bytes(ledger.read_bytes() + b'{"crc32":"0')
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}
    with open_disk_store(path, kind) as store:
        assert store.content_hash() == expected_hash(store.spec, store.rows())
        store.read(["last"], [1])
        store.holders()
        with pytest.raises(StoreError, match="open for reading"):
            store.plan(["new"], [0])
        with pytest.raises(StoreError, match="open for reading"):
            store.claim(Shard(0, ()))
    after = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}
    assert after == before


@pytest.mark.usefixtures("full_store")
def test_living_writer_is_left_alone_by_one_that_starts(path: Path, kind: str) -> None:
    with open_disk_store(path, kind, mode="a") as writer:
        writer.plan(["new", "newer"], [0])
        commit_example(writer, writer.pending()[0])
        writer.plan(["newest"], [0])
        shard = writer.pending()[0]
        assert writer.claim(shard).state == "ours"
        own = max((path / "ledger").glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        own.write_bytes(own.read_bytes() + b'{"crc')
        partial = path / "ledger" / "x.77.partial"
        partial.write_bytes(b"being written")
        with open_disk_store(path, kind, mode="a") as other:
            assert own.read_bytes().endswith(b'{"crc')
            assert partial.exists()
            assert (path / lease_name(shard.index)).exists()
            claim = other.claim(shard)
            assert claim.state == "held"
            assert claim.holder is not None
            assert f"process {os.getpid()}" in claim.holder
            assert other.holders() == {shard.index: claim.holder}
    with open_disk_store(path, kind, mode="a") as store:
        assert own.read_bytes().endswith(b"}}\n")
        assert not partial.exists()
        assert not (path / lease_name(shard.index)).exists()
        assert store.outcome("newer") is not None
        assert store.claim(shard).state == "ours"


@pytest.mark.usefixtures("full_store")
def test_making_a_store_where_one_is_opens_that_one(path: Path, kind: str) -> None:
    before = (path / "ledger" / "spec.json").read_bytes()
    with open_disk_store(path, kind, example_spec(), "a", 64) as store:
        assert store.content_hash() == expected_hash(store.spec, store.rows())
    assert (path / "ledger" / "spec.json").read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.usefixtures("full_store")
def test_litter_of_a_killed_writer_is_removed(path: Path, kind: str) -> None:
    folders = [path, *(entry for entry in path.rglob("*") if entry.is_dir())]
    litter = [folder / "name.0123abcd.partial" for folder in folders]
    for file in litter:
        file.write_bytes(b"half")
    open_disk_store(path, kind, mode="a").close()
    assert not any(file.exists() for file in litter)


def test_two_writers_share_plan_and_shards(path: Path, kind: str) -> None:
    with (
        open_disk_store(path, kind, example_spec(), "a", 4) as first,
        open_disk_store(path, kind, mode="a") as second,
        open_disk_store(path, kind) as reader,
    ):
        first.plan(VIDEO_IDS, [0])
        second.plan(VIDEO_IDS, [0, 1])
        first.plan(["one more"], [0])
        second.plan(["one more", "and more"], [0])
        assert second.rows()[-1] == RowKey("and more", 0)
        for position, shard in enumerate(first.pending()):
            commit_example(second if position % 2 else first, shard)
        assert first.pending() == second.pending() == []
        assert reader.pending() == []
        assert first.rows() == second.rows() == reader.rows()
        np.testing.assert_array_equal(reader.read(["and more"], [0]), first.read(["and more"], [0]))
        assert first.content_hash() == second.content_hash() == expected_hash(first.spec, first.rows())


def test_writer_that_comes_too_late_touches_nothing_of_what_was_committed(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_disk_store(path, kind, example_spec(), "a", 4) as first, open_disk_store(path, kind, mode="a") as second:
        first.plan(["a", "b"], [0])
        shard = second.pending()[0]
        take = second._leases.take

        def commit_first(shard_index: int) -> str | None:
            # After the second writer has seen that the shard is pending, before it has the lease.
            commit_example(first, shard)
            return take(shard_index)

        monkeypatch.setattr(second._leases, "take", commit_first)
        names = first._format.file_names(shard.index)
        with pytest.raises(StoreError, match="committed already, with other content"):
            second.commit(shard, other_arrays(shard, second), [OK, OK])
        before = [(path / name).stat().st_mtime_ns for name in names]
        commit_example(second, shard)
        assert [(path / name).stat().st_mtime_ns for name in names] == before
    with open_disk_store(path, kind) as store:
        np.testing.assert_array_equal(store.read(["a"], [0])[0], example_row(RowKey("a", 0), "cube", CUBE))
        assert store.holders() == {}


def test_loser_of_a_shard_is_told_who_holds_it(path: Path, kind: str) -> None:
    with open_disk_store(path, kind, example_spec(), "a", 4) as first, open_disk_store(path, kind, mode="a") as second:
        first.plan(VIDEO_IDS, [0])
        shard = first.pending()[0]
        first.claim(shard)
        with pytest.raises(ShardHeld, match=rf"shard 0 is being made by process {os.getpid()} on .*, since 2\d{{3}}-"):
            commit_example(second, shard)
        first.release(shard)
        commit_example(second, shard)
        assert first.claim(shard).state == "done"


def test_lease_that_was_made_between_two_looks_is_left_alone(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        open_disk_store(path, kind, example_spec(), "a", 4) as first,
        open_disk_store(path, kind, mode="a") as second,
        open_disk_store(path, kind, mode="a") as third,
    ):
        first.plan(VIDEO_IDS, [0])
        shard, other = first.pending()[:2]
        first.claim(shard)
        third.claim(other)
        read = second._leases._read

        def read_between(shard_index: int) -> dict[str, Any] | None:
            monkeypatch.setattr(second._leases, "_read", read)
            first.release(shard)
            nothing = read(shard_index)
            assert third.claim(shard).state == "ours"
            return nothing

        monkeypatch.setattr(second._leases, "_read", read_between)
        assert second.claim(shard).state == "held"
        assert first.claim(shard).state == "held"


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"log":1'])
def test_damaged_lease_is_replaced(path: Path, kind: str, data: bytes) -> None:
    with open_disk_store(path, kind, example_spec(), "a", 4) as store:
        store.plan(VIDEO_IDS, [0])
        (path / lease_name(0)).parent.mkdir(exist_ok=True)
        (path / lease_name(0)).write_bytes(data)
        assert store.holders() == {}
        fill(store, VIDEO_IDS, [0])


def test_lease_is_given_up_when_the_writer_loses_its_log(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_disk_store(path, kind, example_spec(), "a", 4) as first, open_disk_store(path, kind, mode="a") as second:
        first.plan(VIDEO_IDS, [0])
        shard = first.pending()[0]
        with monkeypatch.context() as patch:
            patch.setattr(_LocalLog, "append", _fail)
            with pytest.raises(StoreError, match="as if the disk were full"):
                commit_example(first, shard)
        assert second.claim(shard).state == "ours"
        with pytest.raises(ShardHeld):
            commit_example(first, shard)
        first.release(shard)
        assert (path / lease_name(shard.index)).exists()
        commit_example(second, shard)
        assert first.pending() == second.pending()


def _fail(*_: object) -> None:
    raise StoreError("as if the disk were full")


def test_shard_that_two_writers_made_past_their_leases_stays_readable(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_disk_store(path, kind, example_spec(), "a", 4) as first, open_disk_store(path, kind, mode="a") as second:
        first.plan(["a", "b"], [0])
        shard = second.pending()[0]
        other = other_arrays(shard, second)
        # As on a file system without locks, when a writer slept for so long that its lease was taken over.
        with monkeypatch.context() as patch:
            patch.setattr(DiskStore, "_refresh", lambda _: None)
            second.claim(shard)
            (path / lease_name(shard.index)).unlink()
            commit_example(first, shard)
            second.commit(shard, other, [OK, OK])
    with open_disk_store(path, kind) as store:
        np.testing.assert_array_equal(store.read(["a"], [0])[0], other["cube"][0])
        (record,) = store._table.records.values()
        assert record.rows[0].sha256["cube"] == hashlib.sha256(other["cube"][0].tobytes()).hexdigest()


def test_failed_ledger_write_leaves_the_shard_pending_and_the_store_usable(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_disk_store(path, kind, example_spec(), "a", 4) as store:
        store.plan(VIDEO_IDS, [0])
        commit_example(store, store.pending()[0])
        fsync = os.fsync

        def full(descriptor: int) -> None:
            if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".jsonl":
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr("cache.files.os.fsync", full)
            with pytest.raises(StoreError, match=rf"{path}/ledger/.*\.jsonl could not be written: No space"):
                commit_example(store, store.pending()[0])
        assert [shard.index for shard in store.pending()] == [1, 2]
        fill(store, VIDEO_IDS, [0])
    with open_disk_store(path, kind) as store:
        assert store.pending() == []
        assert store.content_hash() == expected_hash(store.spec, store.rows())


def test_shard_is_on_disk_before_its_line_is_in_the_ledger(
    path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    put, append = LocalFiles.put, _LocalLog.append

    def noted_put(files: LocalFiles, name: str, data: bytes, replace: bool = True) -> None:
        put(files, name, data, replace)
        steps.append(name)

    def noted_append(log: Any, data: bytes) -> None:
        steps.append("ledger line")
        append(log, data)

    with open_disk_store(path, kind, example_spec(), "a", 4) as store:
        store.plan(["a"], [0])
        monkeypatch.setattr(LocalFiles, "put", noted_put)
        monkeypatch.setattr(_LocalLog, "append", noted_append)
        commit_example(store, store.pending()[0])
        data_files = list(store._format.file_names(0))
    assert steps == [lease_name(0), *data_files, "ledger line"]


def test_store_of_an_older_format_is_refused(path: Path, kind: str) -> None:
    open_disk_store(path, kind, example_spec(), "a").close()
    document = read_sealed(LocalFiles(path), SPEC)
    (path / SPEC).write_bytes(seal({**document, "format": 1}))
    with pytest.raises(StoreError, match="has format 1, this version reads 2; extract into a new store"):
        open_disk_store(path, kind)


def test_four_writers_at_once_make_each_shard_once(tmp_path: Path, kind: str) -> None:
    with Nursery(tmp_path / "said") as nursery:
        tally = four_at_once(nursery, tmp_path, kind, 3)
    assert (tally.trials, tally.lost_rows, tally.wrong_rows, tally.bad) == (3, 0, 0, [])
