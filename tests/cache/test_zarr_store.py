from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from cache.disk_store import DiskStore
from cache.open import open_disk_store
from cache.store import RowKey
from contracts.store_examples import (
    CUBE,
    VIDEO_IDS,
    commit_example,
    example_row,
    example_spec,
    fill,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A full store, closed."""
    path = tmp_path / "S.zarr"
    with open_disk_store(path, "zarr", example_spec(), "a", 4) as store:
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


@pytest.mark.parametrize("goes_on", [False, True])
def test_kill_between_plan_and_arrays_is_mended(path: Path, goes_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: DiskStore) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, open_disk_store(path, "zarr", mode="a") as store:
        patch.setattr(DiskStore, "_write_derived", killed)
        with pytest.raises(KeyboardInterrupt):
            store.plan([*VIDEO_IDS, "new"], [0])
        patch.undo()
        if goes_on:
            commit_example(store, store.pending()[0])
    with open_disk_store(path, "zarr") as store:
        assert store.ids()[-1] == "new"
        assert (store.pending() == []) == goes_on
    with open_disk_store(path, "zarr", mode="a") as store:
        fill(store, [*VIDEO_IDS, "new"], [0])
        np.testing.assert_array_equal(store.read(["new"], [0])[0], example_row(RowKey("new", 0), "cube", CUBE))
    group: Any = zarr.open_group(path, mode="r")
    assert "new" in group["video_id"][:].tolist()
