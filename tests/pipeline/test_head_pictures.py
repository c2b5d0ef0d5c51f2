"""Pictures of a head's maps show what the maps say, where they say it; every kind of map can be drawn."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cli
from cache.open import open_store
from contracts.world import World
from episodes.maps import AXES
from episodes.sampler import draw_noise_seed
from extract.build import build_backbone
from extract.decode import read_views
from pipeline import training
from pipeline.extraction import build_spec, extract_videos, video_sources
from pipeline.head_canvas import PANEL_PIXELS, Film, framed, with_region, write_gif
from pipeline.head_pictures import EpisodeView, ShownVideo, draw_maps
from pipeline.head_view import frame_steps, shortened_text, step_frames
from pipeline.model import FewShotModel
from pipeline.scoring import load_run
from pipeline.setup import make_sampler
from pipeline.sources import assemble

CPU = torch.device("cpu")
GREY = 90
SIDE = 40
LONG_NAMES = (
    "Pretending to put something next to something",
    "Moving [something] away from [something] with the left hand",
    "Unfolding something",
    "Tearing something just a little bit",
    "Opening something",
)


def grey_view(
    n_way: int = 5, k_shot: int = 1, num_frames: int = 4, num_steps: int = 2, names: tuple[str, ...] = LONG_NAMES
) -> EpisodeView:
    """One query of class 1, taken for class 3; every frame is grey, so that all colour in a picture is the map's."""
    supports = tuple(ShownVideo(f"{names[label]}/{shot}", label) for shot in range(k_shot) for label in range(n_way))
    query = ShownVideo("the query", 1)
    grey = np.full((num_frames, SIDE, SIDE, 3), GREY, np.uint8)
    scores = np.where(np.arange(n_way) == min(3, n_way - 1), 2.0, 0.0)[None]
    return EpisodeView(
        names[:n_way], supports, (query,), scores, {video.video_id: grey for video in (*supports, query)}, num_steps
    )


def rightly(view: EpisodeView) -> EpisodeView:
    """The view with the query taken for its own class."""
    return replace(view, scores=np.roll(view.scores, 1 - view.predicted(0), axis=1))


def with_frames(view: EpisodeView, query: np.ndarray, support: np.ndarray) -> EpisodeView:
    """The view with other frames of the query and of all supports."""
    frames = {video.video_id: support for video in view.supports} | {"the query": query}
    return replace(view, frames=frames)


def numbered_frames(num_frames: int, channel: int) -> np.ndarray:
    """Frames that tell their number by the brightness of one colour: 40, 60, 80, ..."""
    frames = np.zeros((num_frames, SIDE, SIDE, 3), np.uint8)
    frames[..., channel] = (40 + 20 * np.arange(num_frames))[:, None, None]
    return frames


def example_maps(view: EpisodeView, time_steps: int, other_steps: int, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """A map for every name in AXES."""
    generator = np.random.default_rng(0)
    sizes = {
        "S": len(view.supports), "Q": 1, "N": len(view.class_names), "2": 2, "K": min(2, view.num_steps),
        "T": time_steps, "U": other_steps, "H": grid[0], "W": grid[1],
    }  # fmt: skip
    maps: dict[str, np.ndarray] = {}
    for name, axes in AXES.items():
        shape = tuple(sizes[letter] for letter in axes.split()[1:])
        if axes.endswith("K"):
            maps[name] = np.broadcast_to(np.arange(sizes["K"]), shape)
        elif name == "tuple_video":
            maps[name] = np.array([[view.supports_of(label)[-1] for label in range(sizes["N"])]])
        else:
            maps[name] = generator.random(shape)
    return maps


def kind_names() -> set[str]:
    return {name.removesuffix("_query").removesuffix("_support").removesuffix("_video") for name in AXES}


@pytest.mark.parametrize(
    ("view", "time_steps", "other_steps", "grid", "num_frames"),
    [
        (rightly(grey_view(n_way=2, num_steps=1)), 1, 1, (1, 3), 7),
        pytest.param(grey_view(k_shot=3, num_frames=9, num_steps=4), 4, 6, (2, 5), 0, marks=pytest.mark.slow),
    ],
)
def test_every_named_map_can_be_drawn(
    tmp_path: Path,
    view: EpisodeView,
    time_steps: int,
    other_steps: int,
    grid: tuple[int, int],
    num_frames: int,
) -> None:
    written = draw_maps(view, example_maps(view, time_steps, other_steps, grid), tmp_path, gif_frames=num_frames)
    pictures = [path for path in written if path.suffix == ".png"]
    assert {path.name for path in pictures} == {f"query0_{kind}.png" for kind in kind_names()}
    for path in pictures:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        # Those of tuples and alignments are as wide as they need to be.
        can_be_narrow = "tuple" in path.stem or "alignment" in path.stem
        assert image.width <= 1440 if can_be_narrow else image.width == 1440
        assert pixels.std() > 10.0
        # Nothing runs over the edges: the margins are white.
        assert all((edge == 255).all() for edge in (pixels[:6], pixels[-6:], pixels[:, :6], pixels[:, -6:])), path
    # All but the weights moves, in as many frames as asked, though the videos stand still.
    films = [path for path in written if path.suffix == ".gif"]
    assert {path.stem for path in films} == (
        {f"query0_{kind}" for kind in kind_names() - {"support_weights"}} if num_frames else set()
    )
    assert all(len(gif_frames(path)) == num_frames for path in films)


def gif_frames(path: Path) -> np.ndarray:
    """(F, H, W, 3) float."""
    with Image.open(path) as image:
        frames = []
        for index in range(getattr(image, "n_frames")):  # noqa: B009  as above
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB"), dtype=float))
    return np.stack(frames)


def test_films_play_in_their_places_and_the_bar_grows(tmp_path: Path) -> None:
    red, blue = (np.zeros((3, 20, 20, 3), np.uint8) for _ in range(2))
    red[..., 0] = np.array([0, 120, 240])[:, None, None]
    blue[..., 2] = np.array([240, 120, 0])[:, None, None]
    frames = gif_frames(write_gif([[Film("one", red), Film("two", blue)]], tmp_path / "two.gif", "films", 3))
    middle, bar = frames.shape[1] - PANEL_PIXELS // 2 - 30, frames.shape[1] - 15
    left, right = 12 + PANEL_PIXELS // 2, 24 + PANEL_PIXELS * 3 // 2
    np.testing.assert_allclose(frames[:, middle, left], red[:, 0, 0], atol=6)
    np.testing.assert_allclose(frames[:, middle, right], blue[:, 0, 0], atol=6)
    dark = [int((frame[bar].max(axis=-1) < 60).sum()) for frame in frames]
    assert dark[0] < dark[1] < dark[2]


def peaks_of(maps: Mapping[str, tuple[int, int, int]], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Maps that are 1 at one place for every query and class and small elsewhere."""
    values = {}
    for name, place in maps.items():
        values[name] = np.full((1, 5, *shape), 0.01)
        values[name][(..., *place)] = 1.0
    return values


def hot_columns_and_rows(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the yellow that only the peak of the heat has."""
    red, green, blue = (pixels[..., channel].astype(int) for channel in range(3))
    rows, columns = np.nonzero((red > 160) & (green > 130) & (blue < red - 20))
    return columns, rows


def test_heat_is_hottest_where_the_map_peaks_in_time_and_space(tmp_path: Path) -> None:
    view = grey_view(num_frames=8)
    maps = peaks_of({"cross_query": (0, 0, 3), "cross_support": (3, 3, 0)}, (4, 4, 4))
    (path,) = draw_maps(view, maps, tmp_path)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    pixels = pixels[: -int(1.0 * 150)]  # without the bar of colours
    columns, rows = hot_columns_and_rows(pixels)
    cell = (9.2 * 150) / 8.0  # a frame of the strip
    is_query = columns < 9.6 * 75
    # The query peaks in the first step (frames 0 and 1), upper right; its supports in the last one, lower left.
    assert is_query.any()
    assert (~is_query).any()
    place = (columns - 30) / cell
    assert place[is_query].max() < 2.0
    assert place[~is_query].min() > 6.0
    assert (place[is_query] % 1.0 > 0.5).all()
    assert (place[~is_query] % 1.0 < 0.5).all()
    # Four rows of two strips: query and support beside the predicted class, then beside its own.
    assert len(np.unique(np.round(rows[is_query] / pixels.shape[0] * 4.0 - 0.5))) == 2


def test_heat_of_the_gif_moves_with_the_map(tmp_path: Path) -> None:
    view = grey_view(num_frames=8)
    maps = {"self_query": np.full((1, 2, 2, 2), 0.01)}
    maps["self_query"][0, 0, 0, 0] = maps["self_query"][0, 1, 1, 1] = 1.0
    _, gif = draw_maps(view, maps, tmp_path, gif_frames=8)
    frames = gif_frames(gif)
    for index, lies_low in ((0, False), (7, True)):
        columns, rows = hot_columns_and_rows(frames[index])
        left, top = 24 + PANEL_PIXELS, frames.shape[1] - 30 - PANEL_PIXELS
        assert ((columns - left > PANEL_PIXELS / 2) == lies_low).all()
        assert ((rows - top > PANEL_PIXELS / 2) == lies_low).all()
        assert len(columns) > 100


def test_support_map_of_each_shot_lies_on_that_shot(tmp_path: Path) -> None:
    view = grey_view(k_shot=2)
    maps = {"patch_support": np.full((10, 2, 2, 2), 0.01)}
    first, second = view.supports_of(3)
    maps["patch_support"][first, :, 0, 0] = maps["patch_support"][second, :, 1, 1] = 1.0
    for label in (0, 1, 2, 4):
        maps["patch_support"][view.supports_of(label)] = 1.0
    _, gif = draw_maps(view, maps, tmp_path, gif_frames=1)
    frame = gif_frames(gif)[0]
    columns, rows = hot_columns_and_rows(frame[: frame.shape[0] // 2])  # the row of the predicted class
    is_first = columns < frame.shape[1] / 2
    assert is_first.any()
    assert (~is_first).any()
    top = 30 + 60 + PANEL_PIXELS / 2
    assert (rows[is_first] < top).all()
    assert (rows[~is_first] > top).all()


def test_alignment_film_shows_the_support_frame_that_fits_best(tmp_path: Path) -> None:
    view = with_frames(grey_view(num_frames=4), numbered_frames(4, 0), numbered_frames(4, 2))
    backwards = np.broadcast_to(np.eye(4)[::-1], (1, 5, 4, 4))
    png, gif = draw_maps(view, {"class_alignment": backwards}, tmp_path, gif_frames=4)
    frames = gif_frames(gif)
    row = 30 + 60 + PANEL_PIXELS // 2
    np.testing.assert_allclose(frames[:, row, 12 + PANEL_PIXELS // 2, 0], [40, 60, 80, 100], atol=6)
    np.testing.assert_allclose(frames[:, row, 24 + PANEL_PIXELS * 3 // 2, 2], [100, 80, 60, 40], atol=6)
    with Image.open(png) as image:
        pixels = np.asarray(image.convert("RGB"))
    # The bright cells of the left matrix go from its lower left to its upper right corner.
    columns, rows = hot_columns_and_rows(pixels[: -int(1.2 * 150), : int(4.8 * 150)])
    assert len(columns) > 1000
    assert np.corrcoef(columns, rows)[0, 1] < -0.9


def test_query_frame_that_goes_with_none_has_no_best_frame(tmp_path: Path) -> None:
    view = with_frames(grey_view(num_frames=2), numbered_frames(2, 0), numbered_frames(2, 2))
    maps = {"class_alignment": np.broadcast_to([[0.0, 1.0], [0.0, 0.0]], (1, 5, 2, 2))}
    _, gif = draw_maps(view, maps, tmp_path, gif_frames=2)
    best = gif_frames(gif)[:, 30 + 60 + PANEL_PIXELS // 2, 24 + PANEL_PIXELS * 3 // 2, 2]
    np.testing.assert_allclose(best, [60, 0], atol=6)


def test_tuples_are_framed_on_the_query_and_on_the_named_support(tmp_path: Path) -> None:
    view = grey_view(k_shot=2, num_frames=8, num_steps=4)
    shown = view.supports_of(3)[1]
    frames = dict(view.frames) | {view.supports[shown].video_id: numbered_frames(8, 1)}
    view = replace(view, frames=frames)
    maps = {
        "tuple_query_2": np.broadcast_to([0, 1], (1, 5, 2)),
        "tuple_support_2": np.broadcast_to([2, 3], (1, 5, 2)),
        "tuple_video_2": np.full((1, 5), shown),
    }
    png, gif = draw_maps(view, maps, tmp_path, gif_frames=8)
    assert png.name == "query0_tuple_2.png"
    films = gif_frames(gif)
    border = 30 + 60 + 2
    for left, chosen in ((12, [1, 1, 1, 1, 0, 0, 0, 0]), (24 + PANEL_PIXELS, [0, 0, 0, 0, 1, 1, 1, 1])):
        at_border = films[:, border, left + PANEL_PIXELS // 2]
        is_orange = (at_border[:, 0] > 180) & (at_border[:, 2] < 80)
        np.testing.assert_array_equal(is_orange, np.array(chosen, dtype=bool))
    middle = films[:, 30 + 60 + PANEL_PIXELS // 2, 24 + PANEL_PIXELS * 3 // 2]
    np.testing.assert_allclose(middle[:, 1], 40 + 20 * np.arange(8), atol=6)


def test_warped_film_has_the_frames_of_the_source_times_and_black_outside(tmp_path: Path) -> None:
    view = with_frames(grey_view(num_frames=5), numbered_frames(5, 0), numbered_frames(5, 2))
    maps = {"warp_query": np.array([[0.5, -0.5]]), "warp_support": np.broadcast_to([-2.0, 0.0], (5, 2))}
    _, gif = draw_maps(view, maps, tmp_path, gif_frames=5)
    films = gif_frames(gif)
    row, right = 30 + 60 + PANEL_PIXELS // 2, 24 + PANEL_PIXELS * 3 // 2
    # Times -1, -0.5, ..., 1 come from -1, -0.75, ..., 0, that is from frames 0, 0.5, ..., 2.
    np.testing.assert_allclose(films[:, row, right, 0], [40, 50, 60, 70, 80], atol=6)
    second = row + PANEL_PIXELS + 60
    np.testing.assert_allclose(films[:, second, right, 2], [0, 120, 80, 40, 0], atol=6)


def test_region_is_boxed_where_the_offset_moves_it() -> None:
    black = np.zeros((2, 120, 120, 3), np.uint8)
    drawn = with_region(black, np.array([[0.5, 0.0], [0.0, -0.5]]))
    white = (drawn == 255).all(axis=-1)
    # To the right by half of half the frame: nothing is drawn on the left quarter, and the box has a left side there.
    assert not white[0, :, :29].any()
    assert white[0, 20:100, 29:36].any(axis=1).all()
    # Upwards: nothing below three quarters.
    assert not white[1, 91:].any()
    assert white[1, 84:91, 20:100].any(axis=0).all()
    # The arrow leads from the centre to the centre of the region.
    assert white[0, 56:65, 62:86].any(axis=0).all()


def test_opposite_offset_is_drawn_on_the_support(tmp_path: Path) -> None:
    offsets = np.broadcast_to([0.6, 0.0], (1, 5, 2, 2))
    _, gif = draw_maps(grey_view(), {"offset": offsets}, tmp_path, gif_frames=2)
    frame = gif_frames(gif)[0][30 + 60 :][:PANEL_PIXELS]
    white = (frame > 240).all(axis=-1)
    for left, is_right in ((12, True), (24 + PANEL_PIXELS, False)):
        columns = np.nonzero(white[:, left : left + PANEL_PIXELS].any(axis=0))[0]
        assert (columns.min() > PANEL_PIXELS / 4) == is_right
        assert (columns.max() < PANEL_PIXELS * 3 / 4) != is_right


def test_longest_bar_belongs_to_the_heaviest_support(tmp_path: Path) -> None:
    view = grey_view(k_shot=2)
    weights = np.full((1, 10), 0.02)
    weights[0, view.supports_of(3)[1]] = 0.8
    (path,) = draw_maps(view, {"support_weights": weights}, tmp_path)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    blue = (abs(pixels - (0x1D, 0x5C, 0x9F)) < 8).all(axis=-1)
    orange = (abs(pixels - (0xE6, 0x9F, 0x00)) < 8).all(axis=-1)
    row_pixels = 0.46 * 150
    rows = np.nonzero(blue.sum(axis=1) > 300)[0]
    # Classes in order, two supports each: the second of class 3 is the eighth row.
    assert ((rows - 0.85 * 150) // row_pixels == 7).all()
    assert 0 < orange.sum() < blue.sum() / 5


def test_of_very_many_supports_the_heaviest_are_shown(tmp_path: Path) -> None:
    names = tuple(f"class {number}" for number in range(40))
    view = grey_view(n_way=40, names=names)
    sizes = []
    for count in (40, 5):
        part = replace(view, supports=view.supports[:count])
        weights = np.random.default_rng(0).random((1, count))
        (path,) = draw_maps(part, {"support_weights": weights}, tmp_path)
        with Image.open(path) as image:
            sizes.append(image.height)
    assert sizes[0] == pytest.approx((30 * 0.46 + 1.45) * 150, abs=1)
    assert sizes[1] < sizes[0] / 3


def test_rightly_recognised_query_is_shown_beside_one_class(tmp_path: Path) -> None:
    heights = []
    for view in (grey_view(), rightly(grey_view())):
        (path,) = draw_maps(view, {"cross_query": np.ones((1, 5, 1, 2, 2))}, tmp_path)
        with Image.open(path) as image:
            heights.append(image.height)
    assert heights[1] < heights[0]


@pytest.mark.parametrize(
    "maps",
    [
        {"class_alignment": np.broadcast_to(np.eye(4), (1, 5, 4, 4))},
        {"tuple_query_2": np.broadcast_to([0, 1], (1, 5, 2)), "tuple_support_2": np.broadcast_to([2, 3], (1, 5, 2))},
    ],
)
def test_page_of_one_narrow_picture_is_not_half_empty(tmp_path: Path, maps: dict[str, np.ndarray]) -> None:
    (path,) = draw_maps(rightly(grey_view(num_frames=4, num_steps=4)), maps, tmp_path)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] < 1100
    used = np.flatnonzero((pixels != 255).any(axis=(0, 2)))
    assert used.max() > pixels.shape[1] - 100
    assert used.max() < pixels.shape[1] - 6


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ({"glow": np.zeros((1, 5))}, "no map is called 'glow'"),
        ({"self_query": np.zeros((2, 1, 2, 2))}, r"'self_query' is \(2, 1, 2, 2\).*Q = 1"),
        ({"support_weights": np.zeros((1, 4))}, "S = 5"),
        ({"self_query": np.full((1, 1, 2, 2), np.nan)}, "not finite"),
        ({"self_query": np.full((1, 1, 2, 2), -1.0)}, "'self_query' has negative"),
        ({"tuple_query": np.full((1, 5, 2), 2)}, r"time steps \(2, 2\), but a cube has 2"),
        ({"tuple_video": np.full((1, 5), 9)}, "support 9 of 5"),
    ],
)
def test_maps_that_do_not_fit_are_refused_by_name(tmp_path: Path, maps: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw_maps(grey_view(), maps, tmp_path)


def test_steps_share_the_clip_evenly_and_long_names_lose_their_middle() -> None:
    assert step_frames(16, 2).tolist() == [4, 12]
    assert step_frames(8, 8).tolist() == list(range(8))
    assert frame_steps(8, 2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert shortened_text("abcdefghij", 7) == "abc…hij"
    assert shortened_text("abc", 7) == "abc"
    marked = framed(np.zeros((2, 44, 44, 3), np.uint8), [False, True])
    assert not marked[0].any()
    assert marked[1, 0].any()


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each of three heads on one store."""
    folder = tmp_path_factory.mktemp("runs")
    config = world.config()
    backbone = build_backbone(config.backbone, config.sampling)
    with open_store(folder / "cubes.zarr", spec=build_spec(config, backbone, CPU), mode="a", shard_rows=8) as store:
        extract_videos(store, list(video_sources(world.manifest).values()), backbone, config, CPU)
    for head in ("mastaf", "cross", "neighbor"):
        overrides = (f'store.path="{folder / "cubes.zarr"}"', f"head.name={head}", "training.episodes=3")
        training.train(world.config(*overrides), folder / head, CPU)
    return folder


def mastaf(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of a command in this process; 0 where it returns."""
    monkeypatch.setattr(sys, "argv", ["mastaf", *map(str, arguments)])
    monkeypatch.setattr(signal, "signal", lambda *_arguments: None)
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_command_writes_pictures_arrays_and_what_they_are_of(
    world: World, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "maps"
    arguments = ("maps", runs / "mastaf", "--split", "test", "--episode", 3, "--query", 1, "--gif", "--out", out)
    assert mastaf(monkeypatch, *arguments, "--device", "cpu") == 0
    printed = {Path(line) for line in capsys.readouterr().out.splitlines()}
    assert printed == set(out.iterdir())
    names = {"query1_self.png", "query1_self.gif", "query1_cross.png", "query1_cross.gif", "maps.npz", "maps.json"}
    assert {path.name for path in printed} == names
    assert len(gif_frames(out / "query1_cross.gif")) == 4  # of the clip

    run = load_run(runs / "mastaf", CPU)
    sampler = make_sampler(run.config, world.manifest, "test")
    episode = sampler.episode(3)
    record = json.loads((out / "maps.json").read_text())
    assert [each["video_id"] for each in record["supports"]] == list(episode.support_ids)
    assert [each["video_id"] for each in record["queries"]] == list(episode.query_ids)
    assert [each["label"] for each in record["queries"]] == list(episode.query_labels)
    assert record["class_names"] == list(episode.class_names)
    for each in record["queries"]:
        assert each["predicted"] == int(np.argmax(each["scores"]))
        assert each["class_name"] == episode.class_names[each["label"]]

    views = np.zeros((1, 2), dtype=np.int64)
    seeds = [draw_noise_seed(sampler.split_hash, sampler.seed, 3)]
    batch = assemble([episode], run.source, views, views, seeds=seeds)
    with torch.no_grad():
        output = FewShotModel(torch.nn.Identity(), run.model.head).eval()(batch, with_maps=True)
    arrays = np.load(out / "maps.npz")
    assert set(arrays) == set(output.maps) == set(record["maps"])
    for name, values in output.maps.items():
        np.testing.assert_array_equal(arrays[name], values[0].numpy())
        assert len(record["maps"][name]["axes"].split()) == arrays[name].ndim
    np.testing.assert_allclose([each["scores"] for each in record["queries"]], output.logits[0].numpy(), rtol=1e-6)


def test_command_draws_the_frames_that_the_network_saw(
    world: World, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mastaf(monkeypatch, "maps", runs / "cross", "--split", "test", "--query", 0, "--device", "cpu", "--gif") == 0
    folder = runs / "cross" / "maps" / "test_0"
    query = json.loads((folder / "maps.json").read_text())["queries"][0]["video_id"]
    run = load_run(runs / "cross", CPU)
    clip = read_views(video_sources(world.manifest)[query], run.config.sampling, [0]).clips[0]
    shown = gif_frames(folder / "query0_cross.gif")[:, 30 + 60 : 30 + 60 + PANEL_PIXELS, 12 : 12 + PANEL_PIXELS]
    assert len(shown) == len(clip) == 4
    for frame, original in zip(shown, clip, strict=True):
        small = np.asarray(Image.fromarray(frame.astype(np.uint8)).resize((24, 24), Image.Resampling.BOX), dtype=float)
        # Enlarging, shrinking and a palette of 256 colours blur a little.
        assert abs(small - original).mean() < 8.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["neighbor"], ["'neighbor'", "nothing to show"]),
        (["mastaf", "--query", "2"], ["--query 2", "0 to 1"]),
        (["mastaf", "--split", "tset"], ["tset"]),
        (["absent"], ["absent"]),
        (["mastaf", "--out", __file__], [__file__, "is a file"]),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_exit_code_2(
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    run, *others = arguments
    assert mastaf(monkeypatch, "maps", runs / run, "--device", "cpu", *others) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]


def test_missing_video_is_named_in_one_line(
    world: World, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(world.folder, folder)
    run = load_run(runs / "cross", CPU)
    lost = make_sampler(run.config, world.manifest, "test").episode(0).support_ids[0]
    (folder / "videos" / f"{lost}.mp4").unlink()
    arguments = ("maps", runs / "cross", "--split", "test", "--device", "cpu", "--out", tmp_path / "out")
    assert mastaf(monkeypatch, *arguments, "--manifest", folder / world.manifest_path.name) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lost in lines[0]
    assert "have no file" in lines[0]
    assert not (tmp_path / "out").exists()
