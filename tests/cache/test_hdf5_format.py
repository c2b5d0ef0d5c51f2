"""Letters: R rows of a shard; C channels, T time steps, H W grid."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cache.cube import ArraySpec
from cache.document import StoreDocument
from cache.files import LocalFiles
from cache.hdf5_format import NUM_OPEN, Hdf5Format
from cache.hdf5_part import PartArray, encode_part
from cache.open import open_store
from cache.store import RowDamaged, RowKey, StoreDamaged, StoreError
from contracts.store_examples import CUBE, VIDEO_IDS, commit_example, example_row, example_spec, fill

# As in docs/store.md.
SNIPPET = """
import h5py

with h5py.File("S.h5/index.h5") as index:
    rows = list(zip(index["video_id"].asstr()[:], index["view"][:]))
    cube = index["cube"][rows.index(("walk/a", 0))]
if cube[0, 0, 0, 0] != cube[0, 0, 0, 0]:  # NaN
    raise LookupError("not extracted, or rejected: see S.h5/ledger/*.jsonl")
print(cube.shape, cube.dtype)  # (C, T, H, W)
"""
SHAPE = (4, *CUBE.shape)
ROW_BYTES = 144


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A full store of five shards, closed."""
    path = tmp_path / "made" / "S.h5"
    with open_store(path, spec=example_spec(), mode="a", shard_rows=4) as store:
        fill(store, VIDEO_IDS, [0, 1])
    return path


def part_of(path: Path, shard_index: int = 0) -> Path:
    return path / "parts" / f"{shard_index:06d}.h5"


def example_block() -> Any:
    """(R, C, T, H, W) float16."""
    return np.stack([example_row(RowKey(video_id, 0), "cube", CUBE) for video_id in "abcd"])


def test_layout_is_one_part_per_shard_and_an_index(path: Path) -> None:
    names = {str(file.relative_to(path)) for file in path.rglob("*.h5")}
    assert names == {"index.h5", *(f"parts/{index:06d}.h5" for index in range(5))}
    with h5py.File(part_of(path)) as part:
        assert set(part) == {"cube", "cube.crc32", "pooled", "pooled.crc32"}
        cube = part["cube"]
        assert (cube.shape, cube.dtype, cube.chunks, cube.fletcher32) == (SHAPE, np.float16, (1, *CUBE.shape), True)
        assert np.isnan(cube.fillvalue)
        rows = [example_row(RowKey(video_id, view), "cube", CUBE) for video_id in VIDEO_IDS[:2] for view in (0, 1)]
        np.testing.assert_array_equal(cube[:], np.stack(rows))
        assert part["cube.crc32"][:].tolist() == [zlib.crc32(row.tobytes()) for row in rows]


def test_plain_h5py_reads_the_index_from_any_folder_and_after_a_move(path: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    shutil.move(path, tmp_path / "moved" / "S.h5")
    result = subprocess.run(
        [sys.executable, "-c", SNIPPET], cwd=tmp_path / "moved", capture_output=True, text=True, check=True
    )
    assert result.stdout == "(4, 2, 3, 3) float16\n"
    # The working folder of this process is neither the one nor the other.
    with h5py.File(tmp_path / "moved" / "S.h5" / "index.h5") as index:
        for row, (video_id, view) in enumerate(zip(index["video_id"].asstr()[:], index["view"][:], strict=True)):
            if video_id and video_id not in ("broken", "bytes\\xff"):
                for name, array in example_spec().arrays.items():
                    wanted = example_row(RowKey(video_id, int(view)), name, array)
                    np.testing.assert_array_equal(index[name][row], wanted)


def test_index_shows_ids_views_and_spec_and_nan_where_there_is_no_row(path: Path) -> None:
    with open_store(path, mode="a") as store:
        store.remove(["walk/a"])
        store.plan(["not yet", "nul\0id"], [0])
    part_of(path, 1).unlink()
    with h5py.File(path / "index.h5") as index:
        ids, views = index["video_id"].asstr()[:].tolist(), index["view"][:].tolist()
        assert ids[:4] == ["walk/b", "walk/b", "", ""]
        assert views[:4] == [0, 1, -1, -1]
        assert ids[8:10] == ["bytes\\xff"] * 2
        assert ids[20:] == ["not yet", "nul\\x00id", "", ""]
        cubes = index["cube"][:]
        assert cubes.shape == (24, *CUBE.shape)
        is_nan = np.isnan(cubes).all(axis=(1, 2, 3, 4))
        # The part that was deleted (with both views of `broken`), the padding, and what is not extracted.
        assert np.flatnonzero(is_nan).tolist() == [4, 5, 6, 7, 18, 19, 20, 21, 22, 23]
        document = json.loads(index.attrs["mastaf"])
        assert document["spec"] == example_spec().to_json()
        assert document["layout"]["shard_rows"] == 4


def test_empty_store_has_an_index_without_rows(tmp_path: Path) -> None:
    open_store(tmp_path / "S.h5", spec=example_spec(), mode="a").close()
    with h5py.File(tmp_path / "S.h5" / "index.h5") as index:
        assert index["cube"].shape == (0, *CUBE.shape)
        assert index["cube"].dtype == np.float16
        assert index["video_id"].shape == (0,)


def test_rejected_rows_take_no_room_and_a_shard_of_them_has_no_part(tmp_path: Path) -> None:
    path = tmp_path / "S.h5"
    with open_store(path, spec=example_spec(), mode="a", shard_rows=2) as store:
        fill(store, ["a", "broken"], [0])
        store.plan(["broken", "c"], [1])
        store.plan(["broken"], [2])
        for shard in store.pending():
            commit_example(store, shard)
        assert store.pending() == []
    assert sorted(file.name for file in (path / "parts").iterdir()) == ["000000.h5", "000001.h5"]
    with h5py.File(part_of(path)) as part:
        assert part["cube"].id.get_num_chunks() == 1


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_equal_content_gives_equal_bytes(compression: str) -> None:
    blocks = {"cube": example_block()}
    assert encode_part(blocks, compression) == encode_part({"cube": blocks["cube"].copy()}, compression)


def test_index_follows_from_the_plan_alone_byte_for_byte(tmp_path: Path) -> None:
    stores = [tmp_path / name / "S.h5" for name in ("one", "two")]
    open_store(stores[0], spec=example_spec(), mode="a", shard_rows=4).close()
    # The random id of the store is part of the index.
    shutil.copytree(stores[0], stores[1])
    for path, backwards in zip(stores, (False, True), strict=True):
        with open_store(path, mode="a") as store:
            fill(store, VIDEO_IDS[:5], [0], backwards)
            fill(store, VIDEO_IDS, [0, 1], backwards)
    wanted = (stores[0] / "index.h5").read_bytes()
    assert (stores[1] / "index.h5").read_bytes() == wanted
    (stores[0] / "index.h5").write_bytes(wanted[:100])
    open_store(stores[0], mode="a").close()
    assert (stores[0] / "index.h5").read_bytes() == wanted


def test_damaged_or_hostile_index_does_not_matter_to_our_reader(path: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "elsewhere.h5", "w") as file:
        file["cube"] = np.zeros((20, *CUBE.shape), np.float16)
    with h5py.File(path / "index.h5", "w") as file:
        file["cube"] = h5py.ExternalLink(str(tmp_path / "elsewhere.h5"), "/cube")
    with open_store(path) as store:
        np.testing.assert_array_equal(store.read(["walk/a"], [0])[0], example_row(RowKey("walk/a", 0), "cube", CUBE))


# Each writes what a stranger might put in place of a part. The decoy holds rows that would be believed.


def _external_link(part: Any, decoy: Path) -> None:
    part["cube"] = h5py.ExternalLink(str(decoy), "/cube")


def _soft_link(part: Any, decoy: Path) -> None:
    part["other"] = h5py.ExternalLink(str(decoy), "/cube")
    part["cube"] = h5py.SoftLink("/other")


def _external_storage(part: Any, decoy: Path) -> None:  # noqa: ARG001
    part.create_dataset("cube", SHAPE, "<f2", external=[("/etc/passwd", 0, 4 * ROW_BYTES)])


def _external_checksums(part: Any, decoy: Path) -> None:  # noqa: ARG001
    _good(part)
    del part["cube.crc32"]
    part.create_dataset("cube.crc32", (4,), "<u4", external=[("/etc/passwd", 0, 16)])


def _virtual(part: Any, decoy: Path) -> None:
    layout = h5py.VirtualLayout(SHAPE, np.dtype("<f2"))
    layout[:] = h5py.VirtualSource(str(decoy), "cube", SHAPE)
    part.create_virtual_dataset("cube", layout)


def _good(part: Any, **changes: Any) -> Any:
    block = example_block()
    settings = {"shape": SHAPE, "dtype": "<f2", "chunks": (1, *CUBE.shape), "fletcher32": True, **changes}
    dataset = part.create_dataset("cube", **settings)
    part["cube.crc32"] = np.array([zlib.crc32(row.tobytes()) for row in block], "<u4")
    return dataset


def _wrong_dtype(part: Any, decoy: Path) -> None:  # noqa: ARG001
    _good(part, dtype="<i2")[:] = 0


def _wrong_byte_order(part: Any, decoy: Path) -> None:  # noqa: ARG001
    _good(part, dtype=">f2")[:] = example_block()


def _wrong_shape(part: Any, decoy: Path) -> None:  # noqa: ARG001
    _good(part, shape=(4, 2, 4, 3, 3), chunks=(1, 2, 4, 3, 3))[:] = 0


def _wrong_chunks(part: Any, decoy: Path) -> None:  # noqa: ARG001
    _good(part, chunks=(4, *CUBE.shape))[:] = example_block()


def _huge_shape(part: Any, decoy: Path) -> None:  # noqa: ARG001
    _good(part, shape=(10**10, *CUBE.shape))


def _huge_row(part: Any, decoy: Path) -> None:  # noqa: ARG001
    _good(part, shape=(4, 10**8, 2, 3, 3), chunks=(1, 10**8, 2, 3, 3))


def _group(part: Any, decoy: Path) -> None:  # noqa: ARG001
    part.create_group("cube")


def _nothing(part: Any, decoy: Path) -> None:
    pass


def _other_filter(part: Any, decoy: Path) -> None:  # noqa: ARG001
    _good(part, compression="lzf")[:] = example_block()


def _no_checksum(part: Any, decoy: Path) -> None:  # noqa: ARG001
    _good(part, fletcher32=False)[:] = example_block()


def _checksum_skipped(part: Any, decoy: Path) -> None:  # noqa: ARG001
    _good(part).id.write_direct_chunk((0, 0, 0, 0, 0), example_block()[0].tobytes(), filter_mask=1)


def _other_rows(part: Any, decoy: Path) -> None:  # noqa: ARG001
    _good(part)[:] = example_block()[::-1]


def _zeros(part: Any, decoy: Path) -> None:  # noqa: ARG001
    # Fletcher-32 of zeros is zero, so that HDF5 itself takes a stretch of a file that was never copied for data.
    _good(part)[:] = 0


HOSTILE: dict[Callable[[Any, Path], None], str] = {
    _external_link: "link to elsewhere",
    _soft_link: "link to elsewhere",
    _external_storage: "lies in another file",
    _external_checksums: "lies in another file",
    _virtual: "lies in another file",
    _wrong_dtype: "int16",
    _wrong_byte_order: ">f2",
    _wrong_shape: r"\(4, 2, 4, 3, 3\)",
    _wrong_chunks: "chunks",
    _huge_shape: "10000000000",
    _huge_row: "100000000",
    _group: "not a dataset",
    _nothing: "'cube' is missing",
    _other_filter: "filters",
    _no_checksum: "filters",
    _checksum_skipped: "table of chunks",
    _other_rows: "does not match its checksum",
    _zeros: "does not match its checksum",
}


@pytest.mark.parametrize("write", HOSTILE, ids=lambda write: write.__name__)
def test_hostile_part_is_an_error_naming_the_row_and_reads_nothing_outside(
    tmp_path: Path, write: Callable[[Any, Path], None]
) -> None:
    path = tmp_path / "S.h5"
    with open_store(path, spec=example_spec(arrays={"cube": CUBE}), mode="a", shard_rows=4) as store:
        fill(store, list("abcd"), [0])
    decoy = tmp_path / "decoy.h5"
    shutil.copy(part_of(path), decoy)
    with h5py.File(part_of(path), "w") as part:
        write(part, decoy)
    # HDF5 itself does follow it, so that there is something to refuse.
    if write in (_external_link, _soft_link, _virtual):
        with h5py.File(part_of(path)) as part:
            np.testing.assert_array_equal(part["cube"][:], example_block())
    with open_store(path) as store, pytest.raises(RowDamaged, match=HOSTILE[write]) as caught:
        store.read(["a"], [0])
    assert "view 0 of video 'a'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_part_that_is_no_plain_file_is_refused_and_never_waited_for(path: Path) -> None:
    decoy = path.parent / "decoy.h5"
    part_of(path).rename(decoy)
    with open_store(path) as store:
        part_of(path).symlink_to(decoy)
        with pytest.raises(RowDamaged, match=r"'walk/b'.*not a regular file"):
            store.read(["walk/b"], [0])
        part_of(path).unlink()
        os.mkfifo(part_of(path))
        with pytest.raises(RowDamaged, match=r"'walk/b'.*not a regular file"):
            store.read(["walk/b"], [0])
        part_of(path).unlink()
        with pytest.raises(RowDamaged, match=r"'walk/b'.*its data is missing"):
            store.read(["walk/b"], [0])
        decoy.rename(part_of(path))
        store.read(["walk/b"], [0])


def test_packed_row_that_would_swell_is_cut_at_the_size_of_a_row(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(10**7), 9)
    shape = (1, 8, 16, 16, 16)
    with h5py.File(tmp_path / "part.h5", "w") as part:
        options: dict[str, Any] = {"compression": "gzip", "shuffle": True, "fletcher32": True}
        dataset = part.create_dataset("cube", shape, "<f2", chunks=shape, **options)
        assert len(bomb) < dataset.nbytes
        dataset.id.write_direct_chunk((0, 0, 0, 0, 0), bomb + bytes(4))
        part["cube.crc32"] = np.array([zlib.crc32(bytes(10**7))], "<u4")
    part_array = PartArray(str(tmp_path / "part.h5"), "cube", shape, "float16", "gzip")
    tracemalloc.start()
    with pytest.raises(StoreDamaged, match="does not match its checksum"):
        part_array.row(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The row's 65,536 bytes, packed, unpacked and put in order; not the ten million that the stream gives.
    assert peak < 1_000_000


def test_row_that_hdf5_left_unpacked_is_read(tmp_path: Path) -> None:
    row = example_block()[0]
    shuffled = np.frombuffer(row.tobytes(), np.uint8).reshape(-1, 2).T.tobytes()
    with h5py.File(tmp_path / "part.h5", "w") as part:
        dataset = _good(part, compression="gzip", shuffle=True)
        dataset.id.write_direct_chunk((0, 0, 0, 0, 0), shuffled + bytes(4), filter_mask=0b010)
    part_array = PartArray(str(tmp_path / "part.h5"), "cube", SHAPE, "float16", "gzip")
    np.testing.assert_array_equal(part_array.row(0), row)
    assert np.isnan(part_array.row(1)).all()


@pytest.mark.parametrize("compression", [pytest.param("none", marks=pytest.mark.slow), "gzip"])
def test_every_flipped_bit_is_noticed_or_harmless(tmp_path: Path, compression: str) -> None:
    block = example_block()
    # Two arrays of one shape: a flipped address may lead from one to the other.
    good = encode_part({"cube": block, "deep": block[::-1]}, compression)
    assert good is not None
    file = tmp_path / "part.h5"
    file.write_bytes(good)
    with h5py.File(file) as part:
        starts = [part["cube"].id.get_chunk_info(index).byte_offset for index in range(4)]
        size = part["cube"].id.get_chunk_info(0).size
    generator = np.random.default_rng(0)
    # Most of the tables are empty room: all of what is not zero, and some of the rest.
    flips = [position for position, byte in enumerate(good) if byte] + generator.integers(0, len(good), 300).tolist()
    for position in flips:
        data = bytearray(good)
        data[position] ^= 1 << int(generator.integers(8))
        file.write_bytes(data)
        try:
            part_array = PartArray(str(file), "cube", SHAPE, "float16", compression)
        except StoreDamaged:
            continue
        num_damaged = 0
        for row in range(4):
            try:
                values = part_array.row(row)
            except StoreDamaged:
                num_damaged += 1
                continue
            if np.isnan(values).all():
                num_damaged += 1
            else:
                np.testing.assert_array_equal(values, block[row])
        if any(start <= position < start + size - 4 for start in starts) and compression == "none":
            assert num_damaged == 1


def test_part_cut_anywhere_is_an_error_naming_the_row(path: Path) -> None:
    data = part_of(path).read_bytes()
    with open_store(path) as store:
        for num_bytes in (0, 7, 100, len(data) // 2, len(data) - 1):
            part_of(path).write_bytes(data[:num_bytes])
            with pytest.raises(RowDamaged, match="'walk/b'"):
                store.read(["walk/b"], [0])
        part_of(path).write_bytes(data)
        store.read(["walk/b"], [0])


def make_format(tmp_path: Path) -> tuple[Hdf5Format, LocalFiles]:
    files = LocalFiles(tmp_path)
    return Hdf5Format(StoreDocument(example_spec(arrays={"cube": CUBE}), "hdf5", 4, "none", "id"), files), files


def put_shard(format_: Hdf5Format, files: LocalFiles, shard_index: int, block: Any) -> None:
    for name, data in format_.encode(shard_index, {"cube": block}).items():
        assert data is not None
        files.put(name, data)


def test_part_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    format_, files = make_format(tmp_path)
    block = example_block()
    put_shard(format_, files, 0, block)
    np.testing.assert_array_equal(format_.read_row("cube", 1), block[1])
    put_shard(format_, files, 0, block[::-1])
    np.testing.assert_array_equal(format_.read_row("cube", 1), block[2])
    put_shard(format_, files, 0, block)
    format_.forget()
    np.testing.assert_array_equal(format_.decode(0, "cube"), block)
    files.delete(format_.file_names(0)[0])
    assert np.isnan(format_.read_row("cube", 1)).all()
    assert np.isnan(format_.decode(0, "cube")).all()


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_number_of_open_files_stays_the_same_however_many_parts_there_are(tmp_path: Path) -> None:
    format_, files = make_format(tmp_path)
    before = num_descriptors()
    for shard_index in range(2 * NUM_OPEN):
        put_shard(format_, files, shard_index, example_block())
    for shard_index in range(2 * NUM_OPEN):
        format_.read_row("cube", 4 * shard_index)
    assert num_descriptors() == before + NUM_OPEN
    format_.close()
    assert num_descriptors() == before


def test_part_that_is_refused_leaves_no_file_open(tmp_path: Path) -> None:
    (tmp_path / "part.h5").write_bytes(b"text")
    before = num_descriptors()
    for _ in range(5):
        with pytest.raises(StoreDamaged, match="does not begin as an HDF5 file"):
            PartArray(str(tmp_path / "part.h5"), "cube", SHAPE, "float16", "none")
    assert num_descriptors() == before


def test_threads_may_read_while_parts_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.hdf5_format.NUM_OPEN", 2)
    format_, files = make_format(tmp_path)
    block = example_block()
    for shard_index in range(6):
        put_shard(format_, files, shard_index, block + np.float16(shard_index))
    problems: list[BaseException] = []

    def read(seed: int) -> None:
        try:
            for place in np.random.default_rng(seed).integers(0, 24, 300).tolist():
                wanted = block[place % 4] + np.float16(place // 4)
                np.testing.assert_array_equal(format_.read_row("cube", place), wanted)
                if place == 7:
                    format_.forget()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_store_and_plain_h5py_read_side_by_side(path: Path) -> None:
    with h5py.File(path / "index.h5") as index, open_store(path, mode="a") as store:
        plain = index["cube"][2]
        np.testing.assert_array_equal(store.read(["walk/a"], [0])[0], plain)
        # A reader that holds the index neither stops a writer nor is disturbed by one.
        fill(store, [*VIDEO_IDS, "new"], [0])
        np.testing.assert_array_equal(index["cube"][2], plain)


def test_compression_that_hdf5_does_not_take_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"compression 'zstd': an HDF5 store takes none, gzip"):
        open_store(tmp_path / "S.h5", spec=example_spec(), mode="a", compression="zstd")
    assert list(tmp_path.iterdir()) == []


def test_object_stores_are_refused(tmp_path: Path) -> None:
    class Remote:
        url = "s3://bucket/S.h5"

    format_, _ = make_format(tmp_path)
    # Any file layer but the local one.
    with pytest.raises(StoreError, match=r"s3://bucket/S\.h5: HDF5 stores live on a local or network file system"):
        Hdf5Format(format_._document, Remote())  # type: ignore[arg-type]


def test_float32_rows_survive_packing(tmp_path: Path) -> None:
    array = ArraySpec("layer4", "none", "float32", None, (3, 2, 2, 2))
    block = np.random.default_rng(0).standard_normal((2, 3, 2, 2, 2)).astype(np.float32)
    block[1] = np.nan
    data = encode_part({"cube": block}, "gzip")
    assert data is not None
    (tmp_path / "part.h5").write_bytes(data)
    part = PartArray(str(tmp_path / "part.h5"), "cube", block.shape, array.dtype, "gzip")
    np.testing.assert_array_equal(np.stack([part.row(0), part.row(1)]), block)
    with h5py.File(io.BytesIO(data)) as plain:
        np.testing.assert_array_equal(plain["cube"][:], block)
