"""The spec of a store: everything that decides the numbers in it, and its fingerprint.

Letters: C channels, T time steps, H W grid.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CUBE_DTYPES = ("float16", "float32")
"""Number types a store can hold."""
RESERVED_NAMES = ("video_id", "view", "ledger")
"""Array names that the stores use themselves."""
_ARRAY_NAME = re.compile(r"[a-z][a-z0-9_]*")


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, ASCII only (odd bytes of file names survive as escapes)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_of(value: Any) -> str:
    """SHA-256 of the canonical JSON, as hex."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def sha256_of_row(row: NDArray[Any]) -> str:
    """SHA-256 of one row's little-endian C-order values, as hex."""
    return hashlib.sha256(np.ascontiguousarray(row, dtype=row.dtype.newbyteorder("<")).data).hexdigest()


def _check_fields(value: Any, names: tuple[str, ...], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(names):
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{what} must have exactly the fields {', '.join(names)}, got {found}")
    return value


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One named array of a store."""

    layer: str
    """Where in the backbone the values are taken, such as `layer4`."""
    pooling: str | None
    """How they are reduced, such as `none` or `time`."""
    dtype: str
    """Stored number type, one of `CUBE_DTYPES`."""
    quantiser: dict[str, Any] | None
    """`{"cast_from": "float16"}` where values were rounded to that type before; else None, values as they were computed."""
    shape: tuple[int, int, int, int]
    """(C, T, H, W) of one row."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.dtype not in CUBE_DTYPES:
            raise ValueError(f"array dtype {self.dtype!r}: allowed are {', '.join(CUBE_DTYPES)}")
        if self.quantiser not in (None, {"cast_from": "float16"}) or (self.quantiser and self.dtype == "float16"):
            raise ValueError(
                f"quantiser {self.quantiser!r} of a {self.dtype} array: allowed are None, and {{'cast_from': 'float16'}} "
                "for float32 values that were float16 once"
            )
        if len(self.shape) != 4 or not all(type(size) is int and size >= 1 for size in self.shape):
            raise ValueError(f"array shape {self.shape!r}: expected four positive integers (C, T, H, W)")

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able dict, the form that is hashed and stored."""
        return {
            "layer": self.layer,
            "pooling": self.pooling,
            "dtype": self.dtype,
            "quantiser": self.quantiser,
            "shape": list(self.shape),
        }

    @classmethod
    def from_json(cls, value: Any) -> "ArraySpec":
        """Read back what `to_json` gave; unknown or missing fields are refused."""
        return cls(**_check_fields(value, ("layer", "pooling", "dtype", "quantiser", "shape"), "an array of the spec"))


@dataclass(frozen=True, slots=True)
class Spec:
    """Everything that decides the numbers of a store. The parts are plain JSON objects given by the caller."""

    decoder: dict[str, Any]
    """What decodes, with major versions."""
    sampling: dict[str, Any]
    """Which frames, how resized and cropped, the view recipe and short-video policy; not the number of views."""
    backbone: dict[str, Any]
    """Name and options of the backbone."""
    weights_digest: str
    """SHA-256 of the backbone's weights, hex."""
    compute: dict[str, Any]
    """Number type and batch size of the forward pass."""
    arrays: dict[str, ArraySpec]
    """The named arrays of a row; most stores have one, `cube`."""

    def __post_init__(self) -> None:
        for field in ("decoder", "sampling", "backbone", "compute"):
            part = getattr(self, field)
            if not isinstance(part, Mapping):
                raise ValueError(f"spec field {field} must be a JSON object, got {type(part).__name__}")
            # A trip through JSON, so that a spec made now equals the same spec read from disk (tuples become lists).
            object.__setattr__(self, field, json.loads(canonical_json(dict(part))))
        if not isinstance(self.weights_digest, str):
            raise ValueError(f"spec field weights_digest must be a text, got {self.weights_digest!r}")
        if not self.arrays:
            raise ValueError("a spec needs at least one array")
        for name in self.arrays:
            if not _ARRAY_NAME.fullmatch(name) or name in RESERVED_NAMES:
                raise ValueError(
                    f"array name {name!r}: use lower-case letters, digits and _, but none of "
                    f"{', '.join(RESERVED_NAMES)}"
                )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, as hex."""
        return sha256_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """As a JSON-able dict, the form that is hashed and stored."""
        return {
            "decoder": self.decoder,
            "sampling": self.sampling,
            "backbone": self.backbone,
            "weights_digest": self.weights_digest,
            "compute": self.compute,
            "arrays": {name: array.to_json() for name, array in self.arrays.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> "Spec":
        """The inverse of `to_json`.

        Raises:
            ValueError: a field is missing, unknown or of the wrong type.
        """
        names = ("decoder", "sampling", "backbone", "weights_digest", "compute", "arrays")
        fields = dict(_check_fields(value, names, "a spec"))
        if not isinstance(fields["arrays"], dict):
            raise ValueError(f"spec field arrays must be a JSON object, got {type(fields['arrays']).__name__}")
        fields["arrays"] = {name: ArraySpec.from_json(array) for name, array in fields["arrays"].items()}
        return cls(**fields)

    def differences(self, wanted: "Spec") -> list[str]:
        """Where this (stored) spec differs from another, as `sampling.num_frames: store 8, wanted 16`."""
        return _differences(self.to_json(), wanted.to_json(), "")


def _differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str) -> list[str]:
    lines: list[str] = []
    for key in sorted(stored.keys() | wanted.keys()):
        here, there = stored.get(key), wanted.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            lines += _differences(here, there, f"{prefix}{key}.")
        elif key not in stored or key not in wanted or canonical_json(here) != canonical_json(there):
            here_text = canonical_json(here) if key in stored else "nothing"
            there_text = canonical_json(there) if key in wanted else "nothing"
            lines.append(f"{prefix}{key}: store {here_text}, wanted {there_text}")
    return lines
