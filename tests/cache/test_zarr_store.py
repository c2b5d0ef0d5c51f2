import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cache.cube import canonical_json
from cache.durable import fsync_path
from cache.ledger import Ledger, checksum
from cache.open import open_store
from cache.rows import ShardRecord
from cache.store import RowKey, RowOutcome, StoreError
from cache.zarr_store import ZarrStore
from contracts.store_examples import (
    CUBE,
    OK,
    VIDEO_IDS,
    commit_example,
    example_row,
    example_spec,
    expected_hash,
    fill,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A full store, closed."""
    path = tmp_path / "S.zarr"
    with ZarrStore.create(path, example_spec(), 4) as store:
        fill(store, VIDEO_IDS, [0, 1])
    return path


def test_plain_zarr_lists_and_reads_the_store_without_warnings(path: Path) -> None:
    group = zarr.open_group(path, mode="r")
    assert sorted(name for name, _ in group.members(max_depth=None)) == [
        "cube",
        "ledger",
        "pooled",
        "video_id",
        "view",
    ]
    assert "cube" in str(group.tree())
    for name in group.array_keys():
        array: Any = group[name]
        array.info_complete()
    cubes: Any = group["cube"]
    assert cubes.metadata.dimension_names == ("row", "C", "T", "H", "W")
    row = list(VIDEO_IDS).index("broken") * 2
    assert np.isnan(cubes[row]).all()


def test_snippet_of_the_docs_reads_one_row_with_plain_zarr(path: Path) -> None:
    text = (ROOT / "docs" / "store.md").read_text()
    snippet = text.split("```python\n")[1].split("```")[0]
    assert len(snippet.strip().splitlines()) <= 10
    assert "cache" not in snippet
    names: dict[str, Any] = {}
    exec(snippet.replace('"S.zarr"', repr(str(path))).replace('"walk/video_7"', '"run/2"'), names)
    np.testing.assert_array_equal(names["cube"], example_row(RowKey("run/2", 0), "cube", CUBE))


def test_row_table_holds_ids_and_views_of_every_row(path: Path) -> None:
    group: Any = zarr.open_group(path, mode="r")
    ids, views = group["video_id"][:].tolist(), group["view"][:].tolist()
    assert ids[:2] == ["walk/b", "walk/b"]
    assert ids[4] == "röhre"
    assert ids[8] == "bytes\\xff"
    assert views == [0, 1] * len(VIDEO_IDS) + [-1, -1]
    assert len(ids) == group["cube"].shape[0] == 20


def test_opening_for_reading_changes_no_byte(path: Path) -> None:
    (path / "cube" / "c.9.x.partial").write_bytes(b"litter")
    ledger = next((path / "ledger").glob("*.jsonl"))
    ledger.write_bytes(ledger.read_bytes() + b'{"crc32":"0')
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}
    with open_store(path) as store:
        assert store.content_hash() == expected_hash(store.spec, store.rows())
        store.read(["last"], [1])
        with pytest.raises(StoreError, match="open for reading"):
            store.plan(["new"], [0])
    after = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}
    assert after == before


def test_living_writer_is_left_alone_by_one_that_starts(path: Path) -> None:
    with ZarrStore(path, "a") as writer:
        writer.plan(["new", "newer"], [0])
        commit_example(writer, writer.pending()[0])
        own = max((path / "ledger").glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        own.write_bytes(own.read_bytes() + b'{"crc')
        partial = path / "cube" / "c.77.partial"
        partial.write_bytes(b"being written")
        with ZarrStore(path, "a"):
            assert own.read_bytes().endswith(b'{"crc')
            assert partial.exists()
    with ZarrStore(path, "a") as store:
        assert own.read_bytes().endswith(b"}}\n")
        assert not partial.exists()
        assert store.outcome("newer") is not None


def test_making_a_store_where_one_is_leaves_it_alone(path: Path) -> None:
    with pytest.raises(FileExistsError):
        ZarrStore.create(path, example_spec(), 4)
    with ZarrStore(path) as store:
        assert store.content_hash() == expected_hash(store.spec, store.rows())
    assert [entry.name for entry in path.parent.iterdir()] == ["S.zarr"]


def test_litter_of_a_killed_writer_is_removed(path: Path) -> None:
    abandoned = path.with_name("S.zarr.0123abcd.partial")
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))
    litter = [path / "cube" / "c.1.0.0.0.abc.partial", path / "ledger" / "plan-000001.json.ab.partial"]
    for file in litter:
        file.write_bytes(b"half")
    ZarrStore(path, "a").close()
    assert not any(file.exists() for file in [*litter, abandoned])


@pytest.mark.parametrize("goes_on", [False, True])
def test_kill_between_plan_and_arrays_is_mended(path: Path, goes_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: ZarrStore) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, ZarrStore(path, "a") as store:
        patch.setattr(ZarrStore, "_sync_row_table", killed)
        with pytest.raises(KeyboardInterrupt):
            store.plan([*VIDEO_IDS, "new"], [0])
        patch.undo()
        if goes_on:
            commit_example(store, store.pending()[0])
    with ZarrStore(path) as store:
        assert store.ids()[-1] == "new"
        assert (store.pending() == []) == goes_on
    with ZarrStore(path, "a") as store:
        fill(store, [*VIDEO_IDS, "new"], [0])
        np.testing.assert_array_equal(store.read(["new"], [0])[0], example_row(RowKey("new", 0), "cube", CUBE))
    group: Any = zarr.open_group(path, mode="r")
    assert "new" in group["video_id"][:].tolist()


def test_two_writers_share_plan_and_shards(tmp_path: Path) -> None:
    path = tmp_path / "S.zarr"
    with ZarrStore.create(path, example_spec(), 4) as first, ZarrStore(path, "a") as second, ZarrStore(path) as reader:
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


def test_shard_that_two_writers_made_by_mistake_stays_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "S.zarr"
    with ZarrStore.create(path, example_spec(), 4) as first, ZarrStore(path, "a") as second:
        first.plan(["a", "b"], [0])
        shard = second.pending()[0]
        # The second writer does not see the first one's commit, as when both write at the same moment.
        with monkeypatch.context() as patch:
            patch.setattr(ZarrStore, "_refresh", lambda _: None)
            commit_example(first, shard)
            other = {
                name: np.stack([example_row(key, name, array) + 1 for key in shard.rows])
                for name, array in first.spec.arrays.items()
            }
            second.commit(shard, other, [OK, OK])
    with ZarrStore(path) as store:
        np.testing.assert_array_equal(store.read(["a"], [0])[0], other["cube"][0])
        (record,) = store._table.records.values()
        assert record.rows[0].sha256["cube"] == _sha256(other["cube"][0])


def _sha256(row: Any) -> str:
    return hashlib.sha256(row.tobytes()).hexdigest()


def test_failed_ledger_write_leaves_the_shard_pending_and_the_store_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "S.zarr"
    with ZarrStore.create(path, example_spec(), 4) as store:
        store.plan(VIDEO_IDS, [0])
        shard = store.pending()[0]
        commit_example(store, shard)
        with monkeypatch.context() as patch:

            def full(_: int) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr("cache.ledger.os.fsync", full)
            patch.setattr("cache.zarr_store.fsync_path", lambda _: None)
            with pytest.raises(OSError, match="No space"):
                commit_example(store, store.pending()[0])
        assert [shard.index for shard in store.pending()] == [1, 2]
        fill(store, VIDEO_IDS, [0])
    with ZarrStore(path) as store:
        assert store.pending() == []
        assert store.content_hash() == expected_hash(store.spec, store.rows())


def test_ledger_that_names_no_sources_is_read(path: Path) -> None:
    ledger = next((path / "ledger").glob("*.jsonl"))
    lines = []
    for line in ledger.read_bytes().splitlines():
        record = json.loads(line)["record"]
        for row in record["rows"]:
            assert row.pop("source") is None
        text = canonical_json(record).encode("ascii")
        lines.append(b'{"crc32":"' + checksum(text).encode("ascii") + b'","record":' + text + b"}\n")
    ledger.write_bytes(b"".join(lines))
    with ZarrStore(path, "a") as store:
        assert store.outcome("short") == RowOutcome("degraded", "too_short", source=None)
        fill(store, [*VIDEO_IDS, "new"], [0])
        assert store.content_hash() == expected_hash(store.spec, store.rows())


def test_shard_is_on_disk_before_its_line_is_in_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "S.zarr"
    steps: list[str] = []

    def record(file: Path) -> None:
        steps.append(f"fsync {file.relative_to(path)}")
        fsync_path(file)

    def append(ledger: Ledger, record: ShardRecord) -> None:
        steps.append("ledger line")
        Ledger.append(ledger, record)

    with ZarrStore.create(path, example_spec(), 4) as store:
        store.plan(["a"], [0])
        monkeypatch.setattr("cache.zarr_store.fsync_path", record)
        monkeypatch.setattr(store._ledger, "append", lambda line: append(store._ledger, line))
        commit_example(store, store.pending()[0])
    assert steps == [
        "fsync cube/c.0.0.0.0.0",
        "fsync cube",
        "fsync pooled/c.0.0.0.0.0",
        "fsync pooled",
        "ledger line",
    ]
