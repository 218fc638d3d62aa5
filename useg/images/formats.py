"""What the readers of all image formats share: what a file declares, what it stores, and limits.

Files that are too large, impossible or damaged are refused with one clear sentence, before anything
is decoded.
"""

from __future__ import annotations

import logging
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
import PIL.Image
from numpy.typing import NDArray

from useg.errors import DataError, SettingsError, UsageError

READ_FORMATS = "PNG, JPEG, WebP, BMP, GIF, PPM, PGM, JPEG 2000, AVIF, HEIC, DICOM, .npy or TIFF"
# Instead of a page number: all pages, which are the bands of one image.
ALL_PAGES = -1_000_000
MAX_PIXELS = 300_000_000
# Decoders take memory and time for every row, however short.
_MAX_SIDE = 1_000_000
# Four bands of 32 bits, or sixteen of 8 bits.
MAX_BYTES_PER_PIXEL = 16
# Maximum pixels per byte of file for a raster that is read in parts: its tiles may be missing.
MAX_SPARSE_PIXELS = 20_000
# Maximum number of blocks (chunks, segments, extensions). Programs write pixels in blocks of 4 kB
# or more.
_MAX_BLOCKS, _BYTES_PER_BLOCK = 10_000, 1024
# A tile may be larger than its image; the rest of it is padding.
MAX_SEGMENT_BYTES = 64 << 20
# Bytes that a file may have beyond its pixels, such as tables of a codec.
EXTRA_BYTES = 1 << 20
# libjpeg-turbo's own fuzzers stop at 500 scans, and progressive JPEGs have about 10. Each takes
# time for every pixel, so fewer are read above 25 megapixels.
MAX_SCANS, _ALWAYS_READ_SCANS, _MAX_SCANNED_PIXELS = 64, 16, 1_600_000_000
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA
# A marker of a JPEG, not a byte 255 of its pixels, a restart or a filler.
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
# Maximum bytes of pixels per byte of file: an image of one colour has nearly no bytes as WebP, JPEG
# 2000, AVIF or HEIC; up to 25 megapixels of it are read. 2 bits of JPEG encode 8x8 pixels.
FLAT_HELD, FLAT_PIXELS, JPEG_HELD = 4096, 25_000_000, 1024
# An array or a JPEG 2000 with more bands is not an image.
MAX_BANDS = 64
# Some errors repeat a whole field of the file.
_MAX_REASON_LENGTH = 300
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

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
# Files that may hold many images.
STACK_SUFFIXES = frozenset({".tif", ".tiff", ".dcm", ".dicom", ".npy"})
# Files that hold images, but that useg does not read: their suffixes, and what to do with them.
_CONVERSIONS = {
    ".nii .mha .mhd .nrrd .mgz": "save their slices as TIFF or .npy, for example with SimpleITK",
    ".npz": "save each array as .npy: numpy.save(name, numpy.load(file)[key])",
    ".mat .h5 .hdf5 .hdf .nc": "save their arrays as .npy or TIFF",
    ".svs .ndpi .mrxs .scn .vms .bif": "convert them to TIFF with vips or QuPath",
    ".czi .lif .nd2 .oib .oif .vsi .ims .lsm": "convert them to TIFF with Fiji or bfconvert",
    ".img .ecw .sid .ntf .nitf .hgt .vrt .grd .bil": "convert them to TIFF with gdal_translate",
    ".cr2 .cr3 .nef .arw .dng .orf .raf .rw2": "develop them to TIFF or JPEG",
    ".psd .xcf .svg .pdf .ai .eps .tga .exr .hdr .jxl .pcx .ico .dds .fits .pam .pfm": (
        "convert them to PNG or TIFF, for example with ImageMagick"
    ),
    ".geojson .shp .gpkg .kml": (
        "draw their polygons into a mask for each image, for example with gdal_rasterize"
    ),
    ".roi": "they are outlines of ImageJ; save a mask for each image instead",
    ".ndjson": "export masks or COCO from the tool that wrote them",
    ".zip .tar .gz .tgz .7z .rar": "unpack them",
    ".tfrecord .parquet .pkl .pt .lmdb .mdb": "export their images as PNG",
}
UNREAD_SUFFIXES = {
    suffix: advice for suffixes, advice in _CONVERSIONS.items() for suffix in suffixes.split()
}


# Git Large File Storage leaves a text file that begins so where a file is not downloaded yet.
GIT_LFS_START = b"version https://git-lfs"


class GitLfsPointerError(Exception):
    """A file that Git LFS has not downloaded yet."""


class TooLargeError(Exception):
    """A declared size above the limit."""


class UnreadableError(Exception):
    """An intact file of a kind that useg does not read: (reason), or (reason, what to do)."""


class PageError(Exception):
    """No page of a stack was chosen, or one that does not exist: (number of pages, page)."""


class BlockCount:
    """Counts the blocks of a file, up to a maximum that follows from its size."""

    def __init__(self, num_bytes: int) -> None:
        self._left = self._most = _MAX_BLOCKS + num_bytes // _BYTES_PER_BLOCK

    def count(self) -> None:
        """Count one more.

        Raises:
            ValueError: There are too many for the bytes of the file.
        """
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it has more than {self._most:,} blocks")


@dataclass(frozen=True)
class StoredPixels:
    """The stored values of a file: ``pixels`` ``(H, W, C)``, upright, without transparency.

    Args:
        pixels: raw values; indices for a palette file, 0-1, 0-3 or 0-15 for 1, 2 or 4 bits.
        colors: ``(N, 3)`` uint8, the palette, or None.
        highest: the value of white in files with fewer than 8 bits per pixel, otherwise 0.
        inverted: whether 0 means white.
        declared_alpha: bands in ``pixels`` that the file declares as alpha, but that hold data:
            they belong to an image, not to a mask.
        alpha: the transparency ``(H, W)`` that ``pixels`` lacks, or None.
        no_data: the value of pixels without data, as GDAL's tag in a TIFF has it, or None.
    """

    pixels: NDArray[Any]
    colors: NDArray[np.uint8] | None = None
    highest: int = 0
    inverted: bool = False
    declared_alpha: tuple[int, ...] = ()
    alpha: NDArray[Any] | None = None
    no_data: float | None = None


@dataclass(frozen=True)
class Container:
    """What a file declares, and where its pixels lie.

    Args:
        form: ``PNG``, ``JPEG``, ``GIF``, ``WEBP``, ``BMP``, ``PNM``, ``NPY``, ``JPEG2000``,
            ``AVIF``, ``HEIF`` or ``DICOM``.
        size: ``(width, height)`` as stored.
        pixel_bytes: bytes of a decoded pixel.
        parts: ``(place, length)`` of what a decoder needs, or bytes that stand for a header.
        held: arguments of :func:`check_held`: declared bytes of pixels, bytes of the file that
            encode them, and maximum bytes of pixels per byte of the file.
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
        content = b"".join(_read_part(file, part) for part in self.parts)
        if self.form == "JPEG":
            check_scans(content, math.prod(self.size))
        return content


def _read_part(file: BinaryIO, part: tuple[int, int] | bytes) -> bytes:
    if isinstance(part, bytes):
        return part
    file.seek(part[0])
    return file.read(part[1])


def pixel_limit(max_pixels: int | None) -> int:
    """Return the largest number of pixels that may be read.

    Args:
        max_pixels: the limit; None reads the environment variable USEG_MAX_PIXELS, and
            :data:`MAX_PIXELS` applies where that is not set.

    Raises:
        SettingsError: the variable is not a whole number above 0.
    """
    if max_pixels is not None:
        return max_pixels
    text = os.environ.get("USEG_MAX_PIXELS", "") or str(MAX_PIXELS)
    if not text.isascii() or not text.replace("_", "").isdigit() or int(text) < 1:
        raise SettingsError(
            f"the environment variable USEG_MAX_PIXELS is {text!r}, which is not a number of "
            "pixels; set a whole number above 0, or unset it"
        )
    return int(text)


def silence_package(package: str) -> None:
    """Suppress log messages and warnings of a package: our error message says what is wrong.

    They could also print text from a damaged file. A log handler of the user stays.
    """
    warnings.filterwarnings("ignore", module=re.escape(package))
    log = logging.getLogger(package)
    if not log.handlers:
        log.addHandler(logging.NullHandler())


def is_tiff(file: BinaryIO) -> bool:
    """Tell whether a file starts like a TIFF or BigTIFF."""
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    if not start:
        raise ValueError("the file is empty")
    return start in TIFF_STARTS


def file_bytes(file: BinaryIO) -> int:
    """Return the size of an open file."""
    return file.seek(0, os.SEEK_END)


def check_declared_size(width: int, height: int, bytes_per_pixel: int, max_pixels: int) -> None:
    """Refuse a declared size that is empty, or above the limit of a side, in pixels or in bytes."""
    if width < 1 or height < 1:
        raise ValueError(f"it declares a size of {width}x{height}")
    if max(width, height) > _MAX_SIDE:
        raise ValueError(
            f"it declares {width}x{height} pixels, but a side can have at most {_MAX_SIDE:,}"
        )
    num_pixels, max_bytes = width * height, max_pixels * MAX_BYTES_PER_PIXEL
    if num_pixels > max_pixels or num_pixels * bytes_per_pixel > max_bytes:
        unit = "bytes" if bytes_per_pixel > 1 else "byte"
        raise TooLargeError(f"{width}x{height} pixels of {bytes_per_pixel} {unit}", max_pixels)


def check_held(num_bytes: int, stored_bytes: int, most: int) -> None:
    """Refuse more declared pixels than the bytes of a file can encode.

    Args:
        num_bytes: declared bytes of pixels.
        stored_bytes: bytes of the file that encode them.
        most: maximum bytes of pixels per stored byte.
    """
    if num_bytes > (stored_bytes + 64) * most:
        raise ValueError(
            f"it declares {num_bytes:,} bytes of pixels, more than its {stored_bytes:,} bytes "
            "can hold"
        )


def check_mostly_stored(num_pixels: int, stored_bytes: int) -> None:
    """Refuse a raster larger than the limit for whole images if nearly all of its tiles are
    missing."""
    if num_pixels > max(pixel_limit(None), stored_bytes * MAX_SPARSE_PIXELS):
        raise ValueError(
            f"it declares {num_pixels:,} pixels, but holds only {stored_bytes:,} bytes"
        )


def check_page(page: int | None, num_pages: int) -> int:
    """Return the page to read, or ALL_PAGES; if none is chosen, the file must have only one."""
    if page in (None, ALL_PAGES) and num_pages == 1:
        return 0
    if page is None or not 0 <= page < num_pages:
        raise PageError(num_pages, page)
    return page


@contextmanager
def clear_errors(name: str) -> Iterator[None]:
    """Turn any failure to read a file into one sentence that names the file.

    Raises:
        DataError: the file is missing, damaged, too large, or of a kind that is not read.
    """
    try:
        yield
    except (UsageError, ImportError):
        raise
    except Exception as error:
        raise DataError(_describe_failure(name, error)) from error


def _describe_failure(name: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"'{name}' does not exist; check the path"
    if isinstance(error, IsADirectoryError | PermissionError):
        return f"'{name}' cannot be read: {error.strerror}; give a readable image file"
    if isinstance(error, GitLfsPointerError):
        return (
            f"'{name}' is a Git LFS pointer instead of the file itself; "
            "run git lfs pull where you cloned the data"
        )
    if isinstance(error, PIL.UnidentifiedImageError):
        return (
            f"'{name}' is not an image that useg can read ({READ_FORMATS}), "
            "or it is damaged; convert or remove it"
        )
    if isinstance(error, UnreadableError):
        usual = "save it as PNG, or as a plain TIFF (uncompressed, LZW or deflate)"
        reason, advice = (*error.args, usual)[:2]
        return f"'{name}' cannot be read: {reason}; {advice}"
    if isinstance(error, TooLargeError):
        size, limit = error.args
        return (
            f"'{name}' declares {size}, but at most {limit:,} pixels of "
            f"{MAX_BYTES_PER_PIXEL} bytes are read; cut it into smaller images, or raise the "
            "environment variable USEG_MAX_PIXELS"
        )
    if isinstance(error, PageError):
        return _describe_page_error(name, *error.args)
    # For damaged files, decoders raise exceptions of nearly any class: MemoryError, TypeError, ...
    reason = str(error)[:_MAX_REASON_LENGTH] or type(error).__name__
    return f"'{name}' is damaged or incomplete ({reason}); save or copy it again, or remove it"


def check_is_file(path: Path) -> None:
    """Refuse a pipe or a device, which never ends; a folder is another error."""
    kind = path.stat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise DataError(f"'{path}' is a pipe or a device, not a file; give an image file")


@contextmanager
def open_image_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read it, and turn any failure within the block into one sentence.

    Raises:
        DataError: As for :func:`clear_errors`; also if it is a pipe or a device, which never ends.
    """
    with clear_errors(str(path)):
        check_is_file(path)
        with path.open("rb") as file:
            yield file


def _describe_page_error(name: str, num_pages: int, page: int | None) -> str:
    if page is None:
        if name.lower().endswith(".npy"):
            read, write, bands = "numpy.load", "numpy.save(f'page{k:04}.npy', page)", ""
        else:
            read, write = "tifffile.imread", "tifffile.imwrite(f'page{k:04}.tif', page)"
            bands = (
                "; if its pages are the bands of one image, save them as bands: "
                "tifffile.imwrite(new, tifffile.imread(old), photometric='minisblack', "
                "planarconfig='separate')"
            )
        return (
            f"'{name}' is a stack of {num_pages} pages, not one image; useg predict labels each "
            f"page; for all else, save each page as a file of its own, in Python: for k, page in "
            f"enumerate({read}('{name}')): {write}{bands}"
        )
    held = "one page" if num_pages == 1 else f"{num_pages} pages"
    return (
        f"'{name}' has {held}, but page {page} was requested; pages count from 0 to {num_pages - 1}"
    )


def jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, place and length of the segments of a JPEG, up to its end.

    Pixels lie between them. Bytes that look like a marker may lie in a segment.
    """
    blocks, place = BlockCount(len(content)), 2
    while found := _JPEG_MARKER.search(content, place):
        blocks.count()
        place = found.start()
        marker = content[place + 1]
        if marker == _END_OF_IMAGE:
            return
        length = 2
        # Those below are reserved, and have no length.
        if marker >= 0xC0 and marker != _START_OF_IMAGE:
            length += int.from_bytes(content[place + 2 : place + 4], "big")
        yield marker, place, length
        place += length


def check_scans(content: bytes, num_pixels: int) -> None:
    """Refuse a JPEG of very many scans, each of which costs as much time as a whole image.

    Args:
        content: the JPEG.
        num_pixels: of the image, of which this may be a part.
    """
    most = max(min(MAX_SCANS, _MAX_SCANNED_PIXELS // num_pixels), _ALWAYS_READ_SCANS)
    if sum(marker == _START_OF_SCAN for marker, _, _ in jpeg_segments(content)) > most:
        raise ValueError(f"it has more than {most} scans")


def turn_upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
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
