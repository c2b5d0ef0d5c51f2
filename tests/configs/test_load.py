"""Recipes and overrides: what is wrong is one line that names it."""

from pathlib import Path

import pytest

from configs.load import ConfigError, find_recipe, load_config, parse_config, to_toml


def test_defaults_load_without_a_file() -> None:
    config = load_config()
    assert config.episodes.n_way == 5
    assert config.training.mode == "cached"
    assert config.head.name == "mastaf"


def test_unknown_key_names_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"sampling\.num_frame; did you mean 'num_frames'"):
        parse_config({"sampling": {"num_frame": 8}})


def test_unknown_table_names_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sampling'"):
        parse_config({"samplin": {}})


def test_unknown_backbone_and_head_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="r3d50"):
        parse_config({"backbone": {"name": "r3d5"}})
    with pytest.raises(ConfigError, match="mastaf"):
        parse_config({"head": {"name": "mastaff"}})


def test_unknown_head_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="lambda_few"):
        parse_config({"head": {"name": "mastaf", "lamda_few": 0.5}})


def test_wrong_value_names_key_value_and_allowed() -> None:
    with pytest.raises(ConfigError, match=r"sampling\.crop = 'center'.*centre"):
        parse_config({"sampling": {"crop": "center"}})


def test_set_overrides_beat_tables_and_file(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[episodes]\nk_shot = 5\nn_query = 2\n")
    config = load_config(file, ["episodes.k_shot=3", "head.name=neighbor"], {"episodes": {"k_shot": 4, "n_way": 7}})
    assert (config.episodes.k_shot, config.episodes.n_query, config.episodes.n_way) == (3, 2, 7)
    assert config.head.name == "neighbor"


@pytest.mark.parametrize("override", ["episodes.k_shot", "k_shot=3", "episodes.=3", "=3"])
def test_malformed_override_says_the_form(override: str) -> None:
    with pytest.raises(ConfigError, match=r"table\.key=value"):
        load_config(None, [override])


def test_config_survives_toml_and_back(tmp_path: Path) -> None:
    overrides = [
        "backbone.name=small3d",
        "backbone.options.width=8",
        "head.alpha=0.25",
        'data.manifest="a\\"b\\\\c.csv"',
        "store.path=x.zarr",
    ]
    config = load_config(None, overrides)
    file = tmp_path / "r.toml"
    file.write_text(to_toml(config))
    assert load_config(file) == config


def test_unreadable_toml_says_where(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[episodes\n")
    with pytest.raises(ConfigError, match="line 1"):
        load_config(file)


def test_contradictions_are_refused_when_built() -> None:
    with pytest.raises(ConfigError, match="train_views"):
        parse_config({"episodes": {"train_views": 4}, "sampling": {"num_views": 2}})
    with pytest.raises(ConfigError, match="shard_rows"):
        parse_config({"store": {"shard_rows": 10}, "extraction": {"forward_batch": 8}})
    with pytest.raises(ConfigError, match="crop_size"):
        parse_config({"sampling": {"crop_size": 300}})


def test_recipe_is_found_by_name_and_a_wrong_name_is_helped() -> None:
    assert find_recipe("ucf101_r3d50_1shot").name == "ucf101_r3d50_1shot.toml"
    with pytest.raises(ConfigError, match="ucf101_r3d50_1shot"):
        find_recipe("ucf101_r3d50_1sho")
