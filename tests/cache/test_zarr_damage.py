from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from cache.open import open_disk_store, open_store
from cache.store import FeatureStore, RowDamaged, RowKey, StoreDamaged, StoreError
from contracts.store_examples import (
    CUBE,
    VIDEO_IDS,
    example_row,
    example_spec,
    expected_hash,
    fill,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A full store, closed."""
    path = tmp_path / "S.zarr"
    with open_disk_store(path, "zarr", example_spec(), "a", 4) as store:
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
    with open_store(path) as store:
        assert [shard.index for shard in store.pending()] == [4]
    with open_store(path, mode="a") as store:
        assert ledger.read_bytes() == whole
        fill(store, VIDEO_IDS, [0, 1])
        assert ledger.read_bytes() == whole
        assert store.content_hash() == expected_hash(store.spec, store.rows())
    with open_store(path) as store:
        assert store.pending() == []


def test_corrupt_line_that_is_not_the_last_is_an_error_naming_the_file(path: Path) -> None:
    ledger = next((path / "ledger").glob("*.jsonl"))
    data = bytearray(ledger.read_bytes())
    data[100] ^= 1
    ledger.write_bytes(data)
    modes: tuple[Literal["r", "a"], ...] = ("r", "a")
    for mode in modes:
        with pytest.raises(StoreError, match=f"{ledger.name} is damaged at byte 0"):
            open_store(path, mode=mode)


def test_ledger_of_another_store_is_refused(path: Path, tmp_path: Path) -> None:
    with open_disk_store(tmp_path / "other.zarr", "zarr", example_spec(weights_digest="cd" * 32), "a", 4) as other:
        fill(other, VIDEO_IDS, [0, 1])
    stranger = next((tmp_path / "other.zarr" / "ledger").glob("*.jsonl"))
    (path / "ledger" / stranger.name).write_bytes(stranger.read_bytes())
    with pytest.raises(StoreError, match=f"{stranger.name} belongs to another store"):
        open_store(path)


@pytest.mark.parametrize("compression", ["none", "zstd", "gzip"])
def test_every_bit_flip_in_a_shard_is_noticed_on_read(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "S.zarr"
    with open_disk_store(path, "zarr", example_spec(), "a", 4, compression) as store:
        fill(store, ["a", "b", "c", "d"], [0])
    (file,) = data_files(path)
    good = file.read_bytes()
    generator = np.random.default_rng(0)
    with open_store(path) as store:
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
    with open_store(path) as store:
        file.write_bytes(file.read_bytes()[:-7])
        with pytest.raises(RowDamaged, match="'walk/b'"):
            store.read(["walk/b"], [0])
        file.unlink()
        with pytest.raises(RowDamaged, match=r"'walk/b'.*its data is missing"):
            store.read(["walk/b"], [0])
        store.read(["last"], [0])


@pytest.mark.parametrize("name", ["ledger/spec.json", "ledger/plan-000000.json"])
def test_flipped_bit_in_spec_or_plan_is_an_error_naming_the_file(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    digest = data.index(b'"sha256"') + 15
    (path / name).write_bytes(data[:digest] + bytes([data[digest] ^ 1]) + data[digest + 1 :])
    modes: tuple[Literal["r", "a"], ...] = ("r", "a")
    for mode in modes:
        with pytest.raises(StoreDamaged, match=f"{name} is damaged"):
            open_store(path, mode=mode)


@pytest.mark.parametrize("name", ["zarr.json", "cube/zarr.json", "view/zarr.json", "view/c.0", "video_id/c.0"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_file_that_follows_from_the_plan_is_mended_by_the_next_writer(path: Path, name: str, damage: str) -> None:
    data = (path / name).read_bytes()
    (path / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    if damage == "missing":
        (path / name).unlink()
    with open_store(path) as store:
        # A reader changes nothing, and gives right rows or none.
        assert _is_damaged(store, "last", example_row(RowKey("last", 0), "cube", CUBE)) == (name == "cube/zarr.json")
    open_store(path, mode="a").close()
    assert (path / name).read_bytes() == data


def test_plan_of_another_store_is_refused(path: Path, tmp_path: Path) -> None:
    with open_disk_store(tmp_path / "other.zarr", "zarr", example_spec(), "a", 4) as other:
        fill(other, VIDEO_IDS, [0, 1])
    name = "ledger/plan-000000.json"
    (path / name).write_bytes((tmp_path / "other.zarr" / name).read_bytes())
    with pytest.raises(StoreDamaged, match=f"{name} belongs to another store"):
        open_store(path)


def test_spec_of_another_store_is_refused(path: Path, tmp_path: Path) -> None:
    open_disk_store(tmp_path / "other.zarr", "zarr", example_spec(weights_digest="cd" * 32), "a", 4).close()
    (path / "ledger" / "spec.json").write_bytes((tmp_path / "other.zarr" / "ledger" / "spec.json").read_bytes())
    with pytest.raises(StoreDamaged, match="belongs to another store"):
        open_store(path)


@pytest.mark.parametrize("name", ["ledger/plan-000000.json", "ledger/spec.json"])
@pytest.mark.parametrize("mode", ["r", "a"])
def test_missing_document_is_an_error_naming_it(path: Path, name: str, mode: Literal["r", "a"]) -> None:
    (path / name).unlink()
    with pytest.raises(StoreError, match=rf"{name} is missing.*mastaf store repair"):
        open_store(path, mode=mode)
