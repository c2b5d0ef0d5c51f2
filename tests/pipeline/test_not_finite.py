"""Numbers that are none stop a run before they are kept, and are never taken for an answer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from configs.load import ConfigError, load_config
from configs.schema import RunConfig
from contracts.made_runs import MadeRuns
from contracts.world import World
from episodes.batch import EpisodeBatch
from episodes.head import HeadOutput
from episodes.sampler import draw_noise_seed
from pipeline import training
from pipeline.checkpoint import load_checkpoint
from pipeline.classify_score import mean_probabilities
from pipeline.evaluation import ScoreError, evaluate_model
from pipeline.learning import TrainingError
from pipeline.model import FewShotModel
from pipeline.optimisation import has_finite_weights
from pipeline.running_statistics import EpisodeOrder
from pipeline.scoring import evaluate_run, load_run
from pipeline.setup import make_sampler, prepare

CPU = torch.device("cpu")


def on_cubes(made: MadeRuns, *overrides: str) -> RunConfig:
    options = (f'store.path="{made.store_path}"', "training.mode=cached", "training.episodes=6")
    return made.world.config(*options, "training.validation_episodes=2", *overrides)


def all_finite(path: Path) -> bool:
    return all(bool(value.isfinite().all()) for value in load_checkpoint(path)["model"].values())


@pytest.mark.parametrize(
    "override",
    [
        "training.learning_rate=inf",
        "training.weight_decay=nan",
        'training.rates={"head.*"=inf}',
        "classify.mixup_alpha=nan",
    ],
)
def test_settings_that_are_no_numbers_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        load_config(None, [override])


def test_no_limit_may_be_written_as_infinity() -> None:
    training_config = load_config(None, ["training.save_seconds=inf", "training.clip_gradient_norm=inf"]).training
    assert (training_config.save_seconds, training_config.clip_gradient_norm) == (math.inf, math.inf)
    for name in ("save_seconds", "clip_gradient_norm"):
        with pytest.raises(ConfigError, match=rf"training\.{name}"):
            load_config(None, [f"training.{name}=nan"])


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_are_looked_at_one_by_one(number: float) -> None:
    model = torch.nn.Linear(3, 3)
    with torch.no_grad():
        model.weight[1, 1] = 3e38  # finite, though its square is not
        assert has_finite_weights(model)
        model.weight[2, 2] = number
    assert not has_finite_weights(model)
    model.requires_grad_(False)
    assert has_finite_weights(model)
    model.register_parameter("nothing", torch.nn.Parameter(torch.zeros(0)))
    assert has_finite_weights(model)


def test_step_that_leaves_weights_that_are_no_numbers_is_not_kept(
    made: MadeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = on_cubes(made, "head.name=mastaf"), tmp_path / "run"
    step = torch.optim.SGD.step
    num_steps = 0

    def overflow(self: torch.optim.SGD, closure: None = None) -> None:
        nonlocal num_steps
        num_steps += 1
        step(self, closure)
        if num_steps == 2:
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[0] = math.inf

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", overflow)
        with pytest.raises(
            TrainingError, match=r"the weights are not finite with their step training episodes \[3, 4, 5\]"
        ):
            training.train(config, run, CPU)
    assert all_finite(run / "last.pt")
    assert [each["index"] for each in json.loads((run / "not_finite.json").read_text())["episodes"]] == [3, 4, 5]
    training.train(config, run, CPU, resume=True)
    training.train(config, tmp_path / "whole", CPU)
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_running_statistics_that_would_be_no_numbers_stop_before_the_step(
    made: MadeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variance may overflow where no loss and no gradient does."""
    gather, num_steps = EpisodeOrder.gather, 0

    def overflow(self: EpisodeOrder) -> None:
        nonlocal num_steps
        num_steps += 1
        gather(self)
        assert self._gathered, "a head without running statistics shows nothing"
        if num_steps == 2:
            next(iter(self._gathered.values())).view(-1)[-1] = math.inf

    config, run = on_cubes(made, "head.name=mastaf"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(EpisodeOrder, "gather", overflow)
        with pytest.raises(
            TrainingError, match=r"the running statistics are not finite in training episodes \[3, 4, 5\]"
        ):
            training.train(config, run, CPU)
    assert all_finite(run / "last.pt")
    assert load_checkpoint(run / "last.pt")["progress"]["episode"] == 3
    training.train(config, run, CPU, resume=True)
    training.train(config, tmp_path / "whole", CPU)
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_scores_that_are_no_numbers_are_no_answers(made: MadeRuns, tmp_path: Path) -> None:
    training.train(on_cubes(made, "head.name=feat"), tmp_path / "run", CPU)
    run = load_run(tmp_path / "run", CPU)
    with torch.no_grad():
        next(iter(run.model.head.parameters())).fill_(math.nan)
    with pytest.raises(ScoreError, match=r"the scores of evaluation episode 0 are not finite"):
        evaluate_run(run, "test", 5, CPU)


class Poisoned(nn.Module):
    """A model whose scores of one episode are no numbers."""

    def __init__(self, model: FewShotModel, seed: int) -> None:
        super().__init__()
        self.model, self.encoder, self.seed = model, model.encoder, seed

    def forward(self, batch: EpisodeBatch) -> HeadOutput:
        output: HeadOutput = self.model(batch)
        assert batch.seeds is not None
        output.logits[batch.seeds == self.seed, -1, 0] = math.nan
        return output


@pytest.mark.parametrize("index", [0, 1, 7, 39])
def test_episode_whose_scores_are_no_numbers_is_named(made: MadeRuns, index: int) -> None:
    run = load_run(made.heads[0], CPU)
    sampler = make_sampler(run.config, run.manifest, "test")
    model = Poisoned(run.model, draw_noise_seed(sampler.split_hash, sampler.seed, index))
    with pytest.raises(ScoreError, match=rf"the scores of evaluation episode {index} are not finite"):
        evaluate_model(cast(FewShotModel, model), run.source, sampler, 40, CPU)
    # The episodes before it have scores.
    if index:
        assert evaluate_model(cast(FewShotModel, model), run.source, sampler, index, CPU).episodes == index


def test_held_out_probabilities_that_are_no_numbers_are_no_answers(world: World) -> None:
    config = world.config("training.mode=classify", "training.episodes=0", "head.name=protonet", "head.distance=cosine")
    place = prepare(config, CPU)
    with torch.no_grad():
        next(place.model.parameters()).fill_(math.nan)
    clips = torch.zeros((1, 1, 4, 24, 24, 3), dtype=torch.uint8)
    with pytest.raises(ScoreError, match="held-out videos are not finite"):
        mean_probabilities(place.model.eval(), clips, CPU)  # type: ignore[arg-type]  # a classifier, by its mode
