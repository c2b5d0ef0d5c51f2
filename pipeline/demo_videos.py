"""Demo videos: each shows one motion class among clutter, and nothing but the motion tells which.

F frames, H W pixels. Every choice comes from a generator keyed by (seed, class, number): the same three give the same frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from episodes.video import Video
from pipeline.demo_classes import MOTION_CLASSES, Track

NUM_FRAMES = 24
FRAME_SIZE = 64
"""Height and width in pixels."""
FRAMES_PER_SECOND = 12
X264_OPTIONS = {"preset": "veryfast", "qp": "20", "x264-params": "threads=1:rc-lookahead=0:mbtree=0:aq-mode=0"}
"""Constant quantiser without look-ahead: with rate control the same frames did not always give the same bytes."""
ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox", "h264_mf")
"""H.264 encoders, the first that this PyAV carries is used."""

# The difficulty. With a few hundred training videos these leave a small network in the middle between chance and certainty.
OBJECT_RADIUS = (6.0, 9.0)
"""Pixels at scale 1, of what moves and of what only stands in the way."""
PATH_HALF_EXTENT = (12.0, 17.0)
"""Pixels."""
NUM_DISTRACTORS = (1, 3)
DRIFT_PIXELS = 4.0
"""Pan of the camera over the whole video, at most."""
NOISE_LEVELS = 8.0
"""Deviation of the noise of a pixel, at most, of 255."""
_OUTLINE_STEPS = 256


@dataclass(frozen=True, slots=True)
class Look:
    """What an object looks like; drawn alike for actors and distractors of all classes."""

    outline: np.ndarray
    """(256,) float32, radius by direction, at most 1."""
    radius: float
    """Pixels at scale 1."""
    colours: np.ndarray
    """(2, 3) float32, the two colours of the stripes, 0 to 255."""
    stripes: np.ndarray
    """(3,) float32: waves per radius along x and y of the object, and phase."""


def video_generator(*key: object) -> np.random.Generator:
    """A generator for one purpose, independent of all others: Philox keyed by the SHA-256 of the words."""
    digest = hashlib.sha256("/".join(str(word) for word in key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def render_frames(class_name: str, number: int, seed: int) -> np.ndarray:
    """One video of a class.

    Args:
        class_name: a key of `MOTION_CLASSES`.
        number: which video of the class.
        seed: of the whole set.

    Returns:
        (F, H, W, 3) uint8.
    """
    if class_name not in MOTION_CLASSES:
        raise KeyError(f"unknown motion class {class_name!r}; known: {sorted(MOTION_CLASSES)}")
    generator = video_generator("demo", seed, class_name, number)
    drift = _camera_drift(generator)
    frames = _background(generator, drift)
    layers = [(_draw_look(generator), track) for track in _actor_tracks(class_name, generator)]
    for _ in range(int(generator.integers(NUM_DISTRACTORS[0], NUM_DISTRACTORS[1] + 1))):
        layers.append((_draw_look(generator), _distractor_track(generator)))
    for index in generator.permutation(len(layers)):
        look, track = layers[index]
        _paint(frames, look, Track(track.position + drift, track.scale, track.angle))
    flicker = generator.normal(1.0, 0.03, (NUM_FRAMES, 1, 1, 1)).astype(np.float32)
    noise = generator.uniform(2.0, NOISE_LEVELS) * generator.standard_normal(frames.shape, dtype=np.float32)
    return np.asarray(np.clip(np.rint(frames * flicker + noise), 0, 255).astype(np.uint8))


def _progress(generator: np.random.Generator) -> np.ndarray:
    """(F,) progress of the motion in [0, 1]: it begins late, ends early, and speeds up or slows down a little."""
    onset, end = generator.uniform(0.0, 0.2), generator.uniform(0.8, 1.0)
    seconds = np.linspace(0.0, 1.0, NUM_FRAMES)
    evenly = np.clip((seconds - onset) / (end - onset), 0.0, 1.0)
    return np.asarray(evenly ** generator.uniform(0.8, 1.25))


def _actor_tracks(class_name: str, generator: np.random.Generator) -> list[Track]:
    """The class's tracks in pixels, the whole path placed at random inside the frame."""
    tracks = MOTION_CLASSES[class_name].motion(_progress(generator), generator)
    half_extent = generator.uniform(*PATH_HALF_EXTENT)
    path = half_extent * np.concatenate([track.position for track in tracks])
    margin = 6.0
    lowest, highest = margin - path.min(axis=0), FRAME_SIZE - 1 - margin - path.max(axis=0)
    middle, room = (lowest + highest) / 2.0, np.maximum(highest - lowest, 0.0) / 2.0
    place = middle + room * generator.uniform(-1.0, 1.0, 2)
    turned = generator.uniform(0.0, 2.0 * np.pi, len(tracks))
    return [
        Track(place + half_extent * track.position, track.scale, track.angle + angle)
        for track, angle in zip(tracks, turned, strict=True)
    ]


def _distractor_track(generator: np.random.Generator) -> Track:
    """Something that hardly moves: a slow glide, a slight turn, a slight change of size."""
    seconds = np.linspace(-0.5, 0.5, NUM_FRAMES)
    way = generator.uniform(-7.0, 7.0, 2)
    place = generator.uniform(4.0, FRAME_SIZE - 4.0, 2)
    turn, growth = generator.uniform(-0.7, 0.7), generator.uniform(-0.25, 0.25)
    return Track(
        place + seconds[:, None] * way, np.exp(growth * seconds), generator.uniform(0.0, 2.0 * np.pi) + turn * seconds
    )


def _camera_drift(generator: np.random.Generator) -> np.ndarray:
    """(F, 2) pixels: an even pan plus a slow sway."""
    seconds = np.linspace(-0.5, 0.5, NUM_FRAMES)[:, None]
    pan = generator.uniform(-DRIFT_PIXELS, DRIFT_PIXELS, 2)
    phase = 2.0 * np.pi * (generator.uniform(0.5, 1.5, 2) * seconds + generator.uniform(0.0, 1.0, 2))
    sway = generator.uniform(0.0, 1.2, 2) * np.sin(phase)
    return np.asarray(pan * seconds + sway)


def _background(generator: np.random.Generator, drift: np.ndarray) -> np.ndarray:
    """(F, H, W, 3) float32: blotches and clutter that slide with the camera."""
    margin = 12
    side = FRAME_SIZE + 2 * margin
    base = generator.uniform(75.0, 180.0) + generator.uniform(-40.0, 40.0, 3)
    scene = np.broadcast_to(base, (side, side, 3)).astype(np.float32)
    for cells, strength in ((4, 45.0), (11, 35.0), (26, 22.0)):
        blotches = (
            generator.standard_normal((cells, cells, 3)) * 0.4 + generator.standard_normal((cells, cells, 1)) * 0.9
        )
        scene = scene + generator.uniform(0.3, 1.0) * strength * _enlarge(blotches, side).astype(np.float32)
    frames = np.empty((NUM_FRAMES, FRAME_SIZE, FRAME_SIZE, 3), np.float32)
    for index, (shift_x, shift_y) in enumerate(margin - drift):
        frames[index] = _window(scene, shift_x, shift_y)
    return frames


def _enlarge(values: np.ndarray, side: int) -> np.ndarray:
    """Bilinear enlargement of (n, n, 3) to (side, side, 3)."""
    where = np.linspace(0.0, len(values) - 1.0, side)
    low = np.minimum(where.astype(int), len(values) - 2)
    part = where - low
    rows = values[low] * (1.0 - part)[:, None, None] + values[low + 1] * part[:, None, None]
    return np.asarray(rows[:, low] * (1.0 - part)[:, None] + rows[:, low + 1] * part[:, None])


def _window(scene: np.ndarray, x: float, y: float) -> np.ndarray:
    """Cut (H, W, 3) out of a larger picture at a fractional place."""
    left, top = int(x), int(y)
    part_x, part_y = np.float32(x - left), np.float32(y - top)
    cut = scene[top : top + FRAME_SIZE + 1, left : left + FRAME_SIZE + 1]
    rows = cut[:-1] * (1 - part_y) + cut[1:] * part_y
    return np.asarray(rows[:, :-1] * (1 - part_x) + rows[:, 1:] * part_x)


def _draw_look(generator: np.random.Generator) -> Look:
    directions = np.linspace(0.0, 2.0 * np.pi, _OUTLINE_STEPS, endpoint=False)
    waves = np.arange(1, 7)
    strengths = generator.normal(0.0, 0.35, 6) / waves**0.7
    outline = np.exp(np.cos(directions[:, None] * waves + generator.uniform(0.0, 2.0 * np.pi, 6)) @ strengths)
    corners = int(generator.integers(2, 8))
    if corners > 2:  # two thirds are polygons, the others blobs
        sector = np.pi / corners
        outline = np.cos(sector) / np.cos((directions + sector) % (2.0 * sector) - sector)
        outline = outline * np.exp(generator.uniform(0.0, 0.5) * np.cos(directions))
    first = generator.uniform(0.0, 255.0, 3)
    away = generator.choice([-1.0, 1.0], 3) * generator.uniform(60.0, 160.0, 3)
    second = np.where((first + away < 0) | (first + away > 255), first - away, first + away)
    angle, waves_per_radius = generator.uniform(0.0, 2.0 * np.pi), generator.uniform(0.25, 0.8)
    stripes = (waves_per_radius * np.cos(angle), waves_per_radius * np.sin(angle), generator.uniform(0.0, 1.0))
    return Look(
        outline=(outline / outline.max()).astype(np.float32),
        radius=float(generator.uniform(*OBJECT_RADIUS)),
        colours=np.stack([first, np.clip(second, 0.0, 255.0)]).astype(np.float32),
        stripes=np.array(stripes, np.float32),
    )


def _paint(frames: np.ndarray, look: Look, track: Track) -> None:
    """Draw one object over all frames, in place; edges and stripes are smooth over about a pixel."""
    pixels = np.arange(FRAME_SIZE, dtype=np.float32)
    position, angle = track.position.astype(np.float32), track.angle.astype(np.float32)
    radius = (look.radius * track.scale).astype(np.float32)[:, None, None]
    x = pixels[None, None, :] - position[:, 0, None, None]
    y = pixels[None, :, None] - position[:, 1, None, None]
    cosine, sine = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    along, across = (
        (cosine * x + sine * y) / radius,
        (cosine * y - sine * x) / radius,
    )  # (F, H, W), in the object's own frame
    distance = np.sqrt(along * along + across * across)
    direction = (np.arctan2(across, along) * (_OUTLINE_STEPS / (2.0 * np.pi))).astype(np.int32) % _OUTLINE_STEPS
    cover = np.clip((look.outline[direction] - distance) * radius + 0.5, 0.0, 1.0)
    wave = np.sin(2.0 * np.pi * (along * look.stripes[0] + across * look.stripes[1] + look.stripes[2]))
    mix = np.clip(0.5 + 2.0 * wave, 0.0, 1.0)[..., None]
    colour = look.colours[0] * (1.0 - mix) + look.colours[1] * mix
    frames += cover[..., None] * (colour - frames)


def encoder_name() -> str:
    """The H.264 encoder of this PyAV."""
    for name in ENCODERS:
        try:
            av.codec.Codec(name, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        return name
    raise RuntimeError(
        f"this PyAV {av.__version__} has none of the H.264 encoders {ENCODERS}; install the wheel: pip install av"
    )


def write_video(path: Path, frames: np.ndarray) -> None:
    """Encode (F, H, W, 3) uint8 as H.264 in MP4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder_name(), rate=FRAMES_PER_SECOND)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.options = X264_OPTIONS if encoder_name() == "libx264" else {}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_demo_videos(
    folder: Path, videos_per_class: int, seed: int, on_progress: Callable[[int, int], None] | None = None
) -> list[Video]:
    """Render and encode the whole set, as `folder/class/class_000.mp4`.

    Args:
        folder: made if it is missing.
        videos_per_class: how many of each class.
        seed: another seed gives another set.
        on_progress: called with (videos written, videos in all).

    Returns:
        A row of each video for the manifest, paths relative to `folder`.
    """
    rows = [
        Video(f"{name}_{number:03d}", f"{name}/{name}_{number:03d}.mp4", name, motion_class.split)
        for name, motion_class in MOTION_CLASSES.items()
        for number in range(videos_per_class)
    ]
    for name in MOTION_CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)

    def write(index: int) -> None:
        row = rows[index]
        write_video(folder / row.path, render_frames(row.class_name, index % videos_per_class, seed))

    with ThreadPoolExecutor(2, thread_name_prefix="render") as pool:
        for done, _ in enumerate(pool.map(write, range(len(rows))), start=1):
            if on_progress is not None:
                on_progress(done, len(rows))
    return rows
