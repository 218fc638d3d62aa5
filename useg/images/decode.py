"""Decode an image file to what it stores, upright: formats, bit depths, palettes, rotation tags.

Pillow reads PNG, JPEG, BMP and GIF. It silently reduces 16-bit RGB PNGs to 8 bits and drops bands
of planar TIFFs, and it takes six times the memory of a WebP: imagecodecs and tifffile read these.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from useg.images.containers import Container, orientation, read_container
from useg.images.limits import (
    check_declared_size,
    check_page,
    is_tiff,
    pixel_limit,
    silence_package,
)
from useg.images.tiff import open_tiff, read_tiff

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


# Photometric interpretations of a TIFF.
_WHITE_IS_ZERO, _CMYK = 0, 5


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
        alpha: the transparency ``(H, W)`` that ``pixels`` lacks, or None.
    """

    pixels: NDArray[Any]
    colors: NDArray[np.uint8] | None = None
    highest: int = 0
    inverted: bool = False
    called_alpha: tuple[int, ...] = ()
    alpha: NDArray[Any] | None = None


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
    container = read_container(file)
    check_declared_size(*container.size, container.pixel_bytes, max_pixels)
    turn, content = orientation(container.exif), container.content(file)
    depth, kind = container.depth, container.color_type
    if container.form == "WEBP":
        return _split_alpha(_turn(_decode_webp(content, container), turn))
    if depth == 16 and kind in (2, 4, 6):
        return _split_alpha(_turn(_decode_deep_png(content), turn))
    if depth == 8 and kind in (2, 6):
        fast = _decode_plain_png(content, container.size)
        if fast is not None:
            return _split_alpha(_turn(fast, turn))
    pixels, colors, highest = _decode_with_pillow(content, container)
    return replace(_split_alpha(_turn(pixels, turn)), colors=colors, highest=highest)


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


def stored_pages(file: BinaryIO) -> int:
    """Return how many pages :func:`decode` can choose from: 1, except for stacks in a TIFF."""
    if is_tiff(file):
        with open_tiff(file) as tiff:
            return tiff.num_pages
    read_container(file)
    return 1


def stored_size(file: BinaryIO, page: int | None = None) -> tuple[int, int]:
    """Return the ``(width, height)`` that :func:`decode` gives, from the header alone."""
    if is_tiff(file):
        with open_tiff(file) as tiff:
            check_page(page, tiff.num_pages)
            (width, height), turn = tiff.size, tiff.orientation
    else:
        check_page(page, 1)
        container = read_container(file)
        (width, height), turn = container.size, orientation(container.exif)
    return (height, width) if turn >= 5 else (width, height)


def stored_palette(file: BinaryIO) -> NDArray[np.uint8] | None:
    """Return the palette ``(N, 3)`` uint8 of a file, from the header alone, or None."""
    if is_tiff(file):
        with open_tiff(file) as tiff:
            return tiff.colors
    container = read_container(file)
    if container.form in ("JPEG", "WEBP") or container.color_type not in (-1, 3):
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

    Returns None where anything is unusual, so that Pillow reports what is wrong.
    """
    import imagecodecs

    try:
        decoded: NDArray[Any] = imagecodecs.spng_decode(content)
    # imagecodecs has one class for all that can be wrong, and Pillow's messages are better.
    except Exception:
        return None
    if decoded.dtype != np.uint8 or decoded.ndim != 3:
        return None
    return decoded if decoded.shape[1::-1] == size and decoded.shape[2] >= 3 else None


def _decode_webp(content: bytes, container: Container) -> NDArray[np.uint8]:
    """Decode the first picture of a WebP: RGB, or with transparency.

    It may cover a part of an animation's canvas.
    """
    import imagecodecs

    silence_package("imagecodecs")
    decoded: NDArray[np.uint8] = imagecodecs.webp_decode(content)
    left, top, width, height = container.frame
    if decoded.shape[1::-1] != (width, height):
        raise ValueError(f"it declares {width}x{height} pixels, but holds others")
    if container.size == (width, height):
        return decoded
    canvas = np.zeros((*container.size[::-1], decoded.shape[2]), np.uint8)
    canvas[top : top + height, left : left + width] = decoded
    return canvas


@contextlib.contextmanager
def _opened(content: bytes, container: Container) -> Iterator[PIL.Image.Image]:
    """Open with Pillow what holds the pixels of a file.

    ``PIL.Image.open`` has a limit of pixels that is global to the process.
    """
    try:
        opened = _PLUGINS[container.form](io.BytesIO(content))
    except SyntaxError as error:
        raise PIL.UnidentifiedImageError(str(error)) from error
    with opened:
        if opened.size != container.size:
            raise ValueError(f"it declares the sizes {container.size} and {opened.size}")
        yield opened


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
        alpha = None
        if called_alpha and _is_transparency(pixels, called_alpha, tiff.highest):
            alpha = _turn(pixels[..., called_alpha[0]], tiff.orientation)
            pixels, called_alpha = np.delete(pixels, called_alpha, axis=2), ()
        highest = tiff.highest if first.bitspersample < 8 else 0
        return StoredPixels(
            _turn(pixels, tiff.orientation),
            tiff.colors,
            highest,
            first.photometric == _WHITE_IS_ZERO,
            called_alpha,
            alpha,
        )


def _is_transparency(pixels: NDArray[Any], bands: tuple[int, ...], highest: int) -> bool:
    """Tell whether bands that a TIFF calls alpha are transparency.

    They are if they are mostly 0 or the highest value where there is any colour. GDAL calls the
    fourth of four 8-bit bands alpha, whatever it is, and near infrared must not be lost for that.
    """
    coloured = np.delete(pixels, bands, axis=2).any(axis=2)
    alpha = pixels[..., bands][coloured]
    return bool(((alpha == 0) | (alpha == highest)).mean() >= 0.5) if alpha.size else True


_PLUGINS: dict[str, Callable[[BinaryIO], PIL.Image.Image]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
}
