"""A TIFF larger than memory -> any rectangle of its pixels, decoded from the tiles or strips that the rectangle touches."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from useg.data.decode import Stored
from useg.data.ifds import JPEG
from useg.data.images import Image, as_image
from useg.data.limits import UnreadableError, check_page, check_size, clear_errors, pixel_limit
from useg.data.tiff import Tiff, check_kind, checked_plane, is_tiff, open_tiff
from useg.errors import UsageError

HELD_BYTES = 96 << 20  # of decoded tiles: neighbouring rectangles share them
STRIP_BYTES = 384 << 20  # of decoded strips: each is as wide as the picture, so all rectangles of a row share them
WHITE_IS_ZERO, CMYK = 0, 5  # photometric interpretations
PLACED = (282, 283, 296, 33550, 33922, 34264, 34735, 34736, 34737)  # tags: resolution; GeoTIFF's scale, tie points, transformation and keys
NO_DATA = 42113  # GDAL's tag


class Raster:
    """An open TIFF as an image ``(H, W, C)`` that is read by rectangles: ``raster[rows, columns]``, each as ``read_image`` would give it.

    Args:
        name: of the file, for error messages.
        file: the TIFF.
        tiff: what :func:`open_tiff` says about it.
        channels: bands that the model takes; bands that the file calls alpha are left out unless these are needed too.
    """

    def __init__(self, name: str, file: BinaryIO, tiff: Tiff, channels: int) -> None:
        first, numbers = tiff.first, tiff.planes[check_page(None, tiff.num_pages)]
        check_kind(first)
        if first.photometric == CMYK or tiff.orientation != 1:
            raise UnreadableError("its colours are CMYK" if first.photometric == CMYK else "it is stored turned or mirrored")
        self._name, self._file, self._tiff, self._numbers = name, file, tiff, numbers
        self._lock = threading.Lock()
        self._copies = first.samplesperpixel if first.planarconfig == 2 else 1  # of the grid of tiles: one for each band
        width, height = tiff.size
        self._segment = (first.tilelength, first.tilewidth) if first.is_tiled else (min(first.rowsperstrip, height), width)
        self._stored_shape = (height, width, len(numbers) * first.samplesperpixel)
        if tiff.series.dataoffset is None:
            self._planes = [checked_plane(file, tiff.series, int(number)) for number in numbers]
            segment_bytes = self._segment[0] * self._segment[1] * first.samplesperpixel // self._copies * first.dtype.itemsize
            check_size(self._segment[1], self._segment[0], first.samplesperpixel // self._copies * first.dtype.itemsize, pixel_limit(None))
            self._held = max(1, (HELD_BYTES if first.is_tiled else STRIP_BYTES) // segment_bytes)
            self._decoded = functools.lru_cache(self._held)(self._decode)
        bands = set(range(self._stored_shape[2]))
        self._bands = sorted(bands - set(tiff.called_alpha) if len(bands) != channels else bands)
        self.dtype = (sample := self[0:1, 0:1]).dtype
        self.shape = (height, width, sample.shape[2])

    @property
    def tags(self) -> dict[int, tuple[int, Any]]:
        """What says where on earth the picture lies and how large its pixels are: tag -> (type, value), as stored."""
        return {tag.code: (int(tag.dtype), tag.value) for tag in self._tiff.first.tags if tag.code in PLACED}

    @property
    def no_data(self) -> float | None:
        """The value of pixels at which there is no picture, or None."""
        return self._tiff.first.nodata if NO_DATA in self._tiff.first.tags else None

    def __getitem__(self, place: tuple[slice, slice]) -> Image:
        """Return the image at these rows and columns, which lie inside."""
        first = self._tiff.first
        highest = self._tiff.highest if first.bitspersample < 8 else 0
        return as_image(Stored(self._read(place), self._tiff.colors, highest, first.photometric == WHITE_IS_ZERO))

    def band(self, rows: int) -> int:
        """Return how wide a band is of which so many rows stay decoded, so that what lies below them finds their last ones again."""
        if self._tiff.series.dataoffset is not None or not self._tiff.first.is_tiled:
            return self.shape[1]  # nothing is decoded, or each strip is as wide as the picture
        return columns_held(self._held // (len(self._numbers) * self._copies), self._segment, rows)

    def missing(self, place: tuple[slice, slice]) -> NDArray[np.bool_]:
        """Return where at these rows and columns there is no picture: all bands have the file's value for that."""
        if self.no_data is None:
            return np.zeros([some.stop - some.start for some in place], bool)
        pixels = self._read(place)
        missing: NDArray[np.bool_] = (np.isnan(pixels) if np.isnan(self.no_data) else pixels == self.no_data).all(2)
        return missing

    def _read(self, place: tuple[slice, slice]) -> NDArray[Any]:
        """Return the numbers ``(h, w, C)`` that the file stores at these rows and columns, in native byte order, without alpha."""
        with clear_errors(self._name):
            pixels = self._assembled(*place) if self._tiff.series.dataoffset is None else self._mapped(*place)
        pixels = pixels if len(self._bands) == pixels.shape[2] else pixels[..., self._bands]
        return pixels.astype(np.uint8 if pixels.dtype == bool else pixels.dtype.newbyteorder("="), copy=False)

    def _mapped(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Copy a rectangle of a file that stores its pixels as they are, plane after plane."""
        first, series = self._tiff.first, self._tiff.series
        kind = np.dtype(series.parent.byteorder + first.dtype.char)
        parts = []
        for number in self._numbers:
            plane: NDArray[Any] = np.memmap(self._name, kind, "r", series.dataoffset + int(number) * first.nbytes, first.shape)
            plane = np.moveaxis(plane, 0, -1) if first.axes.startswith("S") else plane.reshape(*plane.shape[:2], -1)
            parts.append(np.array(plane[rows, columns]))
        return np.concatenate(parts, -1)

    def _assembled(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Put a rectangle together from tiles or strips."""
        pixels = np.empty((rows.stop - rows.start, columns.stop - columns.start, self._stored_shape[2]), self._tiff.first.dtype)
        (high, wide), samples = self._segment, self._tiff.first.samplesperpixel // self._copies
        across, down = (-(-length // side) for length, side in ((self._stored_shape[1], wide), (self._stored_shape[0], high)))
        for k in range(self._stored_shape[2] // samples):
            plane, copy = divmod(k, self._copies)
            bands = pixels[..., k * samples : (k + 1) * samples]
            fill(bands, (rows, columns), self._segment, functools.partial(self._at, plane, copy * down, across))
        return pixels

    def _at(self, plane: int, above: int, across: int, i: int, j: int) -> NDArray[Any]:
        """Return one tile or strip by its row and column, of a grid with so many rows of others above it in the file."""
        segment: NDArray[Any] = self._decoded(plane, (above + i) * across + j)
        return segment

    def _decode(self, plane: int, number: int) -> NDArray[Any]:
        """Decode one tile or strip: (h, w, samples), cut off at the picture's edge."""
        page, first = self._planes[plane], self._tiff.first
        with self._lock:  # two threads may read
            self._file.seek(page.dataoffsets[number])
            content = self._file.read(page.databytecounts[number]) or None
        tables = {"jpegtables": page.jpegtables, "jpegheader": first.jpegheader} if first.compression in JPEG else {}
        pixels, _, shape = first.decode(content, number, **tables)
        if pixels is None:  # a tile that was never written
            return np.full(shape[1:], first.nodata, first.dtype)
        decoded: NDArray[Any] = pixels[0]
        return decoded


def fill(pixels: NDArray[Any], place: tuple[slice, slice], segment: tuple[int, int], decoded: Callable[[int, int], NDArray[Any]]) -> None:
    """Put the pixels of a rectangle together.

    Args:
        pixels: ``(h, w, C)``, those at the rows and columns of ``place``; they are written.
        place: where the rectangle lies.
        segment: (height, width) of what the picture is stored in.
        decoded: row and column of a segment -> its pixels, cut off at the picture's edge or not.
    """
    (rows, columns), (high, wide) = place, segment
    for i in range(rows.start // high, -(-rows.stop // high)):
        for j in range(columns.start // wide, -(-columns.stop // wide)):
            top, left = max(rows.start, i * high), max(columns.start, j * wide)
            part = decoded(i, j)[top - i * high : rows.stop - i * high, left - j * wide : columns.stop - j * wide]
            top, left = top - rows.start, left - columns.start
            pixels[top : top + part.shape[0], left : left + part.shape[1]] = part


def columns_held(count: int, segment: tuple[int, int], rows: int) -> int:
    """Return how many columns of so many rows, wherever they start, touch at most ``count`` segments (height, width)."""
    high, wide = segment
    return (count // (-(-rows // high) + 1) - 1) * wide


@contextmanager
def open_raster(path: Path, channels: int) -> Iterator[Raster]:
    """Open a TIFF of any size for a model that takes ``channels`` bands.

    Raises:
        UsageError: no such file, no TIFF, damaged, or of a kind that is not read.
    """
    with ExitStack() as stack:
        with clear_errors(str(path)):
            file = stack.enter_context(path.open("rb"))
            if not is_tiff(file):
                raise UsageError(f"'{path}' is not a TIFF, and no other picture is read in parts; save it as a TIFF in tiles")
            raster = Raster(str(path), file, stack.enter_context(open_tiff(file)), channels)
        yield raster


def declared_pixels(path: Path) -> int:
    """Return width times height of a TIFF, from its header alone; 0 for any other file, which this does not judge."""
    try:
        with path.open("rb") as file:
            if not is_tiff(file):
                return 0
            with open_tiff(file) as tiff:
                return tiff.size[0] * tiff.size[1]
    except Exception:  # damaged: whoever reads it says so
        return 0
