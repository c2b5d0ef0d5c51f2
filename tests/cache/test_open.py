import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from cache.config import StoreConfig
from cache.disk_store import DiskStore
from cache.open import ENDINGS, FORMATS, open_disk_store, open_store
from cache.store import MemoryStore, SpecMismatch, StoreDamaged, StoreError
from contracts.store_examples import VIDEO_IDS, example_spec, fill

ROOT = Path(__file__).parents[2]
CHANGED = example_spec(
    sampling={"num_frames": 16, "policy": "even", "resize": {"size": 256, "crop": "random"}, "axis": "time"}
)


@pytest.mark.parametrize("ending", ENDINGS)
def test_store_is_created_once_and_then_opened(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "deep" / f"S{ending}"
    with open_store(path, spec=example_spec(), mode="a", shard_rows=2, compression="gzip") as store:
        assert isinstance(store, DiskStore)
        fill(store, ["a", "b", "c"], [0])
    with open_store(str(path), spec=example_spec(), mode="a", shard_rows=64) as store:
        layout = store.layout()
        assert (layout["backend"], layout["shard_rows"], layout["compression"]) == (ENDINGS[ending], 2, "gzip")
        assert store.pending() == []
    with open_store(path) as store:
        assert store.spec == example_spec()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", FORMATS)
def test_writers_that_start_together_share_one_store(tmp_path: Path, kind: str) -> None:
    def work(_: int) -> str:
        with open_store(tmp_path / "S", kind, example_spec(), "a", shard_rows=4) as store:
            store.plan(VIDEO_IDS, [0])
            return str(store.rows())

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(work, range(4)))) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["S"]


def test_memory_store_is_opened_by_kind() -> None:
    assert isinstance(open_store(None, "memory", example_spec()), MemoryStore)


@pytest.mark.parametrize("mode", ["r", "a"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_spec_mismatch_lists_every_differing_field_and_the_way_out(tmp_path: Path, mode: str, ending: str) -> None:
    path = tmp_path / f"S{ending}"
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


@pytest.mark.parametrize("kind", FORMATS)
def test_store_of_another_spec_is_left_as_it_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "S"
    with open_store(path, kind, example_spec(), "a", shard_rows=4) as store:
        fill(store, VIDEO_IDS, [0])
    ledger = next((path / "ledger").glob("*.jsonl"))
    ledger.write_bytes(ledger.read_bytes() + b'{"crc32":"0')
    (path / "ledger" / "lock").unlink()
    (path / "ledger" / "leases" / "shard-00000001.json").write_bytes(b'{"log":"gone-1-ab.jsonl","since":"x"}')
    (path / "something.x.partial").write_bytes(b"litter")

    def everything() -> dict[Path, tuple[int, bytes]]:
        return {
            entry: (entry.stat().st_mtime_ns, entry.read_bytes() if entry.is_file() else b"")
            for entry in tmp_path.rglob("*")
        }

    before = everything()
    with pytest.raises(SpecMismatch):
        open_store(path, spec=CHANGED, mode="a", kind=kind)
    assert everything() == before
    # With its own spec all of it is cleared.
    open_store(path, kind, example_spec(), "a").close()
    assert not ledger.read_bytes().endswith(b'{"crc32":"0')
    assert list(tmp_path.rglob("*.partial")) == []
    assert list((path / "ledger" / "leases").iterdir()) == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_paths_that_hold_no_store_are_refused_in_one_line(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"file{ending}").write_text("text")
    for name, entry in (("folder", "notes.txt"), ("lost", "cube")):
        (tmp_path / f"{name}{ending}").mkdir()
        (tmp_path / f"{name}{ending}" / entry).write_text("text")
    (tmp_path / f"lost{ending}" / "ledger").mkdir()
    cases: tuple[tuple[str, Literal["r", "a"], str], ...] = (
        (f"absent{ending}", "r", "there is no store at"),
        (f"file{ending}", "r", "is a file"),
        (f"file{ending}", "a", "is a file"),
        (f"folder{ending}", "a", "is not a store"),
        (f"folder{ending}", "r", "is not a store"),
        (f"lost{ending}", "a", "has lost ledger/spec.json"),
        (f"lost{ending}", "r", "has lost ledger/spec.json"),
        ("cubes.bin", "a", "ending '.bin'"),
    )
    for name, mode, message in cases:
        with pytest.raises(StoreError, match=message) as caught:
            open_store(tmp_path / name, spec=example_spec(), mode=mode)
        assert "\n" not in str(caught.value)
    assert (tmp_path / f"folder{ending}" / "notes.txt").read_text() == "text"
    assert list((tmp_path / f"lost{ending}" / "ledger").iterdir()) == []


def test_store_of_another_backend_than_asked_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path / "S", "zarr", example_spec(), "a").close()
    with pytest.raises(StoreError, match="is a zarr store, not a hdf5 store; leave the kind out"):
        open_store(tmp_path / "S", "hdf5")
    with open_store(tmp_path / "S") as store:
        assert store.layout()["backend"] == "zarr"


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "S.zarr"
    with pytest.raises(StoreError, match="there is no store at"):
        open_store(path, mode="a")
    with pytest.raises(StoreError, match="needs a spec"):
        open_store(None, "memory")
    with pytest.raises(StoreError, match="shard_rows 0"):
        open_store(path, spec=example_spec(), mode="a", shard_rows=0)
    for ending in ENDINGS:
        with pytest.raises(StoreError, match="compression 'lzma'"):
            open_store(tmp_path / f"S{ending}", spec=example_spec(), mode="a", compression="lzma")
    with pytest.raises(StoreError, match="compression 'zstd'"):
        open_store(tmp_path / "S.h5", spec=example_spec(), mode="a", compression="zstd")
    wrong_mode: Any = "w"
    with pytest.raises(StoreError, match="store mode 'w': allowed are r, a"):
        open_store(path, spec=example_spec(), mode=wrong_mode)
    with pytest.raises(StoreError, match="store kind 'lmdb'"):
        open_store(path, kind="lmdb")
    with pytest.raises(StoreError, match="needs a path"):
        open_store(None, kind="zarr")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_failed_creation_leaves_no_store_and_can_be_repeated(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "S"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cache.files.os.fsync", full)
        with pytest.raises(StoreError, match=f"{path}.*No space"):
            open_store(path, kind, example_spec(), "a")
    assert [entry for entry in tmp_path.rglob("*") if entry.is_file()] == []
    with pytest.raises(StoreError, match="there is no store at"):
        open_store(path, kind)
    with open_store(path, kind, example_spec(), "a") as store:
        fill(store, VIDEO_IDS, [0])


@pytest.mark.parametrize("kind", FORMATS)
def test_killed_creation_is_completed_by_the_next_writer(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "S"
    (path / "ledger").mkdir(parents=True)
    (path / "ledger" / "spec.json.0123abcd.partial").write_bytes(b'{"docu')
    with open_store(path, kind, example_spec(), "a") as store:
        fill(store, VIDEO_IDS, [0])
    assert list(path.rglob("*.partial")) == []
    # Killed between the spec and its copy.
    (path / "ledger" / "spec.copy.json").unlink()
    with open_store(path, kind, example_spec(), "a") as store:
        assert store.pending() == []
    assert (path / "ledger" / "spec.copy.json").read_bytes() == (path / "ledger" / "spec.json").read_bytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_origin_is_kept_in_a_new_store_and_decides_nothing(tmp_path: Path, kind: str) -> None:
    origin = {"config": {"sampling": {"num_frames": 8}}, "weights": "r3d50.pth"}
    open_disk_store(tmp_path / "S", kind, example_spec(), "a", origin=origin).close()
    with open_disk_store(tmp_path / "S", kind, example_spec(), "a", origin={"other": 1}) as store:
        assert store.origin == origin
        assert store.spec == example_spec()


def test_lost_spec_is_not_taken_for_an_empty_folder(tmp_path: Path) -> None:
    path = tmp_path / "S.zarr"
    with open_store(path, spec=example_spec(), mode="a") as store:
        fill(store, VIDEO_IDS, [0])
    for name in ("spec.json", "spec.copy.json"):
        (path / "ledger" / name).unlink()
    with pytest.raises(StoreDamaged, match=r"has lost ledger/spec\.json and its copy"):
        open_store(path, spec=example_spec(), mode="a")


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


@pytest.mark.parametrize("kind", FORMATS)
def test_store_without_ending_is_known_by_its_content(tmp_path: Path, kind: str) -> None:
    open_store(tmp_path / "cubes", kind=kind, spec=example_spec(), mode="a").close()
    with open_store(tmp_path / "cubes") as store:
        assert store.ids() == []
        assert store.layout()["backend"] == kind
