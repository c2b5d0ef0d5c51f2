"""ViViT: order of the tokens, inflation of an image network, and positions for other clip sizes.

Letters: B clips; C channels; T' H' W' tubelets along time, height and width.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from extract.backbones.vivit import inflated_patches, read_preprocessing, resized_positions
from extract.build import build_backbone, weights_digest
from extract.config import BackboneConfig, SamplingConfig
from extract.weights import BackboneError, WeightsError

transformers = pytest.importorskip("transformers", reason="transformers is not installed (the extra mastaf[vivit])")

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def sampling(num_frames: int = 8, crop_size: int = 48) -> SamplingConfig:
    return SamplingConfig(num_frames=num_frames, resize_size=crop_size, crop_size=crop_size)


def build(clip: SamplingConfig, weights: str = "random:2", **options: Any) -> Any:
    return build_backbone(BackboneConfig(name="vivit", weights=weights, options=options), clip)


def random_clips(num_frames: int = 8, side: int = 48, num_clips: int = 2) -> torch.Tensor:
    return torch.rand((num_clips, 3, num_frames, side, side), generator=torch.Generator().manual_seed(0))


def give_random_positions(model: Any) -> None:
    positions = model.embeddings.position_embeddings
    positions.data.copy_(torch.randn(positions.shape, generator=torch.Generator().manual_seed(5)) * 0.3)


def save_vivit(directory: Path, num_frames: int, side: int, **fields: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.VivitModel(
            transformers.VivitConfig(num_frames=num_frames, image_size=side, **{**SIZES, **fields})
        ).eval()
    give_random_positions(model)
    model.save_pretrained(directory)
    return model


def save_image_vit(directory: Path, side: int = 48) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.ViTModel(transformers.ViTConfig(image_size=side, patch_size=16, **SIZES)).eval()
    model.save_pretrained(directory)
    return model


def test_cube_parity_with_the_tokens_of_transformers() -> None:
    backbone = build(sampling(), **SIZES)
    give_random_positions(backbone.model)
    clips = random_clips()
    with torch.inference_mode():
        cube = backbone(clips)["cube"]
        tokens = backbone.model(clips.transpose(1, 2)).last_hidden_state
    assert cube.shape == (2, 16, 4, 3, 3)
    for time in range(4):
        for row in range(3):
            for column in range(3):
                assert torch.equal(cube[:, :, time, row, column], tokens[:, 1 + (time * 3 + row) * 3 + column])


@pytest.mark.parametrize(("time", "row", "column"), [(0, 0, 0), (1, 2, 0), (2, 0, 1), (3, 1, 2)])
def test_pixels_of_a_tubelet_move_their_own_place_in_the_cube(time: int, row: int, column: int) -> None:
    backbone = build(sampling(), **SIZES)
    backbone.model.layers = torch.nn.ModuleList()  # without attention every token sees its own tubelet only
    clips = random_clips(num_clips=1)
    changed = clips.clone()
    changed[:, :, 2 * time : 2 * time + 2, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 1.0
    with torch.inference_mode():
        moved = (backbone(changed)["cube"] != backbone(clips)["cube"]).any(1)[0]
    assert moved.nonzero().tolist() == [[time, row, column]]


def test_directory_of_the_same_size_gives_the_same_numbers(tmp_path: Path) -> None:
    trained = save_vivit(tmp_path, 8, 48)
    backbone = build(sampling(), weights=str(tmp_path))
    clips = random_clips()
    with torch.inference_mode():
        tokens = trained(clips.transpose(1, 2)).last_hidden_state[:, 1:]
        cube = backbone(clips)["cube"]
    assert torch.equal(cube.flatten(2).transpose(1, 2), tokens)


def test_directory_of_a_classifier_loads_its_trunk(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = transformers.VivitConfig(num_frames=8, image_size=48, **SIZES)
        model = transformers.VivitForVideoClassification(config).eval()
    model.save_pretrained(tmp_path)
    backbone = build(sampling(), weights=str(tmp_path))
    clips = random_clips()
    with torch.inference_mode():
        tokens = model.vivit(clips.transpose(1, 2)).last_hidden_state[:, 1:]
        assert torch.equal(backbone(clips)["cube"].flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize(("num_frames", "side"), [(8, 48), (16, 64), (32, 32), (10, 80)])
def test_directory_of_another_size_is_interpolated(num_frames: int, side: int, tmp_path: Path) -> None:
    trained = save_vivit(tmp_path, 16, 48)
    backbone = build(sampling(num_frames, side), weights=str(tmp_path))
    grid = (num_frames // 2, side // 16, side // 16)
    with torch.inference_mode():
        assert backbone(random_clips(num_frames, side))["cube"].shape == (2, 16, *grid)
    positions = backbone.model.embeddings.position_embeddings
    expected = resized_positions(trained.embeddings.position_embeddings, (8, 3, 3), grid)
    assert torch.equal(positions, expected)
    if num_frames == 16 and side == 48:
        assert torch.equal(positions, trained.embeddings.position_embeddings)


def test_positions_are_interpolated_in_space_and_in_time_by_their_own_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn((4, 3, 3, 5), generator=generator)
    positions = torch.cat((torch.randn((1, 1, 5), generator=generator), table.reshape(1, -1, 5)), dim=1)
    found = resized_positions(positions, (4, 3, 3), (4, 6, 6))
    assert torch.equal(found[:, 0], positions[:, 0])
    for time in range(4):
        plane = F.interpolate(table[time].permute(2, 0, 1)[None], (6, 6), mode="bicubic", align_corners=False)
        torch.testing.assert_close(found[0, 1:].reshape(4, 6, 6, 5)[time], plane[0].permute(1, 2, 0))
    # Twice the time steps, linear: the quarters between neighbours, and the ends held.
    longer = resized_positions(positions, (4, 3, 3), (8, 3, 3))[0, 1:].reshape(8, 3, 3, 5)
    torch.testing.assert_close(longer[0], table[0])
    torch.testing.assert_close(longer[3], 0.75 * table[1] + 0.25 * table[2])
    assert torch.equal(resized_positions(positions, (4, 3, 3), (4, 3, 3)), positions)


def test_image_positions_are_repeated_over_time() -> None:
    positions = torch.randn((1, 10, 5), generator=torch.Generator().manual_seed(0))
    found = resized_positions(positions, (1, 3, 3), (4, 3, 3))
    torch.testing.assert_close(found[0, 1:].reshape(4, 9, 5), positions[0, 1:].expand(4, 9, 5))


@pytest.mark.parametrize("inflation", ["central", "mean"])
@pytest.mark.parametrize("tubelet_frames", [1, 2, 4])
def test_still_clip_through_an_inflated_network_equals_the_image_network(
    inflation: str, tubelet_frames: int, tmp_path: Path
) -> None:
    image_vit = save_image_vit(tmp_path)
    tubelet = (tubelet_frames, 16, 16)
    backbone = build(
        sampling(), weights="pretrained", image_vit=str(tmp_path), inflation=inflation, tubelet_size=tubelet
    )
    picture = random_clips(1)
    still = picture.expand(-1, -1, 8, -1, -1)
    with torch.inference_mode():
        embedded = backbone.model.embeddings(still.transpose(1, 2))
        image = image_vit.embeddings(picture[:, :, 0])
    expected = torch.cat((image[:, :1], image[:, 1:].repeat(1, 8 // tubelet_frames, 1)), dim=1)
    torch.testing.assert_close(embedded, expected, rtol=1e-5, atol=1e-5)  # sums of float32 in another order
    assert torch.equal(backbone.model.layers[1].mlp.fc1.weight, image_vit.layers[1].mlp.fc1.weight)
    assert torch.equal(backbone.model.layernorm.weight, image_vit.layernorm.weight)


def test_central_inflation_sees_the_central_frame_alone() -> None:
    kernel = torch.randn((4, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    central = inflated_patches(kernel, 3, "central")
    assert torch.equal(central[:, :, 1], kernel)
    assert central[:, :, [0, 2]].abs().max() == 0
    torch.testing.assert_close(inflated_patches(kernel, 3, "mean").sum(2), kernel)


def test_image_network_of_another_size_is_interpolated(tmp_path: Path) -> None:
    save_image_vit(tmp_path, side=64)
    backbone = build(sampling(8, 48), weights="pretrained", image_vit=str(tmp_path))
    with torch.inference_mode():
        assert backbone(random_clips())["cube"].shape == (2, 16, 4, 3, 3)


def test_file_of_a_network_from_an_image_network_loads_again(tmp_path: Path) -> None:
    save_image_vit(tmp_path)
    backbone = build(sampling(), weights="pretrained", image_vit=str(tmp_path))
    give_random_positions(backbone.model)
    torch.save(backbone.state_dict(), tmp_path / "weights.pt")
    again = build(sampling(), weights=str(tmp_path / "weights.pt"), image_vit=str(tmp_path))
    assert weights_digest(again) == weights_digest(backbone)
    assert again.architecture == backbone.architecture


@pytest.mark.parametrize("weights", ["random:3", "none"])
def test_random_weights_and_an_image_network_are_refused(weights: str, tmp_path: Path) -> None:
    save_image_vit(tmp_path)
    with pytest.raises(BackboneError, match=f"weights '{weights}' and image_vit .*Allowed.* \"pretrained\"") as caught:
        build(sampling(), weights=weights, image_vit=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_architecture_is_that_of_the_directory_at_the_size_in_use(tmp_path: Path) -> None:
    save_vivit(tmp_path, 16, 64, hidden_act="relu", layer_norm_eps=1e-5, qkv_bias=False, hidden_dropout_prob=0.1)
    assert build(sampling(8, 48), weights=str(tmp_path)).architecture == {
        **SIZES,
        "hidden_act": "relu",
        "num_channels": 3,
        "head_dim": 8,
        "layer_norm_eps": 1e-5,
        "qkv_bias": False,
        "tubelet_size": [2, 16, 16],
        "num_frames": 8,
        "image_size": [48, 48],
        "class_token": "attended, then dropped",
    }


def test_architecture_names_neither_the_directory_nor_the_inflation(tmp_path: Path) -> None:
    stated = []
    for folder, inflation in (("first", "central"), ("second", "mean")):
        save_image_vit(tmp_path / folder)
        backbone = build(
            sampling(), weights="pretrained", image_vit=str(tmp_path / folder), inflation=inflation, min_frames=4
        )
        stated.append(backbone.architecture)
    assert stated[0] == stated[1]
    assert str(tmp_path) not in json.dumps(stated)


def test_preprocessing_is_read_from_the_directory(tmp_path: Path) -> None:
    assert read_preprocessing(tmp_path).mean == (0.5, 0.5, 0.5)
    settings: dict[str, Any] = {
        "do_rescale": True,
        "rescale_factor": 1 / 127.5,
        "offset": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.5, 0.25],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    found = read_preprocessing(tmp_path)
    for byte in (0, 100, 255):
        for colour in range(3):
            library = ((byte / 127.5 - 1) - settings["image_mean"][colour]) / settings["image_std"][colour]
            assert (byte / 255 - found.mean[colour]) / found.std[colour] == pytest.approx(library)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    assert read_preprocessing(tmp_path).std == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("clip", "options", "message"),
    [
        (sampling(6), SIZES, "at least 8 frames"),
        (sampling(9), SIZES, "multiples of its tubelet's 2"),
        (sampling(8, 50), SIZES, "crop_size 50 is no multiple"),
        (sampling(), {**SIZES, "num_attention_heads": 3}, "hidden_size 16 is no multiple of 3 heads"),
        (sampling(), {"inflation": "first"}, "inflation"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(clip: SamplingConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        build(clip, **options)


def test_fewer_frames_are_taken_when_the_config_says_so() -> None:
    backbone = build(sampling(4), min_frames=4, **SIZES)
    with torch.inference_mode():
        assert backbone(random_clips(4))["cube"].shape == (2, 16, 2, 3, 3)


def test_directory_and_sizes_together_are_refused(tmp_path: Path) -> None:
    save_vivit(tmp_path, 8, 48)
    with pytest.raises(BackboneError, match="leave out the options hidden_size"):
        build(sampling(), weights=str(tmp_path), hidden_size=16)
    with pytest.raises(BackboneError, match="cannot start from both"):
        build(sampling(), weights=str(tmp_path), image_vit=str(tmp_path))


def test_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json"):
        build(sampling(), weights=str(tmp_path))
    with pytest.raises(WeightsError, match=r"config\.json"):
        build(sampling(), weights="pretrained", image_vit=str(tmp_path / "absent"))


def test_directory_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_vivit(tmp_path, 8, 48)
    state = load_file(tmp_path / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="lacks weights of VivitModel: layernorm"):
        build(sampling(), weights=str(tmp_path))


def test_absent_library_is_one_line_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackboneError, match=r"pip install 'mastaf\[vivit\]'"):
        build(sampling(), **SIZES)
