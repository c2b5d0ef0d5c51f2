"""Whether a file that states where it ends reaches that place: Matroska and WebM, and GIF.

Formats: RFC 8794 (EBML), RFC 9559 (Matroska), and the GIF89a specification of 1990.
"""

from pathlib import Path
from typing import BinaryIO

EBML_HEADER = 0x1A45DFA3
SEGMENT = 0x18538067
EBML_VOID = 0xEC
EBML_CHECKSUM = 0xBF

GIF_EXTENSION = b"\x21"
GIF_PICTURE = b"\x2c"
GIF_TRAILER = b"\x3b"


def ends_early(path: Path) -> bool | None:
    """True for a cut file, False for a whole one, None where the content does not state its end."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        if start.startswith(EBML_HEADER.to_bytes(4, "big")):
            return _segment_ends_early(file, num_bytes)
        if start in (b"GIF87a", b"GIF89a"):
            return _gif_ends_early(file, num_bytes)
    return None


def _segment_ends_early(file: BinaryIO, num_bytes: int) -> bool | None:
    while (name := _variable_integer(file, keeps_marker=True)) is not None:
        size = _variable_integer(file, keeps_marker=False)
        if size is None or name not in (EBML_HEADER, EBML_VOID, EBML_CHECKSUM, SEGMENT):
            return None
        end = file.tell() + size
        if name == SEGMENT or end > num_bytes:
            return end > num_bytes
        file.seek(end)
    return None


def _variable_integer(file: BinaryIO, keeps_marker: bool) -> int | None:
    """An EBML number of up to 8 bytes; None at the end of the file and for the size that means "unknown"."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    num_more = 8 - first[0].bit_length()
    more = file.read(num_more)
    if len(more) < num_more:
        return None
    value = int.from_bytes(first + more, "big")
    if keeps_marker:
        return value
    largest = (1 << 7 * (num_more + 1)) - 1
    value &= largest
    return None if value == largest else value


def _gif_ends_early(file: BinaryIO, num_bytes: int) -> bool:
    """Walks over the blocks, since a cut may fall behind any byte, and some programs append bytes to whole files."""
    screen = file.read(13)
    if len(screen) < 13:
        return True
    file.seek(_colour_table_bytes(screen[10]), 1)
    while file.tell() < num_bytes:
        label = file.read(1)
        if label == GIF_TRAILER:
            return False
        if label == GIF_EXTENSION:
            file.seek(1, 1)
        elif label == GIF_PICTURE:
            picture = file.read(9)
            file.seek(_colour_table_bytes(picture[-1] if len(picture) == 9 else 0) + 1, 1)
        else:  # damage, which the decoder counts; only the last byte is left to go by
            file.seek(num_bytes - 1)
            return file.read(1) != GIF_TRAILER
        while length := file.read(1):
            if length == b"\0":
                break
            file.seek(length[0], 1)
    return True


def _colour_table_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
