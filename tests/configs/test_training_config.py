"""What contradicts itself in training is refused when the config is built, in one line that names the knob and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.load import ConfigError, load_config, parse_config, to_toml

END_TO_END = {"mode": "end_to_end"}
CLASSIFY = {"mode": "classify"}


@pytest.mark.parametrize(
    ("training", "fragment"),
    [
        ({"episodes_per_step": 2, "episodes_per_forward": 3}, "episodes_per_forward = 3 is more than"),
        (END_TO_END | {"clips_per_forward": 2, "backbone_batchnorm": "episode"}, "Use gradient_checkpointing"),
        (END_TO_END | {"backbone_batchnorm": "synchronised", "episodes_per_forward": 1}, "they pass at once"),
        (CLASSIFY | {"episodes_per_forward": 1}, "they pass at once"),
        (CLASSIFY | {"backbone_batchnorm": "episode"}, "statistics of a single clip"),
        (CLASSIFY | {"clips_per_forward": 1, "backbone_batchnorm": "frozen"}, "Use episodes_per_forward"),
        ({"episodes_per_step": 1, "published_first_step": True}, "first step of no episode"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum = 0.9 has no effect on adam"),
        ({"nesterov": True}, "nesterov = true needs training.momentum"),
        ({"backbone_learning_rate": 0.1}, "on the cache there is no backbone to learn"),
        ({"schedule": "multi_step"}, "go together"),
        ({"milestones": [5]}, "go together"),
        ({"schedule": "multi_step", "milestones": [9, 5]}, "not ascending"),
        ({"warmup_episodes": 10, "episodes": 10}, "not less than training.episodes"),
        ({"rates": {"head.*": -1.0}}, "'head.*' has a negative rate"),
        ({"layer_decay": 0.5}, "layer_decay"),
        ({"gradient_checkpointing": True}, "on the cache there is no backbone"),
        ({"compute_dtype": "bfloat16"}, "on the cache there is no backbone"),
        ({"clips_per_forward": 2}, "on the cache there is no backbone"),
        (END_TO_END | {"backbone_learning_rate": 0.0, "gradient_checkpointing": True}, "the backbone is frozen"),
        ({"backbone_batchnorm": "episode"}, 'no backbone. Leave it out or set "frozen"'),
        (END_TO_END | {"backbone_learning_rate": 0.0, "backbone_batchnorm": "published"}, "the backbone is frozen"),
        ({"check_videos": True}, "cubes are read from the cache"),
        ({"milestone_factor": 0.5}, 'is of schedule "multi_step"'),
        ({"decay_norm_and_bias": False}, "changes nothing without training.weight_decay"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(training: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config({"training": training})
    assert fragment in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tables", "fragment"),
    [
        ({"classify": {"dropout": 0.5}}, 'training.mode is not "classify"'),
        ({"augmentation": {"rand_augment": 2}, "episodes": {"train_views": 9}}, "read from the cache"),
        ({"augmentation": {"rand_augment": 2}, "training": END_TO_END}, "train_views"),
        (
            {"training": CLASSIFY | {"episodes_per_step": 1}, "classify": {"mixup_alpha": 0.2}},
            "mix clips of one forward pass",
        ),
    ],
)
def test_tables_that_contradict_each_other_are_refused(tables: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config(tables)
    assert fragment in str(refused.value)


def test_patterns_survive_the_way_through_a_file(tmp_path: Path) -> None:
    config = load_config(None, ['training.rates={"head.*"=0.1,"a b"=0.2}', 'training.freeze=["encoder.*.bn?.*"]'])
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "config.toml") == config
    assert config.training.rates == {"head.*": 0.1, "a b": 0.2}
