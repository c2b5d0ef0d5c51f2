import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.open import open_store
from cache.rows import RowDamaged
from cache.store import FeatureStore, StoreError
from cache.zarr_store import ZarrStore
from contracts.store_examples import (
    CUBE,
    VIDEO_IDS,
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


def data_files(path: Path) -> list[Path]:
    return sorted((path / "cube").glob("c.*"))


@pytest.mark.parametrize("num_bytes_kept", [1, 40, -2, -1])
def test_torn_last_line_is_ignored_by_readers_and_cut_by_the_next_writer(path: Path, num_bytes_kept: int) -> None:
    ledger = next((path / "ledger").glob("*.jsonl"))
    lines = ledger.read_bytes().splitlines(keepends=True)
    whole = b"".join(lines[:-1])
    ledger.write_bytes(whole + lines[-1][:num_bytes_kept])
    with ZarrStore(path) as store:
        assert [shard.index for shard in store.pending()] == [4]
    with ZarrStore(path, "a") as store:
        assert ledger.read_bytes() == whole
        fill(store, VIDEO_IDS, [0, 1])
        assert ledger.read_bytes() == whole
        assert store.content_hash() == expected_hash(store.spec, store.rows())
    with ZarrStore(path) as store:
        assert store.pending() == []


def test_corrupt_line_that_is_not_the_last_is_an_error_naming_the_file(path: Path) -> None:
    ledger = next((path / "ledger").glob("*.jsonl"))
    data = bytearray(ledger.read_bytes())
    data[100] ^= 1
    ledger.write_bytes(data)
    for mode in ("r", "a"):
        with pytest.raises(StoreError, match=f"{ledger.name} is damaged at byte 0"):
            open_store(path, mode=mode)


def test_ledger_of_another_store_is_refused(path: Path, tmp_path: Path) -> None:
    with ZarrStore.create(tmp_path / "other.zarr", example_spec(weights_digest="cd" * 32), 4) as other:
        fill(other, VIDEO_IDS, [0, 1])
    stranger = next((tmp_path / "other.zarr" / "ledger").glob("*.jsonl"))
    (path / "ledger" / stranger.name).write_bytes(stranger.read_bytes())
    with pytest.raises(StoreError, match=f"{stranger.name} belongs to another store"):
        ZarrStore(path)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_bit_flip_in_a_shard_is_noticed_on_read(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "S.zarr"
    with ZarrStore.create(path, example_spec(), 4, compression) as store:
        fill(store, ["a", "b", "c", "d"], [0])
    (file,) = data_files(path)
    good = file.read_bytes()
    generator = np.random.default_rng(0)
    with ZarrStore(path) as store:
        wanted = store.read(["a", "b", "c", "d"], [0] * 4)
        for position in generator.integers(0, len(good), 60):
            data = bytearray(good)
            data[position] ^= 1 << int(generator.integers(8))
            file.write_bytes(data)
            assert sum(_is_damaged(store, video_id, wanted[row]) for row, video_id in enumerate("abcd")) >= 1


def _is_damaged(store: FeatureStore, video_id: str, wanted: Any) -> bool:
    """Whether reading fails and names the video; a row that is read must be right."""
    try:
        cubes = store.read([video_id], [0])
    except RowDamaged as error:
        return f"video '{video_id}'" in str(error)
    np.testing.assert_array_equal(cubes[0], wanted)
    return False


def test_truncated_or_missing_shard_is_an_error_and_never_zeros(path: Path) -> None:
    file = data_files(path)[0]
    with ZarrStore(path) as store:
        file.write_bytes(file.read_bytes()[:-7])
        with pytest.raises(RowDamaged, match="'walk/b'"):
            store.read(["walk/b"], [0])
        file.unlink()
        with pytest.raises(RowDamaged, match=r"'walk/b'.*its data is missing"):
            store.read(["walk/b"], [0])
        store.read(["last"], [0])


@pytest.mark.parametrize("name", ["zarr.json", "ledger/spec.json", "ledger/plan-000000.json"])
def test_flipped_bit_in_spec_or_plan_is_an_error_naming_the_file(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    digest = data.index(b'"sha256"') + 15
    (path / name).write_bytes(data[:digest] + bytes([data[digest] ^ 1]) + data[digest + 1 :])
    with pytest.raises(StoreError, match=f"{name} is damaged"):
        ZarrStore(path)


def test_two_copies_of_the_spec_that_differ_are_refused(path: Path, tmp_path: Path) -> None:
    ZarrStore.create(tmp_path / "other.zarr", example_spec(weights_digest="cd" * 32), 4).close()
    (path / "ledger" / "spec.json").write_bytes((tmp_path / "other.zarr" / "ledger" / "spec.json").read_bytes())
    with pytest.raises(StoreError, match="hold different specs"):
        ZarrStore(path)


@pytest.mark.parametrize("name", ["ledger/plan-000000.json", "cube/zarr.json", "zarr.json", "ledger/spec.json"])
def test_missing_file_is_an_error_naming_it(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(StoreError, match=r"missing|not planned"):
        ZarrStore(path)


def test_killed_writer_loses_nothing_it_committed_and_the_resumed_store_is_the_same(tmp_path: Path) -> None:
    generator = np.random.default_rng(7)
    num_killed_midway = 0
    for trial in range(5):
        path = tmp_path / f"trial_{trial}.zarr"
        command = [sys.executable, str(Path(__file__).parent / "crash_writer.py"), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
            assert writer.stdout is not None
            # Trial 0 dies while the store is made, the others a moment after a random commit.
            before = [writer.stdout.readline() for _ in range(1 + (0 if trial == 0 else generator.integers(1, 18)))]
            time.sleep(generator.uniform(0, 0.03))
            writer.kill()
            acknowledged = [int(line) for line in (before + writer.stdout.readlines())[1:]]
        with ZarrStore.create(path, example_spec(), 4) if not path.exists() else ZarrStore(path, "a") as store:
            pending = [shard.index for shard in store.pending()]
            assert not set(pending) & set(acknowledged)
            num_killed_midway += bool(pending) and bool(acknowledged)
            for key in store.rows():
                if store.outcome(key.video_id, key.view) is not None and key.video_id != "broken":
                    row = store.read([key.video_id], [key.view])[0]
                    np.testing.assert_array_equal(row, example_row(key, "cube", CUBE))
            fill(store, VIDEO_IDS, [0, 1, 2])
            fill(store, [f"more/{i}" for i in range(60)], [0])
            assert store.content_hash() == expected_hash(store.spec, store.rows())
            assert len(store.rows()) == len(VIDEO_IDS) * 3 + 60
        assert list(path.rglob("*.partial")) == []
    assert num_killed_midway >= 3
