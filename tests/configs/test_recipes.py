"""Every recipe that ships is loaded, and says what it is."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.load import load_config, recipe_folder

RECIPES = sorted(recipe_folder().glob("*.toml"))
DATA_SETS = ("ucf101", "hmdb51", "ssv2_part", "ssv2_all")
RIVALS = ("baseline", "matchingnet", "trx", "strm", "ta2n", "tsn_mean", "otam", "feat", "pal")
"""Heads of other papers; their recipes end in the name."""
RIVAL_RECIPES = [file for file in RECIPES if file.stem.endswith(tuple(f"shot_{head}" for head in RIVALS))]
CLASSIFY_RECIPES = ("classify_r3d50", "classify_tsn", "demo_classify", "ssv2_all_r3d50_classify")
"""First stages: they train a backbone, and no few-shot head."""
PAPER_RECIPES = [
    file
    for file in RECIPES
    if file.stem.startswith(DATA_SETS)
    and file.stem not in ("hmdb51_published_readme", *CLASSIFY_RECIPES)
    and file not in RIVAL_RECIPES
]
PER_STEP = {"ucf101": 128, "hmdb51": 64, "ssv2_part": 32, "ssv2_all": 32}
BACKBONES = {"r3d50": "r3d50", "tsn": "tsn_resnet50", "vivit": "vivit"}
FRAMES = {"r3d50": 16, "tsn": 8, "vivit": 8}
WEIGHTS = {"r3d50": "r3d50_KMS_200ep.pth", "tsn": "pretrained", "vivit": "pretrained"}

# Reference 8.2: the numbers of the paper's tables 1 to 3, 5-way, in percent.
PUBLISHED = {
    ("ucf101", "r3d50"): {"1 mastaf": 90.6, "5 mastaf": 97.6, "1 neighbor": 82.7, "1 self": 90.3, "1 cross": 90.5},
    ("ucf101", "tsn"): {"1 mastaf": 79.3, "5 mastaf": 90.3},
    ("ucf101", "vivit"): {"1 mastaf": 91.6},
    ("hmdb51", "r3d50"): {"1 mastaf": 67.9, "5 mastaf": 81.2},
    ("hmdb51", "tsn"): {"1 mastaf": 54.8, "5 mastaf": 67.7},
    ("hmdb51", "vivit"): {"1 mastaf": 69.5},
    ("ssv2_part", "r3d50"): {"1 mastaf": 39.9, "5 mastaf": 52.2},
    ("ssv2_part", "tsn"): {"1 mastaf": 37.5, "5 mastaf": 50.2},
    ("ssv2_part", "vivit"): {"1 mastaf": 45.6},
    ("ssv2_all", "r3d50"): {"1 mastaf": 50.3, "5 mastaf": 66.7, "1 neighbor": 43.2, "1 self": 49.4, "1 cross": 49.2},
    ("ssv2_all", "tsn"): {"1 mastaf": 46.9, "5 mastaf": 62.4},
    ("ssv2_all", "vivit"): {"1 mastaf": 60.7},
}


@dataclass(frozen=True, slots=True)
class RecipeName:
    """What a paper recipe's file name says: DATA_BACKBONE_Kshot, and a head that is not the full method."""

    data: str
    backbone: str
    k_shot: int
    head: str

    @classmethod
    def read(cls, stem: str) -> "RecipeName":
        """Split ``ssv2_all_r3d50_1shot_self``."""
        data = next(name for name in DATA_SETS if stem.startswith(f"{name}_"))
        backbone, shots, *head = stem.removeprefix(f"{data}_").split("_")
        assert len(head) <= 1
        assert shots.endswith("shot")
        return cls(data, backbone, int(shots.removesuffix("shot")), head[0] if head else "mastaf")


@pytest.mark.parametrize("file", RECIPES, ids=[file.stem for file in RECIPES])
def test_recipe_loads_and_its_header_names_its_command(file: Path) -> None:
    config = load_config(file)
    header = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"mastaf train {file.stem}" in header or ("mastaf demo" in header and file.stem.startswith("demo_"))
    assert "Aims at" in header or "Measured" in header
    assert config.evaluation.split == "test"


@pytest.mark.parametrize("file", PAPER_RECIPES, ids=[file.stem for file in PAPER_RECIPES])
def test_paper_recipe_is_what_its_name_says(file: Path) -> None:
    name, config = RecipeName.read(file.stem), load_config(file)
    assert config.data.manifest == f"{name.data}.csv"
    assert config.data.global_labels == "train"
    assert (config.backbone.name, config.backbone.weights) == (BACKBONES[name.backbone], WEIGHTS[name.backbone])
    sampling = config.sampling
    assert (sampling.num_frames, sampling.resize_size, sampling.crop_size) == (FRAMES[name.backbone], 256, 224)
    assert (sampling.policy, sampling.crop, sampling.flip, sampling.normalization) == (
        "reference",
        "centre",
        True,
        "unit",
    )
    episodes = config.episodes
    assert (episodes.protocol, episodes.n_way, episodes.k_shot, episodes.n_query) == ("one_query", 5, name.k_shot, 1)
    assert config.head.name == name.head
    assert config.head.options == ({"average_time": True} if name.backbone == "tsn" else {})
    training = config.training
    assert training.mode == "end_to_end"
    assert (training.optimizer, training.learning_rate, training.backbone_learning_rate) == ("sgd", 0.01, None)
    assert (training.momentum, training.weight_decay, training.schedule) == (0.0, 0.0, "constant")
    assert training.episodes_per_step == PER_STEP[name.data]
    assert training.episodes == (256_000 if name.data == "ssv2_all" else 128_000)
    assert (config.evaluation.episodes, config.evaluation.seed) == (10_000, 0)
    header = file.read_text().split("[data]")[0]
    assert f"5-way {name.k_shot}-shot" in header
    published = PUBLISHED[name.data, name.backbone][f"{name.k_shot} {name.head}"]
    assert f"# Aims at:            {published} %" in header


# Reference 8.2: rows of the MASTAF tables, 5-way 1-shot and 5-shot, in percent.
RIVAL_ROWS: dict[tuple[str, str], dict[str, tuple[float | None, ...]]] = {
    ("r3d50", "baseline"): {
        "ssv2_part": (24.9, 36.1),
        "ssv2_all": (25.6, 39.8),
        "ucf101": (53.4, 88.7),
        "hmdb51": (40.1, 68.1),
    },
    ("r3d50", "matchingnet"): {
        "ssv2_part": (34.1, 45.2),
        "ssv2_all": (43.2, 54.4),
        "ucf101": (82.7, 93.5),
        "hmdb51": (61.8, 75.6),
    },
    ("r3d50", "trx"): {
        "ssv2_part": (26.1, 47.0),
        "ssv2_all": (34.9, 58.9),
        "ucf101": (82.5, 94.1),
        "hmdb51": (57.0, 74.3),
    },
    ("vivit", "trx"): {"ssv2_part": (34.7,), "ssv2_all": (42.7,), "ucf101": (84.8,), "hmdb51": (58.1,)},
    ("tsn", "tsn_mean"): {"ssv2_all": (34.4, 43.8)},
    ("tsn", "otam"): {"ssv2_all": (42.8, 52.3)},
    ("tsn", "feat"): {"ssv2_all": (45.3, 61.2), "ucf101": (83.9, 94.5), "hmdb51": (60.4, 75.2)},
    ("tsn", "pal"): {"ssv2_all": (46.4, 62.6), "ucf101": (85.3, 95.2), "hmdb51": (60.9, 75.8)},
    # The papers' own: TRX and STRM report 5-shot.
    ("tsn", "trx"): {
        "ssv2_all": (42.0, 64.6),
        "ssv2_part": (36.0, 59.1),
        "kinetics100": (None, 85.9),
        "hmdb51": (None, 75.6),
        "ucf101": (None, 96.1),
    },
    ("tsn", "strm"): {
        "ssv2_all": (None, 68.1),
        "kinetics100": (None, 86.7),
        "hmdb51": (None, 77.3),
        "ucf101": (None, 96.8),
    },
    ("tsn", "ta2n"): {
        "kinetics100": (72.8, 85.8),
        "ssv2_all": (47.6, 61.0),
        "ucf101": (81.9, 95.1),
        "hmdb51": (59.7, 73.9),
    },
}
RIVAL_CELLS = [
    (f"{data}_{backbone}_{k_shot}shot_{head}", head, k_shot, published)
    for (backbone, head), rows in RIVAL_ROWS.items()
    for data, numbers in rows.items()
    for k_shot, published in zip((1, 5), numbers, strict=False)
    if published is not None
]
# Reference 8.1: rate, training episodes, episodes of a step, queries of each class, sum or mean.
RIVAL_SETTINGS = {
    ("trx", "ssv2_all"): (1e-3, 75_000, 16, 5, "sum"),
    ("trx", "ucf101"): (1e-3, 10_000, 16, 5, "sum"),
    ("strm", "ssv2_all"): (1e-3, 75_000, 16, 4, "sum"),
    ("strm", "hmdb51"): (1e-4, 20_000, 16, 4, "sum"),
    ("strm", "kinetics100"): (1e-4, 10_000, 16, 4, "sum"),
    ("ta2n", "ssv2_all"): (1e-3, 100_000, 16, 5, "sum"),
    ("otam", "ssv2_all"): (1e-3, 50_000, 1, 5, "mean"),
    ("tsn_mean", "ssv2_all"): (1e-3, 50_000, 1, 5, "mean"),
    ("pal", "ucf101"): (1e-4, 7_000, 1, 5, "mean"),
}


def test_every_row_of_another_method_has_its_recipe_and_no_recipe_is_without_a_row() -> None:
    assert sorted(stem for stem, *_ in RIVAL_CELLS) == sorted(file.stem for file in RIVAL_RECIPES)


@pytest.mark.parametrize(("stem", "head", "k_shot", "published"), RIVAL_CELLS, ids=[cell[0] for cell in RIVAL_CELLS])
def test_recipe_of_another_method_is_what_its_name_says(stem: str, head: str, k_shot: int, published: float) -> None:
    file = recipe_folder() / f"{stem}.toml"
    config = load_config(file)
    data, backbone = stem.removesuffix(f"_{k_shot}shot_{head}").rsplit("_", 1)
    assert config.data.manifest == f"{data}.csv"
    assert (config.head.name, config.episodes.n_way, config.episodes.k_shot) == (head, 5, k_shot)
    assert (config.backbone.name, config.backbone.weights) == (BACKBONES[backbone], WEIGHTS[backbone])
    assert (config.sampling.num_frames, config.sampling.resize_size, config.sampling.crop_size) == (
        FRAMES[backbone],
        256,
        224,
    )
    assert config.sampling.normalization == "unit"
    assert f"# Aims at:            {published} %" in file.read_text()
    if backbone in ("r3d50", "vivit"):
        assert (config.episodes.protocol, config.episodes.n_query) == ("one_query", 1)
        assert config.head.options.get("cardinalities") == ([1] if head == "trx" else None)
        assert config.training.mode == ("cached" if head == "baseline" else "end_to_end")
    else:
        assert config.sampling.policy == ("ta2n" if head == "ta2n" else "trx")
        assert config.sampling.crop == "random"
        assert config.sampling.flip == (head != "ta2n" or not data.startswith("ssv2"))
        assert config.episodes.protocol == "per_class"


@pytest.mark.parametrize(("head", "data"), RIVAL_SETTINGS, ids=str)
def test_recipes_of_other_methods_hold_the_published_settings(head: str, data: str) -> None:
    config = load_config(recipe_folder() / f"{data}_tsn_5shot_{head}.toml")
    training = config.training
    assert (
        training.learning_rate,
        training.episodes,
        training.episodes_per_step,
        config.episodes.n_query,
        training.query_reduction,
    ) == RIVAL_SETTINGS[head, data]
    # Reference 6: PAL alone steps down, at 3,000 and 6,000.
    schedule = ("multi_step", (3_000, 6_000)) if head == "pal" else ("constant", ())
    assert (training.optimizer, training.momentum) == ("sgd", 0.0)
    assert (training.schedule, training.milestones) == schedule


def test_every_pal_recipe_steps_down_and_names_its_pre_training() -> None:
    recipes = [file for file in RIVAL_RECIPES if file.stem.endswith("_pal")]
    assert len(recipes) == 6
    for file in recipes:
        config, header = load_config(file), file.read_text().split("[data]")[0]
        assert config.training.milestones == (3_000, 6_000)
        data = file.stem.split("_tsn")[0]
        assert f"mastaf train classify_tsn --set data.manifest={data}.csv --out runs/{data}_tsn_classify" in header
        assert f"--set training.initial_weights=runs/{data}_tsn_classify/best.pt" in header


@pytest.mark.parametrize("file", RECIPES, ids=[file.stem for file in RECIPES])
def test_recipe_that_trains_a_backbone_states_what_its_batchnorm_does(file: Path) -> None:
    config = load_config(file)
    if config.training.mode == "cached":
        assert config.training.backbone_batchnorm is None
        return
    ours = {
        "demo_end_to_end": "episode",
        "end_to_end_mastaf": "episode",
        "demo_classify": "synchronised",
        "classify_r3d50": "frozen",
        "classify_tsn": "synchronised",
        "ssv2_all_r3d50_classify": "synchronised",
    }
    assert config.training.backbone_batchnorm == ours.get(file.stem, "published")
    assert "not in two calls" not in file.read_text()


def test_classification_recipes_are_those_listed_and_fit_the_few_shot_recipes_that_follow_them() -> None:
    found = {file.stem: load_config(file) for file in RECIPES if load_config(file).training.mode == "classify"}
    assert sorted(found) == sorted(CLASSIFY_RECIPES)
    assert all(config.classify.holdout > 0 for config in found.values())
    # The backbone is used on the frames that it was trained on.
    tsn, pal = found["classify_tsn"], load_config(recipe_folder() / "hmdb51_tsn_5shot_pal.toml")
    assert (tsn.sampling, tsn.backbone) == (pal.sampling, pal.backbone)
    demo, end_to_end = found["demo_classify"], load_config(recipe_folder() / "demo_end_to_end.toml")
    assert (demo.sampling, demo.backbone) == (end_to_end.sampling, end_to_end.backbone)
    # Equal numbers of clips pass in training: 5 ways with 1 support and 3 queries each.
    assert demo.training.episodes == end_to_end.training.episodes * 5 * (1 + 3)
    baseline = load_config(recipe_folder() / "ssv2_all_r3d50_1shot_baseline.toml")
    r3d = found["ssv2_all_r3d50_classify"]
    assert r3d.sampling == baseline.sampling.model_copy(update={"crop": "random", "flip": False})
    assert r3d.backbone == baseline.backbone


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
