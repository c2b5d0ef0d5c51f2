"""What every store must hold. A subclass says how its stores are made.

Letters: R rows of a shard; C channels, T time steps, H W grid.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from cache.cube import Spec
from cache.store import (
    FeatureStore,
    RowKey,
    RowNotReady,
    RowOutcome,
    RowRejected,
    Shard,
    StoreError,
)
from cache.summary import failures, summarise
from contracts.store_examples import (
    CUBE,
    OK,
    VIDEO_IDS,
    commit_example,
    example_arrays,
    example_outcome,
    example_row,
    example_spec,
    expected_hash,
    fill,
)


class StoreFactory(Protocol):
    """How the contract makes stores of one kind."""

    def create(self, spec: Spec, shard_rows: int) -> FeatureStore:
        """The store, empty and open for writing."""

    def reopen(self, store: FeatureStore) -> FeatureStore:
        """Close it and open it again for writing; a store that dies with its object is returned as it is."""


class StoreContract:
    """Subclass with a fixture `factory`."""

    @pytest.fixture
    def factory(self) -> StoreFactory:
        raise NotImplementedError("a subclass says how its stores are made")

    @pytest.fixture
    def store(self, factory: StoreFactory) -> Any:
        with factory.create(example_spec(), 4) as store:
            yield store

    def test_rows_survive_a_round_trip_bit_for_bit(self, store: FeatureStore) -> None:
        fill(store, VIDEO_IDS, [0, 1])
        keys = [key for key in store.rows() if key.video_id != "broken"]
        for name, array in store.spec.arrays.items():
            read = store.read([key.video_id for key in keys], [key.view for key in keys], name)
            wanted = np.stack([example_row(key, name, array) for key in keys])
            assert read.dtype == np.dtype(array.dtype)
            np.testing.assert_array_equal(read, wanted)

    def test_rows_come_in_the_order_asked_repeats_included(self, store: FeatureStore) -> None:
        fill(store, VIDEO_IDS, [0, 1])
        asked = [RowKey("last", 0), RowKey("walk/b", 1), RowKey("last", 0), RowKey("bytes\udcff", 0)]
        read = store.read([key.video_id for key in asked], [key.view for key in asked])
        np.testing.assert_array_equal(read, np.stack([example_row(key, "cube", CUBE) for key in asked]))

    def test_reading_nothing_gives_an_empty_array(self, store: FeatureStore) -> None:
        assert store.read([], []).shape == (0, *CUBE.shape)

    def test_plan_is_video_major_in_the_order_given(self, store: FeatureStore) -> None:
        store.plan(["b", "a", "c"], [0, 1])
        assert store.ids() == ["b", "a", "c"]
        assert store.rows() == [RowKey(video_id, view) for video_id in "bac" for view in (0, 1)]
        assert [shard.index for shard in store.pending()] == [0, 1]
        assert [len(shard.rows) for shard in store.pending()] == [4, 2]

    def test_row_that_is_not_extracted_raises(self, store: FeatureStore) -> None:
        store.plan(VIDEO_IDS, [0])
        commit_example(store, store.pending()[0])
        assert store.outcome("last") is None
        with pytest.raises(RowNotReady, match="'last'"):
            store.read(["walk/b", "last"], [0, 0])

    def test_rejected_row_raises_with_its_reason(self, store: FeatureStore) -> None:
        fill(store, VIDEO_IDS, [0])
        assert store.outcome("broken") == RowOutcome("rejected", "not_a_video", "no stream in broken.mp4")
        with pytest.raises(RowRejected, match=r"'broken'.*not_a_video.*no stream"):
            store.read(["walk/b", "broken"], [0, 0])

    def test_source_of_a_row_is_kept_whatever_its_status(self, store: FeatureStore, factory: StoreFactory) -> None:
        outcomes = [
            RowOutcome("ok", source="videos/walk b.mp4 [0.0, 2.5]"),
            RowOutcome("degraded", "too_short", source="bytes\udcff.mp4"),
            RowOutcome("rejected", "not_a_video", "no stream", "röhre.mp4"),
            OK,
        ]
        store.plan(VIDEO_IDS[:4], [0])
        (shard,) = store.pending()
        store.commit(shard, example_arrays(shard, store.spec), outcomes)
        with factory.reopen(store) as again:
            assert [again.outcome(video_id) for video_id in VIDEO_IDS[:4]] == outcomes
            assert again.outcome(VIDEO_IDS[3]) == RowOutcome("ok", source=None)

    def test_source_is_no_part_of_the_content_hash(self, store: FeatureStore) -> None:
        store.plan(VIDEO_IDS[:2], [0])
        (shard,) = store.pending()
        arrays = example_arrays(shard, store.spec)
        store.commit(shard, arrays, [RowOutcome("ok", source="a.mp4"), RowOutcome("ok", source="b.mp4")])
        assert store.content_hash() == expected_hash(store.spec, shard.rows)
        with pytest.raises(StoreError, match="committed already, with other content or sources"):
            store.commit(shard, arrays, [RowOutcome("ok", source="a.mp4"), RowOutcome("ok", source="c.mp4")])

    def test_source_is_a_text_or_absent(self) -> None:
        for source in ("", Path("a.mp4")):
            # A caller without types may give a path.
            with pytest.raises(StoreError, match=r"source .*expected a text"):
                RowOutcome("ok", source=source)  # type: ignore[arg-type]

    def test_degraded_row_is_read_and_marked(self, store: FeatureStore) -> None:
        fill(store, VIDEO_IDS, [0])
        assert store.outcome("short") == RowOutcome("degraded", "too_short")
        assert store.read(["short"], [0]).shape == (1, *CUBE.shape)

    def test_unknown_names_are_refused(self, store: FeatureStore) -> None:
        fill(store, VIDEO_IDS, [0])
        with pytest.raises(StoreError, match="'nobody' is not in the store"):
            store.read(["nobody"], [0])
        with pytest.raises(StoreError, match="no view 3"):
            store.read(["last"], [3])
        with pytest.raises(StoreError, match="no array 'cubes'"):
            store.read(["last"], [0], "cubes")
        with pytest.raises(StoreError, match="one view per video"):
            store.read(["last"], [0, 1])
        assert store.outcome("nobody") is None

    def test_half_written_shard_is_absent(
        self, store: FeatureStore, factory: StoreFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.plan(VIDEO_IDS, [0])
        shard = store.pending()[0]

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(type(store), "_publish", killed)
            with pytest.raises(KeyboardInterrupt):
                store.commit(shard, {name: a + 1 for name, a in example_arrays(shard, store.spec).items()}, [OK] * 4)
        with factory.reopen(store) as again:
            assert again.pending()[0] == shard
            assert again.outcome("walk/b") is None
            with pytest.raises(RowNotReady):
                again.read(["walk/b"], [0])
            fill(again, VIDEO_IDS, [0])
            np.testing.assert_array_equal(
                again.read(["walk/b"], [0])[0], example_row(RowKey("walk/b", 0), "cube", CUBE)
            )
            assert again.content_hash() == expected_hash(again.spec, again.rows())

    def test_store_grows_by_ids_and_by_views_without_touching_what_is_there(self, store: FeatureStore) -> None:
        fill(store, VIDEO_IDS[:5], [0])
        shards = store.layout()["num_shards"]
        fill(store, VIDEO_IDS, [0])
        assert store.ids() == VIDEO_IDS
        store.plan(VIDEO_IDS, [0, 2])
        assert all(shard.index >= shards for shard in store.pending())
        assert {key.view for shard in store.pending() for key in shard.rows} == {2}
        fill(store, VIDEO_IDS, [0, 2])
        keys = [key for key in store.rows() if key.video_id != "broken"]
        assert len(store.rows()) == 2 * len(VIDEO_IDS)
        assert store.layout()["views"] == [0, 2]
        read = store.read([key.video_id for key in keys], [key.view for key in keys])
        np.testing.assert_array_equal(read, np.stack([example_row(key, "cube", CUBE) for key in keys]))

    def test_planning_again_adds_nothing_also_after_reopening(self, store: FeatureStore, factory: StoreFactory) -> None:
        store.plan(VIDEO_IDS, [0, 1])
        commit_example(store, store.pending()[2])
        before = (store.ids(), store.rows(), store.pending(), store.outcome("short"))
        store.plan(VIDEO_IDS, [0, 1])
        store.plan(VIDEO_IDS[::-1], [1, 0])
        with factory.reopen(store) as again:
            again.plan(VIDEO_IDS, [0, 1])
            assert (again.ids(), again.rows(), again.pending(), again.outcome("short")) == before

    @pytest.mark.parametrize("shard_rows", [1, 64])
    @pytest.mark.parametrize("backwards", [False, True])
    def test_content_hash_is_the_one_of_the_design_in_any_layout(
        self, factory: StoreFactory, shard_rows: int, backwards: bool
    ) -> None:
        with factory.create(example_spec(), shard_rows) as store:
            ids = VIDEO_IDS[::-1] if backwards else VIDEO_IDS
            fill(store, ids[:4], [0], backwards)
            fill(store, ids, [1, 0], backwards)
            assert store.content_hash() == expected_hash(store.spec, store.rows())

    def test_content_hash_changes_with_one_value(self, store: FeatureStore) -> None:
        store.plan(["walk/b"], [0])
        shard = store.pending()[0]
        arrays = example_arrays(shard, store.spec)
        arrays["cube"][0, 3, 1, 2, 2] += 1
        store.commit(shard, arrays, [OK])
        assert store.content_hash() != expected_hash(store.spec, store.rows())

    def test_wrong_arrays_are_refused_and_nothing_is_kept(self, store: FeatureStore) -> None:
        store.plan(VIDEO_IDS, [0])
        shard = store.pending()[0]
        good = example_arrays(shard, store.spec)
        infinite = good["cube"].copy()
        infinite[2, 0, 0, 0, 1] = np.inf
        bad: list[tuple[dict[str, NDArray[Any]], str]] = [
            ({"cube": good["cube"]}, "the spec names"),
            ({**good, "extra": good["cube"]}, "the spec names"),
            ({**good, "cube": good["cube"][:3]}, "shape"),
            ({**good, "cube": good["cube"][..., :2]}, "shape"),
            ({**good, "cube": good["cube"].astype(np.float32)}, "dtype float32, expected float16"),
            ({**good, "pooled": good["pooled"].astype(np.float64)}, "dtype float64, expected float32"),
            ({**good, "cube": infinite}, "'röhre' holds NaN or infinity"),
        ]
        for arrays, message in bad:
            with pytest.raises(StoreError, match=message):
                store.commit(shard, arrays, [OK] * 4)
        with pytest.raises(StoreError, match="got 3 outcomes"):
            store.commit(shard, good, [OK] * 3)
        with pytest.raises(StoreError, match="not planned"):
            store.commit(Shard(7, shard.rows), good, [OK] * 4)
        with pytest.raises(StoreError, match="not planned"):
            store.commit(Shard(0, shard.rows[::-1]), good, [OK] * 4)
        assert len(store.pending()) == 3

    def test_rejected_rows_may_hold_anything(self, store: FeatureStore) -> None:
        store.plan(["broken"], [0])
        shard = store.pending()[0]
        arrays = {name: np.full_like(values, np.nan) for name, values in example_arrays(shard, store.spec).items()}
        store.commit(shard, arrays, [example_outcome(shard.rows[0])])
        assert store.pending() == []
        assert store.content_hash() == hashlib.sha256().hexdigest()

    def test_first_commit_of_a_shard_wins(self, store: FeatureStore) -> None:
        store.plan(VIDEO_IDS, [0])
        shard = store.pending()[0]
        commit_example(store, shard)
        commit_example(store, shard)
        other = {name: values + 1 for name, values in example_arrays(shard, store.spec).items()}
        with pytest.raises(StoreError, match="committed already"):
            store.commit(shard, other, [example_outcome(key) for key in shard.rows])
        np.testing.assert_array_equal(store.read(["walk/b"], [0])[0], example_row(shard.rows[0], "cube", CUBE))

    def test_bad_plans_are_refused(self, store: FeatureStore) -> None:
        for video_ids, views, message in (
            (["a", "b", "a"], [0], "'a' is planned twice"),
            (["a"], [0, 0], "one view twice"),
            ([""], [0], "at least one character"),
            (["a"], [-1], "view -1"),
        ):
            with pytest.raises(StoreError, match=message):
                store.plan(video_ids, views)
        assert store.ids() == []

    def test_summary_counts_every_video_once_by_its_worst_view(self, store: FeatureStore) -> None:
        fill(store, VIDEO_IDS, [0])
        store.plan(["last"], [1])
        summary = summarise(store)
        counts = {name: summary[name] for name in ("num_ok", "num_degraded", "num_rejected", "num_missing")}
        assert counts == {"num_ok": 6, "num_degraded": 1, "num_rejected": 1, "num_missing": 1}
        assert summary["num_videos"] == sum(counts.values()) == len(VIDEO_IDS)
        assert (summary["cube_shape"], summary["dtype"]) == ([4, 2, 3, 3], "float16")
        assert summary["fingerprint"] == store.spec.fingerprint
        assert summary["bytes"] > 0
        assert [(row["video_id"], row["status"], row["reason"]) for row in failures(store)] == [
            ("broken", "rejected", "not_a_video"),
            ("short", "degraded", "too_short"),
            ("last", "missing", "not_extracted"),
        ]
        json.dumps(summary)
