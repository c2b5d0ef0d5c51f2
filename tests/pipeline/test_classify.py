"""Classification on the one loop: against plain torch, resumed, scored, handed on to extraction and to end-to-end training."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.load import ConfigError, parse_config
from configs.schema import RunConfig
from configs.training import ClassifyConfig
from contracts.rank_jobs import train_and_evaluate
from contracts.rank_processes import run_ranks
from contracts.world import World
from episodes.build import build_head
from episodes.clip_sampler import ClipSampler
from episodes.datasets import Manifest, read_manifest, write_manifest
from episodes.head import HeadInputs
from episodes.linear import LinearClassifier, LinearOptions
from episodes.sampler import SamplerError, draw_views
from episodes.video import Video
from extract.build import build_backbone
from extract.transform import to_input
from pipeline import training, training_job
from pipeline.batches import TrainingBatches
from pipeline.checkpoint import CheckpointError, load_checkpoint
from pipeline.classify import clip_sampler
from pipeline.classify_model import ClassifierModel
from pipeline.classify_score import HeldOutScore, place_of_label, score_videos
from pipeline.extract_command import extract_to_store
from pipeline.initial_weights import load_initial_weights
from pipeline.interrupts import Stopped
from pipeline.model import FewShotModel, preprocessing_of
from pipeline.scoring import evaluate_run, load_run
from pipeline.settings import SetupError
from pipeline.setup import global_index, make_sampler, prepare
from pipeline.sources import LiveClips
from pipeline.statistics import Interval, share_interval

CPU = torch.device("cpu")


def config_of(world: World, *overrides: str) -> RunConfig:
    """Twelve clips in steps of four, with a quarter of the four videos of each class held out."""
    classify = ["training.mode=classify", "training.episodes_per_step=4", "classify.holdout=0.25"]
    return world.config(*classify, "episodes.train_views=3", "sampling.crop=random", *overrides)


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def weights(path: Path) -> dict[str, Tensor]:
    return dict(load_checkpoint(path)["model"])


def assert_same_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished classification run; read only."""
    folder = tmp_path_factory.mktemp("classified") / "run"
    training.train(config_of(world, "classify.num_clips=2", "classify.num_crops=3"), folder, CPU)
    return folder


def test_run_writes_its_files_and_says_how_it_goes_on_seen_and_unseen_classes(world: World, run: Path) -> None:
    assert {"config.toml", "metrics.jsonl", "best.pt", "last.pt", "card.json", "backbone.pt"} <= {
        path.name for path in run.iterdir()
    }
    steps = lines_of(run, "step")
    assert [line["episode"] for line in steps] == [4, 8, 12]
    assert all(line["loss"] == line["loss_class"] > 0 for line in steps)
    for line in lines_of(run, "validation"):
        # Three classes with one held-out video each; too few classes for five of them to say something.
        assert line["heldout_videos"] == 3
        assert line["heldout_top1"] * 3 == pytest.approx(round(line["heldout_top1"] * 3))
        assert "heldout_top5" not in line
        assert 0 <= line["val_accuracy"] <= 1
    card = json.loads((run / "card.json").read_text())
    assert card["selected_on"] == "val"
    assert (card["head"], card["split_hash"]) == ("protonet", world.manifest.split_hash)
    state = weights(run / "best.pt")
    assert state["head.linear.weight"].shape == (3, 16)


def plain_training(config: RunConfig, world: World) -> dict[str, Tensor]:
    """The same in plain torch: no loop, no sampler classes, no encoder; whole batches through the network in training mode."""
    sampler = clip_sampler(config, world.manifest)
    start = prepare(config, CPU)
    assert isinstance(start.model, ClassifierModel)
    backbone = build_backbone(config.backbone, config.sampling).train()
    linear = nn.Linear(16, 3)
    linear.load_state_dict(start.model.head.linear.state_dict())
    optimizer = torch.optim.SGD([*linear.parameters(), *backbone.parameters()], lr=config.training.learning_rate)
    for first in range(0, config.training.episodes, config.training.episodes_per_step):
        indices = range(first, first + config.training.episodes_per_step)
        episodes = [sampler.episode(index) for index in indices]
        views = [int(draw_views(sampler.split_hash, sampler.seed, index, 1, 3)[0]) for index in indices]
        clips = start.source.read([episode.query_ids[0] for episode in episodes], views)
        labels = torch.tensor(
            [sorted(world.manifest.classes("train")).index(episode.query_ids[0].split("/")[0]) for episode in episodes]
        )
        cubes = backbone(to_input(clips, preprocessing_of(backbone), config.sampling.normalization))["cube"]
        loss = F.cross_entropy(linear(cubes.mean(dim=(2, 3, 4))), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
        optimizer.step()
    assert isinstance(start.source, LiveClips)
    start.source.close()
    return {
        **{f"encoder.backbone.{name}": value for name, value in backbone.state_dict().items()},
        **{f"head.linear.{name}": value for name, value in linear.state_dict().items()},
    }


def test_run_is_what_plain_torch_makes_of_the_same_clips(world: World, tmp_path: Path) -> None:
    """Weights and BatchNorm's running statistics: those of a step are taken over all its clips (synchronised, the default)."""
    config = config_of(world, "classify.label_smoothing=0.1", "training.validate_every=100")
    training.train(config, tmp_path / "run", CPU)
    found, expected = weights(tmp_path / "run/last.pt"), plain_training(config, world)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Sums over clips are added in another order.
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_clips_that_pass_one_by_one_give_the_step_of_the_whole_batch(world: World, tmp_path: Path) -> None:
    """Frozen statistics: gradients add up, whatever passes at a time; dropout belongs to the clip, not to the pass."""
    results = []
    for size in (1, 3, 4):
        folder = tmp_path / str(size)
        few = ["training.backbone_batchnorm=frozen", f"training.episodes_per_forward={size}", "classify.dropout=0.3"]
        training.train(config_of(world, *few, "training.validate_every=100"), folder, CPU)
        results.append(weights(folder / "last.pt"))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_stopped_and_resumed_run_equals_an_uninterrupted_one(world: World, tmp_path: Path) -> None:
    options = ("classify.mixup_alpha=0.4", "classify.cutmix_alpha=1", "classify.dropout=0.2", "training.ema_decay=0.9")
    config = config_of(world, *options)
    training.train(config, tmp_path / "whole", CPU)

    def stop_after_one_step(line: Mapping[str, Any]) -> None:
        if line["kind"] == "step" and line["episode"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        training.train(config, tmp_path / "cut", CPU, report=stop_after_one_step)
    torch.rand(7)  # the global generator plays no part
    training.train(config, tmp_path / "cut", CPU, resume=True)
    for name in ("last.pt", "best.pt"):
        assert_same_weights(weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name))
    for kind in ("step", "validation"):
        assert lines_of(tmp_path / "whole", kind) == lines_of(tmp_path / "cut", kind)


@pytest.mark.slow
def test_ranks_learn_what_one_process_learns_and_score_it_exactly_alike(world: World, tmp_path: Path) -> None:
    """Dropout and label smoothing on, mixing off: partners are those of a rank."""
    options = ("classify.dropout=0.3", "classify.label_smoothing=0.1", "classify.holdout=0.5")
    # The first is scored as it begins, so that all score the same weights.
    cases = {"start": config_of(world, *options, "training.episodes=0"), "run": config_of(world, *options)}
    for name, config in cases.items():
        training.train(config, tmp_path / f"{name}_1", CPU)
    runs = [[(config, tmp_path / f"{name}_2")] for name, config in cases.items()]
    first_rank, second_rank = run_ranks(2, train_and_evaluate, runs)
    assert first_rank.digests == second_rank.digests
    assert lines_of(tmp_path / "start_1", "validation") == lines_of(tmp_path / "start_2", "validation")
    one, two = (lines_of(tmp_path / name, "step") for name in ("run_1", "run_2"))
    for first, second in zip(one, two, strict=True):
        assert first.pop("kind") == second.pop("kind")
        assert second == pytest.approx(first, rel=1e-4)
    for name, value in weights(tmp_path / "run_1/last.pt").items():
        # Statistics and gradients are summed in another order.
        torch.testing.assert_close(weights(tmp_path / "run_2/last.pt")[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_mixed_clips_change_training_alone(world: World) -> None:
    config = config_of(world, "classify.mixup_alpha=1", "training.backbone_batchnorm=frozen")
    place = prepare(config, CPU)
    assert isinstance(place.model, ClassifierModel)
    assert isinstance(place.source, LiveClips)
    sampler = clip_sampler(config, place.manifest)
    with place.source as clips:
        batches = TrainingBatches(sampler, clips, global_index(config, place.manifest), 1)
        batch = batches.make(range(4))
    found = {}
    with torch.no_grad():
        for is_mixed in (True, False):
            place.model.mixing = place.model.mixing if is_mixed else None
            for is_training in (True, False):
                found[is_mixed, is_training] = place.model.train(is_training)(batch).logits
    assert torch.equal(found[True, False], found[False, False])
    assert not torch.allclose(found[True, True], found[False, True])


def without_validation_classes(world: World, folder: Path) -> str:
    manifest = world.manifest
    kept = tuple(replace(video, path=str(manifest.path_of(video))) for video in manifest.videos if video.split != "val")
    write_manifest(replace(manifest, videos=kept), folder / "no_val.csv")
    return f'data.manifest="{folder / "no_val.csv"}"'


class _Scores:
    """Held-out accuracies to order."""

    def __init__(self, *top1: float) -> None:
        self.top1 = iter(top1)

    def __call__(self, *_: object) -> HeldOutScore:
        return HeldOutScore(next(self.top1), Interval(0.1, 0.9), None, 3)


def test_checkpoint_is_chosen_on_unseen_classes_where_there_are_any_else_on_held_out_videos(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = "training.validate_every=4"
    monkeypatch.setattr(training_job, "score_held_out", _Scores(0.1, 0.9, 0.2))
    config = config_of(world, every, without_validation_classes(world, tmp_path), "data.allow_outside=true")
    card = training.train(config, tmp_path / "held_out", CPU)
    assert card["best_episode"] == 8
    assert "held-out" in card["selected_on"]
    assert card["val_accuracy"] is None
    monkeypatch.setattr(training_job, "score_held_out", _Scores(0.1, 0.9, 0.2))
    card = training.train(config_of(world, every), tmp_path / "val", CPU)
    accuracies = [line["val_accuracy"] for line in lines_of(tmp_path / "val", "validation")]
    assert card["selected_on"] == "val"
    assert card["best_episode"] == 4 * (1 + accuracies.index(max(accuracies)))


def test_without_held_out_videos_and_validation_classes_nothing_is_selected(world: World, tmp_path: Path) -> None:
    options = (without_validation_classes(world, tmp_path), "data.allow_outside=true", "classify.holdout=0")
    card = training.train(config_of(world, *options), tmp_path / "run", CPU)
    assert card["best_episode"] == 12
    assert "nothing" in card["selected_on"]
    assert "heldout_top1" not in lines_of(tmp_path / "run", "validation")[0]


def test_no_test_episode_is_drawn_and_no_held_out_video_is_trained_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    seen: set[str] = set()

    def spy(config: RunConfig, manifest: Any, split: str) -> Any:
        asked.append(split)
        return make_sampler(config, manifest, split)

    def read(self: LiveClips, ids: Sequence[str], views: Sequence[Any]) -> Tensor:
        if any(isinstance(view, int) and view for view in views):  # view 0 and scoring views are of evaluation
            seen.update(ids)
        return whole_read(self, ids, views)

    whole_read = LiveClips.read
    monkeypatch.setattr(training, "make_sampler", spy)
    monkeypatch.setattr(LiveClips, "read", read)
    config = config_of(world, "training.episodes=40", "training.validate_every=100")
    training.train(config, tmp_path / "run", CPU)
    assert set(asked) == {"val"}
    sampler = clip_sampler(config, world.manifest)
    assert seen == set(sampler.video_ids)
    assert not seen & set(sampler.held_out_ids)


class _Encoder(nn.Module):
    """Clips of one grey level to cubes that have it as their only number."""

    def forward(self, clips: Tensor) -> Tensor:
        return clips.float().mean(dim=(2, 3, 4, 5), keepdim=True).reshape(*clips.shape[:2], 1, 1, 1, 1)


class _Grey:
    """Scoring clips with a grey level each."""

    def __init__(self, levels: Mapping[str, Sequence[int]]) -> None:
        self.levels = levels

    def read_scoring(
        self, video_ids: Sequence[str], num_clips: int, num_crops: Literal[1, 3], while_waiting: Callable[[], None]
    ) -> Tensor:
        del while_waiting
        rows = torch.tensor([self.levels[name] for name in video_ids], dtype=torch.uint8)
        assert rows.shape[1] == num_clips * num_crops
        return rows[:, :, None, None, None, None].expand(-1, -1, 2, 4, 4, 3)


def test_held_out_score_averages_probabilities_over_clips_and_crops(world: World) -> None:
    config = config_of(world, "classify.holdout=0.5", "classify.num_clips=2", "classify.num_crops=3")
    sampler = clip_sampler(config, world.manifest)
    place = prepare(config, CPU)
    assert isinstance(place.model, ClassifierModel)
    model = place.model
    model.encoder, model.head.cube_shape = _Encoder(), (1, 1, 1, 1)
    model.head.linear = nn.Linear(1, 3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.head.linear.weight.copy_(torch.tensor([[0.05], [-0.05], [0.0]]))
        model.head.linear.bias.copy_(torch.tensor([-5.0, 5.0, 0.5]))
    levels = {name: torch.randint(0, 256, (6,), generator=generator).tolist() for name in sampler.held_out_ids}
    found = score_videos(model.eval(), _Grey(levels), sampler, config.classify, CPU)
    right = []
    for name, label in zip(sampler.held_out_ids, sampler.held_out_labels, strict=True):
        mean = torch.stack(
            [model.head.linear(torch.tensor([float(level)])).softmax(dim=0) for level in levels[name]]
        ).mean(dim=0)
        right.append(int(mean.argmax() == label))
    assert len(right) == 6
    assert 0 < sum(right) < 6, "the case shows nothing where all or none are right"
    assert found.top1 == pytest.approx(sum(right) / 6)
    assert found.interval == share_interval(sum(right), 6)
    assert (found.top5, found.videos) == (None, 6)


@pytest.mark.parametrize(("num_classes", "top5"), [(9, None), (10, 0.5), (20, 0.25)])
def test_held_out_video_is_among_the_likeliest_five_where_at_most_four_classes_are_ahead(
    num_classes: int, top5: float | None
) -> None:
    names = [f"class{number:02}" for number in range(num_classes)]
    videos = tuple(
        Video(f"{name}/{number}", f"{name}{number}.mp4", name, "train") for name in names for number in (0, 1)
    )
    sampler = ClipSampler(Manifest(videos, Path()), 0.5)
    linear = LinearClassifier(
        LinearOptions(), HeadInputs((1, 1, 1, 1), num_classes, generator=torch.Generator().manual_seed(0))
    )
    with torch.no_grad():
        linear.linear.weight.zero_()
        linear.linear.bias.copy_(-torch.arange(num_classes))  # as many classes are ahead of one as its number says
    model = ClassifierModel(_Encoder(), linear, build_head("protonet", {}, (1, 1, 1, 1), None, True))
    clips = _Grey({video.video_id: [100] for video in videos})
    score = score_videos(model, clips, sampler, ClassifyConfig(holdout=0.5), CPU)
    assert score.videos == num_classes
    assert score.top1 == pytest.approx(1 / num_classes)
    assert score.top5 == (None if top5 is None else pytest.approx(top5))
    assert score.line.get("heldout_top5") == score.top5


def test_place_of_a_label_counts_the_classes_ahead_of_it() -> None:
    probabilities = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.6, 0.3], [0.5, 0.25, 0.25], [0.2, 0.4, 0.4]])
    assert place_of_label(probabilities, torch.tensor([1, 0, 2, 2])).tolist() == [0, 2, 2, 1]


def test_unseen_classes_score_the_same_live_and_through_the_extracted_cubes(
    world: World, run: Path, tmp_path: Path
) -> None:
    report = extract_to_store(
        world.manifest_path,
        None,
        None,
        str(tmp_path / "s.zarr"),
        None,
        None,
        run,
        "cpu",
        ("extraction.decode_workers=0",),
    )
    assert report["num_ok"] == len(world.manifest.videos)
    live, _ = evaluate_run(load_run(run, CPU), "test", 40, CPU)
    stored, _ = evaluate_run(load_run(run, CPU, str(tmp_path / "s.zarr")), "test", 40, CPU)
    assert live == stored
    assert (live["mode"], live["head"]) == ("classify", "protonet")
    assert live["store_fingerprint"] == report["fingerprint"]
    # A head on these cubes is an ordinary cached run.
    its_own = (f'backbone.weights="{run / "backbone.pt"}"', "sampling.crop=random")
    head = world.config(f'store.path="{tmp_path / "s.zarr"}"', *its_own, "head.name=neighbor", "training.episodes=0")
    training.train(head, tmp_path / "neighbor", CPU)


def test_end_to_end_run_starts_from_the_classified_backbone_with_a_fresh_head(
    world: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = f'training.initial_weights="{run / "best.pt"}"'
    end_to_end = world.config("training.mode=end_to_end", "training.episodes=0", start)
    training.train(end_to_end, tmp_path / "next", CPU)
    assert "only its backbone is taken, the head begins anew" in " ".join(capsys.readouterr().err.split())
    given, taken = weights(run / "best.pt"), weights(tmp_path / "next/last.pt")
    fresh = prepare(world.config("training.mode=end_to_end"), CPU).model.state_dict()
    for name, value in taken.items():
        assert torch.equal(value, given[name] if name.startswith("encoder.") else fresh[name]), name
    # The exported file does as [backbone] weights what the run's backbone does.
    exported = world.config(f'backbone.weights="{run / "backbone.pt"}"')
    backbone = build_backbone(exported.backbone, exported.sampling)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, given[f"encoder.backbone.{name}"]), name
    # And back: classification begins from an end-to-end run's backbone, or from a classification run whole.
    for origin, is_whole in ((tmp_path / "next/best.pt", False), (run / "best.pt", True)):
        folder = tmp_path / f"again{is_whole}"
        training.train(config_of(world, "training.episodes=0", f'training.initial_weights="{origin}"'), folder, CPU)
        state = weights(folder / "last.pt")
        assert torch.equal(state["encoder.backbone.stem.0.weight"], given["encoder.backbone.stem.0.weight"])
        assert torch.equal(state["head.linear.weight"], given["head.linear.weight"]) == is_whole


def test_head_on_the_cache_cannot_start_from_a_classification_run(run: Path) -> None:
    head = build_head("neighbor", {}, (16, 2, 2, 2), 3, default_meta_bn_query=True)
    with pytest.raises(CheckpointError, match=r"linear classifier.*extract --from-run"):
        load_initial_weights(FewShotModel(nn.Identity(), head), run / "best.pt")


def test_head_of_the_config_measures_and_must_not_have_weights(world: World) -> None:
    neighbor = prepare(config_of(world, "head.name=neighbor"), CPU)
    assert neighbor.config.head.name == "neighbor"
    assert neighbor.model.few_shot_head is not neighbor.model.head
    with pytest.raises(SetupError, match=r'"feat" has weights to learn'):
        prepare(config_of(world, "head.name=feat"), CPU)
    with pytest.raises(SetupError, match=r"head\.alpha is an option of a few-shot head"):
        prepare(config_of(world, "head.alpha=0.5"), CPU)


def test_class_with_a_single_video_is_refused_before_any_work(world: World, tmp_path: Path) -> None:
    manifest = read_manifest(world.manifest_path)
    kept = tuple(
        replace(video, path=str(manifest.path_of(video)))
        for video in manifest.videos
        if video.class_name != "left" or video.video_id == "left/0"
    )
    write_manifest(replace(manifest, videos=kept), tmp_path / "one.csv")
    config = config_of(world, f'data.manifest="{tmp_path / "one.csv"}"', "data.allow_outside=true")
    with pytest.raises(SamplerError, match="only one: left"):
        training.train(config, tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"data": {"global_labels": "all"}}, "never sees"),
        ({"classify": {"mixup_alpha": 0.2}, "training": {"episodes_per_step": 1}}, "a single one passes"),
        ({"training": {"clips_per_forward": 2}}, "Use episodes_per_forward"),
        ({"training": {"episodes_per_forward": 2}}, "what classification does if nothing is said"),
        ({"training": {"backbone_batchnorm": "episode"}}, "statistics of a single clip"),
    ],
)
def test_contradictions_are_refused_when_the_config_is_built(tables: dict[str, Any], message: str) -> None:
    tables = {**tables, "training": {"mode": "classify", **tables.get("training", {})}}
    with pytest.raises(ConfigError, match=message):
        parse_config(tables)


def test_defaults_of_the_knobs_mix_and_hold_out_as_documented() -> None:
    defaults = ClassifyConfig()
    assert (defaults.mixup_alpha, defaults.cutmix_alpha, defaults.label_smoothing, defaults.dropout) == (0, 0, 0, 0)
    assert defaults.holdout == 0.1
