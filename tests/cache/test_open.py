import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from cache.config import StoreConfig
from cache.open import open_store
from cache.store import MemoryStore, SpecMismatch, StoreError
from cache.zarr_store import ZarrStore
from contracts.store_examples import VIDEO_IDS, example_spec, fill

ROOT = Path(__file__).parents[2]
CHANGED = example_spec(
    sampling={"num_frames": 16, "policy": "even", "resize": {"size": 256, "crop": "random"}, "axis": "time"}
)


def test_store_is_created_once_and_then_opened(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "S.zarr"
    with open_store(path, spec=example_spec(), mode="a", shard_rows=2, compression="zstd") as store:
        assert isinstance(store, ZarrStore)
        fill(store, ["a", "b", "c"], [0])
    with open_store(str(path), spec=example_spec(), mode="a", shard_rows=64) as store:
        assert (store.layout()["shard_rows"], store.layout()["compression"]) == (2, "zstd")
        assert store.pending() == []
    with open_store(path) as store:
        assert store.spec == example_spec()
    assert [entry.name for entry in path.parent.iterdir()] == ["S.zarr"]


def test_processes_that_start_together_share_one_store(tmp_path: Path) -> None:
    def work(_: int) -> str:
        with open_store(tmp_path / "S.zarr", spec=example_spec(), mode="a", shard_rows=4) as store:
            store.plan(VIDEO_IDS, [0])
            return str(store.rows())

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(work, range(4)))) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["S.zarr"]


def test_memory_store_is_opened_by_kind() -> None:
    assert isinstance(open_store(None, "memory", example_spec()), MemoryStore)


@pytest.mark.parametrize("mode", ["r", "a"])
def test_spec_mismatch_lists_every_differing_field_and_the_way_out(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "S.zarr"
    open_store(path, spec=example_spec(), mode="a").close()
    with pytest.raises(SpecMismatch) as caught:
        open_store(path, spec=CHANGED, mode="a" if mode == "a" else "r")
    message = str(caught.value)
    assert str(path) in message
    assert 'sampling.axis: store nothing, wanted "time"' in message
    assert "sampling.num_frames: store 8, wanted 16" in message
    assert 'sampling.resize.crop: store "centre", wanted "random"' in message
    assert "policy" not in message
    assert "another folder" in message


def test_store_of_another_spec_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "S.zarr"
    with open_store(path, spec=example_spec(), mode="a", shard_rows=4) as store:
        fill(store, VIDEO_IDS, [0])
    ledger = next((path / "ledger").glob("*.jsonl"))
    ledger.write_bytes(ledger.read_bytes() + b'{"crc32":"0')
    (path / "ledger" / "lock").unlink()
    (path / "cube" / "c.9.x.partial").write_bytes(b"litter")
    abandoned = tmp_path / "S.zarr.0123abcd.partial"
    abandoned.mkdir()
    os.utime(abandoned, (0, 0))

    def everything() -> dict[Path, tuple[int, bytes]]:
        return {
            entry: (entry.stat().st_mtime_ns, entry.read_bytes() if entry.is_file() else b"")
            for entry in tmp_path.rglob("*")
        }

    before = everything()
    with pytest.raises(SpecMismatch):
        open_store(path, spec=CHANGED, mode="a")
    assert everything() == before
    # With its own spec all of it is cleared.
    open_store(path, spec=example_spec(), mode="a").close()
    assert not ledger.read_bytes().endswith(b'{"crc32":"0')
    assert list(tmp_path.rglob("*.partial")) == []


def test_paths_that_hold_no_store_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file.zarr").write_text("text")
    (tmp_path / "folder.zarr").mkdir()
    (tmp_path / "folder.zarr" / "notes.txt").write_text("text")
    cases = (
        ("absent.zarr", "r", "there is no store at"),
        ("file.zarr", "a", "is a file"),
        ("folder.zarr", "a", "not a store"),
        ("folder.zarr", "r", "not a store"),
        ("cubes.h5", "a", "HDF5 comes with the next release: use .zarr"),
        ("cubes.bin", "a", "ending '.bin'"),
    )
    for name, mode, message in cases:
        with pytest.raises(StoreError, match=message) as caught:
            open_store(tmp_path / name, spec=example_spec(), mode="a" if mode == "a" else "r")
        assert "\n" not in str(caught.value)
    assert (tmp_path / "folder.zarr" / "notes.txt").read_text() == "text"


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "S.zarr"
    with pytest.raises(StoreError, match="needs a spec"):
        open_store(path, mode="a")
    with pytest.raises(StoreError, match="needs a spec"):
        open_store(None, "memory")
    with pytest.raises(StoreError, match="shard_rows 0"):
        open_store(path, spec=example_spec(), mode="a", shard_rows=0)
    with pytest.raises(StoreError, match="compression 'gzip'"):
        open_store(path, spec=example_spec(), mode="a", compression="gzip")
    with pytest.raises(StoreError, match="store kind 'lmdb'"):
        open_store(path, kind="lmdb")
    with pytest.raises(StoreError, match="needs a path"):
        open_store(None, kind="zarr")
    assert list(tmp_path.iterdir()) == []


def test_failed_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cache.zarr_layout.fsync_tree", full)
        with pytest.raises(OSError, match="No space"):
            open_store(tmp_path / "S.zarr", spec=example_spec(), mode="a")
    assert list(tmp_path.iterdir()) == []


def test_config_refuses_unknown_keys_and_values() -> None:
    assert StoreConfig().dtype == "float16"
    with pytest.raises(ValidationError):
        StoreConfig.model_validate({"shards": 3})
    with pytest.raises(ValidationError):
        StoreConfig.model_validate({"shard_rows": 0})


def test_cache_room_loads_no_torch() -> None:
    modules = [f"cache.{file.stem}" for file in sorted((ROOT / "cache").glob("*.py")) if file.stem != "__init__"]
    code = f"import sys; import {', '.join(modules)}; assert not any(m.split('.')[0] == 'torch' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_store_without_ending_is_known_by_its_content(tmp_path: Path) -> None:
    open_store(tmp_path / "cubes", kind="zarr", spec=example_spec(), mode="a").close()
    with open_store(tmp_path / "cubes") as store:
        assert store.ids() == []
