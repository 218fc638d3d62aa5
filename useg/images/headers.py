"""Parse the more complex headers: PNM, NPY, AVIF and HEIC, DICOM, JPEG 2000.

They are read twice: for what a file declares (containers.py), and for its pixels (decode.py).

OpenJPEG allocates every precinct and code block of a tile before it reads one, and a palette can
make hundreds of bands of one: a JPEG 2000 of some kilobytes could take gigabytes. Its sections and
tables are those of ISO/IEC 15444-1.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import PIL
import PIL.Image
from PIL.AvifImagePlugin import AvifImageFile

from useg.errors import need
from useg.images.limits import BlockCount, UnreadableError, file_bytes, silence_package

# DICOM: the group of items of a sequence, kinds of values with long lengths, where pixels begin.
_DICOM_ITEM, _PIXEL_DATA = 0xFFFE, b"\xe0\x7f\x10\0"
_LONG_KINDS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT"}
# Maximum bytes of files that are read whole, because their header cannot be read alone.
_MAX_WHOLE_BYTES = 1 << 29
_MAX_NPY_HEADER = 10_000
# An array or a JPEG 2000 with more bands is not an image.
_MAX_BANDS = 64
# These transfer syntaxes compress a whole DICOM file.
_DEFLATED = (b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.4.95")
_DICOM_TAGS = (
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "NumberOfFrames"),
    *("RescaleSlope", "RescaleIntercept", "RedPaletteColorLookupTableDescriptor"),
    *("GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor"),
    *("RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableData",),
)

# JPEG 2000: how its two kinds of files start.
BOX_START, CODESTREAM_START = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"
# Subsampling of three colours: 4:4:4, 4:2:2 and 4:2:0. The decoder prints on standard error for any
# other, and then refuses it.
_COLOR_STEPS = ([(1, 1)] * 3, [(1, 1), (2, 1), (2, 1)], [(1, 1), (2, 2), (2, 2)])
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


@dataclass(frozen=True)
class PnmHeader:
    """The header of a PBM, PGM or PPM: its type (1 to 6), size, maximum value and length."""

    kind: int
    width: int
    height: int
    highest: int
    length: int

    @property
    def bands(self) -> int:
        """Number of bands."""
        return 3 if self.kind in (3, 6) else 1


def read_pnm_header(start: bytes) -> PnmHeader:
    """Read the header of a PBM, PGM or PPM."""
    kind = start[1] - ord("0")
    # Possessive: with \s+ and without the second plus, 30 line breaks would take minutes.
    number = rb"(?:\s|#[^\n\r]*[\n\r])++([0-9]{1,9})"
    is_bitmap = kind in (1, 4)
    found = re.match(rb"P[1-6]" + number * (2 if is_bitmap else 3) + rb"\s?", start)
    if found is None:
        raise PIL.UnidentifiedImageError("its header is damaged")
    width, height, highest = map(int, (*found.groups(), b"1") if is_bitmap else found.groups())
    if not 1 <= highest <= 65535:
        raise ValueError(f"its highest value is {highest}")
    return PnmHeader(kind, width, height, highest, found.end())


def read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Read a .npy file up to its values: shape, type, and whether columns come first."""
    file.seek(0)
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise UnreadableError(f"it is a .npy file of version {version[0]}.{version[1]}")
    length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
    # Python parses the header, and would print a warning about invalid escapes in it.
    if b"\\" in file.read(min(length, _MAX_NPY_HEADER)):
        raise ValueError("its header has a backslash")
    file.seek(8)
    shape, by_columns, dtype = read(file, max_header_size=_MAX_NPY_HEADER)
    if dtype.kind not in "buif":
        raise UnreadableError(f"it stores {dtype} and not numbers")
    if min(shape, default=0) < 0:
        raise ValueError(f"it declares the shape {shape}")
    return shape, dtype, by_columns


def npy_axes(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], bool]:
    """Return the (height, width, bands) of an array, and whether its bands come first.

    ``(H, W)`` has one band. Of three axes, the bands are the first if it is shorter than the last,
    otherwise the last.
    """
    if len(shape) == 2:
        return (shape[0], shape[1], 1), False
    if len(shape) == 3 and min(shape[0], shape[2]) <= _MAX_BANDS:
        if shape[0] < shape[2]:
            return (shape[1], shape[2], shape[0]), True
        return (shape[0], shape[1], shape[2]), False
    raise UnreadableError(f"it is an array of the shape {shape}, and not one image")


def open_iso_media(form: str, content: bytes, file: BinaryIO | None = None) -> PIL.Image.Image:
    """Open an AVIF or HEIC with its decoder, which reads the header only."""
    if file is not None:
        content = _read_all(file)
    try:
        if form == "AVIF":
            return AvifImageFile(io.BytesIO(content))
        plugin: Any = need("pillow_heif", "heic")
        opened: PIL.Image.Image = plugin.HeifImageFile(io.BytesIO(content))
        return opened
    except SyntaxError as error:
        raise PIL.UnidentifiedImageError(str(error)) from error


def read_dicom(file: BinaryIO, *, with_pixels: bool) -> Any:
    """Read the elements of a DICOM file that describe its pixels; all others are dropped."""
    pydicom: Any = need("pydicom", "dicom")
    silence_package("pydicom")
    content = _read_all(file)
    if any(syntax in content for syntax in _DEFLATED):
        raise UnreadableError("it is a DICOM file that is compressed as a whole")
    _count_elements(content)
    tags = [*_DICOM_TAGS, *(["PixelData"] if with_pixels else [])]
    return pydicom.dcmread(
        io.BytesIO(content), stop_before_pixels=not with_pixels, specific_tags=tags
    )


def _count_elements(content: bytes) -> None:
    """Refuse a DICOM file of very many elements (PS3.5, section 7.1); order is little-endian."""
    blocks, place = BlockCount(len(content)), 132
    while place + 12 <= len(content) and content[place : place + 4] != _PIXEL_DATA:
        blocks.count()
        group, _, kind, length = struct.unpack_from("<HH2sH", content, place)
        head = 8
        if group == _DICOM_ITEM or not kind.isupper():
            (length,) = struct.unpack_from("<I", content, place + 4)
        elif kind in _LONG_KINDS:
            (length,) = struct.unpack_from("<I", content, place + 8)
            head = 12
        # What has no length ends with an element of its own: its parts are counted, too.
        place += head + (0 if length == 0xFFFFFFFF else length)


def _read_all(file: BinaryIO) -> bytes:
    if file_bytes(file) > _MAX_WHOLE_BYTES:
        raise UnreadableError(f"it has more than {_MAX_WHOLE_BYTES:,} bytes")
    file.seek(0)
    return file.read()


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
        raise PIL.UnidentifiedImageError("its codestream does not begin with a size")
    right, bottom, left, top, wide, high, tile_x, tile_y = struct.unpack_from(">8I", head, 8)
    (bands,) = struct.unpack_from(">H", head, 40)
    components = file.read(3 * bands)
    depths = components[::3]
    width, height = right - left, bottom - top
    if not (wide and high and bands and len(depths) == bands and min(width, height) > 0):
        raise ValueError("it declares no size")
    if bands > _MAX_BANDS:
        raise ValueError(f"it declares {bands:,} bands, more than {_MAX_BANDS}")
    steps = [*zip(components[1::3], components[2::3], strict=True)]
    if {*steps} != {(1, 1)} and (steps[:3] not in _COLOR_STEPS or {*steps[3:]} - {(1, 1)}):
        raise ValueError("its bands have sizes that do not fit together")
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
            raise ValueError("it has very many marker segments")
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
                raise ValueError("a tile of it is shorter than its header")
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
        raise ValueError(f"a tile of it has {blocks * bands:,} code blocks, more than images have")
    if precincts * bands > _MAX_PRECINCTS + values // _VALUES_PER_PRECINCT:
        raise ValueError(f"a tile of it has {precincts * bands:,} precincts, more than images have")
    if (layers + 1) * bands * (levels + 1) * most > _MAX_PACKETS:
        raise ValueError(f"it has {layers:,} layers, more than images have")


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
        raise ValueError("it has no picture")
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
            raise ValueError("a box of it is shorter than its header")
        yield kind, start, stop
        place = stop
