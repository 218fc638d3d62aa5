"""Pixels -> the content of a PNG file, in a quarter of the time that Pillow takes and in fewer bytes; a mark in it says what it was made from."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from useg.classes import ClassTable, Label, palette
from useg.errors import UsageError
from useg.files import replacing
from useg.images.decode import StoredPixels, decode, stored_pages, stored_palette, stored_size
from useg.images.limits import clear_errors

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


_MARK_AT = 33  # the signature, and the one chunk that has to come first


# The first bytes of a PNG that contain its mark, if it has up to 400 characters.
MARKED_BYTES = 450


_GREY, _RGB, _PALETTE = 0, 2, 3


_AS_IT_IS, _DIFFERENCE = 0, 1  # filters: a row itself, or each pixel less the one to its left


def encode_png(
    pixels: NDArray[np.uint8], colors: NDArray[np.uint8] | None = None, mark: str = ""
) -> bytes:
    """Return a picture as the content of a PNG file.

    One filter for all rows and libdeflate, where others try five filters on each row: measured on overlays of 800x600, 9 ms instead of 49.

    Args:
        pixels: ``(H, W, 3)`` uint8, or ``(H, W)`` uint8: grey, or indices when there are ``colors``.
        colors: ``(N, 3)`` uint8, the palette.
        mark: ASCII text for :func:`has_mark`.
    """
    import imagecodecs

    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.ndim == 2 or pixels.shape[2] == 3, pixels.shape
    kind = _RGB if pixels.ndim == 3 else _GREY if colors is None else _PALETTE
    H, W = pixels.shape[:2]
    bands, flat = (3 if kind == _RGB else 1), pixels.reshape(H, -1)
    rows = np.empty((H, 1 + flat.shape[1]), np.uint8)
    if kind == _PALETTE:
        rows[:, 0], rows[:, 1:] = _AS_IT_IS, flat
    else:
        rows[:, 0], rows[:, 1 : 1 + bands] = _DIFFERENCE, flat[:, :bands]
        np.subtract(flat[:, bands:], flat[:, :-bands], out=rows[:, 1 + bands :])
    header = W.to_bytes(4, "big") + H.to_bytes(4, "big") + bytes((8, kind, 0, 0, 0))
    palette = _chunk(b"PLTE", colors.tobytes()) if colors is not None else b""
    content = imagecodecs.deflate_encode(rows, level=6 if kind == _PALETTE else 1)  # type: ignore[arg-type]  # any buffer will do
    return (
        _SIGNATURE
        + _chunk(b"IHDR", header)
        + _mark(mark)
        + palette
        + _chunk(b"IDAT", content)
        + _chunk(b"IEND", b"")
    )


def has_mark(path: Path, mark: str) -> bool:
    """Whether a file is a PNG that :func:`encode_png` wrote with this mark; see :func:`starts_with_mark`."""
    try:
        with path.open("rb") as file:
            return starts_with_mark(file.read(MARKED_BYTES), mark)
    except OSError:
        return False


def starts_with_mark(start: bytes, mark: str) -> bool:
    """Whether a PNG has this mark, from its first ``MARKED_BYTES``; its pixels are not read."""
    expected = _mark(mark)
    return bool(expected) and start[_MARK_AT : _MARK_AT + len(expected)] == expected


def _mark(text: str) -> bytes:
    return _chunk(b"tEXt", b"useg\0" + text.encode("ascii")) if text else b""


def _chunk(name: bytes, content: bytes | bytearray) -> bytes:
    return (
        len(content).to_bytes(4, "big")
        + name
        + content
        + zlib.crc32(name + content).to_bytes(4, "big")
    )


Image = NDArray[Any]  # (H, W, C) uint8, uint16 or float32


@dataclass(frozen=True)
class Sample:
    """One place seen twice: ``image`` ``(H, W, C)`` and ``label`` ``(H, W)`` uint8 class ids (255 = ignore)."""

    image: Image
    label: Label


def natural_key(path: Path | str) -> tuple[tuple[str | int, ...], str]:
    """Return a sort key under which numbers in names count as numbers: ``a2.png`` before ``a10.png``."""
    text = path.as_posix() if isinstance(path, Path) else path
    parts = re.split(r"([0-9]+)", text.casefold())
    return tuple(int(part) if k % 2 else part for k, part in enumerate(parts)), text


def read_image(path: Path, max_pixels: int | None = None, page: int | None = None) -> Image:
    """Read a picture: ``(H, W, C)`` uint8, uint16 or float32, turned as its EXIF tag says.

    Grey stays one band, a palette becomes RGB, 1-bit becomes 0/255, alpha is dropped, 8-bit CMYK becomes RGB; 16-bit files stay 16 bit; whole
    numbers wider than 16 bit or with a sign, and every float, become float32. A TIFF keeps all its bands but transparency: a band that it calls
    alpha and that is mostly all or nothing where there is colour. Near infrared stays, though many programs call any fourth band alpha.

    Args:
        path: PNG, JPEG, TIFF, WebP, BMP or GIF; its content decides, not its suffix.
        max_pixels: larger pictures are refused before they are decoded; also more than 16 bytes for each of these pixels. None: what the
            environment variable USEG_MAX_PIXELS says, or 300 million.
        page: which page of a TIFF stack, from 0 (:func:`num_pages`); None for a file of one picture.

    Raises:
        UsageError: no such file, no picture, damaged, too large, a stack without ``page``, or no such page.
    """
    with clear_errors(str(path)), Path(path).open("rb") as file:
        return as_image(decode(file, max_pixels, page))


def decode_image(
    content: bytes,
    name: str = "the picture",
    max_pixels: int | None = None,
    page: int | None = None,
) -> Image:
    """As :func:`read_image`, for a file's content in memory (an upload); ``name`` is for the error message."""
    with clear_errors(name):
        return as_image(decode(io.BytesIO(content), max_pixels, page))


def read_mask(path: Path, max_pixels: int | None = None, page: int | None = None) -> NDArray[Any]:
    """Read the values a mask file stores: ``(H, W)`` integers, or ``(H, W, 3)`` uint8 when its three bands differ.

    A palette file gives its indices, never grey levels; 1-bit gives 0/1, 2- and 4-bit grey give 0-3 and 0-15; alpha is dropped; RGB with three
    equal bands is one band. Rotated as :func:`read_image` does, so that image and mask stay together.

    Raises:
        UsageError: as for :func:`read_image`; also 2 or more than 3 bands, or fractions.
    """
    with clear_errors(str(path)), Path(path).open("rb") as file:
        return _as_mask(_without_alpha(decode(file, max_pixels, page)), path)


def read_colors(
    path: Path, max_pixels: int | None = None, page: int | None = None
) -> NDArray[np.uint8]:
    """Read a mask that stores colours: ``(H, W, 3)`` uint8; a palette is looked up, grey becomes three equal bands.

    Raises:
        UsageError: as for :func:`read_image`; also other than 1 or 3 bands of 8 bits.
    """
    with clear_errors(str(path)), Path(path).open("rb") as file:
        image = as_image(_without_alpha(decode(file, max_pixels, page)))
        if image.shape[2] not in (1, 3):
            raise UsageError(f"mask '{path}' has {image.shape[2]} bands; colours need three")
        return _eight_bit(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image, path)


def read_palette(path: Path) -> NDArray[np.uint8] | None:
    """Return the colours ``(N, 3)`` uint8 of a palette file's indices, or None for other files; its pixels are not decoded.

    Raises:
        UsageError: no such file or no picture.
    """
    with clear_errors(str(path)), Path(path).open("rb") as file:
        return stored_palette(file)


def read_size(path: Path, page: int | None = None) -> tuple[int, int]:
    """Return ``(width, height)`` after rotation, from the file's header alone.

    Raises:
        UsageError: no such file or no picture, a stack without ``page``, or no such page.
    """
    with clear_errors(str(path)), Path(path).open("rb") as file:
        return stored_size(file, page)


def num_pages(path: Path) -> int:
    """Return how many pictures of one size a TIFF stack holds; 1 for every other file, an ImageJ stack of channels (bands) included.

    Raises:
        UsageError: no such file or no picture.
    """
    with clear_errors(str(path)), Path(path).open("rb") as file:
        return stored_pages(file)


def encode_label(label: Label, table: ClassTable, mark: str = "") -> bytes:
    """Return a label map ``(H, W)`` uint8 as a palette PNG; :func:`read_mask` gives the same ids back, ``IGNORE`` (255) included.

    A ``mark`` in it is found by :func:`useg.images.files.has_mark`.
    """
    assert (label.ndim, str(label.dtype)) == (2, "uint8"), (
        f"a label map is (H, W) uint8, not {label.shape} {label.dtype}"
    )
    return encode_png(label, palette(table), mark)


def write_label(path: Path, label: Label, table: ClassTable, mark: str = "") -> None:
    """Write a label map ``(H, W)`` uint8 as a palette PNG in the table's colours; the file is there whole or not at all.

    Raises:
        UsageError: the name does not end in ``.png``, or the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(
            f"a label map is written as PNG, but '{path.name}' was asked for; end the name in .png"
        )
    with replacing(path) as temporary:
        temporary.write_bytes(encode_label(label, table, mark))


def encode_picture(picture: NDArray[np.uint8], suffix: str = ".png") -> bytes:
    """Return a picture ``(H, W, 3)`` uint8 as the content of a PNG or JPEG file.

    Raises:
        UsageError: another suffix.
    """
    if suffix.lower() not in _PICTURE_FORMATS:
        raise UsageError(
            f"a picture is written as {', '.join(_PICTURE_FORMATS)}, but {suffix!r} was asked for; change the name's end"
        )
    return _PICTURE_FORMATS[suffix.lower()](picture)


def _encode_jpeg(picture: NDArray[np.uint8]) -> bytes:
    target = io.BytesIO()
    PIL.Image.fromarray(picture).save(target, "JPEG", quality=92)
    return target.getvalue()


def write_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write a picture ``(H, W, 3)`` uint8 as PNG or JPEG, by the name's suffix; the file is there whole or not at all.

    Raises:
        UsageError: another suffix, or the file cannot be written.
    """
    content = encode_picture(picture, path.suffix)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def resize_image(image: Image, size: tuple[int, int]) -> Image:
    """Resize ``(H, W, C)`` of any dtype and band count to ``size = (width, height)``: bilinear, averaged over the source area when shrinking."""
    H, W, C = image.shape
    if size == (W, H):
        return image
    if image.dtype == np.uint8 and C in (1, 3):
        resized = PIL.Image.fromarray(image[..., 0] if C == 1 else image).resize(
            size, PIL.Image.Resampling.BILINEAR
        )
        return np.array(resized).reshape(size[1], size[0], C)
    # Band by band: Pillow would multiply a fourth band into the other three as alpha, and knows no other band counts.
    bands = [
        PIL.Image.fromarray(image[..., c].astype(np.float32)).resize(
            size, PIL.Image.Resampling.BILINEAR
        )
        for c in range(C)
    ]
    stacked = np.stack([np.asarray(band) for band in bands], axis=-1)
    return stacked if image.dtype.kind == "f" else np.rint(stacked).astype(image.dtype)


def resize_label(label: Label, size: tuple[int, int]) -> Label:
    """Resize a label map ``(H, W)`` to ``size = (width, height)`` by the nearest pixel; no new ids appear."""
    if label.shape == (size[1], size[0]):
        return label
    return np.array(PIL.Image.fromarray(label).resize(size, PIL.Image.Resampling.NEAREST))


def _without_alpha(stored: StoredPixels) -> StoredPixels:
    return (
        replace(stored, pixels=np.delete(stored.pixels, stored.called_alpha, axis=2))
        if stored.called_alpha
        else stored
    )


def as_image(stored: StoredPixels) -> Image:
    """Turn what a file stores into an image: palettes looked up, white is high, 8 or 16 bits or float32."""
    pixels = stored.pixels
    if stored.colors is not None:
        return np.take(stored.colors, pixels[..., 0], axis=0)
    if stored.inverted and pixels.dtype.kind == "u":
        pixels = (stored.highest or np.iinfo(pixels.dtype).max) - pixels
    if stored.highest:
        pixels = (pixels * (255 // stored.highest)).astype(np.uint8)
    return (
        pixels if pixels.dtype in (np.uint8, np.uint16, np.float32) else pixels.astype(np.float32)
    )


def _eight_bit(colors: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    if colors.dtype != np.uint8 and (
        colors.min() < 0 or colors.max() > 255 or colors.dtype.kind == "f"
    ):
        raise UsageError(
            f"mask '{path}' has three bands of {colors.dtype}; colours are 8 bit: save it as 8-bit RGB PNG"
        )
    return np.ascontiguousarray(colors.astype(np.uint8, copy=False))


def _as_mask(stored: StoredPixels, path: Path) -> NDArray[Any]:
    pixels = stored.pixels
    if stored.inverted and stored.highest == 1:
        pixels = 1 - pixels
    if pixels.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = pixels.astype(np.int32)
        if not np.array_equal(whole, pixels):
            raise UsageError(
                f"mask '{path}' holds fractions; a mask stores whole numbers (class ids) or colours: save it as 8-bit PNG"
            )
        pixels = whole
    if pixels.shape[2] == 1:
        return pixels[..., 0]
    if pixels.shape[2] != 3:
        raise UsageError(
            f"mask '{path}' has {pixels.shape[2]} bands; a mask has one band of class ids, or three of colours"
        )
    if np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(
        pixels[..., 0], pixels[..., 2]
    ):
        return np.ascontiguousarray(pixels[..., 0])
    return _eight_bit(pixels, path)


_PICTURE_FORMATS: dict[str, Callable[[NDArray[np.uint8]], bytes]] = {
    ".png": encode_png,
    ".jpg": _encode_jpeg,
    ".jpeg": _encode_jpeg,
}
