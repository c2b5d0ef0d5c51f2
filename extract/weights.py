"""Weights of a backbone: where they come from, and the checks before a single number is copied."""

import hashlib
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from extract.config import BackboneConfig

Options = TypeVar("Options", bound=BaseModel)
StateDict = dict[str, Tensor]


class BackboneError(ValueError):
    """A backbone cannot be built as asked."""


class WeightsError(BackboneError):
    """Weights cannot be read, or do not fit the network."""


class NoOptions(BaseModel):
    """For backbones without knobs of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def random_seed(weights: str) -> int | None:
    """Seed of the initial values: SEED of "random:SEED", 0 of "none", and None where trained weights are asked for."""
    if weights == "none":
        return 0
    if not weights.startswith("random:"):
        return None
    digits = weights.removeprefix("random:")
    if not re.fullmatch(r"[0-9]{1,18}", digits):
        raise WeightsError(
            f"weights {weights!r}: after 'random:' comes a whole number of at most 18 digits, as in random:0"
        )
    return int(digits)


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block and give it back untouched."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reach the GPU generators too, which this block does not restore.
        torch.default_generator.manual_seed(seed)
        yield


def checked_options(kind: type[Options], options: Mapping[str, Any], name: str) -> Options:
    """Options of a backbone as its own value type, or one line that names what is wrong."""
    try:
        return kind(**options)
    except (ValidationError, TypeError) as error:
        known = ", ".join(kind.model_fields) or "none"
        raise BackboneError(
            f"backbone {name} cannot take the options {dict(options)!r}: {_one_line(error)}. Known: {known}"
        ) from error


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
    return " ".join(str(error).split())


def load_weights(
    module: nn.Module,
    config: BackboneConfig,
    convert: Callable[[Mapping[str, Any], Path], StateDict] | None = None,
    pretrained: Callable[[], Mapping[str, Tensor]] | None = None,
) -> None:
    """Fill a freshly built module as `config.weights` says.

    Args:
        module: holds its initial values already, drawn under `own_randomness`.
        config: name and weights.
        convert: from the content of a file to the module's own keys; None where files hold these keys already.
        pretrained: fetches published weights under the module's own keys; None where there is no such source.
    """
    if random_seed(config.weights) is not None:
        return
    if config.weights == "pretrained":
        copy_weights(module, _fetch(config.name, pretrained), f"the published weights of {config.name}")
        return
    path = Path(config.weights)
    content = read_checkpoint(path)
    state = convert(content, path) if convert else trunk_state_dict(content, path, dropped=())
    copy_weights(module, state, str(path))


def _fetch(name: str, pretrained: Callable[[], Mapping[str, Tensor]] | None) -> Mapping[str, Tensor]:
    if pretrained is None:
        raise WeightsError(
            f"backbone {name} has no weights that can be fetched. Download a file and give it with --weights FILE"
        )
    try:
        return pretrained()
    except (OSError, RuntimeError) as error:  # no network, a proxy, a full disk, a wrong hash
        raise WeightsError(
            f"the published weights of {name} could not be fetched ({_one_line(error)}). "
            "Without a network, copy the file here and give it with --weights FILE"
        ) from error


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Content of a weights file, without running anything that is in it."""
    if not path.is_file():
        raise WeightsError(f"weights {str(path)!r} are not a file. Give a file, random:SEED, none or pretrained")
    try:
        content = (
            _read_safetensors(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} was refused: it holds more than tensors and plain values, and loading it could run code. "
            "Save its state_dict alone and give that"
        ) from error
    except WeightsError:
        raise
    # A damaged file fails in many ways inside torch (RuntimeError, EOFError, KeyError, UnicodeDecodeError and more).
    except Exception as error:
        raise WeightsError(
            f"{path} is not a checkpoint that can be read ({type(error).__name__}: {_one_line(error)[:160]})"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _read_safetensors(path: Path) -> StateDict:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise WeightsError(f"{path} needs the package safetensors: pip install safetensors") from error
    return dict(load_file(path))


def tensors_only(content: object, path: Path) -> StateDict:
    """A mapping from names to tensors, or a WeightsError."""
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds no state dict")
    wrong = [str(key) for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if wrong:
        raise WeightsError(f"{path} holds no state dict: {_short_list(wrong)} are not tensors")
    return dict(content)


def trunk_state_dict(content: Mapping[str, Any], path: Path, dropped: tuple[str, ...]) -> StateDict:
    """State dict of a file, bare or under "state_dict", without `module.` prefixes and without the classifier."""
    inner = content.get("state_dict")
    state = tensors_only(inner if isinstance(inner, Mapping) else content, path)
    plain = {key.replace("module.", ""): value for key, value in state.items()}
    return {key: value for key, value in plain.items() if not key.startswith(dropped)}


def copy_weights(module: nn.Module, state: Mapping[str, Tensor], source: str, hint: str = "") -> None:
    """Copy after every name, shape and number was checked; nothing is copied unless everything fits."""
    wanted = module.state_dict()
    # Files from before PyTorch 0.4.1 do not count batches; evaluation never reads the counter.
    given = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")} | dict(state)
    missing = [key for key in wanted if key not in given]
    unknown = [key for key in given if key not in wanted]
    # Shapes first: a file of a kilobyte can describe a tensor that would take 64 GiB once copied.
    shapes = [
        f"{k} {tuple(given[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in wanted
        if k in given and given[k].shape != wanted[k].shape
    ]
    problems = [
        f"{len(names)} {what} ({_short_list(names)})"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise WeightsError(f"{source} does not fit this network: {'; '.join(problems)}{hint}")
    for key, value in wanted.items():
        # In the network's own type, since 1e300 of a float64 file is infinite as float32.
        if value.is_floating_point() and not given[key].to(value.dtype).isfinite().all():
            raise WeightsError(
                f"{source} holds numbers that are not finite, first in {key}; every weight must be finite. "
                "The file is damaged, or its training diverged: take an earlier checkpoint"
            )
    module.load_state_dict(given, strict=True)


def _short_list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over the sorted state dict: name, dtype, shape and bytes of every entry."""
    return state_digest(module.state_dict())


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """The `weights_digest` of the module whose state dict this is."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(f"{key}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
