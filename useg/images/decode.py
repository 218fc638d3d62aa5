"""An image file -> its declared size, and its stored values, upright.

PNG, JPEG, GIF, WebP and BMP are read here, and all others through here. Decoders get only the parts
of a file that hold pixels: a million empty blocks, comments or scans would take them minutes, and
metadata would take memory.

Pillow reads PNG, JPEG, BMP, GIF and AVIF. It silently reduces 16-bit RGB PNGs and JPEG 2000 to 8
bits, drops bands of planar TIFFs, stretches the values of PGMs, and takes six times the memory of a
WebP: imagecodecs, tifffile and numpy read these. HEIC and DICOM need an optional package each.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np
import PIL
import PIL.Image
from numpy.typing import NDArray
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from useg.images.formats import (
    ALL_PAGES,
    EXTRA_BYTES,
    FLAT_HELD,
    FLAT_PIXELS,
    GIT_LFS_START,
    JPEG_HELD,
    BlockCount,
    Container,
    GitLfsPointerError,
    StoredPixels,
    UnreadableError,
    check_declared_size,
    check_page,
    file_bytes,
    is_tiff,
    pixel_limit,
    silence_package,
    turn_upright,
)
from useg.images.jpeg2000 import BOX_START, CODESTREAM_START, decode_jpeg2000, jpeg2000_container
from useg.images.other_formats import (
    NPY_START,
    decode_dicom,
    decode_iso_media,
    decode_npy,
    decode_pnm,
    dicom_container,
    is_iso_media,
    iso_media_container,
    npy_container,
    npy_page,
    pnm_container,
)
from useg.images.tiff import decode_tiff, open_tiff

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
# Maximum bytes of pixels per byte of file: 2 bits of deflate encode up to 258 bytes; a 12-bit code
# of LZW stands for up to 4,095 pixels; RLE has runs of 255.
_PNG_HELD, _GIF_HELD, _RLE_HELD = 1100, 2800, 256
# Pillow decodes run lengths of a BMP in Python, which is slow.
_MAX_RLE_PIXELS, _MAX_RLE_BYTES = 4_000_000, 500_000
# The first frame of an animation may be smaller than its canvas if the canvas has at most this
# size.
_MAX_CANVAS_PIXELS = 4_000_000
_BMP_PLAIN, _BMP_RUNS, _BMP_MASKS = 0, (1, 2), 3


def decode(file: BinaryIO, max_pixels: int | None = None, page: int | None = None) -> StoredPixels:
    """Decode an image file, or one page of a stack; call it inside :func:`clear_errors`.

    Args:
        file: the open file.
        max_pixels: larger images are refused before they are decoded; None: see
            :func:`useg.images.formats.pixel_limit`.
        page: of a stack; None if there is only one.
    """
    max_pixels = pixel_limit(max_pixels)
    if is_tiff(file):
        return decode_tiff(file, max_pixels, page)
    container, page = _read_page(file, page)
    check_declared_size(*container.size, container.pixel_bytes, max_pixels)
    turn = orientation(container.exif) if container.exif else 1
    content = container.content(file)
    if container.form in _OTHER_FORMS:
        stored = _OTHER_FORMS[container.form](content, page)
        if stored.pixels.shape[1::-1] != container.size:
            raise ValueError(f"it declares the size {container.size}, but has another")
        return replace(stored, pixels=turn_upright(stored.pixels, turn))
    depth, kind = container.depth, container.color_type
    if container.form == "WEBP":
        return _split_alpha(turn_upright(_decode_webp(content, container), turn))
    if depth == 16 and kind in (2, 4, 6):
        return _split_alpha(turn_upright(_decode_deep_png(content), turn))
    if depth == 8 and kind in (2, 6):
        fast = _decode_plain_png(content, container.size)
        if fast is not None:
            return _split_alpha(turn_upright(fast, turn))
    pixels, colors, highest = _decode_with_pillow(content, container)
    return replace(_split_alpha(turn_upright(pixels, turn)), colors=colors, highest=highest)


def _split_alpha(pixels: NDArray[Any]) -> StoredPixels:
    """Separate transparency from ``(H, W, C)``: the last of two or four bands."""
    if pixels.shape[2] not in (2, 4):
        return StoredPixels(pixels)
    return StoredPixels(np.ascontiguousarray(pixels[..., :-1]), alpha=pixels[..., -1])


def _decode_with_pillow(
    content: bytes, container: Container
) -> tuple[NDArray[Any], NDArray[np.uint8] | None, int]:
    """Return pixels ``(H, W, C)``, the palette or None, and the value of white or 0."""
    with _opened(content, container) as opened:
        mode, colors, highest = opened.mode, None, 0
        if mode == "P":
            colors = _pillow_palette(opened)
        elif mode not in ("1", "L", "LA", "I", "I;16", "I;16B", "F", "RGB", "RGBA", "RGBX"):
            opened = opened.convert("RGB")
        pixels = np.array(opened)
        if mode == "1":
            pixels, highest = pixels.astype(np.uint8), 1
        elif mode == "L" and container.color_type == 0 and container.depth in (2, 4):
            # Pillow stretches 2- and 4-bit grey to 0-255: the ids 0, 1, 2 of a mask would become
            # 0, 17, 34.
            highest = (1 << container.depth) - 1
            pixels = pixels // (255 // highest)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        pixels = pixels[..., :3] if mode == "RGBX" else pixels
        return pixels.astype(pixels.dtype.newbyteorder("="), copy=False), colors, highest


def decode_alpha(file: BinaryIO) -> NDArray[np.uint8] | None:
    """Decode the alpha band ``(H, W)`` of a PNG; None if it has none, or for other formats."""
    if is_tiff(file):
        return None
    container = read_container(file)
    if container.color_type not in (4, 6):
        return None
    check_declared_size(*container.size, container.pixel_bytes, pixel_limit(None))
    with _opened(container.content(file), container) as opened:
        return np.asarray(opened.getchannel("A"), np.uint8)


def stored_size(file: BinaryIO, page: int | None = None) -> tuple[int, int]:
    """Return the ``(width, height)`` that :func:`decode` gives, from the header alone."""
    if is_tiff(file):
        with open_tiff(file) as tiff:
            if page != ALL_PAGES:
                check_page(page, tiff.num_pages)
            (width, height), turn = tiff.size, tiff.orientation
    else:
        container = _read_page(file, page)[0]
        (width, height), turn = container.size, orientation(container.exif)
    return (height, width) if turn >= 5 else (width, height)


def stored_no_data(file: BinaryIO) -> float | None:
    """Return the value of pixels without data in a TIFF (GDAL's nodata tag), or None."""
    if not is_tiff(file):
        return None
    with open_tiff(file) as tiff:
        return tiff.no_data


def stored_palette(file: BinaryIO) -> NDArray[np.uint8] | None:
    """Return the palette ``(N, 3)`` uint8 of a file, from the header alone, or None."""
    if is_tiff(file):
        with open_tiff(file) as tiff:
            return tiff.colors
    container = read_container(file)
    if (
        container.form not in _PLUGINS
        or container.form == "JPEG"
        or container.color_type not in (-1, 3)
    ):
        return None
    with _opened(container.content(file), container) as opened:
        return _pillow_palette(opened)


def _pillow_palette(opened: PIL.Image.Image) -> NDArray[np.uint8] | None:
    if opened.mode != "P" or opened.palette is None:
        return None
    # opened.getpalette() would decode the pixels.
    form, table = opened.palette.getdata()
    stored = np.frombuffer(bytes(table), np.uint8)[: 256 * len(form)]
    stored = stored[: stored.size - stored.size % len(form)].reshape(-1, len(form))[:, :3]
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(stored)] = stored[:, ::-1] if form.startswith("B") else stored
    return colors


def _decode_deep_png(content: bytes) -> NDArray[Any]:
    import imagecodecs

    silence_package("imagecodecs")
    decoded: NDArray[Any] = imagecodecs.png_decode(content)
    return decoded


def _decode_plain_png(content: bytes, size: tuple[int, int]) -> NDArray[Any] | None:
    """Decode 8-bit RGB or RGBA in two thirds of Pillow's time.

    Returns None if anything is unusual, so that Pillow reports what is wrong.
    """
    import imagecodecs

    try:
        decoded: NDArray[Any] = imagecodecs.spng_decode(content)
    # imagecodecs raises one class for every fault, and Pillow's messages are better.
    except Exception:
        return None
    if decoded.dtype != np.uint8 or decoded.ndim != 3:
        return None
    return decoded if decoded.shape[1::-1] == size and decoded.shape[2] >= 3 else None


def _decode_webp(content: bytes, container: Container) -> NDArray[np.uint8]:
    """Decode the first frame of a WebP: RGB or RGBA.

    In an animation it may cover only a part of the canvas.
    """
    import imagecodecs

    silence_package("imagecodecs")
    decoded: NDArray[np.uint8] = imagecodecs.webp_decode(content)
    left, top, width, height = container.frame
    if decoded.shape[1::-1] != (width, height):
        raise ValueError(f"it declares {width}x{height} pixels, but has another size")
    if container.size == (width, height):
        return decoded
    canvas = np.zeros((*container.size[::-1], decoded.shape[2]), np.uint8)
    canvas[top : top + height, left : left + width] = decoded
    return canvas


# Each function takes the content of a file and the number of a page.
_OTHER_FORMS: dict[str, Callable[[bytes, int], StoredPixels]] = {
    "PNM": decode_pnm,
    "NPY": decode_npy,
    "JPEG2000": decode_jpeg2000,
    "AVIF": lambda content, _: decode_iso_media("AVIF", content),
    "HEIF": lambda content, _: decode_iso_media("HEIF", content),
    "DICOM": lambda content, page: decode_dicom(content, page, read_container),
}


@contextlib.contextmanager
def _opened(content: bytes, container: Container) -> Iterator[PIL.Image.Image]:
    """Open with Pillow what holds the pixels of a file.

    ``PIL.Image.open`` would apply its own limit of pixels, which is global to the process.
    """
    try:
        opened = _PLUGINS[container.form](io.BytesIO(content))
    except SyntaxError as error:
        raise PIL.UnidentifiedImageError(str(error)) from error
    with opened:
        if opened.size != container.size:
            raise ValueError(f"it declares two sizes, {container.size} and {opened.size}")
        yield opened


_PLUGINS: dict[str, Callable[[BinaryIO], PIL.Image.Image]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
}


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
    raise _unknown_format(start)


def _read_page(file: BinaryIO, page: int | None) -> tuple[Container, int]:
    """Read what a file declares of a page, and return the page's number."""
    container = read_container(file)
    if container.form == "NPY" and page not in (None, ALL_PAGES):
        return npy_page(file, page or 0), 0
    return container, check_page(page, container.pages)


def _unknown_format(start: bytes) -> Exception:
    if start.startswith(GIT_LFS_START):
        return GitLfsPointerError()
    return PIL.UnidentifiedImageError("unknown format")


def _check_length(num_bytes: int, most: int) -> None:
    if num_bytes > most + EXTRA_BYTES:
        raise ValueError(f"it stores {num_bytes:,} bytes for {most:,} bytes of pixels")


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
    row, stored = (width * bands * depth + 7) // 8, min(stored, size)
    _check_length(stored, 2 * height * (row + 8))
    return Container(
        "PNG",
        (width, height),
        bands * max(depth // 8, 1),
        tuple(parts),
        (height * row, stored, _PNG_HELD),
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
        (width * height, size, JPEG_HELD),
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
            raise ValueError("it contains no image")
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
        raise ValueError("it contains no image")
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
        (wide * high, picture[1] + FLAT_PIXELS // FLAT_HELD, FLAT_HELD),
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
            raise UnreadableError("it is a large BMP with run-length encoding")
    elif compression not in (_BMP_PLAIN, _BMP_MASKS):
        raise UnreadableError(f"it is a BMP with compression type {compression}")
    start = int.from_bytes(head[10:14], "little")
    length = size if compression in _BMP_RUNS else min(size, start + held[0] + EXTRA_BYTES)
    return Container("BMP", (width, height), max(bits // 8, 1), ((0, length),), held)


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


_READERS: tuple[tuple[Callable[[bytes], bool], Callable[[BinaryIO], Container]], ...] = (
    (lambda start: start.startswith(_PNG_START), _png),
    (lambda start: start.startswith(b"\xff\xd8\xff"), _jpeg),
    (lambda start: start.startswith((b"GIF87a", b"GIF89a")), _gif),
    (lambda start: start[:4] == b"RIFF" and start[8:12] == b"WEBP", _webp),
    (lambda start: start.startswith(b"BM"), _bmp),
    (lambda start: re.match(rb"P[1-6][\s#]", start) is not None, pnm_container),
    (lambda start: start.startswith(NPY_START), npy_container),
    (lambda start: start.startswith((BOX_START, CODESTREAM_START)), jpeg2000_container),
    (is_iso_media, iso_media_container),
    (lambda start: start[128:132] == b"DICM", dicom_container),
)
