"""TIFF's directories and segments -> refused where tifffile would loop, fill the memory, or return half a picture."""

from __future__ import annotations

import math
import struct
from typing import Any, BinaryIO

from useg.data.limits import UnreadableError, check_held, file_bytes

MOST_DIRECTORIES = 20_000
_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # by type, TIFF 6.0 section 2
_SUB_DIRECTORIES = (330, 34665, 34853, 40965)
JPEG = (7, 33007)
# The most bytes of pixels that a byte of file holds. One bit of CCITT is a row; a block of ZSTD repeats one byte 128 kB long.
_MOST_HELD = {1: 1, 2: 1 << 20, 3: 1 << 20, 4: 1 << 20, 5: 4096, 7: 4096, 8: 1100, 32773: 64, 32946: 1100, 33007: 4096, 34925: 8192, 50000: 1 << 16}


def check_directories(file: BinaryIO) -> None:
    """Walk over all directories of a TIFF without reading a value.

    tifffile follows a ring of directories for ever, and reads every value that a directory claims, also the same bytes a thousand times.
    """
    size = file_bytes(file)
    file.seek(0)
    head = file.read(16)
    order, big = "<" if head[:2] == b"II" else ">", head[2:4] in (b"+\0", b"\0+")
    entry = struct.Struct(order + ("HHQ8s" if big else "HHI4s"))
    number, offset = struct.Struct(order + ("Q" if big else "H")), struct.Struct(order + ("Q" if big else "I"))
    claimed, seen = 0, set()
    todo = [(offset.unpack_from(head, 8 if big else 4)[0], True)]
    while todo:
        place, is_page = todo.pop()
        if not 8 <= place < size or (place in seen and not is_page):  # tifffile passes over these
            continue
        if place in seen:
            raise ValueError("its pages form a ring")
        seen.add(place)
        file.seek(place)
        (count,) = number.unpack(file.read(number.size))
        if count * entry.size > size:
            raise ValueError("a directory is longer than the file")
        content = file.read(count * entry.size + offset.size)
        if is_page:
            todo.append((offset.unpack_from(content, count * entry.size)[0], True))
        for code, kind, length, value in entry.iter_unpack(content[: count * entry.size]):
            held = _VALUE_BYTES.get(kind, 1) * length
            claimed += held
            if claimed > 2 * size:
                raise ValueError("its directories claim more than the file holds")
            if code in _SUB_DIRECTORIES and kind in (4, 13, 16, 18):
                todo += [(place, False) for place in _offsets(file, offset, held, value, order + ("I" if kind in (4, 13) else "Q"))]
        if len(seen) + len(todo) > MOST_DIRECTORIES:
            raise ValueError(f"it has more than {MOST_DIRECTORIES:,} pages")


def _offsets(file: BinaryIO, offset: struct.Struct, held: int, value: bytes, form: str) -> list[int]:
    if held > len(value):
        file.seek(offset.unpack(value)[0])
        value = file.read(held)
    return [place for (place,) in struct.iter_unpack(form, value[: held - held % struct.calcsize(form)])]


def check_segments(file: BinaryIO, plane: Any, first: Any) -> None:
    """Refuse a plane (tifffile's page, and the one that describes it) whose strips or tiles are missing, cut off, or cannot hold its pixels."""
    import tifffile

    if first.compression not in _MOST_HELD:
        known = first.compression in set(tifffile.COMPRESSION)
        name = tifffile.COMPRESSION(first.compression).name if known else str(first.compression)
        raise UnreadableError(f"it is compressed by {name}")
    number, offsets, counts = math.prod(first.chunked), plane.dataoffsets, plane.databytecounts
    if min(len(offsets), len(counts)) < number:  # tifffile would fill the rest with zeros and only log it
        raise ValueError(f"it has {min(len(offsets), len(counts))} of {number} strips or tiles")
    held = [(offset, count) for offset, count in zip(offsets[:number], counts, strict=False) if offset and count]
    size, total = file_bytes(file), sum(count for _, count in held)
    if not held or any(offset + count > size for offset, count in held):
        raise ValueError("its pixels lie beyond the end of the file")
    if total > 4 * size + first.nbytes:
        raise ValueError("its strips or tiles overlap")
    segment = math.prod(first.chunks) * first.dtype.itemsize  # of pixels; the lowest strip may be smaller
    pixels = len(held) * segment if first.is_tiled else min(first.nbytes, len(held) * segment)
    check_held(pixels * min(first.bitspersample, 8) // 8 if isinstance(first.bitspersample, int) else 0, total, _MOST_HELD[first.compression])
    if first.compression in JPEG:
        width, height = (first.tilewidth, first.tilelength) if first.is_tiled else (first.imagewidth, first.rowsperstrip)
        for offset, count in held:
            file.seek(offset)
            _check_jpeg(file.read(count), width, height)


def _check_jpeg(content: bytes, width: int, height: int) -> None:
    """Refuse a JPEG with more pixels than its strip or tile, which its decoder would make, or cut off, which it would not notice."""
    if not content.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError("a strip or tile of it is cut off")
    place = 2
    while place + 9 < len(content) and content[place] == 0xFF:
        marker, (length,) = content[place + 1], struct.unpack_from(">H", content, place + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            declared = struct.unpack_from(">HH", content, place + 5)
            if declared[0] > height or declared[1] > width:
                raise ValueError(f"a strip or tile of {width}x{height} declares {declared[1]}x{declared[0]} pixels")
            return
        place += 1 if marker == 0xFF else 2 + length
    raise ValueError("a strip or tile of it declares no size")
