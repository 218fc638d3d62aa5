"""An image file other than a TIFF -> its declared size and the parts of it that hold pixels.

Nothing is decoded here. Decoders get only the parts that hold pixels: a million empty blocks,
comments or scans would take them minutes, and metadata would take memory.
"""

from __future__ import annotations

import contextlib
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import PIL
import PIL.Image

from useg.images.headers import (
    BOX_START,
    CODESTREAM_START,
    find_codestream,
    npy_axes,
    open_iso_media,
    read_codestream,
    read_dicom,
    read_npy_header,
    read_pnm_header,
)
from useg.images.limits import (
    EXTRA_BYTES,
    MAX_SEGMENT_BYTES,
    BlockCount,
    UnreadableError,
    check_held,
    check_scans,
    file_bytes,
)

_MAX_EXIF_BYTES = 1 << 16
# Bands of a PNG, by its colour type.
_PNG_BANDS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_START = b"\x89PNG\r\n\x1a\n"
_OLD_EXIF = b"Raw profile type exif"
# Markers of JPEG: those without a length; starts of frames; JFIF, EXIF, Adobe, comment, scan.
_BARE = {0x01, *range(0xD0, 0xD9)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_JFIF, _EXIF, _ADOBE, _COMMENT, _SCAN = 0xE0, 0xE1, 0xEE, 0xFE, 0xDA
_APPLICATION = range(0xE0, 0xF0)
# Maximum bytes of pixels per byte of file: 2 bits of deflate encode up to 258 bytes; 2 bits of JPEG
# encode 8x8 pixels; a 12-bit code of LZW stands for up to 4,095 pixels; RLE has runs of 255.
_PNG_HELD, _JPEG_HELD, _GIF_HELD, _RLE_HELD = 1100, 1024, 2800, 256
# A WebP of one colour has 34 bytes, whatever its size; up to 25 megapixels of it are read.
_WEBP_HELD, _FLAT_PIXELS = 4096, 25_000_000
# Pillow decodes run lengths of a BMP in Python, which is slow.
_MAX_RLE_PIXELS, _MAX_RLE_BYTES = 4_000_000, 500_000
# The first frame of an animation may be smaller than its canvas if the canvas has at most this
# size.
_MAX_CANVAS_PIXELS = 4_000_000
_BMP_PLAIN, _BMP_RUNS, _BMP_MASKS = 0, (1, 2), 3
# As for WebP: an image of one colour has nearly no bytes as JPEG 2000, AVIF or HEIC.
_WAVELET_HELD = 4096
# The decoder of JPEG 2000 keeps 32 bits for each value.
_WORD_BYTES = 4
# Brands of the ISO base media format; an AVIF may call itself mif1.
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1")
_NPY_START = b"\x93NUMPY"


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
            the file that encode them, and maximum bytes of pixels per byte of the file.
        exif: the EXIF block, or nothing.
        depth: of a PNG: bits per band; 0 for other formats.
        color_type: of a PNG: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA; otherwise -1.
        frame: of a WebP: left, top, width and height of its first frame on its canvas.
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
            # The header is truncated.
            except (struct.error, IndexError) as error:
                raise PIL.UnidentifiedImageError("its header is cut off") from error
            if min(container.size) < 1:
                raise ValueError("it declares a size of {}x{}".format(*container.size))
            return container
    raise PIL.UnidentifiedImageError("unknown format")


def _check_length(num_bytes: int, most: int) -> None:
    if num_bytes > most + EXTRA_BYTES:
        raise ValueError(f"it takes {num_bytes:,} bytes to hold {most:,} bytes of pixels")


def _png(file: BinaryIO) -> Container:
    size, blocks = file_bytes(file), BlockCount(file_bytes(file))
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
        exif or (_from_hex(old_exif) if old_exif else b""),
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
    size, blocks = file_bytes(file), BlockCount(file_bytes(file))
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
    # More bytes follow only if the file holds another image.
    parts[-1] = place, min(length, 4 * width * height * bands + EXTRA_BYTES)
    return Container(
        "JPEG",
        (width, height),
        bands,
        tuple(parts),
        (width * height, size, _JPEG_HELD),
        exif,
    )


def _segments(file: BinaryIO, blocks: BlockCount) -> Iterator[tuple[int, int, int]]:
    """Yield the segments of a JPEG up to its first scan: marker, place and length."""
    place, marker = 2, 0
    while marker != _SCAN:
        blocks.count()
        file.seek(place)
        head = file.read(4)
        if len(head) < 4:
            return
        marker = head[1]
        # Some programs write other bytes between segments.
        if head[0] != 0xFF or marker in (0, 0xFF):
            place += 1
            continue
        length = 2 if marker in _BARE else 2 + int.from_bytes(head[2:], "big")
        yield marker, place, length
        place += length


def _gif(file: BinaryIO) -> Container:
    size, blocks = file_bytes(file), BlockCount(file_bytes(file))
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
        # The graphic control extension says which colour is transparent.
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
    size, blocks = file_bytes(file), BlockCount(file_bytes(file))
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


def _jpeg2000(file: BinaryIO) -> Container:
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
            size + _FLAT_PIXELS // _WAVELET_HELD,
            _WAVELET_HELD,
        ),
    )


def _iso_media(file: BinaryIO) -> Container:
    size = file_bytes(file)
    file.seek(8)
    brand = file.read(4)
    form = "AVIF" if brand in _AVIF_BRANDS else "HEIF"
    file.seek(0)
    start = file.read(64)
    if form == "HEIF" and any(known in start for known in _AVIF_BRANDS):
        form = "AVIF"
    # The size stands in several boxes that refer to each other, so the decoder reads them.
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
    (lambda start: start.startswith((BOX_START, CODESTREAM_START)), _jpeg2000),
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
