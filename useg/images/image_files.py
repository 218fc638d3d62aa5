"""Image files to arrays and back: images, masks, label maps; resizing, and listing image files.

An image, a mask of ids and a mask of colours are three views of what a file stores. PNGs are
written in a quarter of Pillow's time and in fewer bytes, and can carry a mark that says what they
were made from.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from useg.classes import ClassTable, Label, palette
from useg.errors import DataError, SettingsError
from useg.files import list_files, replacing
from useg.images.decode import (
    decode,
    decode_alpha,
    stored_no_data,
    stored_palette,
    stored_size,
)
from useg.images.formats import (
    IMAGE_SUFFIXES,
    StoredPixels,
    clear_errors,
    open_image_file,
)
from useg.images.stacks import MIN_GREY_PAGES
from useg.ownership import (
    JPEG_COMMENT,
    MASK_MARK,
    PICTURE_MARK,
    is_own_label_map,
    is_own_mask,
    is_own_picture,
)
from useg.parsing import open_file

# (H, W, C) uint8, uint16 or float32.
Image = NDArray[Any]
IdType = TypeVar("IdType", np.uint8, np.int32)
# Least number of bytes of the header of a .npy file.
_NPY_HEADER_BYTES = 64

# Indices of a palette that are looked up at once: as 64-bit numbers they fit into a processor's
# cache.
_INDICES_AT_ONCE = 65_536

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# A mark follows the signature and the chunk IHDR, which must come first.
_MARK_AT = 33
# The first bytes of a PNG that contain its mark, if it has up to 400 characters.
MARKED_BYTES = 450
# Colour types and filters of PNG. The filter "sub" stores each pixel less the one to its left.
_GREY, _RGB, _PALETTE = 0, 2, 3
_FILTER_NONE, _FILTER_SUB = 0, 1
JPEG_QUALITY = 92


def encode_png(
    pixels: NDArray[np.uint8], colors: NDArray[np.uint8] | None = None, mark: str = ""
) -> bytes:
    """Encode pixels as PNG.

    All rows use one filter, and libdeflate compresses them; other encoders try five filters on each
    row. An 800x600 overlay takes 9 ms instead of 49.

    Args:
        pixels: ``(H, W, 3)`` uint8, or ``(H, W)`` uint8: grey, or indices into ``colors``.
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
        rows[:, 0], rows[:, 1:] = _FILTER_NONE, flat
    else:
        rows[:, 0], rows[:, 1 : 1 + bands] = _FILTER_SUB, flat[:, :bands]
        np.subtract(flat[:, bands:], flat[:, :-bands], out=rows[:, 1 + bands :])
    header = W.to_bytes(4, "big") + H.to_bytes(4, "big") + bytes((8, kind, 0, 0, 0))
    palette = _chunk(b"PLTE", colors.tobytes()) if colors is not None else b""
    level = 6 if kind == _PALETTE else 1
    content = imagecodecs.deflate_encode(rows, level=level)  # type: ignore[arg-type]
    head = _SIGNATURE + _chunk(b"IHDR", header) + _mark(mark) + palette
    return head + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")


def has_mark(path: Path, mark: str) -> bool:
    """Tell whether :func:`encode_png` wrote a PNG with this mark; see :func:`starts_with_mark`."""
    try:
        with open_file(path) as file:
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
    checksum = zlib.crc32(name + content)
    return len(content).to_bytes(4, "big") + name + content + checksum.to_bytes(4, "big")


@dataclass(frozen=True)
class Sample:
    """An image and its label.

    Args:
        image: ``(H, W, C)`` uint8, uint16 or float32, as stored.
        label: ``(H, W)`` uint8: class ids; 255 is ignored.
        missing: ``(H, W)``: where the image has no data; None if it has data everywhere.
    """

    image: Image
    label: Label
    missing: NDArray[np.bool_] | None = None


def holds_python_objects(path: Path) -> bool:
    """Return whether a ``.npy`` file says that it has Python objects and no numbers."""
    if path.suffix.lower() != ".npy":
        return False
    try:
        with open_file(path) as file:
            header = file.read(_NPY_HEADER_BYTES)
    except OSError:
        return False
    return header.startswith(b"\x93NUMPY") and b"'descr': '|O'" in header


def list_image_files(folder: Path) -> list[Path]:
    """List the image files in a folder and its sub-folders, as :func:`useg.files.list_files`."""
    return list_files(folder, IMAGE_SUFFIXES)


def read_image(path: Path, page: int | None = None) -> Image:
    """Read an image: ``(H, W, C)`` uint8, uint16 or float32, upright as its EXIF tag says.

    Grey stays one band, a palette becomes RGB, 1-bit becomes 0/255, 8-bit CMYK becomes RGB, and
    alpha is dropped. 16-bit files stay 16-bit. Wider or signed whole numbers, and every float,
    become float32. A TIFF keeps all bands except transparency: a band that it calls alpha and that
    is mostly 0 or the highest value where there is colour. Near infrared stays, although many
    programs call any fourth band alpha.

    Args:
        path: PNG, JPEG, TIFF, WebP, BMP, GIF, PPM, PGM, JPEG 2000, AVIF, HEIC, DICOM or .npy; the
            content decides, not the suffix.
        page: page of a stack, from 0 (:mod:`useg.images.stacks`); None for a file of one image;
            ALL_PAGES: the pages of a TIFF are the bands of one image.

    Raises:
        DataError: the file is missing, not an image or damaged, or has more pixels than
            ``USEG_MAX_PIXELS`` allows (300 million by default) or more than 16 bytes for each; it
            is a stack and ``page`` is missing, or there is no such page.
    """
    with open_image_file(Path(path)) as file:
        return as_image(decode(file, None, page))


def read_image_and_missing(
    path: Path, page: int | None = None
) -> tuple[Image, NDArray[np.bool_] | None]:
    """Read an image, and where it has no data ``(H, W)``; None if it has data everywhere.

    A pixel has no data if all its bands have the NODATA value of a TIFF (GDAL's tag) or are NaN, or
    if it is transparent and black or white. Such pixels get the mean of all others, so that neither
    resizing nor the network mixes a value like -9999 into their neighbours.

    The arguments and errors are those of :func:`read_image`.
    """
    with open_image_file(Path(path)) as file:
        return fill_missing(decode(file, None, page))


def decode_image_and_missing(
    content: bytes, name: str = "the image", max_pixels: int | None = None
) -> tuple[Image, NDArray[np.bool_] | None]:
    """Decode a file's content in memory, like :func:`read_image_and_missing`."""
    with clear_errors(name):
        return fill_missing(decode(io.BytesIO(content), max_pixels))


def fill_missing(stored: StoredPixels) -> tuple[Image, NDArray[np.bool_] | None]:
    """Turn stored values into an image, and return where it has no data: it has the mean there."""
    image, missing = as_image(stored), find_missing(stored)
    if missing is None:
        return image, None
    valid = image[~missing].astype(np.float64)
    is_finite = np.isfinite(valid)
    mean = np.where(is_finite, valid, 0).sum(0) / np.maximum(is_finite.sum(0), 1)
    filled = image.copy()
    filled[missing] = (np.rint(mean) if image.dtype.kind == "u" else mean).astype(image.dtype)
    return filled, missing


def find_missing(stored: StoredPixels) -> NDArray[np.bool_] | None:
    """Return which pixels have no data ``(H, W)``, or None if all have."""
    pixels, found = stored.pixels, []
    if stored.no_data is not None:
        found.append((pixels == stored.no_data).all(2))
    if pixels.dtype.kind == "f":
        found.append(np.isnan(pixels).all(2))
    if stored.alpha is not None and not stored.alpha.all():
        # Some programs keep the photograph's colours under a transparent background.
        highest = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1
        is_plain = (pixels == 0).all(2) | (pixels == highest).all(2)
        found.append((stored.alpha == 0) & is_plain)
    missing: NDArray[np.bool_] = np.logical_or.reduce(found) if found else np.zeros(1, bool)
    return missing if missing.any() else None


def decode_image(
    content: bytes,
    name: str = "the image",
    max_pixels: int | None = None,
    page: int | None = None,
) -> Image:
    """Decode a file's content in memory, like :func:`read_image`; errors call it ``name``."""
    with clear_errors(name):
        return as_image(decode(io.BytesIO(content), max_pixels, page))


def decode_size(content: bytes, name: str = "the image") -> tuple[int, int]:
    """Return the ``(width, height)`` of a file's content, from its header alone."""
    with clear_errors(name):
        return stored_size(io.BytesIO(content))


def decode_coverage(content: bytes, name: str = "the mask") -> NDArray[np.bool_]:
    """Decode a mask of one shape ``(H, W)``, as annotation files embed it.

    The shape consists of the pixels that are not transparent or, without an alpha band, not 0.
    """
    with clear_errors(name):
        alpha = decode_alpha(io.BytesIO(content))
        covered = as_image(decode(io.BytesIO(content))).any(axis=2) if alpha is None else alpha > 0
        return np.asarray(covered, bool)


def read_mask(path: Path, page: int | None = None) -> NDArray[Any]:
    """Read what a mask stores: integers ``(H, W)``, or ``(H, W, 3)`` uint8 if its bands differ.

    A palette file gives its indices, never grey levels. 1-bit gives 0/1; 2- and 4-bit grey give 0-3
    and 0-15. Alpha is dropped, and RGB with three equal bands becomes one band. NaN, infinity and
    negative fractions mark pixels without data; they become negative numbers. The mask is rotated
    as :func:`read_image` rotates the image, so both stay aligned.

    Raises:
        DataError: as for :func:`read_image`; also 2 or more than 3 bands, or fractions.
    """
    with open_image_file(Path(path)) as file:
        return _as_mask(_without_alpha(decode(file, None, page)), path)


def read_mask_and_alpha(
    path: Path, page: int | None = None
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Read a mask as :func:`read_mask` does, and its transparency ``(H, W)``, if it has any.

    Raises:
        DataError: as for :func:`read_mask`.
    """
    with open_image_file(Path(path)) as file:
        stored = decode(file, None, page)
        return _as_mask(_without_alpha(stored), path), stored.alpha


def read_colors(path: Path, page: int | None = None) -> NDArray[np.uint8]:
    """Read a mask that stores colours: ``(H, W, 3)`` uint8.

    Palette indices become their colours; grey becomes three equal bands.

    Raises:
        DataError: as for :func:`read_image`; also other than 1 or 3 bands of 8 bits.
    """
    with open_image_file(Path(path)) as file:
        image = as_image(_without_alpha(decode(file, None, page)))
        if image.shape[2] not in (1, 3):
            raise DataError(f"mask '{path}' has {image.shape[2]} bands; colours need three")
        return _eight_bit(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image, path)


def read_palette(path: Path) -> NDArray[np.uint8] | None:
    """Return a file's palette ``(N, 3)`` uint8, or None, without decoding its pixels.

    Raises:
        DataError: the file is missing or not an image.
    """
    with open_image_file(Path(path)) as file:
        return stored_palette(file)


def read_size(path: Path, page: int | None = None) -> tuple[int, int]:
    """Return ``(width, height)`` after rotation, from the file's header alone.

    Raises:
        DataError: the file is missing or not an image; it is a stack and ``page`` is missing, or
            there is no such page.
    """
    with open_image_file(Path(path)) as file:
        return stored_size(file, page)


def read_no_data(path: Path) -> float | None:
    """Return the value of pixels without data in a TIFF (GDAL's nodata tag), or None.

    Raises:
        DataError: the file is missing or a damaged TIFF.
    """
    with open_image_file(path) as file:
        return stored_no_data(file)


def encode_label(label: Label, table: ClassTable, mark: str = "") -> bytes:
    """Encode a label map ``(H, W)`` uint8 as a palette PNG.

    :func:`read_mask` returns the same ids, ``IGNORE`` (255) too. :func:`has_mark` finds the mark.
    """
    assert (label.ndim, str(label.dtype)) == (2, "uint8"), (
        f"a label map is (H, W) uint8, not {label.shape} {label.dtype}"
    )
    return encode_png(label, palette(table), mark)


def write_label(path: Path, label: Label, table: ClassTable, mark: str = "") -> None:
    """Write a label map ``(H, W)`` uint8 as a palette PNG, whole or not at all.

    Raises:
        SettingsError: the name does not end in ``.png``.
        MachineError: the file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise SettingsError(
            f"label maps are written as PNG, but the file is named '{path.name}'; end it in .png"
        )
    with replacing(path, is_own_label_map if mark else is_own_mask) as draft:
        draft.write_bytes(encode_label(label, table, mark or MASK_MARK))


def encode_picture(picture: NDArray[np.uint8], suffix: str = ".png", mark: str = "") -> bytes:
    """Encode a picture ``(H, W, 3)`` uint8 as PNG or JPEG, with the mark of a file of useg.

    Raises:
        SettingsError: another suffix.
    """
    if suffix.lower() not in _PICTURE_FORMATS:
        raise SettingsError(
            f"a picture is written as {', '.join(_PICTURE_FORMATS)}, but the suffix is {suffix!r}; "
            "change it"
        )
    return _PICTURE_FORMATS[suffix.lower()](picture, mark)


def _encode_jpeg(picture: NDArray[np.uint8], mark: str) -> bytes:
    target = io.BytesIO()
    comment = JPEG_COMMENT if mark else b""
    PIL.Image.fromarray(picture).save(target, "JPEG", quality=JPEG_QUALITY, comment=comment)
    return target.getvalue()


def write_picture(path: Path, picture: NDArray[np.uint8], mark: str = PICTURE_MARK) -> None:
    """Write a picture ``(H, W, 3)`` uint8 as PNG or JPEG, by its suffix, whole or not at all.

    Raises:
        SettingsError: another suffix.
        MachineError: the file cannot be written.
    """
    content = encode_picture(picture, path.suffix, mark)
    with replacing(path, is_own_picture) as draft:
        draft.write_bytes(content)


def image_from_pil(image: PIL.Image.Image) -> Image:
    """Return the pixels ``(H, W, C)``: a palette becomes colours, and transparency is dropped."""
    if image.mode in ("P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"):
        image = image.convert("RGB")
    elif image.mode in ("1", "LA"):
        image = image.convert("L")
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def resize_image(image: Image, size: tuple[int, int]) -> Image:
    """Resize ``(H, W, C)`` of any dtype and number of bands to ``size = (width, height)``.

    Bilinear; when shrinking, averaged over the source area.
    """
    H, W, C = image.shape
    if size == (W, H):
        return image
    if image.dtype == np.uint8 and C in (1, 3):
        whole = PIL.Image.fromarray(image[..., 0] if C == 1 else image)
        resized = whole.resize(size, PIL.Image.Resampling.BILINEAR)
        return np.array(resized).reshape(size[1], size[0], C)
    # Band by band: Pillow would multiply a fourth band into the others as alpha, and it does not
    # know other numbers of bands.
    floats = [PIL.Image.fromarray(image[..., c].astype(np.float32)) for c in range(C)]
    bands = [band.resize(size, PIL.Image.Resampling.BILINEAR) for band in floats]
    stacked = np.stack([np.asarray(band) for band in bands], axis=-1)
    return stacked if image.dtype.kind == "f" else np.rint(stacked).astype(image.dtype)


def resize_label(label: NDArray[IdType], size: tuple[int, int]) -> NDArray[IdType]:
    """Resize a label map ``(H, W)`` to ``size = (width, height)``: nearest, without new ids.

    The ids are uint8, or int32 if they are numbers of objects.
    """
    if label.shape == (size[1], size[0]):
        return label
    resized: NDArray[IdType] = np.array(
        PIL.Image.fromarray(label).resize(size, PIL.Image.Resampling.NEAREST)
    )
    return resized


def _without_alpha(stored: StoredPixels) -> StoredPixels:
    if not stored.declared_alpha:
        return stored
    return replace(stored, pixels=np.delete(stored.pixels, stored.declared_alpha, axis=2))


def _apply_palette(indices: NDArray[Any], colors: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the colours of indices ``(H, W)``: ``(H, W, 3)``.

    A few rows at a time, because NumPy makes indices of 64 bits of them.
    """
    pixels = np.empty((*indices.shape, colors.shape[1]), np.uint8)
    step = max(1, _INDICES_AT_ONCE // indices.shape[1])
    for start in range(0, len(indices), step):
        rows = slice(start, start + step)
        pixels[rows] = np.take(colors, indices[rows], axis=0)
    return pixels


def as_image(stored: StoredPixels) -> Image:
    """Turn stored values into an image: palette applied, high values white, 8, 16 or float32."""
    pixels = stored.pixels
    if stored.colors is not None:
        return _apply_palette(pixels[..., 0], stored.colors)
    if stored.inverted and pixels.dtype.kind == "u":
        pixels = (stored.highest or np.iinfo(pixels.dtype).max) - pixels
    if stored.highest:
        pixels = (pixels * (255 // stored.highest)).astype(np.uint8, copy=False)
    kept = pixels.dtype in (np.uint8, np.uint16, np.float32)
    return pixels if kept else pixels.astype(np.float32)


def _eight_bit(colors: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    is_wide = colors.min() < 0 or colors.max() > 255 or colors.dtype.kind == "f"
    if colors.dtype != np.uint8 and is_wide:
        raise DataError(
            f"mask '{path}' has three bands of {colors.dtype}, but colours have 8 bits; "
            "save it as 8-bit RGB PNG"
        )
    return np.ascontiguousarray(colors.astype(np.uint8, copy=False))


def _describe_bands(path: Path, count: int) -> str:
    """Say that a mask has a wrong number of bands; those of an array may be slices."""
    is_volume = path.suffix.lower() == ".npy" and count >= MIN_GREY_PAGES
    advice = (
        "; if its last axis counts slices, put that first, in images and masks: "
        "numpy.save(file, numpy.moveaxis(numpy.load(file), -1, 0))"
    )
    return (
        f"mask '{path}' has {count} bands, but a mask has one band of class ids, three of colours, "
        "or one for each class, of which one is set at each pixel; save it as such"
        f"{advice * is_volume}"
    )


def _as_mask(stored: StoredPixels, path: Path) -> NDArray[Any]:
    pixels = stored.pixels
    if stored.inverted and stored.highest == 1:
        pixels = 1 - pixels
    if pixels.dtype.kind == "f":
        # Rasters mark pixels without data by NaN, -9999 or the lowest float.
        pixels = np.where(np.isfinite(pixels) & (pixels >= 0), pixels, -1)
        with np.errstate(invalid="ignore"):
            whole = pixels.astype(np.int32)
        if not np.array_equal(whole, pixels):
            raise DataError(
                f"mask '{path}' holds fractions, but a mask stores whole numbers (class ids) or "
                "colours; save it as 8-bit PNG"
            )
        pixels = whole
    if pixels.shape[2] == 1:
        return pixels[..., 0]
    # One-hot: a band for each class, of which one is set at each pixel. Whole numbers in three
    # bands are colours, even if they are 0 and 1, unless they stand for false and true.
    if pixels.shape[2] != 3 or stored.pixels.dtype.kind == "f" or stored.highest == 1:
        is_set = pixels != 0
        if (is_set.sum(2) == 1).all() and pixels[is_set].min() == pixels.max():
            ids: NDArray[Any] = is_set.argmax(2).astype(np.uint8)
            return ids
    if pixels.shape[2] != 3:
        raise DataError(_describe_bands(path, pixels.shape[2]))
    first, second, third = (pixels[..., c] for c in range(3))
    if np.array_equal(first, second) and np.array_equal(first, third):
        return np.ascontiguousarray(first)
    return _eight_bit(pixels, path)


_PICTURE_FORMATS: dict[str, Callable[[NDArray[np.uint8], str], bytes]] = {
    ".png": lambda picture, mark: encode_png(picture, mark=mark),
    ".jpg": _encode_jpeg,
    ".jpeg": _encode_jpeg,
}
