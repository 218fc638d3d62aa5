"""File -> what it stores, the right way up: the one place that knows formats, bit depths, palettes, rotation tags and damaged files.

Pillow reads PNG, JPEG, WebP, BMP and GIF. It squashes 16-bit RGB PNGs to 8 bit and drops bands of a planar TIFF, both without a word, so
the first go to imagecodecs and every TIFF goes to tifffile.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from useg.errors import UsageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 300_000_000
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 0x0112
_OPENING = threading.Lock()


@dataclass(frozen=True)
class Stored:
    """What a file stores: ``pixels`` ``(H, W, C)``, upright, without alpha.

    Args:
        pixels: raw values; indices for a palette file, 0-1, 0-3 or 0-15 for 1, 2 or 4 bits.
        colors: ``(N, 3)`` uint8, the palette, or None.
        highest: the white of files with fewer than 8 bits per pixel, otherwise 0.
        inverted: 0 means white.
    """

    pixels: NDArray[Any]
    colors: NDArray[np.uint8] | None = None
    highest: int = 0
    inverted: bool = False


def decode(file: BinaryIO, max_pixels: int) -> Stored:
    """Decode a picture file; a declared size above ``max_pixels`` is refused before. Use it inside :func:`clear_errors`."""
    if _is_tiff(file):
        return _decode_tiff(file, max_pixels)
    with _open(file, max_pixels) as opened:
        depth, kind = _png_header(file)
        turn = _orientation(opened, file)
        if depth == 16 and kind in (2, 4, 6):
            return Stored(_turn(_decode_deep_png(file, 1 if kind == 4 else 3), turn))
        mode, colors, highest = opened.mode, None, 0
        if mode == "P":
            colors = _pillow_palette(opened)
        elif mode not in ("1", "L", "LA", "I", "I;16", "I;16B", "F", "RGB", "RGBA", "RGBX"):
            opened = opened.convert("RGB")
        pixels = np.array(opened)
        if mode == "1":
            pixels, highest = pixels.astype(np.uint8), 1
        elif mode == "L" and kind == 0 and depth in (2, 4):
            # Pillow stretches 2- and 4-bit grey to 0-255, which would turn the ids 0, 1, 2 of a mask into 0, 17, 34.
            highest = (1 << depth) - 1
            pixels = pixels // (255 // highest)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels[..., : 1 if mode == "LA" else 3]
        return Stored(_turn(pixels.astype(pixels.dtype.newbyteorder("="), copy=False), turn), colors, highest)


def stored_size(file: BinaryIO) -> tuple[int, int]:
    """Return ``(width, height)`` as :func:`decode` would give it, from the header alone."""
    if _is_tiff(file):
        with _tiff(file) as (series, page):
            (width, height), turn = _tiff_size(series), _tiff_orientation(page)
    else:
        with _open(file, None) as opened:
            (width, height), turn = opened.size, _orientation(opened, file)
    return (height, width) if turn >= 5 else (width, height)


def stored_palette(file: BinaryIO) -> NDArray[np.uint8] | None:
    """Return a palette file's colours ``(N, 3)`` uint8, from the header alone; None for other files."""
    if _is_tiff(file):
        with _tiff(file) as (_, page):
            return _tiff_palette(page)
    with _open(file, None) as opened:
        return _pillow_palette(opened)


def _pillow_palette(opened: PIL.Image.Image) -> NDArray[np.uint8] | None:
    if opened.mode != "P":
        return None
    colors = np.zeros((256, 3), np.uint8)
    table = np.array(opened.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    colors[: len(table)] = table
    return colors


def _decode_deep_png(file: BinaryIO, num_bands: int) -> NDArray[Any]:
    import imagecodecs

    file.seek(0)
    decoded: NDArray[Any] = imagecodecs.png_decode(file.read())
    return decoded[..., :num_bands]


@contextmanager
def _open(file: BinaryIO, max_pixels: int | None) -> Iterator[PIL.Image.Image]:
    """Open with Pillow (header only) under our own limit of pixels; Pillow's is a global of the process and stops at 89 or 179 million."""
    with _OPENING:
        usual, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
        try:
            file.seek(0)
            opened = PIL.Image.open(file, formats=FORMATS)
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = usual
    with opened:
        _check_size(*opened.size, 1, max_pixels)
        yield opened


def _check_size(width: int, height: int, num_bands: int, max_pixels: int | None) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"it declares a size of {width}x{height}")
    if max_pixels is not None and (width * height > max_pixels or width * height * num_bands > 4 * max_pixels):
        raise _TooLargeError(f"{width}x{height} pixels in {num_bands} band{'s' if num_bands > 1 else ''}", max_pixels)


class _TooLargeError(Exception):
    """A declared size above the limit."""


def _png_header(file: BinaryIO) -> tuple[int, int]:
    """Return a PNG's bits per band and its colour type (0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA); 0 and -1 for other formats."""
    file.seek(0)
    start = file.read(26)
    return (start[24], start[25]) if start[:4] == b"\x89PNG" and len(start) == 26 else (0, -1)


def _png_has_exif(file: BinaryIO) -> bool:
    file.seek(8)
    while len(head := file.read(8)) == 8:
        if head[4:] == b"eXIf":
            return True
        file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
    return False


def _orientation(opened: PIL.Image.Image, file: BinaryIO) -> int:
    # Pillow decodes a whole PNG to see whether an EXIF block follows the pixels; walking over its blocks does not.
    if opened.format == "PNG" and not {"exif", "Raw profile type exif"} & opened.info.keys() and not _png_has_exif(file):
        return 1
    return int(opened.getexif().get(_ORIENTATION, 1))


def _turn(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn ``(H, W, C)`` upright: EXIF 2.32, table 4.6.4 A; as ``PIL.ImageOps.exif_transpose``, for every dtype."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _is_tiff(file: BinaryIO) -> bool:
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    if not start:
        raise ValueError("the file is empty")
    return start in _TIFF_STARTS


@contextmanager
def _tiff(file: BinaryIO) -> Iterator[tuple[Any, Any]]:
    """Open a TIFF: its first series (full resolution) and that series' first page."""
    import tifffile

    log = logging.getLogger("tifffile")
    if not log.handlers:
        log.addHandler(logging.NullHandler())  # what it would print about a damaged file, our one sentence says
    with tifffile.TiffFile(file) as opened:
        series = opened.series[0]
        yield series, series.keyframe


def _tiff_size(series: Any) -> tuple[int, int]:
    sizes = dict(zip(series.axes, series.shape, strict=True))
    pages = {axis: size for axis, size in sizes.items() if axis not in "YXSC" and size > 1}
    if pages or {"S", "C"} <= {axis for axis, size in sizes.items() if size > 1}:
        raise _StackError(" x ".join(str(size) for axis, size in sizes.items() if axis not in "YXS"))
    return int(sizes["X"]), int(sizes["Y"])


class _StackError(Exception):
    """A TIFF of several pages."""


def _tiff_orientation(page: Any) -> int:
    return int(page.tags.valueof(_ORIENTATION, 1))


def _decode_tiff(file: BinaryIO, max_pixels: int) -> Stored:
    with _tiff(file) as (series, page):
        width, height = _tiff_size(series)
        num_bands = int(np.prod(series.shape, dtype=np.int64)) // (width * height)
        _check_size(width, height, num_bands, max_pixels)
        for part in filter(None, series.pages):
            if len(part.dataoffsets) < np.prod(part.chunked, dtype=np.int64):  # tifffile would fill the rest with zeros and only log it
                raise ValueError(f"it has {len(part.dataoffsets)} of {np.prod(part.chunked)} strips or tiles")
        pixels = series.asarray()
        band_axes = [axis for axis, (name, size) in enumerate(zip(series.axes, series.shape, strict=True)) if name not in "YX" and size > 1]
        pixels = np.moveaxis(pixels, band_axes[0], -1) if band_axes else pixels
        pixels = _plain_bands(pixels.reshape(height, width, num_bands), page)
        if pixels.dtype.kind not in "buif":
            raise ValueError(f"it stores {pixels.dtype} pixels")
        highest = (1 << page.bitspersample) - 1 if page.bitspersample < 8 else 0
        pixels = pixels.astype(np.uint8 if pixels.dtype == bool else pixels.dtype.newbyteorder("="), copy=False)
        return Stored(_turn(pixels, _tiff_orientation(page)), _tiff_palette(page), highest, inverted=page.photometric == 0)


def _tiff_palette(page: Any) -> NDArray[np.uint8] | None:
    if page.photometric != 3 or page.colormap is None:
        return None
    colors: NDArray[Any] = page.colormap >> 8 if page.colormap.max() > 255 else page.colormap
    return colors.T.astype(np.uint8)


def _plain_bands(pixels: NDArray[Any], page: Any) -> NDArray[Any]:
    """Drop the bands that a TIFF declares as alpha (1, 2), and turn CMYK (photometric 5) into RGB."""
    if page.photometric == 5 and pixels.dtype == np.uint8 and pixels.shape[2] == 4:
        return np.asarray(PIL.Image.fromarray(pixels, "CMYK").convert("RGB"))
    first = pixels.shape[2] - len(page.extrasamples)
    alpha = {first + k for k, kind in enumerate(page.extrasamples) if kind in (1, 2)}
    return pixels[..., [c for c in range(pixels.shape[2]) if c not in alpha]] if alpha else pixels


@contextmanager
def clear_errors(name: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one sentence that names it."""
    try:
        yield
    except (UsageError, ImportError):
        raise
    except FileNotFoundError as error:
        raise UsageError(f"'{name}' does not exist; check the path") from error
    except (IsADirectoryError, PermissionError) as error:
        raise UsageError(f"'{name}' cannot be read: {error.strerror}; give a readable picture file") from error
    except PIL.UnidentifiedImageError as error:
        raise UsageError(f"'{name}' is not a picture useg can read ({', '.join(FORMATS)} or TIFF), or it is damaged; convert or remove it") from error
    except _TooLargeError as error:
        size, limit = error.args
        raise UsageError(f"'{name}' declares {size}, but at most {limit:,} pixels are read; cut it into smaller pictures") from error
    except _StackError as error:
        raise UsageError(f"'{name}' is a stack of {error} pages; useg reads one picture a file: save each page as its own file") from error
    except Exception as error:  # damaged files make the decoders raise nearly anything: MemoryError, TypeError, ZeroDivisionError, ...
        raise UsageError(f"'{name}' is damaged or incomplete ({error or type(error).__name__}); save or copy it again, or remove it") from error
