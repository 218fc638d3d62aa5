"""An image file but a TIFF -> its declared size and the parts of it that hold pixels.

Nothing is decoded, and decoders see no other part: a file of a million empty blocks, comments or
scans would cost them minutes, and metadata would cost memory.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import PIL
import PIL.Image
from PIL.AvifImagePlugin import AvifImageFile

from useg.errors import need
from useg.images.jpeg2000 import CODESTREAM_START, check_palette, read_codestream
from useg.images.limits import (
    EXTRA_BYTES,
    MAX_SEGMENT_BYTES,
    UnreadableError,
    check_held,
    check_scans,
    file_bytes,
    silence_package,
)

# Blocks of a file: chunks, segments, extensions. Writers cut pixels into blocks of 4 kB or more.
_MAX_BLOCKS, _BYTES_PER_BLOCK = 10_000, 1024
_MAX_EXIF_BYTES = 1 << 16
# DICOM: the group of items of a sequence, kinds of values with long lengths, where pixels begin.
_DICOM_ITEM, _PIXEL_DATA = 0xFFFE, b"\xe0\x7f\x10\0"
_LONG_KINDS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT"}
# Files whose header is not read apart from their pixels.
_MAX_WHOLE_BYTES = 1 << 29
# Bands of a PNG, by its colour type.
_PNG_BANDS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_START = b"\x89PNG\r\n\x1a\n"
_OLD_EXIF = b"Raw profile type exif"
# Markers of JPEG: without a length; start of frame; what Adobe and JFIF say of colours is kept.
_BARE = {0x01, *range(0xD0, 0xD9)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JFIF, _EXIF, _ADOBE, _COMMENT, _SCAN = 0xE0, 0xE1, 0xEE, 0xFE, 0xDA
_APPLICATION = range(0xE0, 0xF0)
# Bytes of pixels that one byte of file holds at most: 258 bytes of deflate take 2 bits; 8x8 pixels
# of JPEG take 2 bits; a code of 12 bits of LZW stands for 4,095 pixels; RLE has runs of 255.
_PNG_HELD, _JPEG_HELD, _GIF_HELD, _RLE_HELD = 1100, 1024, 2800, 256
# A WebP of one colour has 34 bytes, whatever its size: up to 25 megapixels of that are read.
_WEBP_HELD, _FLAT_PIXELS = 4096, 25_000_000
# Pillow unpacks runs of a BMP in Python.
_MAX_RLE_PIXELS, _MAX_RLE_BYTES = 4_000_000, 500_000
# An animation's first picture may be smaller than its canvas up to this size.
_MAX_CANVAS_PIXELS = 4_000_000
_BMP_PLAIN, _BMP_RUNS, _BMP_MASKS = 0, (1, 2), 3
# As for WebP: JPEG 2000, AVIF and HEIC take nearly no bytes for what has one colour.
_WAVELET_HELD = 4096
# The decoder of JPEG 2000 keeps 32 bits for each value.
_WORD_BYTES = 4
_BOX_START = b"\0\0\0\x0cjP  "
# Brands of the ISO base media format; an AVIF may call itself mif1.
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1")
_NPY_START = b"\x93NUMPY"
_MAX_NPY_HEADER = 10_000
# An array of more bands is no image.
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


@dataclass(frozen=True)
class Container:
    """What a file declares, and where its pixels lie.

    Args:
        form: ``PNG``, ``JPEG``, ``GIF``, ``WEBP``, ``BMP``, ``PNM``, ``NPY``, ``JPEG2000``,
            ``AVIF``, ``HEIF`` or ``DICOM``.
        size: ``(width, height)`` as stored.
        pixel_bytes: bytes of a decoded pixel.
        parts: ``(place, length)`` of what a decoder needs, or bytes that stand for a header.
        held: arguments of :func:`useg.images.limits.check_held`: declared bytes of pixels, bytes of
            the file that hold them, and bytes of pixels that one of these can hold.
        exif: the EXIF block, or nothing.
        depth: of a PNG: bits per band; 0 for other formats.
        color_type: of a PNG: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA; otherwise -1.
        frame: of a WebP: left, top, width and height of its first picture on its canvas.
        pages: of a DICOM: its frames.
    """

    form: str
    size: tuple[int, int]
    pixel_bytes: int
    parts: tuple[tuple[int, int] | bytes, ...]
    held: tuple[int, int, int]
    exif: bytes = b""
    depth: int = 0
    color_type: int = -1
    frame: tuple[int, int, int, int] = (0, 0, 0, 0)
    pages: int = 1

    def content(self, file: BinaryIO) -> bytes:
        """Return a file of the parts that hold pixels, after a check of what they can hold."""
        check_held(*self.held)
        stored = sum(len(part) if isinstance(part, bytes) else part[1] for part in self.parts)
        most = 4 * math.prod(self.size) * self.pixel_bytes * self.pages + MAX_SEGMENT_BYTES
        if stored > most:
            raise ValueError(f"it has {stored:,} bytes, but at most {most:,} for its pixels")
        whole = []
        for part in self.parts:
            if isinstance(part, bytes):
                whole.append(part)
            else:
                file.seek(part[0])
                whole.append(file.read(part[1]))
        if self.form == "JPEG":
            check_scans(whole[-1])
        return b"".join(whole)


def read_container(file: BinaryIO) -> Container:
    """Read what a file declares; any but the formats above is an UnidentifiedImageError."""
    file.seek(0)
    start = file.read(132)
    for is_form, read in _READERS:
        if is_form(start):
            try:
                container = read(file)
            # A header that ends early.
            except (struct.error, IndexError) as error:
                raise PIL.UnidentifiedImageError("its header is cut off") from error
            if min(container.size) < 1:
                raise ValueError("it declares a size of {}x{}".format(*container.size))
            return container
    raise PIL.UnidentifiedImageError("unknown format")


class _Blocks:
    """Counts the blocks of a file, of which there may be only so many."""

    def __init__(self, num_bytes: int) -> None:
        self._left = self._most = _MAX_BLOCKS + num_bytes // _BYTES_PER_BLOCK

    def count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it has more than {self._most:,} blocks")


def _check_length(num_bytes: int, most: int) -> None:
    if num_bytes > most + EXTRA_BYTES:
        raise ValueError(f"it takes {num_bytes:,} bytes to hold {most:,} bytes of pixels")


def _png(file: BinaryIO) -> Container:
    size, blocks = file_bytes(file), _Blocks(file_bytes(file))
    file.seek(8)
    header = file.read(25)
    width, height, depth, color_type = struct.unpack_from(">IIBB", header, 8)
    if header[:8] != b"\0\0\0\x0dIHDR":
        raise PIL.UnidentifiedImageError("its first chunk is not a header")
    parts: list[tuple[int, int]] = [(0, 33)]
    exif, old_exif, stored, place = b"", b"", 0, 33
    while place + 8 <= size:
        blocks.count()
        file.seek(place)
        length, name = struct.unpack(">I4s", file.read(8))
        if name in (b"PLTE", b"IDAT", b"IEND"):
            stored += length if name == b"IDAT" else 0
            parts.append((place, length + 12))
        elif name == b"eXIf" and not exif:
            exif = file.read(min(length, _MAX_EXIF_BYTES))
        elif name in (b"tEXt", b"zTXt") and not old_exif:
            key, _, text = file.read(min(length, 4 * _MAX_EXIF_BYTES)).partition(b"\0")
            if key == _OLD_EXIF:
                old_exif = text if name == b"tEXt" else _inflated(text[1:])
        place += 12 + length
    bands = _PNG_BANDS.get(color_type, 1)
    raw = height * ((width * bands * depth + 7) // 8 + 8)
    _check_length(min(stored, size), 2 * raw)
    return Container(
        "PNG",
        (width, height),
        bands * max(depth // 8, 1),
        tuple(parts),
        (height * ((width * bands * depth + 7) // 8), min(stored, size), _PNG_HELD),
        exif or _from_hex(old_exif),
        depth,
        color_type,
    )


def _inflated(content: bytes) -> bytes:
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj().decompress(content, 4 * _MAX_EXIF_BYTES)
    return b""


def _from_hex(text: bytes) -> bytes:
    """Read the EXIF block that ImageMagick wrote as text before PNG had one."""
    with contextlib.suppress(ValueError):
        return bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
    return b""


def _jpeg(file: BinaryIO) -> Container:
    size, blocks = file_bytes(file), _Blocks(file_bytes(file))
    parts: list[tuple[int, int]] = [(0, 2)]
    frame, exif = None, b""
    for marker, place, length in _segments(file, blocks):
        if marker in _FRAMES and frame is None:
            file.seek(place + 5)
            frame = struct.unpack(">HHB", file.read(5))
        if marker == _EXIF and not exif:
            file.seek(place + 4)
            content = file.read(min(length - 4, _MAX_EXIF_BYTES))
            exif = content if content.startswith(b"Exif\0") else b""
        if marker == _SCAN:
            parts.append((place, size - place))
        elif marker in (_JFIF, _ADOBE) or marker not in (*_APPLICATION, _COMMENT):
            parts.append((place, length))
    if frame is None:
        raise PIL.UnidentifiedImageError("it declares no size")
    height, width, bands = frame
    place, length = parts[-1]
    # More follows what is read only if it is another image.
    parts[-1] = place, min(length, 4 * width * height * bands + EXTRA_BYTES)
    return Container(
        "JPEG",
        (width, height),
        bands,
        tuple(parts),
        (width * height, size, _JPEG_HELD),
        exif,
    )


def _segments(file: BinaryIO, blocks: _Blocks) -> Iterator[tuple[int, int, int]]:
    """Yield the segments of a JPEG up to its first scan: marker, place and length."""
    place, marker = 2, 0
    while marker != _SCAN:
        blocks.count()
        file.seek(place)
        head = file.read(4)
        if len(head) < 4:
            return
        marker = head[1]
        # Some writers put other bytes between segments.
        if head[0] != 0xFF or marker in (0, 0xFF):
            place += 1
            continue
        length = 2 if marker in _BARE else 2 + int.from_bytes(head[2:], "big")
        yield marker, place, length
        place += length


def _gif(file: BinaryIO) -> Container:
    size, blocks = file_bytes(file), _Blocks(file_bytes(file))
    file.seek(0)
    width, height, flags = struct.unpack_from("<HHB", file.read(13), 6)
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    parts: list[tuple[int, int]] = [(0, place)]
    control: list[tuple[int, int]] = []
    while True:
        blocks.count()
        file.seek(place)
        kind = file.read(2)
        if kind[:1] == b",":
            break
        if kind[:1] in (b";", b""):
            raise ValueError("it has no picture")
        start = place
        if kind[:1] != b"!":
            place += 1
            continue
        place += 2
        while length := file.read(1)[0]:
            blocks.count()
            place += 1 + length
            file.seek(place)
        place += 1
        # The graphic control block says which colour is transparent.
        if kind == b"!\xf9":
            control = [(start, place - start)]
    file.seek(place + 1)
    left, top, wide, high = struct.unpack("<HHHH", file.read(8))
    width, height = max(width, left + wide), max(height, top + high)
    length = min(size - place, 4 * wide * high + EXTRA_BYTES)
    return Container(
        "GIF",
        (width, height),
        1,
        (*parts, *control, (place, length)),
        (width * height, size, _GIF_HELD),
    )


def _webp(file: BinaryIO) -> Container:
    size, blocks = file_bytes(file), _Blocks(file_bytes(file))
    canvas = picture = None
    exif, left, top, place, end = b"", 0, 0, 12, size
    while place + 8 <= end:
        blocks.count()
        file.seek(place)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"VP8X":
            values = file.read(10)
            canvas = tuple(1 + int.from_bytes(values[k : k + 3], "little") for k in (4, 7))
        elif name == b"ANMF" and picture is None:
            values = file.read(6)
            left, top = (2 * int.from_bytes(values[k : k + 3], "little") for k in (0, 3))
            # The picture's own chunks lie within.
            length = 16
        elif name in (b"VP8 ", b"VP8L") and picture is None:
            picture = place, min(length, size - place - 8)
        elif name == b"EXIF" and not exif:
            exif = file.read(min(length, _MAX_EXIF_BYTES))
        place += 8 + length + length % 2
    if picture is None:
        raise ValueError("it has no picture")
    file.seek(picture[0])
    wide, high = _webp_size(file.read(18))
    width, height = canvas or (wide, high)
    if width * height > max(4 * wide * high, _MAX_CANVAS_PIXELS):
        raise ValueError(f"its canvas has {width}x{height} pixels, its picture {wide}x{high}")
    _check_length(picture[1], 4 * wide * high)
    padded = picture[1] + picture[1] % 2
    head = b"RIFF" + struct.pack("<I", 4 + 8 + padded) + b"WEBP"
    return Container(
        "WEBP",
        (width, height),
        3,
        (head, (picture[0], 8 + picture[1]), bytes(picture[1] % 2)),
        (wide * high, picture[1] + _FLAT_PIXELS // _WEBP_HELD, _WEBP_HELD),
        exif,
        frame=(left, top, wide, high),
    )


def _webp_size(chunk: bytes) -> tuple[int, int]:
    if chunk[:4] == b"VP8L":
        bits = int.from_bytes(chunk[9:13], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", chunk, 14)
    return width & 0x3FFF, height & 0x3FFF


def _bmp(file: BinaryIO) -> Container:
    size = file_bytes(file)
    file.seek(0)
    head = file.read(54).ljust(54, b"\0")
    if int.from_bytes(head[14:18], "little") == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", head, 18)
        compression = _BMP_PLAIN
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", head, 18)
    height = abs(height)
    held = (height * (-(-width * bits // 32) * 4), size, 1)
    if compression in _BMP_RUNS:
        held = (width * height, size, _RLE_HELD)
        if width * height > _MAX_RLE_PIXELS or size > _MAX_RLE_BYTES:
            raise UnreadableError("it is a large BMP of run lengths")
    elif compression not in (_BMP_PLAIN, _BMP_MASKS):
        raise UnreadableError(f"it is a BMP of compression {compression}")
    start = int.from_bytes(head[10:14], "little")
    length = size if compression in _BMP_RUNS else min(size, start + held[0] + EXTRA_BYTES)
    return Container("BMP", (width, height), max(bits // 8, 1), ((0, length),), held)


@dataclass(frozen=True)
class PnmHeader:
    """The header of a PBM, PGM or PPM: its kind 1 to 6, size, highest value and length."""

    kind: int
    width: int
    height: int
    highest: int
    length: int

    @property
    def bands(self) -> int:
        """Bands of a pixel."""
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


def _pnm(file: BinaryIO) -> Container:
    size = file_bytes(file)
    file.seek(0)
    header = read_pnm_header(file.read(4096))
    depth = 2 if header.highest > 255 else 1
    row = header.width * header.bands
    # Text has one character per pixel of a bitmap, otherwise two.
    row_bytes = {1: row, 2: 2 * row, 3: 2 * row, 4: -(-header.width // 8)}.get(
        header.kind, row * depth
    )
    return Container(
        "PNM",
        (header.width, header.height),
        header.bands * depth,
        ((0, size),),
        (header.height * row_bytes, size - header.length + 1, 1),
    )


def _npy(file: BinaryIO) -> Container:
    size = file_bytes(file)
    shape, dtype, _ = read_npy_header(file)
    height, width, bands = npy_axes(shape)[0]
    stored = size - file.tell()
    if math.prod(shape) * dtype.itemsize > stored:
        raise ValueError(
            f"it declares {'x'.join(map(str, shape))} values of {dtype}, but is shorter"
        )
    held = (math.prod(shape) * dtype.itemsize, stored, 1)
    return Container("NPY", (width, height), bands * dtype.itemsize, ((0, size),), held)


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
    # Python parses the header, and prints a warning of odd escapes in it.
    if b"\\" in file.read(min(length, _MAX_NPY_HEADER)):
        raise ValueError("its header has a backslash")
    file.seek(8)
    shape, by_columns, dtype = read(file, max_header_size=_MAX_NPY_HEADER)
    if dtype.kind not in "buif":
        raise UnreadableError(f"it stores {dtype} and not numbers")
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


def _jpeg2000(file: BinaryIO) -> Container:
    size, blocks = file_bytes(file), _Blocks(file_bytes(file))
    file.seek(0)
    place = 0
    if file.read(4) != CODESTREAM_START:
        place = _jp2_codestream(file, size, blocks)
    codestream = read_codestream(file, place, size)
    return Container(
        "JPEG2000",
        codestream.size,
        codestream.bands * (codestream.value_bytes + _WORD_BYTES),
        ((0, size),),
        (
            codestream.size[0] * codestream.size[1],
            size + _FLAT_PIXELS // _WAVELET_HELD,
            _WAVELET_HELD,
        ),
    )


def _jp2_codestream(file: BinaryIO, size: int, blocks: _Blocks) -> int:
    """Return where the codestream of a JP2 file begins."""
    places = []
    for kind, start, stop in _boxes(file, 0, size, blocks):
        if kind == b"jp2c":
            places.append(start)
        if kind == b"jp2h":
            for inner, begin, _ in _boxes(file, start, stop, blocks):
                if inner == b"pclr":
                    file.seek(begin)
                    check_palette(file.read(3))
    if not places:
        raise ValueError("it has no picture")
    return places[0]


def _boxes(
    file: BinaryIO, place: int, end: int, blocks: _Blocks
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


def _iso_media(file: BinaryIO) -> Container:
    size = file_bytes(file)
    file.seek(8)
    brand = file.read(4)
    form = "AVIF" if brand in _AVIF_BRANDS else "HEIF"
    file.seek(0)
    start = file.read(64)
    if form == "HEIF" and any(known in start for known in _AVIF_BRANDS):
        form = "AVIF"
    # What it declares is in many boxes that refer to each other; decoders read them first.
    with open_iso_media(form, b"", file) as opened:
        width, height = opened.size
        exif = opened.info.get("exif") or b""
    return Container(
        form,
        (width, height),
        2 * len(opened.getbands()),
        ((0, size),),
        (width * height, size + _FLAT_PIXELS // _WAVELET_HELD, _WAVELET_HELD),
        exif,
    )


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


def _dicom(file: BinaryIO) -> Container:
    header = read_dicom(file, with_pixels=False)
    width, height = int(header.Columns), int(header.Rows)
    pages = int(header.get("NumberOfFrames") or 1)
    bits = int(header.BitsAllocated)
    bands = int(header.get("SamplesPerPixel", 1))
    size = file_bytes(file)
    pixel_bits = bands * bits
    if not (pages >= 1 and bits in (1, 8, 16, 32) and bands in (1, 3)):
        raise ValueError(f"it declares {pages} frames of {bands} bands of {bits} bits")
    return Container(
        "DICOM",
        (width, height),
        max(1, pixel_bits // 8),
        ((0, size),),
        (width * height * pixel_bits // 8, size, _JPEG_HELD),
        pages=min(pages, 1 + size // 8),
    )


def read_dicom(file: BinaryIO, *, with_pixels: bool) -> Any:
    """Read what decides the pixels of a DICOM file; no other element is kept."""
    pydicom: Any = need("pydicom", "dicom")
    # It would print what a damaged file says; ours is the error that follows.
    warnings.filterwarnings("ignore", module="pydicom")
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
    blocks, place = _Blocks(len(content)), 132
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


def _is_iso_media(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:12] in (*_AVIF_BRANDS, *_HEIF_BRANDS)


_READERS: tuple[tuple[Callable[[bytes], bool], Callable[[BinaryIO], Container]], ...] = (
    (lambda start: start.startswith(_PNG_START), _png),
    (lambda start: start.startswith(b"\xff\xd8\xff"), _jpeg),
    (lambda start: start.startswith((b"GIF87a", b"GIF89a")), _gif),
    (lambda start: start[:4] == b"RIFF" and start[8:12] == b"WEBP", _webp),
    (lambda start: start.startswith(b"BM"), _bmp),
    (lambda start: re.match(rb"P[1-6][\s#]", start) is not None, _pnm),
    (lambda start: start.startswith(_NPY_START), _npy),
    (lambda start: start.startswith((_BOX_START, CODESTREAM_START)), _jpeg2000),
    (_is_iso_media, _iso_media),
    (lambda start: start[128:132] == b"DICM", _dicom),
)


def orientation(exif: bytes) -> int:
    """Return the orientation that an EXIF block says, 1 to 8; 1 is upright."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    # A damaged EXIF block counts as none.
    with contextlib.suppress(struct.error):
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            code, kind = struct.unpack_from(order + "HH", exif, place)
            if code == 0x0112:
                (turn,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), exif, place + 8)
                return turn if 1 <= turn <= 8 else 1
    return 1
