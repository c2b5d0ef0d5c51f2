"""A conversion keeps every row, or says what it did to it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.convert import convert, converted_spec
from cache.disk_store import DiskStore
from cache.open import open_disk_store, open_store
from cache.store import RowOutcome, SpecMismatch, StoreError
from contracts.flips import make_store
from contracts.store_examples import CUBE, OK, example_arrays, example_spec

KINDS = ("zarr", "hdf5")


@pytest.fixture
def source(tmp_path: Path) -> DiskStore:
    make_store(tmp_path / "S.zarr", "zarr")
    return open_disk_store(tmp_path / "S.zarr", "zarr")


@pytest.mark.parametrize("kind", KINDS)
def test_content_hash_is_kept_by_backend_layout_and_compression(source: DiskStore, kind: str, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "T", kind, shard_rows=7, compression="gzip")
    assert report.content_hash == source.content_hash()
    assert report.fingerprint == source.spec.fingerprint
    with open_store(tmp_path / "T", kind) as target:
        assert target.rows() == source.rows()
        assert target.layout()["shard_rows"] == 7
        assert [target.outcome(key.video_id, key.view) for key in target.rows()] == [
            source.outcome(key.video_id, key.view) for key in source.rows()
        ]


def test_there_and_back_again_gives_the_same_store(source: DiskStore, tmp_path: Path) -> None:
    convert(source, tmp_path / "T.h5")
    with open_disk_store(tmp_path / "T.h5", "hdf5") as middle:
        report = convert(middle, tmp_path / "U.zarr")
    assert report.content_hash == source.content_hash()


def test_rounding_to_float16_gives_the_spec_of_an_extraction_to_float16(tmp_path: Path) -> None:
    wide = example_spec(arrays={"cube": replace(CUBE, dtype="float32")})
    assert converted_spec(wide, "float16").fingerprint == example_spec(arrays={"cube": CUBE}).fingerprint
    with open_disk_store(tmp_path / "S.zarr", "zarr", wide, "a", 4) as source:
        source.plan(["a", "b"], [0])
        (shard,) = source.pending()
        arrays = example_arrays(shard, wide)
        arrays["cube"][1, 0, 0, 0, 0] = 1e6
        source.commit(shard, arrays, [OK, OK])
        report = convert(source, tmp_path / "T.zarr", dtype="float16")
        assert (report.num_rows, report.num_overflowed) == (2, 1)
    with open_store(tmp_path / "T.zarr") as target:
        np.testing.assert_array_equal(target.read(["a"], [0])[0], arrays["cube"][0].astype(np.float16))
        outcome = target.outcome("b")
        assert outcome is not None
        assert (outcome.status, outcome.reason) == ("rejected", "not_finite")


def test_widened_store_does_not_pass_for_one_that_was_extracted_to_float32(source: DiskStore, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "T.zarr", dtype="float32")
    wide = converted_spec(source.spec, "float32")
    assert report.fingerprint == wide.fingerprint
    extracted = example_spec(
        arrays={name: replace(array, dtype="float32") for name, array in source.spec.arrays.items()}
    )
    with pytest.raises(SpecMismatch, match="quantiser"):
        open_store(tmp_path / "T.zarr", spec=extracted)
    with open_disk_store(tmp_path / "T.zarr", "zarr") as target:
        np.testing.assert_array_equal(target.read(["walk/b"], [0]), source.read(["walk/b"], [0]).astype(np.float32))
        back = convert(target, tmp_path / "U.zarr", dtype="float16")
    assert back.num_overflowed == 0
    with open_disk_store(tmp_path / "U.zarr", "zarr") as again:
        np.testing.assert_array_equal(again.read(["walk/b"], [0]), source.read(["walk/b"], [0]))


def test_unfinished_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    make_store(tmp_path / "S.zarr", "zarr")
    with open_disk_store(tmp_path / "S.zarr", "zarr", mode="a") as store:
        store.plan(["later"], [0, 1])
        report = convert(store, tmp_path / "T.zarr")
        assert report.num_rows_left_out == 2
        (shard,) = store.pending()
        store.commit(shard, example_arrays(shard, store.spec), [RowOutcome("rejected", "missing")] * 2)
        assert convert(store, tmp_path / "T.zarr").num_rows == report.num_rows + 2


def test_store_is_not_converted_into_itself(source: DiskStore) -> None:
    with pytest.raises(StoreError, match="into itself"):
        convert(source, source.url)


def test_second_conversion_follows_what_changed_in_the_source(tmp_path: Path) -> None:
    make_store(tmp_path / "S.zarr", "zarr")
    with open_disk_store(tmp_path / "S.zarr", "zarr", mode="a") as source:
        convert(source, tmp_path / "T.h5")
        source.remove(["walk/a"])
        source.replan([key for key in source.rows() if key.video_id == "broken"])
        for shard in source.pending():
            source.commit(shard, example_arrays(shard, source.spec), [OK] * len(shard.rows))
        report = convert(source, tmp_path / "T.h5")
        assert report.content_hash == source.content_hash()
    with open_store(tmp_path / "T.h5") as target:
        assert "walk/a" not in target.ids()
        assert target.outcome("broken") == OK


def test_conversion_that_was_killed_goes_on_though_a_video_left_the_source(tmp_path: Path) -> None:
    make_store(tmp_path / "S.zarr", "zarr")
    with open_disk_store(tmp_path / "S.zarr", "zarr", mode="a") as source:
        with open_disk_store(tmp_path / "T.zarr", "zarr", source.spec, "a", 4) as target:
            target.plan_rows(source.rows())
        source.remove(["walk/b"])
        assert convert(source, tmp_path / "T.zarr").content_hash == source.content_hash()


def test_store_under_another_spelling_of_its_path_is_itself(source: DiskStore, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="into itself"):
        convert(source, tmp_path / "link" / "S.zarr")
