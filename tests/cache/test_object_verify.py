"""`verify`, `repair` and `convert` on S3: the same code as on a disk, over the other file layer."""

from pathlib import Path

import pytest

from cache.convert import convert
from cache.errors import RowNotReady
from cache.object_files import ObjectFiles
from cache.open import FORMATS, open_disk_store, open_files, open_store
from cache.repair import repair
from cache.verify import verify
from contracts.flips import group_of
from contracts.store_examples import VIDEO_IDS, commit_example, example_spec, expected_hash, fill


def make_store(url: str) -> ObjectFiles:
    with open_store(url, spec=example_spec(), mode="a", shard_rows=4) as store:
        fill(store, VIDEO_IDS, [0, 1])
    files = open_files(url)
    assert isinstance(files, ObjectFiles)
    return files


def names(files: ObjectFiles) -> list[str]:
    folders = ("", "cube", "pooled", "video_id", "view", "ledger")
    return [name for folder in folders for name, size in files.sizes(folder).items() if size]


@pytest.mark.slow
def test_flip_in_every_kind_of_object_is_found_and_mended(url: str) -> None:
    files = make_store(url)
    assert verify(files, FORMATS.__getitem__).is_whole
    one_of_each = {group_of(name): name for name in sorted(names(files)) if name not in ("ledger/clock", "ledger/lock")}
    assert set(one_of_each) == {"data", "metadata", "row table", "spec", "plan", "ledger"}
    for group, name in one_of_each.items():
        data = bytearray(files.read(name))
        data[len(data) // 2] ^= 4
        files.put(name, bytes(data))
        assert {damage.file for damage in verify(files, FORMATS.__getitem__).damages} == {name}
        repair(files, FORMATS.__getitem__)
        with open_store(url, mode="a") as store:
            pending = store.pending()
            assert len(pending) <= (group in ("data", "ledger"))
            for shard in pending:
                with pytest.raises(RowNotReady):
                    store.read([shard.rows[0].video_id], [shard.rows[0].view])
                commit_example(store, shard)
            assert store.content_hash() == expected_hash(store.spec, store.rows())
        assert verify(files, FORMATS.__getitem__).is_whole


def test_lost_object_is_found_by_the_fast_mode(url: str) -> None:
    files = make_store(url)
    files.delete("cube/c.1.0.0.0.0")
    (damage,) = verify(files, FORMATS.__getitem__, is_full=False).damages
    assert (damage.file, damage.what, damage.shard_index) == ("cube/c.1.0.0.0.0", "missing", 1)


def test_store_goes_to_a_disk_and_back(url: str, tmp_path: Path) -> None:
    make_store(url)
    with open_disk_store(url, "zarr") as source:
        report = convert(source, tmp_path / "S.h5")
        assert report.content_hash == source.content_hash()
    with open_disk_store(tmp_path / "S.h5", "hdf5") as middle:
        assert convert(middle, f"{url.removesuffix('.zarr')}-2.zarr").content_hash == report.content_hash
