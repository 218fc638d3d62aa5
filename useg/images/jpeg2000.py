"""Read JPEG 2000: what a file declares, and its pixels.

OpenJPEG allocates every precinct and code block of a tile before it reads one, and a palette can
make hundreds of bands of one: a JPEG 2000 of some kilobytes could take gigabytes. The sections and
tables named here are those of ISO/IEC 15444-1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import PIL
import PIL.Image
from numpy.typing import NDArray

from useg.images.formats import (
    FLAT_HELD,
    FLAT_PIXELS,
    MAX_BANDS,
    BlockCount,
    Container,
    StoredPixels,
    file_bytes,
    silence_package,
)

# How the two kinds of files start.
BOX_START, CODESTREAM_START = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"
# Subsampling of three colours: 4:4:4, 4:2:2 and 4:2:0. The decoder prints on standard error for any
# other, and then refuses it.
_COLOR_STEPS = ([(1, 1)] * 3, [(1, 1), (2, 1), (2, 1)], [(1, 1), (2, 2), (2, 2)])
# The decoder keeps 32 bits for each value.
_WORD_BYTES = 4
# Minimum bytes of a tile: its headers.
_MIN_TILE_BYTES = 14
# Maximum bands of a palette: colours, and perhaps transparency.
_MAX_PALETTE_BANDS = 4
# Markers: coding style, that of a band, start of a tile, start of data, end of the codestream.
_STYLE, _BAND_STYLE, _TILE, _DATA, _END = 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9
# Maxima for a tile. Programs write code blocks of 1,024 or 4,096 values, and larger precincts.
_MAX_BLOCKS, _VALUES_PER_BLOCK = 100_000, 256
_MAX_PRECINCTS, _VALUES_PER_PRECINCT = 10_000, 2048
# Maximum packets of all layers: the decoder keeps a flag for each.
_MAX_PACKETS = 1 << 25
_MAX_SEGMENTS, _BYTES_PER_SEGMENT = 100_000, 256


def jpeg2000_container(file: BinaryIO) -> Container:
    """Read what a JPEG 2000 declares."""
    size, blocks = file_bytes(file), BlockCount(file_bytes(file))
    file.seek(0)
    place = 0
    if file.read(4) != CODESTREAM_START:
        place = find_codestream(file, size, blocks)
    codestream = read_codestream(file, place, size)
    return Container(
        "JPEG2000",
        codestream.size,
        codestream.bands * (codestream.value_bytes + _WORD_BYTES),
        ((0, size),),
        (
            codestream.size[0] * codestream.size[1],
            size + FLAT_PIXELS // FLAT_HELD,
            FLAT_HELD,
        ),
    )


def decode_jpeg2000(content: bytes, _: int) -> StoredPixels:
    """Decode a JPEG 2000, without the bands that it declares as opacity."""
    import imagecodecs

    silence_package("imagecodecs")
    decoded: NDArray[Any] = imagecodecs.jpeg2k_decode(content)
    pixels = decoded[..., None] if decoded.ndim == 2 else decoded
    alpha = [band for band in _jpeg2000_alpha(content) if 0 < band < pixels.shape[2]]
    return StoredPixels(np.delete(pixels, alpha, axis=2))


def _jpeg2000_alpha(content: bytes) -> list[int]:
    """Return the bands that a JP2's channel definition box declares as opacity."""
    place = content.find(b"cdef", 0, 4096) + 4
    if place < 4:
        return []
    (count,) = struct.unpack_from(">H", content, place)
    channels = struct.iter_unpack(">HHH", content[place + 2 : place + 2 + 6 * min(count, 4)])
    return [band for band, kind, _ in channels if kind in (1, 2)]


@dataclass(frozen=True)
class Codestream:
    """What a JPEG 2000 codestream declares.

    Args:
        size: ``(width, height)``.
        bands: number of bands.
        value_bytes: bytes of the largest value.
    """

    size: tuple[int, int]
    bands: int
    value_bytes: int


def read_codestream(file: BinaryIO, place: int, end: int) -> Codestream:
    """Read what the codestream at ``place`` declares.

    Raises:
        ValueError: It declares more tiles, bands, blocks or layers than images have.
    """
    file.seek(place)
    head = file.read(42)
    if head[:4] != CODESTREAM_START:
        raise PIL.UnidentifiedImageError("its codestream does not begin with a SIZ segment")
    right, bottom, left, top, wide, high, tile_x, tile_y = struct.unpack_from(">8I", head, 8)
    (bands,) = struct.unpack_from(">H", head, 40)
    components = file.read(3 * bands)
    depths = components[::3]
    width, height = right - left, bottom - top
    if not (wide and high and bands and len(depths) == bands and min(width, height) > 0):
        raise ValueError("it declares no size")
    if bands > MAX_BANDS:
        raise ValueError(f"it declares {bands:,} bands, more than {MAX_BANDS}")
    steps = [*zip(components[1::3], components[2::3], strict=True)]
    if {*steps} != {(1, 1)} and (steps[:3] not in _COLOR_STEPS or {*steps[3:]} - {(1, 1)}):
        raise ValueError("the sizes of its bands are inconsistent")
    if -(-(right - tile_x) // wide) * -(-(bottom - tile_y) // high) * _MIN_TILE_BYTES > end:
        raise ValueError("it declares more tiles than it can hold")
    layers = 1
    for marker, content in _segments(file, place + 2, end):
        if marker == _STYLE:
            layers = max(layers, *struct.unpack_from(">H", content, 2))
            style, has_precincts = content[5:], content[0] & 1
        else:
            at = 1 if bands < 257 else 2
            style, has_precincts = content[at + 1 :], content[at] & 1
        _check_style(style, bool(has_precincts), min(wide, width), min(high, height), bands, layers)
    value_bytes = max(1 + (depth & 0x7F) for depth in depths) // 9 + 1
    return Codestream((width, height), bands, value_bytes)


def _check_palette(content: bytes) -> None:
    """Refuse a palette box (I.5.3.4) that makes more bands than colours have."""
    if len(content) > 2 and content[2] > _MAX_PALETTE_BANDS:
        raise ValueError(f"its palette makes {content[2]} bands, more than {_MAX_PALETTE_BANDS}")


def _segments(file: BinaryIO, place: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield the coding styles of the whole image and of each tile (A.2)."""
    left = _MAX_SEGMENTS + end // _BYTES_PER_SEGMENT
    tile_end = end
    while place + 4 <= end:
        left -= 1
        if left < 0:
            raise ValueError("it has too many marker segments")
        file.seek(place)
        marker, length = struct.unpack(">HH", file.read(4))
        if marker == _END:
            return
        if marker == _DATA:
            place = tile_end
            continue
        if marker == _TILE:
            (tile_bytes,) = struct.unpack_from(">I", file.read(6), 2)
            tile_end = place + tile_bytes if tile_bytes else end
            if tile_end < place + 12:
                raise ValueError("one of its tiles is shorter than its header")
        if marker in (_STYLE, _BAND_STYLE):
            yield marker, file.read(max(length - 2, 0))
        place += 2 + max(length, 2)


def _check_style(
    style: bytes, has_precincts: bool, width: int, height: int, bands: int, layers: int
) -> None:
    """Check the code blocks and precincts of a tile: levels, block size, precincts (A.6.1)."""
    levels, block_x, block_y = style[0], style[1] + 2, style[2] + 2
    exponents = style[5:] if has_precincts else b""
    blocks = precincts = most = 0
    for level in range(levels + 1):
        exponent = exponents[level] if level < len(exponents) else 0xFF
        reduction = levels - level
        wide, high = -(-width >> reduction), -(-height >> reduction)
        # The blocks of a precinct lie in three bands of half its size, but at the lowest level.
        is_split = level > 0
        across = max((exponent & 15) - is_split, 0), max((exponent >> 4) - is_split, 0)
        precincts_here = _count(wide, exponent & 15) * _count(high, exponent >> 4)
        block_exponents = min(block_x, across[0]), min(block_y, across[1])
        half = (wide >> is_split) + is_split, (high >> is_split) + is_split
        blocks += (3 if is_split else 1) * (
            _count(half[0], block_exponents[0]) * _count(half[1], block_exponents[1])
        )
        precincts += precincts_here
        most = max(most, precincts_here)
    values = width * height * bands
    if blocks * bands > _MAX_BLOCKS + values // _VALUES_PER_BLOCK:
        raise ValueError(
            f"one of its tiles has {blocks * bands:,} code blocks, more than any image needs"
        )
    if precincts * bands > _MAX_PRECINCTS + values // _VALUES_PER_PRECINCT:
        raise ValueError(
            f"one of its tiles has {precincts * bands:,} precincts, more than any image needs"
        )
    if (layers + 1) * bands * (levels + 1) * most > _MAX_PACKETS:
        raise ValueError(f"it has {layers:,} layers, more than any image needs")


def _count(length: int, exponent: int) -> int:
    """Return how many cells of ``2 ** exponent`` a range touches."""
    return -(-length >> exponent)


def find_codestream(file: BinaryIO, size: int, blocks: BlockCount) -> int:
    """Return where the codestream of a JP2 file begins."""
    places = []
    for kind, start, stop in _boxes(file, 0, size, blocks):
        if kind == b"jp2c":
            places.append(start)
        if kind == b"jp2h":
            for inner, begin, _ in _boxes(file, start, stop, blocks):
                if inner == b"pclr":
                    file.seek(begin)
                    _check_palette(file.read(3))
    if not places:
        raise ValueError("it contains no image")
    return places[0]


def _boxes(
    file: BinaryIO, place: int, end: int, blocks: BlockCount
) -> Iterator[tuple[bytes, int, int]]:
    """Yield the boxes of an ISO base media file or JP2: kind, start and end of the content."""
    while place + 8 <= end:
        blocks.count()
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        start = place + 8
        if length == 1:
            (length,) = struct.unpack(">Q", file.read(8))
            start += 8
        stop = min(place + length, end) if length else end
        if stop < start:
            raise ValueError("one of its boxes is shorter than its header")
        yield kind, start, stop
        place = stop
