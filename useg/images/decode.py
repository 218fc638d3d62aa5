"""Decode an image file to what it stores, upright: formats, bit depths, palettes, rotation tags.

Pillow reads PNG, JPEG, WebP, BMP and GIF. It silently reduces 16-bit RGB PNGs to 8 bits and drops
bands of planar TIFFs, so imagecodecs reads the former and tifffile reads every TIFF.
"""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from useg.images.limits import (
    PILLOW_FORMATS,
    check_declared_size,
    check_held,
    check_page,
    file_bytes,
    is_tiff,
    pixel_limit,
    silence_package,
)
from useg.images.tiff import open_tiff, read_tiff

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


# EXIF tag.
_ORIENTATION = 0x0112
# Photometric interpretations of a TIFF.
_WHITE_IS_ZERO, _CMYK = 0, 5
# Bands of a PNG, by its colour type.
_PNG_BANDS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PILLOW_LOCK = threading.Lock()


@dataclass(frozen=True)
class StoredPixels:
    """What a file stores: ``pixels`` ``(H, W, C)``, upright, without transparency.

    Args:
        pixels: raw values; indices for a palette file, 0-1, 0-3 or 0-15 for 1, 2 or 4 bits.
        colors: ``(N, 3)`` uint8, the palette, or None.
        highest: the value of white in files with fewer than 8 bits per pixel, otherwise 0.
        inverted: whether 0 means white.
        called_alpha: bands in ``pixels`` that the file calls alpha but that hold data: they belong
            to an image, not to a mask.
    """

    pixels: NDArray[Any]
    colors: NDArray[np.uint8] | None = None
    highest: int = 0
    inverted: bool = False
    called_alpha: tuple[int, ...] = ()


def decode(file: BinaryIO, max_pixels: int | None = None, page: int | None = None) -> StoredPixels:
    """Decode an image file, or one page of a stack; call it inside :func:`clear_errors`.

    Args:
        file: the open file.
        max_pixels: larger images are refused before they are decoded; None: see
            :func:`useg.images.limits.pixel_limit`.
        page: of a stack; None if there is only one.
    """
    max_pixels = pixel_limit(max_pixels)
    if is_tiff(file):
        return _decode_tiff(file, max_pixels, page)
    check_page(page, 1)
    with _open(file) as opened:
        depth, kind = _png_header(file)
        _check_declared(opened, file_bytes(file), depth, kind, max_pixels)
        turn = _orientation(opened, file)
        if depth == 16 and kind in (2, 4, 6):
            return StoredPixels(_turn(_decode_deep_png(file, 1 if kind == 4 else 3), turn))
        plain = depth == 8 and kind in (2, 6)
        if plain and (fast := _decode_plain_png(file, opened.size)) is not None:
            return StoredPixels(_turn(fast, turn))
        mode, colors, highest = opened.mode, None, 0
        if mode == "P":
            colors = _pillow_palette(opened)
        elif mode not in ("1", "L", "LA", "I", "I;16", "I;16B", "F", "RGB", "RGBA", "RGBX"):
            opened = opened.convert("RGB")
        pixels = np.array(opened)
        if mode == "1":
            pixels, highest = pixels.astype(np.uint8), 1
        elif mode == "L" and kind == 0 and depth in (2, 4):
            # Pillow stretches 2- and 4-bit grey to 0-255: the ids 0, 1, 2 of a mask would become
            # 0, 17, 34.
            highest = (1 << depth) - 1
            pixels = pixels // (255 // highest)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels[..., : 1 if mode == "LA" else 3]
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
        return StoredPixels(_turn(pixels, turn), colors, highest)


def stored_pages(file: BinaryIO) -> int:
    """Return how many pages :func:`decode` can choose from: 1, except for stacks in a TIFF."""
    if is_tiff(file):
        with open_tiff(file) as tiff:
            return tiff.num_pages
    with _open(file):
        return 1


def stored_size(file: BinaryIO, page: int | None = None) -> tuple[int, int]:
    """Return the ``(width, height)`` that :func:`decode` gives, from the header alone."""
    if is_tiff(file):
        with open_tiff(file) as tiff:
            check_page(page, tiff.num_pages)
            (width, height), turn = tiff.size, tiff.orientation
    else:
        check_page(page, 1)
        with _open(file) as opened:
            (width, height), turn = opened.size, _orientation(opened, file)
    return (height, width) if turn >= 5 else (width, height)


def stored_palette(file: BinaryIO) -> NDArray[np.uint8] | None:
    """Return the palette ``(N, 3)`` uint8 of a file, from the header alone, or None."""
    if is_tiff(file):
        with open_tiff(file) as tiff:
            return tiff.colors
    with _open(file) as opened:
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


def _decode_deep_png(file: BinaryIO, num_bands: int) -> NDArray[Any]:
    import imagecodecs

    silence_package("imagecodecs")
    file.seek(0)
    decoded: NDArray[Any] = imagecodecs.png_decode(file.read())
    return decoded[..., :num_bands]


def _decode_plain_png(file: BinaryIO, size: tuple[int, int]) -> NDArray[Any] | None:
    """Decode 8-bit RGB or RGBA in two thirds of Pillow's time.

    Returns None where anything is unusual, so that Pillow reports what is wrong.
    """
    import imagecodecs

    file.seek(0)
    try:
        decoded: NDArray[Any] = imagecodecs.spng_decode(file.read())
    # imagecodecs has one class for all that can be wrong, and Pillow's messages are better.
    except Exception:
        return None
    if decoded.dtype != np.uint8 or decoded.ndim != 3:
        return None
    return decoded[..., :3] if decoded.shape[1::-1] == size and decoded.shape[2] >= 3 else None


@contextlib.contextmanager
def _open(file: BinaryIO) -> Iterator[PIL.Image.Image]:
    """Open a file with Pillow (header only) under our own limit of pixels.

    Pillow's limit is global to the process, and it warns at 89 and refuses at 179 million pixels.
    """
    with _PILLOW_LOCK, warnings.catch_warnings():
        # Pillow warns of metadata that is not used here.
        warnings.filterwarnings("ignore", module="PIL")
        usual, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
        try:
            file.seek(0)
            opened = PIL.Image.open(file, formats=PILLOW_FORMATS)
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = usual
    with opened:
        yield opened


def _check_declared(
    opened: PIL.Image.Image, stored_bytes: int, depth: int, kind: int, max_pixels: int
) -> None:
    width, height = opened.size
    if depth:
        row = (width * _PNG_BANDS.get(kind, 1) * depth + 7) // 8
        check_declared_size(width, height, _PNG_BANDS.get(kind, 1) * max(depth // 8, 1), max_pixels)
        check_held(height * row, stored_bytes, 1100)
    else:
        check_declared_size(width, height, len(opened.getbands()), max_pixels)
        if opened.format in ("JPEG", "MPO"):
            # A block of 8x8 pixels takes at least two bits.
            check_held(width * height, stored_bytes, 1024)


def _png_header(file: BinaryIO) -> tuple[int, int]:
    """Return the bits per band and the colour type of a PNG; 0 and -1 for other formats.

    Colour types: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA.
    """
    file.seek(0)
    start = file.read(26)
    return (start[24], start[25]) if start[:4] == b"\x89PNG" and len(start) == 26 else (0, -1)


def _orientation(opened: PIL.Image.Image, file: BinaryIO) -> int:
    """Return EXIF's orientation, 1 to 8.

    Pillow would decode a whole PNG to find an EXIF block behind its pixels.
    """
    exif = opened.info.get("exif") or _png_exif(file, opened.info)
    order = {b"II": "<", b"MM": ">"}.get(exif.removeprefix(b"Exif\0\0")[:2])
    if order is None:
        return 1
    exif = exif.removeprefix(b"Exif\0\0")
    # A damaged EXIF block counts as none.
    with contextlib.suppress(struct.error):
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            code, kind = struct.unpack_from(order + "HH", exif, place)
            if code == _ORIENTATION:
                (turn,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), exif, place + 8)
                return turn if 1 <= turn <= 8 else 1
    return 1


def _png_exif(file: BinaryIO, texts: Mapping[Any, Any]) -> bytes:
    """Return the EXIF block of a PNG, also from behind its pixels.

    Before PNG had such a block, ImageMagick wrote it as text: that is read too.
    """
    file.seek(0)
    if file.read(8) != b"\x89PNG\r\n\x1a\n":
        return b""
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"eXIf":
            return file.read(min(length, 1 << 16))
        file.seek(length + 4, io.SEEK_CUR)
    with contextlib.suppress(ValueError):
        return bytes.fromhex("".join(str(texts.get("Raw profile type exif", "")).split("\n")[3:]))
    return b""


def _turn(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn ``(H, W, C)`` upright, like ``PIL.ImageOps.exif_transpose`` but for every dtype.

    Source: EXIF 2.32, table 4.6.4 A.
    """
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _decode_tiff(file: BinaryIO, max_pixels: int, page: int | None) -> StoredPixels:
    with open_tiff(file) as tiff:
        first, called_alpha = tiff.first, tiff.called_alpha
        pixels = read_tiff(tiff, file, max_pixels, page)
        if first.photometric == _CMYK and pixels.dtype == np.uint8 and pixels.shape[2] == 4:
            pixels = np.asarray(PIL.Image.fromarray(pixels, "CMYK").convert("RGB"))
            called_alpha = ()
        if called_alpha and _is_transparency(pixels, called_alpha, tiff.highest):
            pixels, called_alpha = np.delete(pixels, called_alpha, axis=2), ()
        highest = tiff.highest if first.bitspersample < 8 else 0
        return StoredPixels(
            _turn(pixels, tiff.orientation),
            tiff.colors,
            highest,
            first.photometric == _WHITE_IS_ZERO,
            called_alpha,
        )


def _is_transparency(pixels: NDArray[Any], bands: tuple[int, ...], highest: int) -> bool:
    """Tell whether bands that a TIFF calls alpha are transparency.

    They are if they are mostly 0 or the highest value where there is any colour. GDAL calls the
    fourth of four 8-bit bands alpha, whatever it is, and near infrared must not be lost for that.
    """
    coloured = np.delete(pixels, bands, axis=2).any(axis=2)
    alpha = pixels[..., bands][coloured]
    return bool(((alpha == 0) | (alpha == highest)).mean() >= 0.5) if alpha.size else True
