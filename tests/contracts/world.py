"""A little world of real files: six classes of moving squares, encoded and decoded for real."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from configs.load import load_config
from configs.schema import RunConfig
from episodes.datasets import Manifest, read_manifest, write_manifest
from episodes.video import Video

CLASSES = {
    "right": "train",
    "left": "train",
    "down": "train",
    "up": "val",
    "still": "val",
    "diagonal": "test",
    "jump": "test",
}
STEPS = {
    "right": (0, 1),
    "left": (0, -1),
    "down": (1, 0),
    "up": (-1, 0),
    "still": (0, 0),
    "diagonal": (1, 1),
    "jump": (2, -2),
}


def write_clip(path: Path, class_name: str, number: int, num_frames: int = 10, size: int = 40) -> None:
    """A square that moves as its class says, in random colours, as MPEG-4 in an mp4."""
    generator = np.random.Generator(np.random.Philox(key=[number, list(CLASSES).index(class_name)]))
    background, square = generator.integers(0, 256, 3), generator.integers(0, 256, 3)
    row, column = generator.integers(12, 20, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for index in range(num_frames):
            frame = np.broadcast_to(background, (size, size, 3)).astype(np.uint8)
            top, left = (
                int(np.clip(start + index * step, 0, size - 8))
                for start, step in zip((row, column), STEPS[class_name], strict=True)
            )
            frame[top : top + 8, left : left + 8] = square
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


@dataclass(frozen=True, slots=True)
class World:
    """A folder with videos and their manifest."""

    folder: Path
    manifest_path: Path

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.manifest_path)

    def config(self, *overrides: str) -> RunConfig:
        """A config that runs in seconds: 4 frames of 24 pixels through a narrow network, 2-way episodes."""
        return load_config(
            None,
            [
                f'data.manifest="{self.manifest_path}"',
                "sampling.num_frames=4",
                "sampling.resize_size=28",
                "sampling.crop_size=24",
                "sampling.policy=reference",
                "backbone.name=small3d",
                "backbone.weights=random:1",
                "backbone.options.width=4",
                "extraction.forward_batch=4",
                "extraction.decode_workers=0",
                "training.decode_workers=0",
                "store.shard_rows=8",
                "store.dtype=float32",
                "episodes.n_way=2",
                "episodes.n_query=1",
                "training.episodes=12",
                "training.episodes_per_step=3",
                "training.validate_every=6",
                "training.validation_episodes=8",
                'training.loggers=["csv"]',
                *overrides,
            ],
        )


def make_world(folder: Path, videos_per_class: int = 4) -> World:
    """Write the videos and the manifest."""
    videos = []
    for class_name, split in CLASSES.items():
        for number in range(videos_per_class):
            path = f"videos/{class_name}/{number}.mp4"
            write_clip(folder / path, class_name, number)
            videos.append(Video(f"{class_name}/{number}", path, class_name, split))
    manifest_path = folder / "videos.csv"
    write_manifest(Manifest(tuple(videos), folder), manifest_path)
    return World(folder, manifest_path)
