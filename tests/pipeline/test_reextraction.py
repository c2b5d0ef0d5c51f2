"""What a store says of its origin is enough to make lost shards anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.document import read_document
from cache.open import open_disk_store, open_files, open_store
from cache.store import SpecMismatch
from contracts.world import World
from episodes.datasets import Manifest, write_manifest
from extract.build import build_backbone
from pipeline.extract_command import extract_to_store
from pipeline.extraction import build_spec
from pipeline.reextraction import finish_pending, rebuild_for
from pipeline.settings import SetupError

OVERRIDES = (
    "sampling.num_frames=4", "sampling.resize_size=28", "sampling.crop_size=24", "store.shard_rows=8", "extraction.forward_batch=4",
    "backbone.options.width=4", "extraction.decode_workers=0", "sampling.num_views=2",
)  # fmt: skip


def extract(world: World, store: Path, weights: str) -> dict[str, Any]:
    return extract_to_store(
        world.manifest_path, "small3d", weights, str(store), None, None, None, "cpu", (*OVERRIDES, "sampling.flip=true")
    )


def drop(store: Path, kind: str, *shards: int) -> None:
    with open_disk_store(store, kind, mode="a") as opened:
        for shard in shards:
            opened.drop(shard, "a test")


@pytest.fixture
def weights(world: World, tmp_path: Path) -> Path:
    """A file of weights for the backbone of `extract`."""
    config = world.config("backbone.weights=random:7")
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": build_backbone(config.backbone, config.sampling).state_dict()}, path)
    return path


@pytest.mark.parametrize(("ending", "kind"), [("zarr", "zarr"), ("h5", "hdf5")])
def test_dropped_shards_come_back_bit_for_bit(
    world: World, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, ending: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    store = tmp_path / f"s.{ending}"
    extract(world, store, weights.name)
    monkeypatch.chdir("/")  # the store knows where the file is from any folder
    with open_store(store) as opened:
        whole = opened.content_hash()
    drop(store, kind, 1, 6)
    report = finish_pending(str(store), world.manifest_path, None, "cpu")
    assert (report["num_clips"], report["num_videos"], report["num_ok"], report["num_pending"]) == (16, 28, 28, 0)
    with open_store(store) as opened:
        assert opened.content_hash() == whole


def test_weights_that_have_moved_are_asked_for_and_others_are_refused(
    world: World, tmp_path: Path, weights: Path
) -> None:
    store = tmp_path / "s.zarr"
    extract(world, store, str(weights))
    drop(store, "zarr", 0)
    moved = weights.rename(tmp_path / "moved.pt")
    with pytest.raises(SetupError, match=r"weights\.pt.*--weights"):
        finish_pending(str(store), world.manifest_path, None, "cpu")
    with pytest.raises(SpecMismatch, match="weights_digest"):
        finish_pending(str(store), world.manifest_path, "random:8", "cpu")
    assert finish_pending(str(store), world.manifest_path, str(moved), "cpu")["num_clips"] == 8


def test_run_that_is_gone_is_said_with_the_way_out(world: World, tmp_path: Path, weights: Path) -> None:
    store = tmp_path / "s.zarr"
    extract(world, store, str(weights))
    document = read_document(open_files(str(store)))
    gone = replace(document, origin={**document.origin, "from_run": str(tmp_path / "run")})
    with pytest.raises(SetupError, match=r"run holds no run.*backbone\.pt\) are with --weights"):
        rebuild_for(str(store), gone, None, world.manifest_path, torch.device("cpu"))
    rebuild_for(str(store), gone, str(weights), world.manifest_path, torch.device("cpu"))


def test_store_does_not_decide_that_videos_may_lie_outside(
    world: World, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "outside.csv"
    videos = [replace(video, path=str(world.folder / video.path)) for video in world.manifest.videos]
    write_manifest(Manifest(tuple(videos), tmp_path / "empty"), manifest)
    store = tmp_path / "s.zarr"
    extract_to_store(
        manifest, "small3d", str(weights), str(store), None, None, None, "cpu", (*OVERRIDES, "data.allow_outside=true")
    )
    drop(store, "zarr", 0)
    with pytest.raises(SetupError, match=r"outside\.csv, line .*add --allow-outside"):
        finish_pending(str(store), manifest, None, "cpu")
    capsys.readouterr()
    assert finish_pending(str(store), manifest, None, "cpu", allow_outside=True)["num_clips"] == 8
    assert f"small3d with weights {weights}" in capsys.readouterr().err


def test_store_without_an_origin_names_the_way_out(world: World, tmp_path: Path) -> None:
    config = world.config()
    spec = build_spec(config, build_backbone(config.backbone, config.sampling), torch.device("cpu"))
    open_store(tmp_path / "s.zarr", spec=spec, mode="a").close()
    with pytest.raises(SetupError, match=r"origin is not recorded.*mastaf extract --manifest"):
        finish_pending(str(tmp_path / "s.zarr"), world.manifest_path, None, "cpu")
