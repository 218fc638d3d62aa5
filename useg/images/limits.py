"""Check what an image file declares before anything is decoded: size, pages, TIFF directories.

Files that are too large, impossible or damaged are refused with one clear sentence. For some
damaged TIFFs, tifffile itself would loop, fill the memory, or return half an image.
"""

from __future__ import annotations

import logging
import math
import os
import re
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import PIL

from useg.errors import DataError, SettingsError, UsageError

READ_FORMATS = "PNG, JPEG, WebP, BMP, GIF, PPM, PGM, JPEG 2000, AVIF, HEIC, DICOM, .npy or TIFF"
# Instead of a page number: all pages, which are the bands of one image.
ALL_PAGES = -1_000_000
MAX_PIXELS = 300_000_000
# Four bands of 32 bits, or sixteen of 8 bits.
MAX_BYTES_PER_PIXEL = 16
# Maximum pixels per byte of file for a raster that is read in parts: its tiles may be missing.
MAX_SPARSE_PIXELS = 20_000
# Maximum number of blocks (chunks, segments, extensions). Programs write pixels in blocks of 4 kB
# or more.
_MAX_BLOCKS, _BYTES_PER_BLOCK = 10_000, 1024
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class TooLargeError(Exception):
    """A declared size above the limit."""


class UnreadableError(Exception):
    """An intact file of a kind that useg does not read."""


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
            f"the environment variable USEG_MAX_PIXELS is {text!r}, but it is a number of pixels; "
            "set a whole number above 0, or unset it"
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
    """Refuse a declared size that is empty or above the limit in pixels or bytes."""
    if width < 1 or height < 1:
        raise ValueError(f"it declares a size of {width}x{height}")
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
    except FileNotFoundError as error:
        raise DataError(f"'{name}' does not exist; check the path") from error
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(
            f"'{name}' cannot be read: {error.strerror}; give a readable image file"
        ) from error
    except PIL.UnidentifiedImageError as error:
        raise DataError(
            f"'{name}' is not an image that useg can read ({READ_FORMATS}), "
            "or it is damaged; convert or remove it"
        ) from error
    except UnreadableError as error:
        raise DataError(
            f"'{name}' cannot be read: {error}; save it as PNG, or as a plain TIFF "
            "(uncompressed, LZW or deflate)"
        ) from error
    except TooLargeError as error:
        size, limit = error.args
        raise DataError(
            f"'{name}' declares {size}, but at most {limit:,} pixels of "
            f"{MAX_BYTES_PER_PIXEL} bytes are read; cut it into smaller images, or raise the "
            "environment variable USEG_MAX_PIXELS"
        ) from error
    except PageError as error:
        raise DataError(_describe_page_error(name, *error.args)) from error
    # For damaged files, decoders raise exceptions of nearly any class: MemoryError, TypeError, ...
    except Exception as error:
        raise DataError(
            f"'{name}' is damaged or incomplete ({error or type(error).__name__}); "
            "save or copy it again, or remove it"
        ) from error


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
        return (
            f"'{name}' is a stack of {num_pages} pages, not one image; "
            "save each page as its own file, or in Python read it with page=0; if its pages are "
            "the bands of one image, save them as bands: tifffile.imwrite(new, "
            "tifffile.imread(old), photometric='minisblack', planarconfig='separate')"
        )
    held = "one page" if num_pages == 1 else f"{num_pages} pages"
    return (
        f"'{name}' has {held}, but page {page} was requested; pages count from 0 to {num_pages - 1}"
    )


JPEG = (7, 33007)
# A tile may be larger than its image; the rest of it is padding.
MAX_SEGMENT_BYTES = 64 << 20
# Each strip or tile takes microseconds, however small it is. Programs write tiles of 64 kB.
_MAX_SEGMENTS, _BYTES_PER_SEGMENT = 100_000, 4096
# Bytes that a file may have beyond its pixels, such as tables of a codec.
EXTRA_BYTES = 1 << 20
# libjpeg-turbo's own fuzzers stop at 500 scans, and progressive JPEGs have about 10.
MAX_SCANS = 64
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
# Maximum bytes of pixels per byte of file, by compression. One bit of CCITT can encode a whole row,
# of up to 16,384 pixels on average; a ZSTD block repeats one byte over 128 kB.
_MAX_EXPANSION = {
    1: 1,
    2: 1 << 14,
    3: 1 << 14,
    4: 1 << 14,
    5: 4096,
    7: 4096,
    8: 1100,
    32773: 64,
    32946: 1100,
    33007: 4096,
    34925: 8192,
    50000: 1 << 16,
}


def check_segments(file: BinaryIO, plane: Any) -> None:
    """Refuse a plane whose strips or tiles are missing, cut off, or cannot hold its pixels.

    Args:
        file: the open TIFF.
        plane: tifffile's page.
    """
    import tifffile

    if plane.compression not in _MAX_EXPANSION:
        known = plane.compression in set(tifffile.COMPRESSION)
        name = tifffile.COMPRESSION(plane.compression).name if known else str(plane.compression)
        raise UnreadableError(f"it is compressed by {name}")
    segment = math.prod(plane.chunks) * plane.dtype.itemsize
    if segment > max(plane.nbytes, MAX_SEGMENT_BYTES):
        raise ValueError(
            f"a strip or tile of it has {segment:,} bytes of pixels, the whole image only "
            f"{plane.nbytes:,}"
        )
    number, offsets, counts = math.prod(plane.chunked), plane.dataoffsets, plane.databytecounts
    # tifffile would fill the rest with zeros and only log it.
    if min(len(offsets), len(counts)) < number:
        raise ValueError(f"it has {min(len(offsets), len(counts))} of {number} strips or tiles")
    if number > _MAX_SEGMENTS + plane.nbytes // _BYTES_PER_SEGMENT:
        raise ValueError(f"it has {number:,} strips or tiles, more than images have")
    held = [
        (offset, count)
        for offset, count in zip(offsets[:number], counts, strict=False)
        if offset and count
    ]
    size, total = file_bytes(file), sum(count for _, count in held)
    if not held or any(offset + count > size for offset, count in held):
        raise ValueError("its pixels lie beyond the end of the file")
    if total > 4 * size + plane.nbytes:
        raise ValueError("its strips or tiles overlap")
    if max(count for _, count in held) > 4 * segment + EXTRA_BYTES:
        raise ValueError("a strip or tile of it is longer than its pixels")
    # The last strip may be smaller.
    pixels = len(held) * segment if plane.is_tiled else min(plane.nbytes, len(held) * segment)
    bits = plane.bitspersample
    mean = sum(bits) / len(bits) if isinstance(bits, tuple) else bits
    stored_bytes = int(pixels // plane.dtype.itemsize * mean) // 8
    check_held(stored_bytes, total, _MAX_EXPANSION[plane.compression])
    if plane.compression in JPEG:
        width, height = (
            (plane.tilewidth, plane.tilelength)
            if plane.is_tiled
            else (plane.imagewidth, plane.rowsperstrip)
        )
        for offset, count in held:
            file.seek(offset)
            _check_jpeg(file.read(count), width, height)


def check_scans(content: bytes) -> None:
    """Refuse a JPEG of very many scans, each of which costs as much time as a whole image."""
    start = max(content.find(_START_OF_SCAN), 0)
    end = content.find(_END_OF_IMAGE, start)
    if content.count(_START_OF_SCAN, start, end if end > 0 else len(content)) > MAX_SCANS:
        raise ValueError(f"it has more than {MAX_SCANS} scans")


def _check_jpeg(content: bytes, width: int, height: int) -> None:
    """Refuse a JPEG segment with more pixels than its strip or tile, or that is cut off.

    The decoder would allocate the former, and would not notice that the latter is cut off.
    """
    if not content.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError("a strip or tile of it is cut off")
    check_scans(content)
    place = 2
    while place + 9 < len(content) and content[place] == 0xFF:
        marker, (length,) = content[place + 1], struct.unpack_from(">H", content, place + 2)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            declared = struct.unpack_from(">HH", content, place + 5)
            if declared[0] > height or declared[1] > width:
                raise ValueError(
                    f"a strip or tile of {width}x{height} pixels declares "
                    f"{declared[1]}x{declared[0]}"
                )
            return
        place += 1 if marker == 0xFF else 2 + length
    raise ValueError("a strip or tile of it declares no size")
