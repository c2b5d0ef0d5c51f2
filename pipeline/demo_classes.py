"""The motion classes of the demo: what moves, and how. What the things look like is decided elsewhere (`demo_videos`).

F frames. Positions are (x, y) with y downwards, in units of the path's half extent; angles in radians, clockwise on the screen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "val", "test"]

RIGHT, LEFT, UP, DOWN = (1.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0)
EITHER_SENSE = (-1.0, 1.0)
"""Counterclockwise or clockwise, leftwards or rightwards."""


@dataclass(frozen=True, slots=True)
class Track:
    """Where one moving object is in each frame."""

    position: np.ndarray
    """(F, 2) float64, x and y in half extents of the path."""
    scale: np.ndarray
    """(F,) float64, size relative to the object's own."""
    angle: np.ndarray
    """(F,) float64 radians, clockwise."""

    def __post_init__(self) -> None:
        num_frames = len(self.position)
        if (
            self.position.shape != (num_frames, 2)
            or self.scale.shape != (num_frames,)
            or self.angle.shape != (num_frames,)
        ):
            raise ValueError(
                f"track of {self.position.shape} positions, {self.scale.shape} scales, {self.angle.shape} angles"
            )


Motion = Callable[[np.ndarray, np.random.Generator], list[Track]]
"""(progress (F,) float64 in [0, 1], generator of the free choices) -> the tracks of the one or two objects that make the class."""


@dataclass(frozen=True, slots=True)
class MotionClass:
    """One class of the demo."""

    split: Split
    motion: Motion
    description: str
    """What happens, in a few words."""
    reversed_by: str | None = None
    """The class that this one becomes when the film runs backwards; None where the table has none, or only up to chance."""


def _track(position: np.ndarray, scale: np.ndarray | None = None, angle: np.ndarray | None = None) -> Track:
    still = np.zeros(len(position))
    return Track(position, np.ones(len(position)) if scale is None else scale, still if angle is None else angle)


def _at_rest(progress: np.ndarray) -> np.ndarray:
    return np.zeros((len(progress), 2))


def _part(progress: np.ndarray, start: float, end: float) -> np.ndarray:
    """Progress of an event that fills [start, end] of the whole."""
    return np.clip((progress - start) / (end - start), 0.0, 1.0)


def _unit_vector(generator: np.random.Generator) -> np.ndarray:
    angle = generator.uniform(0.0, 2.0 * np.pi)
    return np.array([np.cos(angle), np.sin(angle)])


def _along(points: np.ndarray, progress: np.ndarray) -> np.ndarray:
    """Walk a chain of straight lines at an even pace: (P, 2) corners, (F,) progress -> (F, 2)."""
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    reached = np.concatenate([[0.0], np.cumsum(lengths)]) / lengths.sum()
    return np.stack([np.interp(progress, reached, points[:, axis]) for axis in range(2)], axis=1)


def _around(angle: np.ndarray, radius: np.ndarray | float = 1.0) -> np.ndarray:
    return np.asarray(np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.reshape(radius, (-1, 1)))


def backwards(motion: Motion) -> Motion:
    """The same motion with the film reversed."""
    return lambda progress, generator: motion(1.0 - progress, generator)


def move(direction: tuple[float, float]) -> Motion:
    """Straight across."""
    way = np.array(direction)
    return lambda progress, generator: [_track(_along(np.stack([-way, way]), progress))]


def turn_corner(first: tuple[float, float], second: tuple[float, float]) -> Motion:
    """One way, then at a right angle the other: the order of two events."""
    corners = 1.5 * np.array([(0.0, 0.0), first, np.add(first, second)])
    return lambda progress, generator: [_track(_along(corners, progress))]


def spin(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Turn clockwise on the spot."""
    return [_track(_at_rest(progress), angle=generator.uniform(1.1, 1.9) * np.pi * progress)]


def _size(generator: np.random.Generator, growth: np.ndarray) -> np.ndarray:
    """Scale over time from growth in [0, 1], small to large around the object's own size."""
    return np.asarray(np.exp(generator.uniform(0.45, 0.65) * (2.0 * growth - 1.0)))


def grow(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Become larger."""
    return [_track(_at_rest(progress), scale=_size(generator, progress))]


def grow_then_shrink(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Large in the middle."""
    return [_track(_at_rest(progress), scale=_size(generator, 1.0 - np.abs(2.0 * progress - 1.0)))]


def shrink_then_grow(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Small in the middle."""
    return [_track(_at_rest(progress), scale=_size(generator, np.abs(2.0 * progress - 1.0)))]


def circle(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Clockwise on a circle, once round or a little less, from anywhere on it."""
    start = generator.uniform(0.0, 2.0 * np.pi)
    return [_track(_around(start + generator.uniform(1.7, 2.1) * np.pi * progress, 0.85))]


def spiral_out(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Round and round from the middle outwards, either sense."""
    start, sense = generator.uniform(0.0, 2.0 * np.pi), generator.choice(EITHER_SENSE)
    return [_track(_around(start + sense * 2.6 * np.pi * progress, 0.1 + 1.0 * progress))]


def square(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Clockwise round a square, from any of its corners."""
    corners = _around((generator.integers(4) + 0.5 + np.arange(5)) * np.pi / 2.0, 1.2)
    return [_track(_along(corners, progress))]


def swing(direction: tuple[float, float]) -> Motion:
    """To and fro."""

    def motion(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
        phase = 2.0 * np.pi * generator.uniform(1.3, 2.0) * progress * generator.choice(EITHER_SENSE)
        return [_track(0.8 * np.sin(phase)[:, None] * np.array(direction))]

    return motion


def zigzag(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Across in sharp turns, leftwards or rightwards."""
    side = generator.choice(EITHER_SENSE)
    corners = np.stack([np.linspace(-side, side, 5), 0.5 * np.array([-1.0, 1.0, -1.0, 1.0, -1.0])], axis=1)
    return [_track(_along(corners, progress))]


def hop(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Across like a bouncing ball, leftwards or rightwards."""
    side = generator.choice(EITHER_SENSE)
    height = 1.2 * np.abs(np.sin(2.5 * np.pi * progress))
    return [_track(np.stack([side * (2.0 * progress - 1.0), -height], axis=1))]


def grow_then_move(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Become larger on the spot, then leave in any direction."""
    way = 1.6 * _unit_vector(generator)
    return [_track(_part(progress, 0.5, 1.0)[:, None] * way, scale=_size(generator, _part(progress, 0.0, 0.5)))]


def move_then_grow(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Go in any direction, then become larger on the spot."""
    way = 1.6 * _unit_vector(generator)
    return [_track(_part(progress, 0.0, 0.5)[:, None] * way, scale=_size(generator, _part(progress, 0.5, 1.0)))]


def spin_then_move(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Turn on the spot, either sense, then leave in any direction."""
    way, sense = 1.6 * _unit_vector(generator), generator.choice(EITHER_SENSE)
    return [_track(_part(progress, 0.5, 1.0)[:, None] * way, angle=sense * 1.3 * np.pi * _part(progress, 0.0, 0.5))]


def approach(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Two objects come together."""
    axis = _unit_vector(generator)
    distance = (1.3 - 0.85 * progress)[:, None]
    return [_track(distance * axis), _track(-distance * axis)]


def meet_and_return(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Two objects come together and part again the way they came."""
    axis = _unit_vector(generator)
    distance = (0.45 + 0.85 * np.abs(2.0 * progress - 1.0))[:, None]
    return [_track(distance * axis), _track(-distance * axis)]


def cross_over(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Two objects change places, passing each other."""
    axis = _unit_vector(generator)
    lane = 0.3 * np.array([-axis[1], axis[0]])
    distance = (1.3 - 2.6 * progress)[:, None]
    return [_track(distance * axis + lane), _track(-distance * axis - lane)]


def orbit(progress: np.ndarray, generator: np.random.Generator) -> list[Track]:
    """Two objects circle each other clockwise."""
    angle = generator.uniform(0.0, 2.0 * np.pi) + generator.uniform(1.2, 1.7) * np.pi * progress
    return [_track(_around(angle, 0.9)), _track(_around(angle + np.pi, 0.9))]


# Mirrored, reversed and swapped classes share a split, so that they meet in one episode. Test motions are unseen
# compositions of what the training classes teach: directions, sizes, senses of rotation, order, pairs.
MOTION_CLASSES: dict[str, MotionClass] = {
    "move_right": MotionClass("train", move(RIGHT), "straight to the right", "move_left"),
    "move_left": MotionClass("train", move(LEFT), "straight to the left", "move_right"),
    "move_up": MotionClass("train", move(UP), "straight up", "move_down"),
    "move_down": MotionClass("train", move(DOWN), "straight down", "move_up"),
    "right_then_up": MotionClass("train", turn_corner(RIGHT, UP), "right, then up", "down_then_left"),
    "up_then_right": MotionClass("train", turn_corner(UP, RIGHT), "up, then right", "left_then_down"),
    "down_then_left": MotionClass("train", turn_corner(DOWN, LEFT), "down, then left", "right_then_up"),
    "left_then_down": MotionClass("train", turn_corner(LEFT, DOWN), "left, then down", "up_then_right"),
    "spin_clockwise": MotionClass("train", spin, "turns clockwise", "spin_counterclockwise"),
    "spin_counterclockwise": MotionClass("train", backwards(spin), "turns counterclockwise", "spin_clockwise"),
    "circle_clockwise": MotionClass("train", circle, "clockwise round a circle", "circle_counterclockwise"),
    "circle_counterclockwise": MotionClass(
        "train", backwards(circle), "counterclockwise round a circle", "circle_clockwise"
    ),
    "grow": MotionClass("train", grow, "becomes larger", "shrink"),
    "shrink": MotionClass("train", backwards(grow), "becomes smaller", "grow"),
    "grow_then_move": MotionClass("train", grow_then_move, "becomes larger, then leaves"),
    "move_then_grow": MotionClass("train", move_then_grow, "comes, then becomes larger"),
    "swing_horizontal": MotionClass("train", swing(RIGHT), "to and fro sideways"),
    "swing_vertical": MotionClass("train", swing(DOWN), "to and fro up and down"),
    "approach": MotionClass("train", approach, "two come together", "separate"),
    "separate": MotionClass("train", backwards(approach), "two move apart", "approach"),
    "square_clockwise": MotionClass("val", square, "clockwise round a square", "square_counterclockwise"),
    "square_counterclockwise": MotionClass(
        "val", backwards(square), "counterclockwise round a square", "square_clockwise"
    ),
    "spin_then_move": MotionClass("val", spin_then_move, "turns, then leaves", "move_then_spin"),
    "move_then_spin": MotionClass("val", backwards(spin_then_move), "comes, then turns", "spin_then_move"),
    "zigzag": MotionClass("val", zigzag, "sideways in sharp turns"),
    "hop": MotionClass("val", hop, "sideways like a bouncing ball"),
    "left_then_up": MotionClass("test", turn_corner(LEFT, UP), "left, then up"),
    "up_then_left": MotionClass("test", turn_corner(UP, LEFT), "up, then left"),
    "spiral_out": MotionClass("test", spiral_out, "round and round, outwards", "spiral_in"),
    "spiral_in": MotionClass("test", backwards(spiral_out), "round and round, inwards", "spiral_out"),
    "grow_then_shrink": MotionClass("test", grow_then_shrink, "larger, then smaller", "grow_then_shrink"),
    "shrink_then_grow": MotionClass("test", shrink_then_grow, "smaller, then larger", "shrink_then_grow"),
    "orbit_clockwise": MotionClass("test", orbit, "two circle each other clockwise", "orbit_counterclockwise"),
    "orbit_counterclockwise": MotionClass(
        "test", backwards(orbit), "two circle each other counterclockwise", "orbit_clockwise"
    ),
    "meet_and_return": MotionClass("test", meet_and_return, "two meet and go back", "meet_and_return"),
    "cross_over": MotionClass("test", cross_over, "two change places"),
}


def classes_of(split: Split) -> list[str]:
    """Names of the split's classes, in the order of the table."""
    return [name for name, motion_class in MOTION_CLASSES.items() if motion_class.split == split]
