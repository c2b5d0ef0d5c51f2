"""Stage 1 on real files: every input is accounted for, and a row does not feel its neighbours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.cube import Spec
from cache.open import open_store
from cache.records import ShardRecord
from cache.rows import RowRecord
from cache.store import FeatureStore, MemoryStore, RowKey, RowRejected, SpecMismatch
from configs.schema import RunConfig
from contracts.world import World, make_world
from extract.build import build_backbone
from extract.clips import VideoTooShortError
from pipeline.extraction import ChangedInput, ExtractionReport, build_spec, extract_videos, video_sources
from pipeline.extraction_report import report_json

CPU = torch.device("cpu")


def extract_into(store: FeatureStore, world: World, config: RunConfig) -> ExtractionReport:
    backbone = build_backbone(config.backbone, config.sampling)
    return extract_videos(store, list(video_sources(world.manifest).values()), backbone, config, CPU)


def memory_store(config: RunConfig) -> MemoryStore:
    return MemoryStore(
        build_spec(config, build_backbone(config.backbone, config.sampling), CPU), config.store.shard_rows
    )


def test_every_input_is_ok_degraded_or_rejected_with_a_reason(broken_world: World) -> None:
    config = broken_world.config()
    store = memory_store(config)
    report = extract_into(store, broken_world, config)
    assert report.num_videos == 21 == report.num_ok + report.num_degraded + report.num_rejected
    again = extract_into(store, broken_world, config)
    assert (again.num_skipped, again.num_rejected, again.problems) == (21, 3, report.problems)
    assert (report.num_ok, report.num_degraded, report.num_rejected) == (17, 1, 3)
    found = {video_id: (outcome.status, outcome.reason) for video_id, outcome in report.problems}
    assert found["down/1"] == ("degraded", "short_video")
    assert found["up/2"] == ("rejected", "missing")
    assert {found["right/0"][0], found["left/1"][0]} == {"rejected"}
    assert all(reason for _, reason in found.values())
    with pytest.raises(RowRejected, match="right/0"):
        store.read(["right/0"], [0])


def test_rows_do_not_feel_the_fate_of_their_neighbours(broken_world: World) -> None:
    config = broken_world.config()
    broken = memory_store(config)
    extract_into(broken, broken_world, config)
    healed = make_world(broken_world.folder / "healed", 3)
    whole = memory_store(config)
    extract_into(whole, healed, config)
    ids = ["right/1", "right/2", "left/0", "left/2", "down/0", "down/2", "jump/2"]
    np.testing.assert_array_equal(broken.read(ids, [0] * len(ids)), whole.read(ids, [0] * len(ids)))


def test_second_extraction_skips_what_is_stored(world: World, tmp_path: Path) -> None:
    config = world.config()
    backbone = build_backbone(config.backbone, config.sampling)
    spec = build_spec(config, backbone, CPU)
    with open_store(tmp_path / "s.zarr", spec=spec, mode="a", shard_rows=8) as store:
        first = extract_into(store, world, config)
        content = store.content_hash()
    with open_store(tmp_path / "s.zarr", spec=spec, mode="a") as store:
        second = extract_into(store, world, config)
        assert store.content_hash() == content
    assert (first.num_ok, first.num_skipped) == (28, 0)
    assert (second.num_ok, second.num_skipped) == (28, 28)


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("sampling.num_frames=8", "sampling.num_frames"),
        ("sampling.policy=even", "sampling.policy"),
        ("sampling.short_policy=loop", "sampling.short_policy"),
        ("sampling.seed=1", "sampling.seed"),
        ("sampling.normalization=unit", "sampling.normalization"),
        ("backbone.weights=random:2", "weights_digest"),
        ("extraction.forward_batch=8", "compute.forward_batch"),
        ("store.dtype=float16", "arrays.cube.dtype"),
    ],
)
def test_other_settings_are_refused_with_the_field(world: World, tmp_path: Path, override: str, field: str) -> None:
    config, other = world.config(), world.config(override)
    spec, other_spec = (build_spec(each, build_backbone(each.backbone, each.sampling), CPU) for each in (config, other))
    open_store(tmp_path / "s.zarr", spec=spec, mode="a").close()
    with pytest.raises(SpecMismatch, match=field.replace(".", r"\.")):
        open_store(tmp_path / "s.zarr", spec=other_spec, mode="a")


def test_number_of_views_is_layout_and_the_store_grows_by_views(world: World) -> None:
    one, three = world.config("sampling.crop=random"), world.config("sampling.crop=random", "sampling.num_views=3")
    store = memory_store(one)
    assert store.spec.fingerprint == memory_store(three).spec.fingerprint
    extract_into(store, world, one)
    before = store.read(["right/0"], [0])
    extract_into(store, world, three)
    np.testing.assert_array_equal(store.read(["right/0"], [0]), before)
    views = store.read(["right/0"] * 3, [0, 1, 2])
    assert not np.array_equal(views[0], views[1])
    assert not np.array_equal(views[1], views[2])


def test_shards_of_another_manifest_are_left_alone_and_counted(world: World) -> None:
    """A killed run has planned 28 videos; extracting eight of them must not reject the other twenty."""
    config = world.config()
    backbone = build_backbone(config.backbone, config.sampling)
    store, sources = memory_store(config), list(video_sources(world.manifest).values())
    store.plan([source.video_id for source in sources], [0])
    few = extract_videos(store, sources[:10], backbone, config, CPU)
    assert (few.num_ok, few.num_rejected, few.num_pending, few.num_rows_left) == (8, 0, 2, 20)
    whole = extract_videos(store, sources, backbone, config, CPU)
    assert (whole.num_ok, whole.num_rejected, whole.num_pending, whole.num_rows_left) == (28, 0, 0, 0)


def test_stored_video_from_another_file_is_refused(world: World, tmp_path: Path) -> None:
    config = world.config()
    backbone = build_backbone(config.backbone, config.sampling)
    store, sources = memory_store(config), list(video_sources(world.manifest).values())[:3]
    extract_videos(store, sources, backbone, config, CPU)
    moved = tmp_path / "moved.mp4"
    moved.write_bytes(sources[0].path.read_bytes())
    extract_videos(store, [replace(sources[0], path=moved), *sources[1:]], backbone, config, CPU)
    with pytest.raises(ChangedInput, match="right/1"):
        extract_videos(store, [sources[0], replace(sources[1], end_seconds=0.5)], backbone, config, CPU)


def test_stored_video_whose_file_is_gone_does_not_block_growth(world: World, tmp_path: Path) -> None:
    config = world.config()
    backbone = build_backbone(config.backbone, config.sampling)
    store, sources = memory_store(config), list(video_sources(world.manifest).values())[:3]
    extract_videos(store, sources[:2], backbone, config, CPU)
    gone = replace(sources[0], path=tmp_path / "gone.mp4")
    report = extract_videos(store, [gone, *sources[1:]], backbone, config, CPU)
    assert (report.num_ok, report.num_clips) == (3, 1)
    with pytest.raises(ChangedInput, match="right/0"):  # another stretch is seen without the file
        extract_videos(store, [replace(gone, end_seconds=0.5), *sources[1:]], backbone, config, CPU)
    (tmp_path / "gone.mp4").write_bytes(b"another file")
    with pytest.raises(ChangedInput, match=r"right/0.*now bytes=12"):
        extract_videos(store, [gone, *sources[1:]], backbone, config, CPU)


def test_resume_in_another_order_reads_each_shard_once_a_pass(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.row_table.NUM_PARSED", 1)
    config = world.config("store.shard_rows=4")
    backbone = build_backbone(config.backbone, config.sampling)
    store, sources = memory_store(config), list(video_sources(world.manifest).values())
    extract_videos(store, sources, backbone, config, CPU)
    parsed: list[int] = []
    rows = vars(ShardRecord)["rows"].fget

    def rows_counted(record: ShardRecord) -> tuple[RowRecord, ...]:
        parsed.append(record.shard_index)
        found: tuple[RowRecord, ...] = rows(record)
        return found

    monkeypatch.setattr(ShardRecord, "rows", property(rows_counted))
    report = extract_videos(store, sources[::2] + sources[1::2], backbone, config, CPU)
    assert (report.num_skipped, report.num_ok) == (28, 28)
    assert parsed == [*range(7)] * 2  # once to find changed inputs, once for the report


def test_outcomes_are_those_of_the_rows_in_the_order_of_the_shards(broken_world: World) -> None:
    config = broken_world.config("sampling.num_views=2")
    store = memory_store(config)
    extract_into(store, broken_world, config)
    store.replan([RowKey("up/2", 1)])
    store.remove(["down/0"])
    asked = {"up/2", "down/0", "right/1", "jump/0", "not there"}
    found = list(store.outcomes(asked))
    assert [(key.video_id, key.view) for key, _ in found] == [
        ("right/1", 0), ("right/1", 1), ("up/2", 0), ("jump/0", 0), ("jump/0", 1), ("up/2", 1)
    ]  # fmt: skip
    assert found == [(key, store.outcome(key.video_id, key.view)) for key, _ in found]
    assert found[-1][1] is None


def test_report_can_leave_the_problems_out(broken_world: World) -> None:
    config = broken_world.config()
    report = extract_into(memory_store(config), broken_world, config)
    whole = report_json(report)
    assert len(whole.pop("problems")) == 4
    assert report_json(report, with_problems=False) == whole


@pytest.mark.parametrize(
    "override",
    [
        "sampling.num_frames=5", "sampling.policy=even", "sampling.axis=time", "sampling.short_policy=loop", "sampling.resize_size=30",
        "sampling.crop_size=20", "sampling.crop=random", "sampling.flip=true", "sampling.normalization=unit", "sampling.seed=1",
        "backbone.options.width=8", "backbone.weights=random:2", "extraction.forward_batch=8", "extraction.compute_dtype=bfloat16",
        "store.dtype=float16",
    ],
)  # fmt: skip
def test_fingerprint_feels_everything_that_decides_the_numbers(world: World, override: str) -> None:
    assert memory_store(world.config()).spec.fingerprint != memory_store(world.config(override)).spec.fingerprint


@pytest.mark.parametrize(
    "override", ["sampling.num_views=3", "store.shard_rows=16", "store.compression=zstd", "backbone.options.depth=1"]
)
def test_fingerprint_does_not_feel_layout_or_a_stated_default(world: World, override: str) -> None:
    assert memory_store(world.config()).spec.fingerprint == memory_store(world.config(override)).spec.fingerprint


def test_fingerprint_covers_decoder_and_normalisation(world: World) -> None:
    spec = memory_store(world.config()).spec
    for part, key in (
        ("decoder", "av"),
        ("decoder", "avcodec"),
        ("decoder", "pillow"),
        ("backbone", "mean"),
        ("backbone", "std"),
    ):
        changed = json.loads(json.dumps(spec.to_json()))
        assert changed[part][key]
        changed[part][key] = 0
        assert Spec.from_json(changed).fingerprint != spec.fingerprint


def test_fail_policy_stops_and_names_the_short_video(broken_world: World) -> None:
    config = broken_world.config("sampling.short_policy=fail")
    with pytest.raises(VideoTooShortError, match="down/1"):
        extract_into(memory_store(config), broken_world, config)


def test_drop_policy_rejects_the_short_video_openly(broken_world: World) -> None:
    config = broken_world.config("sampling.short_policy=drop")
    report = extract_into(memory_store(config), broken_world, config)
    assert dict(report.problems)["down/1"].status == "rejected"
    assert report.num_rejected == 4


def test_cubes_that_overflow_float16_are_rejected_and_counted(world: World) -> None:
    config = world.config("store.dtype=float16")
    store = memory_store(config)
    backbone = build_backbone(config.backbone, config.sampling)
    report = extract_videos(store, list(video_sources(world.manifest).values())[:3], Huge(backbone), config, CPU)
    assert report.num_rejected == 3
    assert {outcome.reason for _, outcome in report.problems} == {"not_finite"}


class Huge(torch.nn.Module):
    """A backbone whose values do not fit float16."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.preprocessing = inner.preprocessing

    def forward(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: cube * 0 + 1e9 for name, cube in self.inner(frames).items()}
