"""Checkpoints with the names and shapes of the released TRX, STRM and TA2N code. Every tensor holds one number, stored once."""

# C channels, T time steps, M frames of a tuple, D width of keys and values

from collections.abc import Sequence

import torch
from torch import Tensor


def trx_shapes(
    channels: int = 2048, num_steps: int = 8, hidden: int = 1152, cardinalities: Sequence[int] = (2, 3)
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the head's part of a TRX checkpoint (reference 2.1)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, cardinality in enumerate(cardinalities):
        layer = f"transformers.{index}"
        shapes[f"{layer}.pe.pe"] = (1, int(1.5 * num_steps), channels)
        for name in ("k_linear", "v_linear"):
            shapes |= {f"{layer}.{name}.weight": (hidden, cardinality * channels), f"{layer}.{name}.bias": (hidden,)}
        for name in ("norm_k", "norm_v"):
            shapes |= {f"{layer}.{name}.weight": (hidden,), f"{layer}.{name}.bias": (hidden,)}
    return shapes


def strm_shapes(
    channels: int = 2048, num_steps: int = 8, hidden: int = 1152, cardinalities: Sequence[int] = (2,), inner: str = ""
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the head's part of an STRM checkpoint (reference 3.2); `inner`: ".module" of several GPUs."""
    narrow = channels // 2
    layers = {
        f"attn_pat{inner}.query_proj": (channels, channels),
        f"attn_pat{inner}.key_proj": (channels, channels),
        f"attn_pat{inner}.value_conv": (channels, channels),
        f"attn_pat{inner}.Bot_MLP.inp_fc": (narrow, channels),
        f"attn_pat{inner}.Bot_MLP.hid_fc": (narrow, narrow),
        f"attn_pat{inner}.Bot_MLP.out_fc": (channels, narrow),
        f"fr_enrich{inner}.Tok_MLP.inp_fc": (num_steps, num_steps),
        f"fr_enrich{inner}.Tok_MLP.out_fc": (num_steps, num_steps),
        f"fr_enrich{inner}.Bot_MLP.inp_fc": (channels, channels),
        f"fr_enrich{inner}.Bot_MLP.out_fc": (channels, channels),
    }
    shapes = trx_shapes(channels, num_steps, hidden, cardinalities)
    shapes[f"attn_pat{inner}.gamma"] = (1,)
    shapes[f"attn_pat{inner}.pe.pe"] = (1, 24, channels)
    shapes[f"fr_enrich{inner}.pe.pe"] = (1, int(1.5 * num_steps), channels)
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def ta2n_shapes(channels: int = 2048) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the head's part of a TA2N checkpoint with the released widths (reference 4.1)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for net, inputs, widths, one in (
        ("firststage.locnet", channels, (64, 128, 32), ()),
        ("secondstage.mvnet", 2 * channels, (128, 128, 64), (1,)),
    ):
        first, second, hidden = widths
        layers = {
            "0": (first, inputs, 3, 3, 3),
            "1": (first,),
            "4": (second, first, 3, 3, 3),
            "5": (second,),
            "10": (hidden, second, *one),
            "12": (2, hidden, *one),
        }
        for layer, shape in layers.items():
            shapes |= {f"align.{net}.{layer}.weight": shape, f"align.{net}.{layer}.bias": shape[:1]}
            if len(shape) == 1:
                shapes |= {f"align.{net}.{layer}.{kind}": shape for kind in ("running_mean", "running_var")}
                shapes[f"align.{net}.{layer}.num_batches_tracked"] = ()
    for kind in ("key", "query", "value"):
        shapes[f"align.secondstage.{kind}net.weight"] = (channels, channels, 1)
        shapes[f"align.{kind}net_multi.weight"] = (channels, channels, 1)
    return shapes


def resnet_shapes(trunk: torch.nn.Module, inner: str = "", is_numbered: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the backbone's part, from our network of the same depth."""
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    shapes = {}
    for name, value in trunk.state_dict().items():
        part, _, rest = name.partition(".")
        shapes[f"resnet{inner}.{numbers[part] if is_numbered else part}.{rest}"] = tuple(value.shape)
    return shapes


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state dict in which the n-th tensor is filled with n / 1000, so that files are small whatever the shapes."""
    return {
        name: torch.tensor(number if name.endswith("num_batches_tracked") else number / 1000).expand(shape)
        for number, (name, shape) in enumerate(shapes.items(), start=1)
    }


def as_training_file(state: dict[str, Tensor]) -> dict[str, object]:
    """What the released training writes around a state dict."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.001)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1_000_000], gamma=0.1)
    return {
        "iteration": 75_000,
        "model_state_dict": state,
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
