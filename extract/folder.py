"""Videos kept as a folder of pictures, one per frame, as the published code stores them.

Deviation: the published code sorts the names lexicographically, which reads 1.png, 10.png, 11.png, 2.png. Here digits count
as numbers. For zero-padded names, as the published scripts write them, both orders are the same.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from extract.container import Decoded, Timeline
from extract.errors import VideoError, is_disk_trouble
from extract.transform import MAX_PIXELS

FRAME_ENDINGS = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, slots=True)
class FrameFolderReader:
    """Reads the jpg and png files of one folder in the order of their names.

    Only the pictures that a clip needs are opened, so a broken one is noticed only if it is chosen.
    """

    path: Path
    """Absolute."""
    root: Path | None = None
    """Where pictures that are links must not lead out of; None: they may lead anywhere."""

    def files(self) -> list[Path]:
        """The frame files, sorted by name with digits as numbers; hidden files are no frames."""
        found = [
            file
            for file in self.path.iterdir()
            if file.suffix.lower() in FRAME_ENDINGS and not file.name.startswith(".")
        ]
        return sorted((file for file in found if file.is_file()), key=lambda file: _name_order(file.name))

    def announced(self) -> Timeline:
        """One frame per second, for want of a clock."""
        files = self.files()
        if not files:
            raise VideoError("no_frames", f"{self.path.name} holds no file ending in {', '.join(FRAME_ENDINGS)}")
        return Timeline(np.arange(len(files), dtype=np.float64), None)

    def frames(self, wanted: Collection[int], stop: int | None = None) -> Iterator[Decoded]:  # noqa: ARG002  nothing is decoded
        """Read the wanted files only."""
        for index, file in enumerate(self.files()):
            if index in wanted:
                self._refuse_outside(file)
                yield Decoded(index, _read_picture(file))

    def _refuse_outside(self, file: Path) -> None:
        if self.root is not None and file.is_symlink() and not file.resolve().is_relative_to(self.root):
            raise VideoError(
                "not_a_file",
                f"{file.name} is a link out of the manifest's root; set data.allow_outside = true where that is meant",
            )

    def observed(self) -> Timeline:
        """The same as announced: every file is a frame."""
        return self.announced()


def _name_order(name: str) -> tuple[list[str | int], str]:
    """Sort key: text and numbers in turns, then the plain name, which tells 1.png from 01.png."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _read_picture(file: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise VideoError(
                    "too_large",
                    f"{file.name}: {image.width} x {image.height} pixels, at most {MAX_PIXELS} are accepted",
                )
            return np.array(image.convert("RGB"))
    # Pillow refuses the largest ones itself, before their size can be read; the warning is an error where the user wants it.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise VideoError("too_large", f"{file.name}: {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise VideoError("corrupt", f"{file.name}: {error}", is_disk_trouble(error)) from error
