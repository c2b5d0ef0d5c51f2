"""Stage 1 in stretches: which rows a call does, which it leaves to whom, and what becomes of the others."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from cache.open import open_store
from cache.store import FeatureStore, MemoryStore, Shard, StoreError
from configs.schema import RunConfig
from contracts.world import World, make_world
from extract.build import build_backbone
from extract.decode import VideoSource, ViewClips, read_views
from pipeline.extraction import ExtractionReport, build_spec, extract_videos, video_sources
from pipeline.interrupts import Stopped
from pipeline.shares import Share

CPU = torch.device("cpu")


def memory_store(config: RunConfig) -> MemoryStore:
    return MemoryStore(
        build_spec(config, build_backbone(config.backbone, config.sampling), CPU), config.store.shard_rows
    )


def sources_of(world: World) -> list[VideoSource]:
    return list(video_sources(world.manifest).values())


def run(store: FeatureStore, world: World, config: RunConfig, **options: Any) -> ExtractionReport:
    backbone = build_backbone(config.backbone, config.sampling)
    return extract_videos(store, sources_of(world), backbone, config, CPU, **options)


def count_decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the videos that are decoded from here on, in this process."""
    decoded: list[str] = []

    def read_and_count(source: VideoSource, *arguments: Any) -> ViewClips:
        decoded.append(source.video_id)
        return read_views(source, *arguments)

    monkeypatch.setattr("extract.pool.read_views", read_and_count)
    return decoded


def test_decode_processes_give_the_same_content_as_none(world: World) -> None:
    hashes, config = set(), world.config("sampling.num_views=3", "sampling.crop=random")
    for workers in (0, 1, 3):
        store = memory_store(config)
        few = config.model_copy(update={"extraction": config.extraction.model_copy(update={"decode_workers": workers})})
        assert run(store, world, few).num_ok == 28
        hashes.add(store.content_hash())
    assert len(hashes) == 1


def test_rejected_videos_are_redone_when_they_are_mended_and_nothing_else(
    broken_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = broken_world.config()
    store = memory_store(config)
    run(store, broken_world, config)
    before = store.read(["left/0"], [0])
    healed = make_world(broken_world.folder / "healed", 3)
    (broken_world.folder / "videos/up/2.mp4").write_bytes((healed.folder / "videos/up/2.mp4").read_bytes())
    decoded = count_decodings(monkeypatch)
    report = run(store, broken_world, config, retry=True)
    assert sorted(decoded) == ["left/1", "right/0", "up/2"]
    assert (report.num_clips, report.num_ok, report.num_rejected, report.num_skipped) == (3, 18, 2, 18)
    np.testing.assert_array_equal(store.read(["left/0"], [0]), before)
    whole = memory_store(config)
    run(whole, healed, config)
    np.testing.assert_array_equal(store.read(["up/2"], [0]), whole.read(["up/2"], [0]))
    assert run(store, broken_world, config).num_clips == 0


def test_rows_that_left_their_shard_are_not_decoded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config()
    store, sources = memory_store(config), sources_of(world)
    store.plan([source.video_id for source in sources], [0])
    store.remove(["right/1", "jump/3"])
    decoded = count_decodings(monkeypatch)
    report = run(store, world, config, only_pending=True)
    assert (report.num_videos, report.num_ok, report.num_pending) == (26, 26, 0)
    assert len(decoded) == 26
    assert not {"right/1", "jump/3"} & set(decoded)
    assert not store.pending()
    again = run(store, world, config)  # planned once more, in a shard of their own
    assert (again.num_ok, again.num_clips, again.num_skipped) == (28, 2, 26)
    whole = memory_store(config)
    run(whole, world, config)
    assert store.content_hash() == whole.content_hash()


def test_pending_shards_are_finished_without_planning_more(world: World) -> None:
    config = world.config("sampling.num_views=2")
    store, sources = memory_store(config), sources_of(world)
    store.plan([source.video_id for source in sources[:5]], [0, 1])
    report = run(store, world, config, only_pending=True)
    assert (report.num_videos, report.num_ok, report.num_clips) == (5, 5, 10)
    assert len(store.ids()) == 5


def test_video_whose_views_lie_in_two_shards_is_decoded_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config("sampling.num_views=3", "sampling.crop=random")  # shards of eight rows
    store = memory_store(config)
    decoded = count_decodings(monkeypatch)
    report = run(store, world, config)
    assert (report.num_clips, len(decoded)) == (84, 28)
    alone = memory_store(config)
    for source in sources_of(world)[2:3]:  # its views 0 and 1 end shard 0, view 2 begins shard 1
        extract_videos(alone, [source], build_backbone(config.backbone, config.sampling), config, CPU)
    ids = ["right/2"] * 3
    np.testing.assert_array_equal(alone.read(ids, [0, 1, 2]), store.read(ids, [0, 1, 2]))


def test_shards_that_another_process_makes_are_left_and_said(world: World, tmp_path: Path) -> None:
    config = world.config()
    spec = memory_store(config).spec
    with (
        open_store(tmp_path / "s.zarr", spec=spec, mode="a", shard_rows=8) as other,
        open_store(tmp_path / "s.zarr", spec=spec, mode="a", shard_rows=8) as store,
    ):
        other.plan([source.video_id for source in sources_of(world)], [0])
        assert other.claim(other.pending()[1]).state == "ours"
        report = run(store, world, config)
        assert (report.num_ok, report.num_pending, report.num_rows_elsewhere, report.num_clips) == (20, 8, 8, 20)
        ((holder, num_shards),) = report.holders
        assert (str(os.getpid()) in holder, num_shards) == (True, 1)
        assert [shard.index for shard in store.pending()] == [1]
        other.release(other.pending()[0])
        assert run(store, world, config).num_ok == 28


def test_shares_together_fill_the_store(world: World, tmp_path: Path) -> None:
    config = world.config()
    with open_store(tmp_path / "s.h5", spec=memory_store(config).spec, mode="a", shard_rows=8) as store:
        first = run(store, world, config, share=Share(0, 2))
        assert (first.num_clips, first.num_pending, first.num_rows_elsewhere) == (16, 12, 12)
        second = run(store, world, config, share=Share(1, 2))
        assert (second.num_clips, second.num_ok, second.num_pending) == (12, 28, 0)


def test_error_while_writing_stops_the_run_and_gives_the_shards_back(world: World, tmp_path: Path) -> None:
    config = world.config()
    with open_store(tmp_path / "s.zarr", spec=memory_store(config).spec, mode="a", shard_rows=4) as store:
        failing = FailingStore(store)
        with pytest.raises(StoreError, match="no space"):
            run(cast(FeatureStore, failing), world, config)
        assert len(failing.committed) == 2
        assert len(store.pending()) == 5
        assert not list((tmp_path / "s.zarr/ledger/leases").iterdir())
        assert run(store, world, config).num_ok == 28
    assert not {thread.name for thread in threading.enumerate()} & {"feed", "writer", "signals", "decode"}


def test_signal_does_not_hide_that_the_last_commit_failed(world: World, tmp_path: Path) -> None:
    config = world.config()
    with open_store(tmp_path / "s.zarr", spec=memory_store(config).spec, mode="a", shard_rows=4) as store:
        failing = InterruptedStore(store)
        with pytest.raises(
            Stopped, match=r"SIGTERM; 8 of 28 clips .*; the last commit failed: no space left"
        ) as stopped:
            run(cast(FeatureStore, failing), world, config)
        assert stopped.value.exit_code == 143
        assert run(store, world, config).num_ok == 28


class FailingStore:
    """A store whose third commit fails."""

    def __init__(self, inner: FeatureStore) -> None:
        self._inner = inner
        self.committed: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def commit(self, shard: Shard, *values: Any) -> None:
        if len(self.committed) == 2:
            raise StoreError("no space left")
        self._inner.commit(shard, *values)
        self.committed.append(shard.index)


class InterruptedStore(FailingStore):
    """A store whose third commit fails after a signal."""

    def commit(self, shard: Shard, *values: Any) -> None:
        if len(self.committed) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)  # the signal is seen first
        super().commit(shard, *values)


def test_report_says_where_the_time_went(world: World) -> None:
    config = world.config()
    report = run(memory_store(config), world, config)
    parts = [report.decoding_seconds, report.backbone_seconds, report.writing_seconds]
    assert min(parts) >= 0
    assert sum(parts) <= report.seconds
    assert report.bound_by == ("decoding", "backbone", "writing")[int(np.argmax(parts))]
    cube = memory_store(config).spec.arrays["cube"]
    assert report.bytes_written == 28 * int(np.prod(cube.shape)) * 4


def test_progress_counts_every_row_once(world: World) -> None:
    config, calls = world.config(), list[tuple[int, int]]()
    run(memory_store(config), world, config, on_progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (28, 28)


@pytest.mark.parametrize("path", ["x" * 300, "folder\0/video.mp4"])
def test_path_that_cannot_be_costs_one_video(world: World, path: str) -> None:
    config = world.config()
    sources = [*sources_of(world)[:2], VideoSource("bad", Path(path))]
    report = extract_videos(
        memory_store(config), sources, build_backbone(config.backbone, config.sampling), config, CPU
    )
    assert (report.num_ok, report.num_rejected) == (2, 1)
