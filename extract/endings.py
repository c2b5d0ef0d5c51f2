"""Whether a file that states where it ends reaches that place, and whether its parts follow each other without a gap.

Formats: ISO 14496-12 (MP4), RFC 8794 and 9559 (Matroska, WebM), RIFF (AVI), PNG and the GIF89a specification of 1990; those
that consist of packets are in `container_packets`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from extract import container_packets
from extract.container_packets import FileEnd

EBML_HEADER = 0x1A45DFA3
SEGMENT = 0x18538067
EBML_VOID = 0xEC
EBML_CHECKSUM = 0xBF
CLUSTER = 0x1F43B675
SEGMENT_PARTS = {
    0x114D9B74,
    0x1549A966,
    0x1654AE6B,
    CLUSTER,
    0x1C53BB6B,
    0x1941A469,
    0x1043A770,
    0x1254C367,
    0x1B538667,
}
CLUSTER_PARTS = {0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0xA2, 0xAF, 0x5854}
ELEMENTS = SEGMENT_PARTS | CLUSTER_PARTS | {EBML_VOID, EBML_CHECKSUM}
ELEMENT_HEADER_BYTES = 12

BOXES = {
    *(b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"mfra", b"sidx", b"styp", b"uuid", b"pdin"),
    *(b"meta", b"udta", b"emsg", b"ssix", b"prft", b"pnot"),
}

FRAGMENT_SEARCH_BYTES = 2**22

GIF_EXTENSION = b"\x21"
GIF_PICTURE = b"\x2c"
GIF_TRAILER = b"\x3b"


def file_end(path: Path) -> FileEnd | None:
    """How the file ends; None where the content does not tell."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(16).ljust(16, b"\0")
        for is_of_format, find_end in _FORMATS:
            if is_of_format(start):
                file.seek(0)
                return find_end(file, num_bytes)
    return None


def _mp4_end(file: BinaryIO, num_bytes: int) -> FileEnd | None:
    place, has_index = 0, False
    while place < num_bytes:
        file.seek(place)
        header = file.read(16)
        size, name = int.from_bytes(header[:4], "big"), header[4:8]
        if name not in BOXES:  # some programs append bytes to whole files, but no fragments
            file.seek(place)
            return "broken" if b"moof" in file.read(FRAGMENT_SEARCH_BYTES) else None
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        if size < 8:  # 0 is "until the end of the file"
            return None
        place += size
        has_index |= name == b"moov"
    return "whole" if place == num_bytes and has_index else "cut"


def _matroska_end(file: BinaryIO, num_bytes: int) -> FileEnd | None:
    while (name := _variable_integer(file, keeps_marker=True)) is not None:
        size = _variable_integer(file, keeps_marker=False)
        if name == SEGMENT:
            end = None if size is None else file.tell() + size
            if end is not None and end > num_bytes:
                return "cut"
            return _segment_end(file, num_bytes if end is None else end) or (None if end is None else "whole")
        if size is None or name not in (EBML_HEADER, EBML_VOID, EBML_CHECKSUM):
            return None
        if file.seek(size, 1) > num_bytes:
            return "cut"
    return None


def _segment_end(file: BinaryIO, end: int) -> FileEnd | None:
    """Walk over the elements of a segment. Where a live recording ends between two of them, none is missing to the eye."""
    while (place := file.tell()) < end:
        name = _variable_integer(file, keeps_marker=True)
        size = _variable_integer(file, keeps_marker=False)
        if name == CLUSTER:  # its parts follow like those of the segment, whether it states a size or not
            continue
        if name is None or size is None:
            return "cut" if end - place < ELEMENT_HEADER_BYTES else "broken"
        if name not in ELEMENTS:
            return "broken"
        if file.seek(size, 1) > end:
            return "cut"
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


def _avi_end(file: BinaryIO, num_bytes: int) -> FileEnd | None:
    """Only whole files are told: sizes that are too large are written by some programs, and counts tell the cut ones."""
    place = 0
    while place < num_bytes:
        file.seek(place)
        header = file.read(12)
        if header[:4] != b"RIFF" or header[8:12] not in (b"AVI ", b"AVIX"):
            return None
        size = int.from_bytes(header[4:8], "little")
        place += 8 + size + size % 2
    return "whole" if place == num_bytes else None


def _png_end(file: BinaryIO, num_bytes: int) -> FileEnd:
    place = 8
    while place < num_bytes:
        file.seek(place)
        header = file.read(8)
        if header[4:] == b"IEND":
            return "whole"
        if len(header) == 8 and not header[4:].isalpha():
            return "broken"
        place += 12 + int.from_bytes(header[:4], "big")
    return "cut"


def _gif_end(file: BinaryIO, num_bytes: int) -> FileEnd:
    """Walks over the blocks, since a cut may fall behind any byte, and some programs append bytes to whole files."""
    screen = file.read(13)
    if len(screen) < 13:
        return "cut"
    file.seek(_colour_table_bytes(screen[10]), 1)
    while file.tell() < num_bytes:
        label = file.read(1)
        if label == GIF_TRAILER:
            return "whole"
        if label == GIF_EXTENSION:
            file.seek(1, 1)
        elif label == GIF_PICTURE:
            picture = file.read(9)
            file.seek(_colour_table_bytes(picture[-1] if len(picture) == 9 else 0) + 1, 1)
        else:
            return "broken"
        while length := file.read(1):
            if length == b"\0":
                break
            file.seek(length[0], 1)
    return "cut"


def _colour_table_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


_FORMATS: list[tuple[Callable[[bytes], bool], Callable[[BinaryIO, int], FileEnd | None]]] = [
    (lambda start: start[4:8] in BOXES, _mp4_end),
    (lambda start: start.startswith(EBML_HEADER.to_bytes(4, "big")), _matroska_end),
    (lambda start: start[:4] == b"RIFF" and start[8:12] == b"AVI ", _avi_end),
    (lambda start: start.startswith(b"\x89PNG\r\n\x1a\n"), _png_end),
    (lambda start: start[:6] in (b"GIF87a", b"GIF89a"), _gif_end),  # before transport streams, which begin with a G too
    *container_packets.FORMATS,
]
