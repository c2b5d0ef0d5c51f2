"""Every recipe that ships is loaded, and says what it is."""

from pathlib import Path

import pytest

from configs.load import load_config, recipe_folder

RECIPES = sorted(recipe_folder().glob("*.toml"))


@pytest.mark.parametrize("file", RECIPES, ids=[file.stem for file in RECIPES])
def test_recipe_loads_and_its_header_names_its_command(file: Path) -> None:
    config = load_config(file)
    header = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"mastaf train {file.stem}" in header or "mastaf demo" in header
    assert "Aims at" in header or "Measured" in header
    assert config.evaluation.split == "test"


def test_there_is_a_recipe_for_every_row_of_the_paper_that_runs() -> None:
    names = {file.stem for file in RECIPES}
    for data in ("ucf101", "hmdb51", "ssv2_part", "ssv2_all"):
        assert {f"{data}_{backbone}_{shots}shot" for backbone in ("r3d50", "tsn") for shots in (1, 5)} <= names
        assert f"{data}_vivit_1shot" in names
    for data in ("ucf101", "ssv2_all"):
        assert {f"{data}_r3d50_1shot_{head}" for head in ("neighbor", "self", "cross")} <= names


@pytest.mark.parametrize(
    ("data", "episodes", "per_step"),
    [("ucf101", 128_000, 128), ("hmdb51", 128_000, 64), ("ssv2_part", 128_000, 32), ("ssv2_all", 256_000, 32)],
)
def test_paper_recipes_hold_the_published_settings(data: str, episodes: int, per_step: int) -> None:
    config = load_config(recipe_folder() / f"{data}_r3d50_1shot.toml")
    assert (config.training.episodes, config.training.episodes_per_step) == (episodes, per_step)
    assert (config.training.optimizer, config.training.learning_rate, config.training.momentum) == ("sgd", 0.01, 0.0)
    assert (config.sampling.num_frames, config.sampling.crop_size, config.sampling.normalization) == (16, 224, "unit")
    assert (config.episodes.protocol, config.episodes.n_query) == ("one_query", 1)


def test_published_readme_command_is_a_recipe() -> None:
    config = load_config(recipe_folder() / "hmdb51_published_readme.toml")
    assert config.backbone.weights == "r3d50_KMS_200ep.pth"
    assert config.training.episodes_per_step == 64
    assert config.training.validate_every == 6400
    assert config.head.options["alpha"] == 1.0
    assert config.head.options["lambda_few"] == 0.5
    assert config.data.global_labels == "all"
