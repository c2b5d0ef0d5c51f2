"""What the pictures of a head's maps are drawn with: marks on frames, and films side by side in one GIF.

F frames, H W pixels.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from PIL import Image, ImageDraw

from pipeline.strips import GRID, INK, Page, check_frames

PANEL_PIXELS = 176
"""Width of a frame that something is drawn on, and of a film in a GIF."""
MARK = "#e69f00"
"""Frames around what is chosen: an orange that differs from the blues also for colour-blind people."""
PREDICTED_COLOUR, OWN_COLOUR, OTHER_COLOUR = "#1d5c9f", "#e69f00", "#a3a9b3"
"""Of the class that a query was taken for, of its own, and of the others."""
MILLISECONDS_PER_FRAME = 160
_GIF_DOTS_PER_INCH = 100
_GAP, _TITLE, _HEADLINE, _BAR = 12, 60, 30, 6
"""Pixels of a GIF: between films, for the title of a film, for the title of all, of the bar of time."""
_LETTERS_PER_INCH = 14.0
"""Of text in 7 points, with room for wide letters."""


def enlarged(frames: np.ndarray, width: int = PANEL_PIXELS) -> np.ndarray:
    """Frames (F, H, W, 3) uint8 at another width, in proportion."""
    check_frames("frames", frames)
    height = max(1, round(frames.shape[1] * width / frames.shape[2]))
    kind = Image.Resampling.LANCZOS if frames.shape[2] > width else Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), kind)) for frame in frames])


def drawn_over(frames: np.ndarray, draw: Callable[[ImageDraw.ImageDraw, int], None]) -> np.ndarray:
    """Copies of frames with something drawn on each by `draw(canvas, frame index)`."""
    drawn = []
    for index, frame in enumerate(frames):
        image = Image.fromarray(frame)
        draw(ImageDraw.Draw(image), index)
        drawn.append(np.asarray(image))
    return np.stack(drawn)


def framed(frames: np.ndarray, is_chosen: Sequence[bool] | np.ndarray, colour: str = MARK) -> np.ndarray:
    """Frames with a border around those that are chosen."""
    height, width = frames.shape[1:3]
    thickness = max(2, width // 22)

    def draw(canvas: ImageDraw.ImageDraw, index: int) -> None:
        if is_chosen[index]:
            canvas.rectangle((0, 0, width - 1, height - 1), outline=colour, width=thickness)

    return drawn_over(frames, draw)


def with_region(frames: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Frames with the region that an offset moves them to, and an arrow from the centre of the frame to that of the region.

    Args:
        frames: (F, H, W, 3) uint8.
        offsets: (F, 2), (x, y) in half frame sizes.
    """
    height, width = frames.shape[1:3]
    thick = max(1, width // 60)
    corner = np.array([width - 1.0, height - 1.0])

    def draw(canvas: ImageDraw.ImageDraw, index: int) -> None:
        shift = offsets[index] * (width / 2.0, height / 2.0)
        low, high = np.clip(shift, 0.0, corner), np.clip(shift + corner, 0.0, corner)
        for colour, thickness in (("black", 3 * thick), ("white", thick)):
            inset = (3 * thick - thickness) // 2
            box = (low[0] + inset, low[1] + inset, high[0] - inset, high[1] - inset)
            if box[2] > box[0] and box[3] > box[1]:
                canvas.rectangle(box, outline=colour, width=thickness)
        _draw_arrow(canvas, np.array([width / 2.0, height / 2.0]), shift, thick)

    return drawn_over(frames, draw)


def _draw_arrow(canvas: ImageDraw.ImageDraw, start: np.ndarray, shift: np.ndarray, thick: int) -> None:
    """A white arrow with a black rim; a dot where it would be too short for a head."""
    length = float(np.hypot(*shift))
    end, size = start + shift, 3.5 * thick + 2.0
    if length < 2.0 * size:
        canvas.ellipse((*(end - 2.5 * thick), *(end + 2.5 * thick)), fill="white", outline="black", width=thick)
        return
    along = shift / length
    across = np.array([-along[1], along[0]])
    neck = end - along * 1.6 * size
    canvas.line((*start, *neck), fill="black", width=3 * thick)
    corners = [(float(corner[0]), float(corner[1])) for corner in (end, neck + across * size, neck - across * size)]
    canvas.polygon(corners, fill="white", outline="black", width=thick)
    canvas.line((*start, *(neck + 2.0 * thick * along)), fill="white", width=thick)


@dataclass(frozen=True, slots=True)
class Film:
    """Frames that play in one place of a GIF."""

    title: str
    """Above it, in up to five lines."""
    frames: np.ndarray
    """(F, H, W, 3) uint8."""

    def __post_init__(self) -> None:
        check_frames(self.title or "a film", self.frames)


def write_gif(rows: Sequence[Sequence[Film]], path: Path, title: str, num_frames: int) -> Path:
    """Films side by side, with a bar that tells the time.

    Args:
        rows: films from left to right, rows from top to bottom.
        path: the GIF to write.
        title: over all films.
        num_frames: of the GIF, at even distances in every film; at least 1.
    """
    panels = [[_resampled(film.frames, num_frames) for film in row] for row in rows]
    heights = [max(panel.shape[1] for panel in row) for row in panels]
    width = max(len(row) for row in rows) * (PANEL_PIXELS + _GAP) + _GAP
    height = _HEADLINE + sum(each + _TITLE for each in heights) + 2 * _GAP + _BAR
    page = Page(Figure(figsize=(width / _GIF_DOTS_PER_INCH, height / _GIF_DOTS_PER_INCH), dpi=_GIF_DOTS_PER_INCH))
    headline = wrapped(title, 0.7 * page.width, 1)
    page.text(_GAP / _GIF_DOTS_PER_INCH, page.height - 0.18, headline, fontsize=10, weight="bold")
    places: list[tuple[int, int, np.ndarray]] = []
    edge = _HEADLINE
    for row, row_panels, row_height in zip(rows, panels, heights, strict=True):
        for column, (film, panel) in enumerate(zip(row, row_panels, strict=True)):
            left = _GAP + column * (PANEL_PIXELS + _GAP)
            text = wrapped(film.title, PANEL_PIXELS / _GIF_DOTS_PER_INCH, 5)
            middle = page.height - (edge + _TITLE / 2.0) / _GIF_DOTS_PER_INCH
            page.text(left / _GIF_DOTS_PER_INCH, middle, text, fontsize=7, linespacing=1.1)
            places.append((edge + _TITLE, left, panel))
        edge += _TITLE + row_height
    _save_gif(_rendered(page), places, path, num_frames)
    return path


def _save_gif(background: np.ndarray, places: list[tuple[int, int, np.ndarray]], path: Path, num_frames: int) -> None:
    images = []
    height, width = background.shape[:2]
    track = width - 2 * _GAP
    top = height - _GAP - _BAR
    for index in range(num_frames):
        pixels = background.copy()
        for row, column, panel in places:
            pixels[row : row + panel.shape[1], column : column + panel.shape[2]] = panel[index]
        # The bar also keeps two frames from being equal: Pillow would make one of them.
        done = round(track * (index + 1) / num_frames)
        pixels[top : top + _BAR, _GAP : _GAP + track] = _rgb(GRID)
        pixels[top : top + _BAR, _GAP : _GAP + done] = _rgb(INK)
        images.append(Image.fromarray(pixels).quantize(256))
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=MILLISECONDS_PER_FRAME, loop=0)


def _resampled(frames: np.ndarray, num_frames: int) -> np.ndarray:
    chosen = np.rint(np.linspace(0, len(frames) - 1, num_frames)).astype(int)
    return enlarged(frames[chosen])


def _rendered(page: Page) -> np.ndarray:
    buffer = io.BytesIO()
    page.figure.savefig(buffer, dpi=_GIF_DOTS_PER_INCH, facecolor="white")
    with Image.open(buffer) as image:
        return np.array(image.convert("RGB"))


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def text_inches(text: str, size: float, weight: str = "normal") -> float:
    """How wide a text is on a page, inches."""
    path = TextPath((0.0, 0.0), text, size=size, prop=FontProperties(weight=weight))
    # Letters fitted to pixels are up to 3 % wider than their outlines.
    return 1.03 * float(path.get_extents().x1) / 72.0


def wrapped(text: str, width_inches: float, most_lines: int) -> str:
    """A text in lines of a width, the last one cut where there are too many."""
    letters = max(8, int(width_inches * _LETTERS_PER_INCH))
    return "\n".join(textwrap.wrap(text, letters, max_lines=most_lines, placeholder=" …"))
