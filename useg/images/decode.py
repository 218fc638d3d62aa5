"""Decode an image file to its stored values, upright: formats, bit depths, palettes, rotation.

Pillow reads PNG, JPEG, BMP, GIF and AVIF. It silently reduces 16-bit RGB PNGs and JPEG 2000 to 8
bits, drops bands of planar TIFFs, stretches the values of PGMs, and takes six times the memory of a
WebP: imagecodecs, tifffile and numpy read these. HEIC and DICOM need an optional package each.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import struct
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
from useg.images.headers import (
    npy_axes,
    open_iso_media,
    read_dicom,
    read_npy_header,
    read_pnm_header,
)
from useg.images.limits import (
    ALL_PAGES,
    EXTRA_BYTES,
    UnreadableError,
    check_declared_size,
    check_page,
    is_tiff,
    pixel_limit,
    silence_package,
)
from useg.images.tiff import open_tiff, read_tiff

IMAGE_SUFFIXES = frozenset(
    {
        *(
            ".png",
            ".jpg",
            ".jpeg",
            ".jpe",
            ".jfif",
            ".webp",
            ".bmp",
            ".dib",
            ".gif",
            ".tif",
            ".tiff",
        ),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpf", ".jpx"),
        *(".jpc", ".avif", ".heic", ".heif", ".dcm", ".dicom", ".npy"),
    }
)

# Files that hold images, but that useg does not read: their suffixes, and what to do with them.
_CONVERSIONS = {
    ".nii .mha .mhd .nrrd .mgz": "save their slices as TIFF or .npy, for example with SimpleITK",
    ".mat": "save their arrays as .npy: numpy.save(name, scipy.io.loadmat(file)[key])",
    ".npz": "save each array as .npy: numpy.save(name, numpy.load(file)[key])",
    ".h5 .hdf5 .hdf .nc": "save their arrays as .npy or TIFF",
    ".svs .ndpi .mrxs .scn .vms .bif": "convert them to TIFF with vips or QuPath",
    ".czi .lif .nd2 .oib .oif .vsi .ims .lsm": "convert them to TIFF with Fiji or bfconvert",
    ".img .ecw .sid .ntf .nitf .hgt .vrt .grd .bil": "convert them to TIFF with gdal_translate",
    ".cr2 .cr3 .nef .arw .dng .orf .raf .rw2": "develop them to TIFF or JPEG",
    ".psd .xcf .svg .pdf .ai .eps .tga .exr .hdr .jxl .pcx .ico .dds .fits .pam .pfm": (
        "convert them to PNG or TIFF, for example with ImageMagick"
    ),
    ".zip .tar .gz .tgz .7z .rar": "unpack them",
    ".tfrecord .parquet .pkl .pt .lmdb .mdb": "export their images as PNG",
}
UNREAD_SUFFIXES = {
    suffix: advice for suffixes, advice in _CONVERSIONS.items() for suffix in suffixes.split()
}


# The transfer syntax of DICOM that pydicom decodes in Python (run lengths), and the maximum bytes
# of such a frame: every two bytes become up to 128, however small the image is.
_DICOM_RUNS, _MAX_RUNS_BYTES = "1.2.840.10008.1.2.5", 4_000_000

# Photometric interpretations of a TIFF.
_WHITE_IS_ZERO, _CMYK = 0, 5


@dataclass(frozen=True)
class StoredPixels:
    """The stored values of a file: ``pixels`` ``(H, W, C)``, upright, without transparency.

    Args:
        pixels: raw values; indices for a palette file, 0-1, 0-3 or 0-15 for 1, 2 or 4 bits.
        colors: ``(N, 3)`` uint8, the palette, or None.
        highest: the value of white in files with fewer than 8 bits per pixel, otherwise 0.
        inverted: whether 0 means white.
        called_alpha: bands in ``pixels`` that the file calls alpha but that hold data: they belong
            to an image, not to a mask.
        alpha: the transparency ``(H, W)`` that ``pixels`` lacks, or None.
        no_data: the value of pixels without data, as GDAL's tag in a TIFF has it, or None.
    """

    pixels: NDArray[Any]
    colors: NDArray[np.uint8] | None = None
    highest: int = 0
    inverted: bool = False
    called_alpha: tuple[int, ...] = ()
    alpha: NDArray[Any] | None = None
    no_data: float | None = None


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
    container = read_container(file)
    page = check_page(page, container.pages)
    check_declared_size(*container.size, container.pixel_bytes, max_pixels)
    turn = orientation(container.exif) if container.exif else 1
    content = container.content(file)
    if container.form in _OTHER_FORMS:
        stored = _OTHER_FORMS[container.form](content, page)
        if stored.pixels.shape[1::-1] != container.size:
            raise ValueError(f"it declares the size {container.size}, but holds another")
        return replace(stored, pixels=_turn(stored.pixels, turn))
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
    """Return the number of pages of which :func:`decode` reads one: 1 unless the file is a
    stack."""
    if is_tiff(file):
        with open_tiff(file) as tiff:
            return tiff.num_pages
    return read_container(file).pages


def stored_size(file: BinaryIO, page: int | None = None) -> tuple[int, int]:
    """Return the ``(width, height)`` that :func:`decode` gives, from the header alone."""
    if is_tiff(file):
        with open_tiff(file) as tiff:
            if page != ALL_PAGES:
                check_page(page, tiff.num_pages)
            (width, height), turn = tiff.size, tiff.orientation
    else:
        container = read_container(file)
        check_page(page, container.pages)
        (width, height), turn = container.size, orientation(container.exif)
    return (height, width) if turn >= 5 else (width, height)


def stored_no_data(file: BinaryIO) -> float | None:
    """Return the value by which a TIFF says that there are no data (GDAL's tag), or None."""
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
        raise ValueError(f"it declares {width}x{height} pixels, but holds others")
    if container.size == (width, height):
        return decoded
    canvas = np.zeros((*container.size[::-1], decoded.shape[2]), np.uint8)
    canvas[top : top + height, left : left + width] = decoded
    return canvas


def _decode_pnm(content: bytes, _: int) -> StoredPixels:
    header = read_pnm_header(content[:4096])
    shape = header.height, header.width, header.bands
    body = content[header.length :]
    if header.kind == 1:
        digits = np.frombuffer(body.translate(None, b" \t\r\n\v\f"), np.uint8) - ord("0")
        pixels: NDArray[Any] = digits[: math.prod(shape)]
    elif header.kind in (2, 3):
        if body.translate(None, b"0123456789 \t\r\n\v\f"):
            raise ValueError("it has text that is no number")
        pixels = np.fromstring(body, np.int64, math.prod(shape), sep=" ")
    elif header.kind == 4:
        row = -(-header.width // 8)
        packed = np.frombuffer(body[: row * header.height], np.uint8).reshape(header.height, row)
        pixels = np.unpackbits(packed, axis=1)[:, : header.width]
    else:
        dtype = np.dtype(">u2" if header.highest > 255 else np.uint8)
        pixels = np.frombuffer(body, dtype, math.prod(shape))
    if pixels.size and not 0 <= pixels.min() <= pixels.max() <= header.highest:
        raise ValueError(f"it has a value outside of 0 to {header.highest}")
    pixels = pixels.astype(np.uint16 if header.highest > 255 else np.uint8).reshape(shape)
    # In a bitmap, 1 is black.
    return StoredPixels(
        pixels, None, header.highest if header.highest < 255 else 0, header.kind in (1, 4)
    )


def _decode_npy(content: bytes, _: int) -> StoredPixels:
    file = io.BytesIO(content)
    shape, dtype, by_columns = read_npy_header(file)
    values = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    pixels = values.reshape(shape, order="F" if by_columns else "C")
    size, is_band_first = npy_axes(shape)
    pixels = np.moveaxis(pixels, 0, -1) if is_band_first else pixels.reshape(size)
    if dtype.kind == "b":
        return StoredPixels(pixels.astype(np.uint8), None, 1)
    if dtype.kind == "f":
        return StoredPixels(pixels.astype(np.float32))
    return StoredPixels(pixels.astype(dtype.newbyteorder("="), copy=False))


def _decode_jpeg2000(content: bytes, _: int) -> StoredPixels:
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


def _decode_iso_media(form: str, content: bytes) -> StoredPixels:
    with open_iso_media(form, content) as opened:
        if opened.mode not in ("L", "LA", "I;16", "RGB", "RGBA"):
            opened = opened.convert("RGB")
        pixels = np.array(opened)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return StoredPixels(pixels[..., : 1 if pixels.shape[2] < 3 else 3])


def _check_dicom_frame(dataset: Any, page: int) -> None:
    """Check a compressed frame like an image file: pydicom would decode whatever it declares."""
    syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
    if syntax is None or not syntax.is_encapsulated:
        return
    encaps: Any = importlib.import_module("pydicom.encaps")
    num_frames = int(dataset.get("NumberOfFrames") or 1)
    frame = encaps.get_frame(dataset.PixelData, page, number_of_frames=num_frames)
    size = int(dataset.Columns), int(dataset.Rows)
    if syntax == _DICOM_RUNS:
        most = size[0] * size[1] * int(dataset.BitsAllocated) * int(dataset.SamplesPerPixel) // 4
        if len(frame) > min(most + EXTRA_BYTES, _MAX_RUNS_BYTES):
            raise UnreadableError("it is a large DICOM file of run lengths")
        return
    file = io.BytesIO(frame)
    container = read_container(file)
    if container.form not in ("JPEG", "JPEG2000") or container.size != size:
        raise ValueError(f"it declares {size[0]}x{size[1]} pixels, but holds another image")
    container.content(file)


def _decode_dicom(content: bytes, page: int) -> StoredPixels:
    """Decode a frame, and rescale its values to units such as Hounsfield units."""
    pixel_functions: Any = importlib.import_module("pydicom.pixels")
    dataset = read_dicom(io.BytesIO(content), with_pixels=True)
    dataset.file_meta = getattr(dataset, "file_meta", None)
    if "PixelData" not in dataset:
        raise ValueError("it ends before its pixels do")
    _check_dicom_frame(dataset, page)
    pixels: NDArray[Any] = pixel_functions.pixel_array(dataset, index=page)
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        colors = pixel_functions.apply_color_lut(pixels, dataset)
        pixels = colors if colors.dtype == np.uint8 else (colors >> 8).astype(np.uint8)
    if kind == "MONOCHROME1" and pixels.dtype.kind == "u":
        pixels = (1 << int(dataset.BitsStored)) - 1 - pixels
    slope = float(dataset.get("RescaleSlope") or 1)
    intercept = float(dataset.get("RescaleIntercept") or 0)
    if (slope, intercept) != (1, 0):
        pixels = pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    highest = 1 if int(dataset.BitsAllocated) == 1 else 0
    return StoredPixels(pixels[..., None] if pixels.ndim == 2 else pixels, None, highest)


# Each function takes the content of a file and the number of a page.
_OTHER_FORMS: dict[str, Callable[[bytes, int], StoredPixels]] = {
    "PNM": _decode_pnm,
    "NPY": _decode_npy,
    "JPEG2000": _decode_jpeg2000,
    "AVIF": lambda content, _: _decode_iso_media("AVIF", content),
    "HEIF": lambda content, _: _decode_iso_media("HEIF", content),
    "DICOM": _decode_dicom,
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
            tiff.no_data,
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
