"""What a picture file declares -> refused, in one clear sentence, before it is decoded: too large, impossible, damaged, many pages."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import PIL

from useg.errors import UsageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 300_000_000
BYTES_PER_PIXEL = 16  # of the limit: four bands of 32 bits, or sixteen of 8


class TooLargeError(Exception):
    """A declared size above the limit."""


class UnreadableError(Exception):
    """A sound file of a kind that is not read."""


class PageError(Exception):
    """A stack of pages of which none was chosen, or a page that is not there: its number of pages and the page."""


def pixel_limit(max_pixels: int | None) -> int:
    """Return ``max_pixels``, or for None what the environment variable USEG_MAX_PIXELS says now, or :data:`MAX_PIXELS`.

    Raises:
        UsageError: the variable is not a whole number above 0.
    """
    if max_pixels is not None:
        return max_pixels
    text = os.environ.get("USEG_MAX_PIXELS", "") or str(MAX_PIXELS)
    if not text.isascii() or not text.replace("_", "").isdigit() or int(text) < 1:
        raise UsageError(f"the environment variable USEG_MAX_PIXELS is {text!r}, but it counts pixels; set a whole number above 0, or unset it")
    return int(text)


def silence(package: str) -> None:
    """Keep a package from printing about a damaged file what our one sentence says; a log handler that somebody set stays."""
    log = logging.getLogger(package)
    if not log.handlers:
        log.addHandler(logging.NullHandler())


def file_bytes(file: BinaryIO) -> int:
    """Return the size of an open file."""
    return file.seek(0, os.SEEK_END)


def check_size(width: int, height: int, bytes_per_pixel: int, max_pixels: int) -> None:
    """Refuse a declared size that is empty, or above the limit in pixels or in bytes."""
    if width < 1 or height < 1:
        raise ValueError(f"it declares a size of {width}x{height}")
    if width * height > max_pixels or width * height * bytes_per_pixel > max_pixels * BYTES_PER_PIXEL:
        raise TooLargeError(f"{width}x{height} pixels of {bytes_per_pixel} byte{'s' if bytes_per_pixel > 1 else ''}", max_pixels)


def check_held(num_bytes: int, stored_bytes: int, most: int) -> None:
    """Refuse ``num_bytes`` of pixels that ``stored_bytes`` of file cannot hold, at ``most`` bytes of pixels for each."""
    if num_bytes > (stored_bytes + 64) * most:
        raise ValueError(f"it declares {num_bytes:,} bytes of pixels, more than its {stored_bytes:,} bytes can hold")


def check_page(page: int | None, num_pages: int) -> int:
    """Return the page to read; without a choice there has to be only one."""
    if page is None and num_pages == 1:
        return 0
    if page is None or not 0 <= page < num_pages:
        raise PageError(num_pages, page)
    return page


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
    except UnreadableError as error:
        raise UsageError(f"'{name}' cannot be read: {error}; save it as PNG, or as a plain TIFF (uncompressed, LZW or deflate)") from error
    except TooLargeError as error:
        size, limit = error.args
        raise UsageError(
            f"'{name}' declares {size}, but at most {limit:,} pixels of {BYTES_PER_PIXEL} bytes are read; "
            "cut it into smaller pictures, or raise the environment variable USEG_MAX_PIXELS"
        ) from error
    except PageError as error:
        raise UsageError(_page_sentence(name, *error.args)) from error
    except Exception as error:  # damaged files make the decoders raise nearly anything: MemoryError, TypeError, ZeroDivisionError, ...
        raise UsageError(f"'{name}' is damaged or incomplete ({error or type(error).__name__}); save or copy it again, or remove it") from error


def _page_sentence(name: str, num_pages: int, page: int | None) -> str:
    if page is None:
        return f"'{name}' is a stack of {num_pages} pages, not one picture; save each page as its own file, or in Python read it with page=0"
    held = "one page" if num_pages == 1 else f"{num_pages} pages"
    return f"'{name}' has {held}, but page {page} was asked for; pages count from 0 to {num_pages - 1}"
