"""What becomes of the pixels of training clips: the operations of torchvision, drawn per (seed, video, view, episode).

V clips; F frames, H W pixels (both the crop size).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from configs.schema import RunConfig
from configs.training import AugmentationConfig
from pipeline.own_draws import OwnDraws

Operation = Callable[[Tensor], Tensor]


class Augmentation:
    """Changes training clips; a clip's draws depend on the seed, its video, its view and the episode alone, in any thread and process.

    So a view that is drawn again, in a later episode, looks different.

    It works where the clips are. What is drawn is the same on every device; pixels may differ by one there, as arithmetic does.
    All frames of a clip get the same draw; what an operation takes from the picture (the mean grey of contrast), it takes from
    each frame.
    """

    def __init__(self, config: AugmentationConfig, seed: int, crop_size: int) -> None:
        """Put the operations together, in the order crop, RandAugment, colours, erasing.

        Args:
            config: says which operations and how strong.
            seed: of the draws, with the clip's video and view and the index of its episode.
            crop_size: side of the clips in pixels.
        """
        self.seed = seed
        self.operations = _operations(config, crop_size)

    @classmethod
    def of(cls, config: RunConfig) -> Augmentation | None:
        """That of a run; None where it would change nothing."""
        augmentation = cls(config.augmentation, config.sampling.seed, config.sampling.crop_size)
        return augmentation if augmentation.operations else None

    def __call__(self, clips: Tensor, keys: Sequence[tuple[str, int, int]]) -> Tensor:
        """Augment clips (V, F, H, W, 3) uint8 on any device, given the video, view and episode of each; same shape and type.

        View 0, the evaluation view, stays as it is.
        """
        if not self.operations or all(view == 0 for _, view, _ in keys):
            return clips
        augmented = torch.empty_like(clips)
        for place, (clip, key) in enumerate(zip(clips, keys, strict=True)):
            augmented[place] = clip if key[1] == 0 else self._augmented(clip, key)
        return augmented

    def _augmented(self, clip: Tensor, key: tuple[str, int, int]) -> Tensor:
        digest = hashlib.sha256(json.dumps([self.seed, *key, "augmentation"]).encode()).digest()
        frames = clip.permute(0, 3, 1, 2)  # (F, 3, H, W)
        with OwnDraws(int.from_bytes(digest[:8], "little") >> 1):
            for operation in self.operations:
                frames = operation(frames)
        return frames.permute(0, 2, 3, 1)


def _operations(config: AugmentationConfig, crop_size: int) -> tuple[Operation, ...]:
    if config == AugmentationConfig():
        return ()
    from torchvision.transforms import v2  # here, so that all other runs start more than a second earlier

    chosen: list[Operation] = []
    if config.crop_scale is not None:
        chosen.append(v2.RandomResizedCrop(crop_size, scale=config.crop_scale, antialias=True))
    if config.rand_augment:
        chosen.append(v2.RandAugment(config.rand_augment, config.rand_augment_magnitude))
    if config.color_jitter:
        strength = config.color_jitter
        chosen.append(v2.ColorJitter(strength, strength, strength, strength / 4))
    if config.erasing_probability:
        chosen.append(v2.RandomErasing(config.erasing_probability))
    return tuple(chosen)
