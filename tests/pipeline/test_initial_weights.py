"""Runs that start from a checkpoint: ours, or a published STAF one with its real names and shapes."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from configs.schema import RunConfig
from contracts.made_runs import MadeRuns, fill_store, train_run
from contracts.world import World
from episodes.build import build_head
from extract.build import build_backbone
from pipeline import training
from pipeline.card_checks import contradictions
from pipeline.checkpoint import CheckpointError, load_checkpoint
from pipeline.initial_weights import load_initial_weights
from pipeline.model import ClipEncoder, FewShotModel
from pipeline.weights_files import weights_name

CPU = torch.device("cpu")
CHANNELS, POSITIONS, CLASSES = 2048, 49, 51


def published_checkpoint(several_gpus: bool) -> dict[str, object]:
    """A STAF training checkpoint: the names and shapes of reference 1.5, with weights of our own."""
    generator = torch.Generator().manual_seed(7)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    inner = ".module" if several_gpus else ""
    r3d50 = build_backbone(_published_config().backbone, _published_config().sampling)
    state: dict[str, Tensor] = {f"base{inner}.{name}": value for name, value in r3d50.state_dict().items()}
    state |= {f"base{inner}.fc.weight": values(1139, CHANNELS), f"base{inner}.fc.bias": values(1139)}
    state |= {
        f"cam{inner}.conv1.conv.weight": values(6, POSITIONS, 1, 1),
        f"cam{inner}.conv1.conv.bias": values(6),
        f"cam{inner}.conv1.bn.weight": values(6).abs() + 0.5,
        f"cam{inner}.conv1.bn.bias": values(6),
        f"cam{inner}.conv1.bn.running_mean": values(6),
        f"cam{inner}.conv1.bn.running_var": values(6).abs() + 0.5,
        f"cam{inner}.conv1.bn.num_batches_tracked": torch.tensor(384_000),
        f"cam{inner}.conv2.weight": values(POSITIONS, 6, 1, 1),
        f"cam{inner}.conv2.bias": values(POSITIONS),
        f"classifier{inner}.weight": values(CLASSES, CHANNELS, 1, 1, 1),
        f"classifier{inner}.bias": values(CLASSES),
    }
    return {"iteration": 128_000, "model_state_dict": state, "optimizer_state_dict": {}, "scheduler": {}}


def _published_config() -> RunConfig:
    from configs.load import load_config

    return load_config(None, ["backbone.name=r3d50", "backbone.weights=random:3"])


def model_for_it() -> FewShotModel:
    config = _published_config()
    head = build_head("mastaf", {}, (CHANNELS, 1, 7, 7), CLASSES, False, torch.Generator().manual_seed(0))
    other = config.backbone.model_copy(update={"weights": "random:4"})
    return FewShotModel(ClipEncoder(build_backbone(other, config.sampling), config.sampling), head)


@pytest.mark.parametrize("several_gpus", [False, True])
def test_published_training_checkpoint_fills_backbone_and_head(tmp_path: Path, several_gpus: bool) -> None:
    checkpoint = published_checkpoint(several_gpus)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    model = model_for_it()
    load_initial_weights(model, tmp_path / "checkpoint.pt")
    state = checkpoint["model_state_dict"]
    assert isinstance(state, dict)
    loaded = model.state_dict()
    inner = ".module" if several_gpus else ""
    assert torch.equal(loaded["encoder.backbone.layer4.2.conv3.weight"], state[f"base{inner}.layer4.2.conv3.weight"])
    assert torch.equal(loaded["head.classifier.weight"], state[f"classifier{inner}.weight"].flatten(1))
    assert torch.equal(loaded["head.cam.expand.weight"], state[f"cam{inner}.conv2.weight"].flatten(1))


def test_published_checkpoint_with_other_classes_says_what_to_set(tmp_path: Path) -> None:
    torch.save(published_checkpoint(False), tmp_path / "checkpoint.pt")
    head = build_head("mastaf", {}, (CHANNELS, 1, 7, 7), 31, False)
    with pytest.raises(ValueError, match="global_labels"):
        load_initial_weights(FewShotModel(nn.Identity(), head), tmp_path / "checkpoint.pt")


def test_run_starts_from_another_runs_checkpoint(world: World, tmp_path: Path) -> None:
    mode = "training.mode=end_to_end"
    training.train(world.config(mode), tmp_path / "first", CPU)
    config = world.config(mode, "training.episodes=0", f'training.initial_weights="{tmp_path / "first/best.pt"}"')
    training.train(config, tmp_path / "second", CPU)
    first, second = (load_checkpoint(tmp_path / run)["model"] for run in ("first/best.pt", "second/best.pt"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_card_says_by_content_what_a_run_started_from(world: World, tmp_path: Path) -> None:
    mode, first, moved = "training.mode=end_to_end", tmp_path / "first", tmp_path / "moved.pt"
    card = training.train(world.config(mode, "training.episodes=0"), first, CPU)
    assert card["started_from"] == {"backbone.weights": "random:1"}
    shutil.copy(first / "best.pt", moved)
    start = (
        "training.episodes=3",
        f'training.initial_weights="{moved}"',
        f'backbone.weights="{first / "backbone.pt"}"',
    )
    card = training.train(world.config(mode, *start), tmp_path / "second", CPU)
    settings = {"training.initial_weights": first / "best.pt", "backbone.weights": first / "backbone.pt"}
    digests = {setting: hashlib.sha256(path.read_bytes()).hexdigest() for setting, path in settings.items()}
    assert card["started_from"] == {setting: f"file {digest}" for setting, digest in digests.items()}
    page = (tmp_path / "second/card.md").read_text()
    assert f"| starts from training.initial_weights | `file {digests['training.initial_weights']}` |" in page
    moved.write_bytes(b"another file")
    longer = world.config(mode, *start[1:], "training.episodes=6")
    assert training.train(longer, tmp_path / "second", CPU, resume=True)["started_from"] == card["started_from"]
    assert contradictions(tmp_path / "second", card | {"started_from": {}}, card["num_parameters"]) != []


def test_directory_of_weights_stands_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "b").write_bytes(b"1")
    (folder / "a").mkdir()
    (folder / "a/c").write_bytes(b"2")
    lines = f"a/c {hashlib.sha256(b'2').hexdigest()}\nb {hashlib.sha256(b'1').hexdigest()}"
    name = f"directory {hashlib.sha256(lines.encode()).hexdigest()}"
    assert weights_name(str(folder)) == name
    # What a downloader writes down beside them has times in it.
    (folder / ".cache/download").mkdir(parents=True)
    (folder / ".cache/download/b.metadata").write_text("today")
    assert weights_name(str(folder)) == name
    (folder / "b").write_bytes(b"3")
    assert weights_name(str(folder)) != name


def test_head_from_the_cubes_of_another_backbone_starts_with_a_warning(
    made: MadeRuns, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = fill_store(made.world, tmp_path / "other.zarr", "random:5")
    start = ("head.name=mastaf", "training.episodes=0", f'training.initial_weights="{made.heads[1] / "best.pt"}"')
    warning = "it starts on features that it does not know"
    train_run(made.world, made.store_path, tmp_path / "same", *start)
    assert warning not in capfd.readouterr().err
    train_run(made.world, other, tmp_path / "other", *start)
    assert warning in capfd.readouterr().err


def test_checkpoint_of_another_model_is_refused_in_one_line(world: World, tmp_path: Path) -> None:
    training.train(world.config("training.mode=end_to_end", "training.episodes=0"), tmp_path / "first", CPU)
    wider = world.config(
        "training.mode=end_to_end",
        "backbone.options.width=8",
        "training.episodes=0",
        f'training.initial_weights="{tmp_path / "first/best.pt"}"',
    )
    with pytest.raises(CheckpointError, match="does not fit"):
        training.train(wider, tmp_path / "second", CPU)
