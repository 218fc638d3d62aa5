"""TIFFs larger than memory: read any rectangle, write a tiled label map with overviews.

Only the tiles or strips that a rectangle touches are decoded. Label maps are BigTIFFs with a
palette, overviews and georeference. Their tiles can be written in any order, and their directories
come last, so only the offsets of the tiles stay in memory. tifffile's writer needs the tiles in
order, and could not read them back for the overviews.
"""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label, palette
from useg.errors import DataError
from useg.images.formats import (
    StoredPixels,
    UnreadableError,
    check_declared_size,
    check_is_file,
    check_mostly_stored,
    check_page,
    clear_errors,
    file_bytes,
    is_tiff,
    open_image_file,
    pixel_limit,
)
from useg.images.image_files import Image, as_image, find_missing
from useg.images.tiff import (
    JPEG,
    NO_DATA_TAG,
    Tiff,
    check_kind,
    checked_plane,
    is_mapped,
    open_tiff,
)
from useg.parsing import open_file

# Maximum bytes of decoded tiles in the cache: neighbouring rectangles share tiles.
TILE_CACHE_BYTES = 96 << 20
# Maximum bytes of decoded strips in the cache: a strip is as wide as the image, so all rectangles
# of a row share it.
STRIP_CACHE_BYTES = 384 << 20
# Photometric interpretations.
WHITE_IS_ZERO, CMYK = 0, 5
# Tags of resolution, and of GeoTIFF: scale, tie points, transformation and keys.
PLACE_TAGS = (282, 283, 296, 33550, 33922, 34264, 34735, 34736, 34737)
TILE_SIDE = 512
COMPRESSION_LEVEL = 6
# Struct formats of the values of a tag, by its type.
_FORMATS = {1: "B", 2: "s", 3: "H", 4: "I", 5: "II", 12: "d", 16: "Q"}


class Raster:
    """An open TIFF as an image ``(H, W, C)`` that is read by rectangles: ``raster[rows, columns]``.

    Rectangles have the values that :func:`useg.images.image_files.read_image` gives.

    Args:
        name: of the file, for error messages.
        file: the TIFF.
        tiff: what :func:`useg.images.tiff.open_tiff` returned for it.
        channels: bands that the model takes; bands that the file calls alpha are left out unless
            these are needed too.
    """

    def __init__(self, name: str, file: BinaryIO, tiff: Tiff, channels: int) -> None:
        first, numbers = tiff.first, tiff.planes[check_page(None, tiff.num_pages)]
        check_kind(first)
        if first.photometric == CMYK or tiff.orientation != 1:
            is_cmyk = first.photometric == CMYK
            raise UnreadableError("its colours are CMYK" if is_cmyk else "it is stored rotated")
        self._name, self._file, self._tiff, self._numbers = name, file, tiff, numbers
        self._lock = threading.Lock()
        # Grids of tiles: one per band if bands are stored separately.
        self._grids = first.samplesperpixel if first.planarconfig == 2 else 1
        width, height = tiff.size
        check_mostly_stored(width * height, file_bytes(file))
        self._segment = (
            (first.tilelength, first.tilewidth)
            if first.is_tiled
            else (min(first.rowsperstrip, height), width)
        )
        self._stored_shape = (height, width, len(numbers) * first.samplesperpixel)
        self._planes = [checked_plane(file, tiff, int(number)) for number in numbers]
        self._is_mapped = all(is_mapped(plane) for plane in self._planes)
        if not self._is_mapped:
            high, wide = self._segment
            if any(plane.chunks != first.chunks for plane in self._planes):
                raise UnreadableError("its bands are cut into tiles or strips of several sizes")
            pixel_bytes = first.samplesperpixel // self._grids * first.dtype.itemsize
            check_declared_size(wide, high, pixel_bytes, pixel_limit(None))
            cache_bytes = TILE_CACHE_BYTES if first.is_tiled else STRIP_CACHE_BYTES
            self._held = max(1, cache_bytes // (high * wide * pixel_bytes))
            self._decoded = functools.lru_cache(self._held)(self._decode)
        bands = set(range(self._stored_shape[2]))
        self._bands = sorted(bands - set(tiff.declared_alpha) if len(bands) != channels else bands)
        self.dtype = (sample := self[0:1, 0:1]).dtype
        self.shape = (height, width, sample.shape[2])

    @property
    def tags(self) -> dict[int, tuple[int, Any]]:
        """Tags of place and resolution: tag -> (type, value), as stored."""
        return {
            tag.code: (int(tag.dtype), tag.value)
            for tag in self._tiff.first.tags
            if tag.code in PLACE_TAGS
        }

    @property
    def may_lack_data(self) -> bool:
        """Whether :meth:`missing` may find pixels without data."""
        has_alpha = len(self._bands) < self._stored_shape[2]
        return self._tiff.no_data is not None or has_alpha or self.dtype.kind == "f"

    def __getitem__(self, place: tuple[slice, slice]) -> Image:
        """Return the image at these rows and columns, which lie inside."""
        first = self._tiff.first
        highest = self._tiff.highest if first.bitspersample < 8 else 0
        return as_image(
            StoredPixels(
                self._read(place), self._tiff.colors, highest, first.photometric == WHITE_IS_ZERO
            )
        )

    def band(self, rows: int) -> int:
        """Return how wide a band of the image may be, so that ``rows`` of its rows stay decoded."""
        if self._is_mapped or not self._tiff.first.is_tiled:
            # Either nothing is decoded, or each strip is as wide as the image.
            return self.shape[1]
        return columns_held(self._held // (len(self._numbers) * self._grids), self._segment, rows)

    def missing(self, place: tuple[slice, slice]) -> NDArray[np.bool_]:
        """Return which pixels have no data; see :func:`useg.images.image_files.find_missing`."""
        missing = None
        if self.may_lack_data:
            pixels = self._read_all(place)
            alpha = [band for band in self._tiff.declared_alpha if band not in self._bands]
            missing = find_missing(
                StoredPixels(
                    pixels[..., self._bands],
                    alpha=pixels[..., alpha[0]] if alpha else None,
                    no_data=self._tiff.no_data,
                )
            )
        shape = [some.stop - some.start for some in place]
        return np.zeros(shape, bool) if missing is None else missing

    def _read(self, place: tuple[slice, slice]) -> NDArray[Any]:
        """Return the stored values ``(h, w, C)``, in native byte order, without alpha."""
        pixels = self._read_all(place)
        return pixels if len(self._bands) == pixels.shape[2] else pixels[..., self._bands]

    def _read_all(self, place: tuple[slice, slice]) -> NDArray[Any]:
        with clear_errors(self._name):
            pixels = self._mapped(*place) if self._is_mapped else self._assembled(*place)
        return pixels.astype(
            np.uint8 if pixels.dtype == bool else pixels.dtype.newbyteorder("="), copy=False
        )

    def _mapped(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Copy a rectangle of a file that stores its pixels as they are, plane after plane."""
        first = self._tiff.first
        kind = np.dtype(first.parent.byteorder + first.dtype.char)
        parts = []
        for page in self._planes:
            plane: NDArray[Any] = np.memmap(self._name, kind, "r", page.dataoffsets[0], first.shape)
            plane = (
                np.moveaxis(plane, 0, -1)
                if first.axes.startswith("S")
                else plane.reshape(*plane.shape[:2], -1)
            )
            parts.append(np.array(plane[rows, columns]))
        return np.concatenate(parts, -1)

    def _assembled(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Assemble a rectangle from tiles or strips."""
        pixels = np.empty(
            (rows.stop - rows.start, columns.stop - columns.start, self._stored_shape[2]),
            self._tiff.first.dtype,
        )
        (high, wide), samples = self._segment, self._tiff.first.samplesperpixel // self._grids
        across, down = (
            -(-length // side)
            for length, side in ((self._stored_shape[1], wide), (self._stored_shape[0], high))
        )
        for k in range(self._stored_shape[2] // samples):
            plane, copy = divmod(k, self._grids)
            bands = pixels[..., k * samples : (k + 1) * samples]
            fill(
                bands,
                (rows, columns),
                self._segment,
                functools.partial(self._at, plane, copy * down, across),
            )
        return pixels

    def _at(self, plane: int, above: int, across: int, i: int, j: int) -> NDArray[Any]:
        """Return a tile or strip by row and column; ``above`` rows of other grids precede it."""
        segment: NDArray[Any] = self._decoded(plane, (above + i) * across + j)
        return segment

    def _decode(self, plane: int, number: int) -> NDArray[Any]:
        """Decode one tile or strip: (h, w, samples), cut off at the image's edge."""
        page, first = self._planes[plane], self._tiff.first
        # Several threads may read.
        with self._lock:
            self._file.seek(page.dataoffsets[number])
            content = self._file.read(page.databytecounts[number]) or None
        tables = (
            {"jpegtables": page.jpegtables, "jpegheader": first.jpegheader}
            if first.compression in JPEG
            else {}
        )
        pixels, _, shape = page.decode(content, number, **tables)
        # A tile that was never written.
        if pixels is None:
            return np.full(shape[1:], first.nodata, first.dtype)
        decoded: NDArray[Any] = pixels[0]
        return decoded


def fill(
    pixels: NDArray[Any],
    place: tuple[slice, slice],
    segment: tuple[int, int],
    decoded: Callable[[int, int], NDArray[Any]],
) -> None:
    """Assemble a rectangle from segments (tiles, strips or chunks).

    Args:
        pixels: ``(h, w, C)``, those at the rows and columns of ``place``; they are written.
        place: where the rectangle lies.
        segment: (height, width) of a segment.
        decoded: row and column of a segment -> its pixels, cut off at the image's edge or not.
    """
    (rows, columns), (high, wide) = place, segment
    for i in range(rows.start // high, -(-rows.stop // high)):
        for j in range(columns.start // wide, -(-columns.stop // wide)):
            top, left = max(rows.start, i * high), max(columns.start, j * wide)
            part = decoded(i, j)[
                top - i * high : rows.stop - i * high, left - j * wide : columns.stop - j * wide
            ]
            top, left = top - rows.start, left - columns.start
            pixels[top : top + part.shape[0], left : left + part.shape[1]] = part


def columns_held(count: int, segment: tuple[int, int], rows: int) -> int:
    """Return how many columns of ``rows`` rows touch at most ``count`` segments, anywhere."""
    high, wide = segment
    return (count // (-(-rows // high) + 1) - 1) * wide


@contextmanager
def open_raster(path: Path, channels: int) -> Iterator[Raster]:
    """Open a TIFF of any size for a model that takes ``channels`` bands.

    Raises:
        DataError: the file is missing, not a TIFF, damaged, or of a kind that is not read.
    """
    with ExitStack() as stack:
        with clear_errors(str(path)):
            check_is_file(path)
            file = stack.enter_context(open_file(path))
            if not is_tiff(file):
                raise DataError(
                    f"'{path}' is not a TIFF, and only TIFFs are read in parts; "
                    "save it as a tiled TIFF"
                )
            raster = Raster(str(path), file, stack.enter_context(open_tiff(file)), channels)
        yield raster


def tiff_declared_pixels(path: Path) -> int:
    """Return width times height of a TIFF, from its header alone; 0 for other files."""
    try:
        with open_image_file(path) as file:
            if not is_tiff(file):
                return 0
            with open_tiff(file) as tiff:
                return tiff.size[0] * tiff.size[1]
    # It is damaged, which reading it will report.
    except Exception:
        return 0


class Pyramid:
    """Writes a label map as a tiled BigTIFF with overviews.

    Args:
        file: open for writing and reading, empty.
        size: (width, height).
        table: its colours become the palette.
        tags: further tags of the full-size image: tag -> (type, value), as in :class:`Raster`.
        no_data: declare in the file that the id 255 means no data.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: tuple[int, int],
        table: ClassTable,
        tags: Mapping[int, tuple[int, Any]],
        *,
        no_data: bool,
    ) -> None:
        self._file, self._table = file, table
        self._tags = {**tags, **({NO_DATA_TAG: (2, str(IGNORE))} if no_data else {})}
        self._sizes = level_sizes(size)
        # The offset and number of bytes of each tile.
        self._places = [
            np.zeros((-(-height // TILE_SIDE), -(-width // TILE_SIDE), 2), np.uint64)
            for width, height in self._sizes
        ]
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))

    def write(self, row: int, column: int, label: Label, level: int = 0) -> None:
        """Write a tile; at the lower and right edge it may be smaller than ``TILE_SIDE``."""
        import imagecodecs

        whole = np.pad(label, [(0, TILE_SIDE - length) for length in label.shape], "edge")
        content = imagecodecs.deflate_encode(whole.tobytes(), COMPRESSION_LEVEL)
        self._places[level][row, column] = self._file.seek(0, 2), len(content)
        self._file.write(content)

    def finish(self) -> None:
        """Make the overviews from the tiles, which are all written, and write the directories."""
        for level in range(1, len(self._sizes)):
            rows, columns = self._places[level].shape[:2]
            for row, column in np.ndindex(rows, columns):
                four = [
                    [self._read(level - 1, 2 * row + i, 2 * column + j) for j in (0, 1)]
                    for i in (0, 1)
                ]
                self.write(row, column, halved(np.block(four)), level)
        # The place of the first directory is written at byte 8.
        linked = 8
        for level in range(len(self._sizes)):
            start = self._file.seek(0, 2)
            self._file.seek(linked)
            self._file.write(struct.pack("<Q", start))
            linked = self._write_directory(start, self._entries(level))

    def _read(self, level: int, row: int, column: int) -> Label:
        import imagecodecs

        rows, columns = self._places[level].shape[:2]
        offset, length = self._places[level][min(row, rows - 1), min(column, columns - 1)]
        self._file.seek(int(offset))
        tile = np.frombuffer(
            imagecodecs.deflate_decode(self._file.read(int(length)), out=TILE_SIDE * TILE_SIDE),
            np.uint8,
        ).reshape(TILE_SIDE, TILE_SIDE)
        # Beyond the edge the last pixels are repeated.
        tile = np.broadcast_to(tile[-1:], tile.shape) if row >= rows else tile
        return np.broadcast_to(tile[:, -1:], tile.shape) if column >= columns else tile

    def _entries(self, level: int) -> dict[int, tuple[int, Any]]:
        """Return the tags of one level: tag -> (type, value), numbered as in TIFF 6.0."""
        width, height = self._sizes[level]
        places = self._places[level].reshape(-1, 2)
        colors = palette(self._table).T.astype(np.uint16) * 257
        return {
            # Whether this is an overview.
            254: (4, int(level > 0)),
            256: (4, width),
            257: (4, height),
            # 8 bits, deflate, palette indices.
            258: (3, 8),
            259: (3, 8),
            262: (3, 3),
            277: (3, 1),
            320: (3, colors.ravel().tolist()),
            322: (3, TILE_SIDE),
            323: (3, TILE_SIDE),
            324: (16, places[:, 0].tolist()),
            325: (16, places[:, 1].tolist()),
            **(self._tags if level == 0 else {}),
        }

    def _write_directory(self, start: int, entries: Mapping[int, tuple[int, Any]]) -> int:
        """Write a directory and, behind it, the values that do not fit into it.

        Returns where to write the place of the next directory.
        """
        behind = start + 8 + 20 * len(entries) + 8
        directory, values = struct.pack("<Q", len(entries)), b""
        for code, (kind, value) in sorted(entries.items()):
            count, content = _packed(kind, value)
            if len(content) > 8:
                place = struct.pack("<Q", behind + len(values))
                values += content + bytes(-len(content) % 8)
            else:
                place = content.ljust(8, b"\0")
            directory += struct.pack("<HHQ", code, kind, count) + place
        self._file.seek(start)
        self._file.write(directory + bytes(8) + values)
        return behind - 8


def level_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the sizes of all levels, each half of the one before, until one tile holds it."""
    sizes = [size]
    while max(sizes[-1]) > TILE_SIDE:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def halved(label: Label) -> NDArray[np.uint8]:
    """Halve a label map: of each four pixels the most frequent class, the first of equals."""
    a, b, c, d = label[::2, ::2], label[::2, 1::2], label[1::2, ::2], label[1::2, 1::2]
    return np.where(
        (a == b) | (a == c) | (a == d), a, np.where((b == c) | (b == d), b, np.where(c == d, c, a))
    )


def _packed(kind: int, value: Any) -> tuple[int, bytes]:
    """Return the number of values of a tag, and their bytes."""
    if kind == 2:
        content = value.encode() + b"\0"
        return len(content), content
    values: Sequence[Any] = value if isinstance(value, tuple | list) else (value,)
    form = _FORMATS[kind]
    content = struct.pack(f"<{form * (len(values) // len(form))}", *values)
    return len(content) // struct.calcsize(f"<{form}"), content
