"""How files end that consist of packets, frames or pages: ASF, FLV, Ogg, MPEG program and transport streams, MXF, DV and YUV4MPEG2.

Formats: the ASF specification 1.20.05, the FLV specification 10.1, RFC 3533 (Ogg), ISO 13818-1 (MPEG streams), SMPTE 377 (MXF),
IEC 61834 (DV) and the header of YUV4MPEG2.
"""

import re
from collections.abc import Callable
from typing import BinaryIO, Literal

FileEnd = Literal["whole", "cut", "broken"]
"""whole: it reaches its stated end. cut: it ends before that. broken: within it, something stands where a part should begin."""

ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
ASF_PACKET_FLAGS = b"\x82"

FLV_TAGS = {8, 9, 18}

MXF_PARTITION = bytes.fromhex("060e2b34020501010d010201")

TS_PACKET_BYTES = 188
TS_PACKETS_AT_ONCE = 4096
TS_SYNC = 0x47

PACK = b"\0\0\1\xba"
PACK_SEARCH_BYTES = 2**20
"""From the end of a program stream; packs are 2 KiB as a rule."""
OGG_PAGE_BYTES = 27 + 255 + 255 * 255

Y4M_SHARES = {"420": (3, 2), "422": (2, 1), "444": (3, 1), "mono": (1, 1), "411": (3, 2)}
"""Bytes per pixel of the samples at 8 bits, as a fraction."""


def _asf_end(file: BinaryIO, num_bytes: int) -> FileEnd | None:
    header = file.read(2**16)
    place = header.find(ASF_FILE_PROPERTIES)
    if place < 0 or len(header) < place + 100:
        return None
    stated = int.from_bytes(header[place + 40 : place + 48], "little")
    is_broadcast = header[place + 88] & 1
    if is_broadcast or stated == 0:
        return None
    if stated > num_bytes:
        return "cut"
    # Packets of one size follow the header and the 50 bytes in front of the data; each begins with the same flags.
    packet_bytes = int.from_bytes(header[place + 92 : place + 96], "little")
    first = int.from_bytes(header[16:24], "little") + 50
    num_packets = int.from_bytes(header[place + 56 : place + 64], "little")
    if not 100 <= packet_bytes <= 2**20 or first + num_packets * packet_bytes > num_bytes:
        return "broken"
    for number in range(num_packets):
        file.seek(first + number * packet_bytes)
        flags = file.read(1)
        if flags != ASF_PACKET_FLAGS:
            return "broken" if number else None
    return "whole"


def _flv_end(file: BinaryIO, num_bytes: int) -> FileEnd | None:
    place = int.from_bytes(file.read(9)[5:9], "big") + 4
    while place < num_bytes:
        file.seek(place)
        tag = file.read(11)
        if len(tag) < 11:
            return "cut"
        if tag[0] & 0x1F not in FLV_TAGS or tag[8:11] != b"\0\0\0":
            return "broken"
        place += 11 + int.from_bytes(tag[1:4], "big") + 4
    return "cut" if place > num_bytes else None


def _ogg_end(file: BinaryIO, num_bytes: int) -> FileEnd | None:
    start = max(0, num_bytes - OGG_PAGE_BYTES)
    file.seek(start)
    tail = file.read()
    page = tail.rfind(b"OggS")
    lengths = tail[page + 27 : page + 27 + (tail[page + 26] if len(tail) > page + 26 else 0)]
    if page < 0:
        return None
    is_whole_header = len(tail) > page + 26 and len(lengths) == tail[page + 26]
    if not is_whole_header or page + 27 + len(lengths) + sum(lengths) > len(tail):
        return "cut"
    return "whole" if tail[page + 5] & 4 else None  # the flag of a stream's last page


def _program_stream_end(file: BinaryIO, num_bytes: int) -> FileEnd | None:
    """Whether the last pack is whole. A file that ends between two packs looks like a whole one."""
    file.seek(max(0, num_bytes - PACK_SEARCH_BYTES))
    tail = file.read()
    place = tail.rfind(PACK)
    if place < 0:
        return None
    if len(tail) < place + 14:
        return "cut"
    place += 12 if tail[place + 4] >> 4 == 2 else 14 + (tail[place + 13] & 7)  # MPEG-1, MPEG-2
    while place < len(tail):
        code = tail[place : place + 4]
        if code == b"\0\0\1\xb9":
            return "whole"
        if not code.startswith(b"\0\0\1"[: len(code)]) or (len(code) == 4 and code[3] < 0xBB):
            return None  # other bytes behind the end
        if len(tail) < place + 6:
            return "cut"
        place += 6 + int.from_bytes(tail[place + 4 : place + 6], "big")
    return "cut" if place > len(tail) else None


def _mxf_end(file: BinaryIO, num_bytes: int) -> FileEnd | None:
    header = file.read(64)
    length_of_length = header[16] & 0x7F if len(header) > 16 and header[16] & 0x80 else 0
    place = 17 + length_of_length + 24
    footer = int.from_bytes(header[place : place + 8], "big")
    return "cut" if footer and footer + 16 > num_bytes else None


def _y4m_end(file: BinaryIO, num_bytes: int) -> FileEnd | None:
    header = file.readline(256).decode("latin-1")
    sizes = re.search(r" W([0-9]{1,6}).* H([0-9]{1,6})", header)
    colours = re.search(r" C(mono|[0-9]{3})[a-z0-9]*?(p[0-9]+)?[ \n]", header) or re.match("(YUV4MPEG2)()", header)
    if sizes is None or colours is None or file.readline(256) != b"FRAME\n":
        return None
    width, height = int(sizes[1]), int(sizes[2])
    if "alpha" in header or (colours[1] == "420" and (width % 2 or height % 2)):
        return None
    times, over = Y4M_SHARES.get(colours[1], (3, 2))
    frame_bytes = 6 + width * height * times // over * (2 if colours[2] else 1)
    return "cut" if (num_bytes - len(header)) % frame_bytes else None


def _dv_end(file: BinaryIO, num_bytes: int) -> FileEnd | None:
    """Frames are of one size, but a file that ends between two of them looks like a whole one."""
    frame_bytes = 144_000 if file.read(4)[3] & 0x80 else 120_000  # 625 or 525 lines
    return "cut" if num_bytes % frame_bytes else None


def _transport_stream_end(file: BinaryIO, num_bytes: int) -> FileEnd | None:
    """Packets are of one size, but a file that ends between two of them looks like a whole one."""
    is_first = True
    while packets := file.read(TS_PACKETS_AT_ONCE * TS_PACKET_BYTES):
        if not set(packets[::TS_PACKET_BYTES]) <= {TS_SYNC}:
            # Other sizes of packet than 188 bytes show at once, as does what merely begins with the same byte.
            is_other = is_first and set(packets[: 3 * TS_PACKET_BYTES : TS_PACKET_BYTES]) != {TS_SYNC}
            return None if is_other else "broken"
        is_first = False
    return "cut" if num_bytes % TS_PACKET_BYTES else None


FORMATS: list[tuple[Callable[[bytes], bool], Callable[[BinaryIO, int], FileEnd | None]]] = [
    (lambda start: start == ASF_HEADER, _asf_end),
    (lambda start: start.startswith(b"FLV"), _flv_end),
    (lambda start: start.startswith(b"OggS"), _ogg_end),
    (lambda start: start.startswith(PACK), _program_stream_end),
    (lambda start: start.startswith(MXF_PARTITION), _mxf_end),
    (lambda start: start.startswith(b"YUV4MPEG2 "), _y4m_end),
    (lambda start: start.startswith(b"\x1f\x07\0"), _dv_end),
    (lambda start: start[0] == TS_SYNC, _transport_stream_end),
]
"""By the first 16 bytes."""
