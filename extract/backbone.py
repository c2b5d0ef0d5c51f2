"""What a backbone must offer.

Letters: B clips; F frames; H W pixels; C channels, T time steps (and H W grid) of a cube.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Mean and deviation per colour that a network's weights expect, for values in [0, 1]."""

    mean: tuple[float, float, float]
    """Red, green, blue."""
    std: tuple[float, float, float]
    """Red, green, blue; all positive."""

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise ValueError(f"every deviation must be positive, not {self.std}")


KINETICS_HARA = Preprocessing((0.4345, 0.4051, 0.3775), (0.2768, 0.2713, 0.2737))
KINETICS_TORCHVISION = Preprocessing((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Backbone(Protocol):
    """A network from clips to named cubes."""

    channels: int
    """C of the array "cube"."""
    preprocessing: Preprocessing
    """What `extract.transform.to_input` applies under normalization = "backbone"."""
    architecture: dict[str, Any]
    """All that decides the numbers besides weights and preprocessing, defaults filled in: JSON values and no paths."""

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        """Embed clips.

        Args:
            frames: (B, 3, F, H, W) float32.

        Returns:
            Array name -> cubes (B, C, T, H, W) of the same dtype. Most networks give one array, "cube".
        """
        ...
