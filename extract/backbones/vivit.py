"""ViViT with joint space-time attention (model 1 of the paper), on the transformers library.

Paper: "ViViT: A Video Vision Transformer", ICCV 2021, https://arxiv.org/abs/2103.15691.
The network is transformers' VivitModel, so no code was consulted; inflation follows section 3.4 of the paper.
Deviations: the class token is dropped and the other tokens are laid back into a cube; transformers' own position
interpolation mixes time with space, so ours is used instead.

Letters: B clips; F frames; H W pixels; C channels; T' H' W' tubelets along time, height and width.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from extract.backbone import HALF, Preprocessing
from extract.config import BackboneConfig, SamplingConfig
from extract.weights import BackboneError, WeightsError, checked_options, copy_weights, load_weights, random_seed

POSITIONS = "embeddings.position_embeddings"
PATCHES = "embeddings.patch_embeddings.projection.weight"


class VivitOptions(BaseModel):
    """Where the architecture comes from. A directory (weights or image_vit) fixes the sizes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    image_vit: str | None = None
    """Directory of a transformers ViTModel to start from; weights must then be "pretrained", or a file of the whole network."""
    inflation: Literal["central", "mean"] = "central"
    """Patch kernel of an image ViT: all in the tubelet's central frame (the paper's better one), or spread evenly."""
    tubelet_size: tuple[int, int, int] | None = None
    """Frames, rows and columns of a tubelet; (2, 16, 16) unless a directory says otherwise."""
    hidden_size: int | None = Field(default=None, ge=1)
    """Channels of a token, 768 as in ViT-B."""
    num_hidden_layers: int | None = Field(default=None, ge=1)
    """Transformer blocks, 12 as in ViT-B."""
    num_attention_heads: int | None = Field(default=None, ge=1)
    """Attention heads, 12 as in ViT-B."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Hidden units of the feed-forward part, 3072 as in ViT-B."""
    min_frames: int = Field(default=8, ge=1)
    """Fewest frames of a clip; MASTAF's ViViT takes 8. Lower it for tests."""


DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


class Vivit(nn.Module):
    """VivitModel with its tokens laid back into (C, T', H', W')."""

    def __init__(self, vivit_config: Any, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model: nn.Module = _transformers().VivitModel(vivit_config, add_pooling_layer=False)
        self.channels = int(vivit_config.hidden_size)
        self.preprocessing = preprocessing
        self.grid = token_grid(vivit_config)
        self.architecture = architecture_of(vivit_config)
        self.dropped = {name: float(getattr(vivit_config, name)) for name in DROPOUT}
        """Shares that are dropped while it learns; `architecture` leaves them out, since no cube depends on them."""

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """Embed clips: (B, 3, F, H, W) float32 -> {"cube": (B, C, T', H', W')}."""
        tokens = self.model(frames.transpose(1, 2)).last_hidden_state[
            :, 1:
        ]  # (B, T' H' W', C), without the class token
        return {"cube": tokens.transpose(1, 2).reshape(len(tokens), self.channels, *self.grid)}


def architecture_of(vivit_config: Any) -> dict[str, Any]:
    """What the configuration decides in evaluation mode; dropout and the spread of initial weights play no part."""
    size = vivit_config.image_size
    names = (*SIZES, "hidden_act", "num_channels")
    return {
        **{name: getattr(vivit_config, name) for name in names},
        # The library reads this one so, although it is no field of the configuration.
        "head_dim": int(
            getattr(vivit_config, "head_dim", vivit_config.hidden_size // vivit_config.num_attention_heads)
        ),
        "layer_norm_eps": float(vivit_config.layer_norm_eps),
        "qkv_bias": bool(vivit_config.qkv_bias),
        "tubelet_size": [int(length) for length in vivit_config.tubelet_size],
        "num_frames": int(vivit_config.num_frames),
        "image_size": [size, size] if isinstance(size, int) else list(size),
        "class_token": "attended, then dropped",
    }


def token_grid(vivit_config: Any) -> tuple[int, int, int]:
    """(T', H', W') of a configuration."""
    size = vivit_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    frames, rows, columns = vivit_config.tubelet_size
    return vivit_config.num_frames // frames, height // rows, width // columns


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BackboneError("the backbone vivit needs the package transformers: pip install 'mastaf[vivit]'") from error
    return transformers


def resized_positions(positions: Tensor, grid: tuple[int, int, int], wanted: tuple[int, int, int]) -> Tensor:
    """Position table for another token grid: bicubic in space, then linear in time.

    Args:
        positions: class token first, (1, 1 + T' H' W', C).
        grid: (T', H', W') of the table; T' = 1 for an image network, whose table is repeated over time.
        wanted: the new (T', H', W').

    Returns:
        (1, 1 + T' H' W', C) of the new grid; the entry of the class token is kept.
    """
    class_token, table = positions[:, :1], positions[:, 1:]
    if grid[1:] != wanted[1:]:
        planes = table.reshape(*grid, -1).permute(0, 3, 1, 2)  # (T', C, H', W')
        planes = F.interpolate(planes, wanted[1:], mode="bicubic", align_corners=False)
        table = planes.permute(0, 2, 3, 1).flatten(0, 2)[None]
    if grid[0] != wanted[0]:
        lines = table.reshape(1, grid[0], -1).transpose(1, 2)  # (1, H' W' C, T')
        lines = F.interpolate(lines, wanted[0], mode="linear", align_corners=False)
        table = lines.transpose(1, 2).reshape(1, -1, positions.shape[2])
    return torch.cat((class_token, table), dim=1)


def inflated_patches(kernel: Tensor, num_frames: int, inflation: Literal["central", "mean"]) -> Tensor:
    """Tubelet kernel (C, 3, num_frames, p, p) from a patch kernel (C, 3, p, p)."""
    if inflation == "mean":
        return kernel[:, :, None].repeat(1, 1, num_frames, 1, 1) / num_frames
    tubelet = kernel.new_zeros(*kernel.shape[:2], num_frames, *kernel.shape[2:])
    tubelet[:, :, num_frames // 2] = kernel
    return tubelet


def read_preprocessing(directory: Path) -> Preprocessing:
    """What `preprocessor_config.json` amounts to for values in [0, 1]; mean and deviation 0.5 without that file."""
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        return HALF
    settings: dict[str, Any] = json.loads(path.read_text())
    # The library computes ((255 u factor - offset) - mean) / std for u in [0, 1].
    factor = 255 * float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 255.0
    offset = 1.0 if settings.get("offset", False) else 0.0
    is_normalized = settings.get("do_normalize", True)
    means = settings.get("image_mean", HALF.mean) if is_normalized else (0.0, 0.0, 0.0)
    deviations = settings.get("image_std", HALF.std) if is_normalized else (1.0, 1.0, 1.0)
    red, green, blue = ((offset + float(mean)) / factor for mean in means)
    red_std, green_std, blue_std = (float(std) / factor for std in deviations)
    return Preprocessing((red, green, blue), (red_std, green_std, blue_std))


def _load_directory(kind: str, directory: Path) -> nn.Module:
    """A transformers model from a local directory; weights that are absent are an error, not a random start."""
    if not (directory / "config.json").is_file():
        raise WeightsError(
            f"{str(directory)!r} is not a directory with a config.json, so it holds no transformers model"
        )
    try:
        model, report = getattr(_transformers(), kind).from_pretrained(
            directory, add_pooling_layer=False, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    # The library raises OSError, ValueError, RuntimeError and safetensors' own error on damaged directories.
    except Exception as error:
        raise WeightsError(f"{directory} cannot be loaded as {kind} ({type(error).__name__}: {error})") from error
    if report["missing_keys"] or report.get("mismatched_keys"):
        raise WeightsError(
            f"{directory} lacks weights of {kind}: {', '.join(sorted(map(str, report['missing_keys']))[:3])}"
        )
    assert isinstance(model, nn.Module)
    return model


def _fitted(vivit_config: Any, options: VivitOptions, sampling: SamplingConfig) -> Any:
    """The configuration with the clip size of the sampling; sizes that do not divide are refused."""
    frames, rows, columns = vivit_config.tubelet_size
    if sampling.num_frames < options.min_frames or sampling.num_frames % frames:
        raise BackboneError(
            f"vivit takes at least {options.min_frames} frames in multiples of its tubelet's {frames}, "
            f"but num_frames is {sampling.num_frames}"
        )
    if sampling.crop_size % rows or sampling.crop_size % columns:
        raise BackboneError(
            f"crop_size {sampling.crop_size} is no multiple of vivit's patch of {rows} x {columns} pixels"
        )
    vivit_config.num_frames = sampling.num_frames
    vivit_config.image_size = sampling.crop_size
    return vivit_config


def _refuse_sizes(options: VivitOptions, directory: str, allowed: tuple[str, ...] = ()) -> None:
    given = [name for name in (*SIZES, "tubelet_size") if name not in allowed and getattr(options, name) is not None]
    if given:
        raise BackboneError(f"{directory} fixes the sizes of vivit; leave out the options {', '.join(given)}")


def _from_directory(directory: Path, options: VivitOptions, sampling: SamplingConfig) -> nn.Module:
    _refuse_sizes(options, str(directory))
    if options.image_vit is not None:
        raise BackboneError(
            f"vivit cannot start from both {directory} and image_vit {options.image_vit}; leave one out"
        )
    trained = _load_directory("VivitModel", directory)
    state = dict(trained.state_dict())
    old_grid = token_grid(trained.config)
    module = Vivit(_fitted(trained.config, options, sampling), read_preprocessing(directory))
    state[POSITIONS] = resized_positions(state[POSITIONS], old_grid, module.grid)
    copy_weights(module.model, state, str(directory))
    return module


def _from_image_vit(directory: Path, options: VivitOptions, sampling: SamplingConfig) -> nn.Module:
    _refuse_sizes(options, f"image_vit {directory}", allowed=("tubelet_size",))
    image_vit = _load_directory("ViTModel", directory)
    image_config: Any = image_vit.config
    patch, image = (_side(image_config.patch_size, directory), _side(image_config.image_size, directory))
    tubelet = options.tubelet_size or (2, patch, patch)
    if tubelet[1:] != (patch, patch):
        raise BackboneError(f"tubelet_size {tubelet} does not fit the patch of {patch} pixels of {directory}")
    shared = (*SIZES, "hidden_act", "layer_norm_eps", "qkv_bias", "num_channels")
    vivit_config = _transformers().VivitConfig(
        tubelet_size=list(tubelet), **{name: getattr(image_config, name) for name in shared}
    )
    module = Vivit(_fitted(vivit_config, options, sampling), read_preprocessing(directory))
    state = {key: value for key, value in image_vit.state_dict().items() if not key.endswith("mask_token")}
    state[PATCHES] = inflated_patches(state[PATCHES], tubelet[0], options.inflation)
    state[POSITIONS] = resized_positions(state[POSITIONS], (1, image // patch, image // patch), module.grid)
    copy_weights(module.model, state, f"image_vit {directory}")
    return module


def _side(size: Any, directory: Path) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise BackboneError(f"image_vit {directory} is not square: {size}")
    return int(sides.pop())


def _from_options(options: VivitOptions, sampling: SamplingConfig) -> nn.Module:
    sizes = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    vivit_config = _transformers().VivitConfig(tubelet_size=list(options.tubelet_size or (2, 16, 16)), **sizes)
    if vivit_config.hidden_size % vivit_config.num_attention_heads:
        raise BackboneError(
            f"vivit's hidden_size {vivit_config.hidden_size} is no multiple of {vivit_config.num_attention_heads} heads"
        )
    return Vivit(_fitted(vivit_config, options, sampling), HALF)


def build_vivit(config: BackboneConfig, sampling: SamplingConfig) -> nn.Module:
    """ViViT for the clip size of `sampling`, from a directory, an image ViT or a configuration, with its weights."""
    options = checked_options(VivitOptions, config.options, config.name)
    if Path(config.weights).is_dir() and random_seed(config.weights) is None:
        return _from_directory(Path(config.weights), options, sampling)
    if options.image_vit is None:
        module = _from_options(options, sampling)
    else:
        if random_seed(config.weights) is not None:
            raise BackboneError(
                f"vivit's weights {config.weights!r} and image_vit {options.image_vit} exclude each other. "
                'Allowed with image_vit: weights "pretrained". For random weights leave out image_vit'
            )
        module = _from_image_vit(Path(options.image_vit), options, sampling)
        if config.weights == "pretrained":
            return module
    load_weights(module, config)
    return module
