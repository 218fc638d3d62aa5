"""A label map, tile by tile in any order -> a tiled, compressed BigTIFF with its colours, overviews, and its place on earth.

The directories are written last, behind the tiles, so only the tiles' places are kept in memory. Each overview halves the one before, and
every pixel of it is the most frequent class of four: a nearest pixel would drop thin things, a mean of ids is no class.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label, palette

SIDE = 512  # of a tile
LEVEL = 6  # of compression
_NO_DATA = 42113
_FORMS = {1: "B", 2: "s", 3: "H", 4: "I", 5: "II", 12: "d", 16: "Q"}  # of the values of a tag, by its type


class Pyramid:
    """A label map that is being written.

    Args:
        file: open for writing and reading, empty.
        size: (width, height).
        table: whose colours it gets.
        tags: further tags of the full-size picture: tag -> (type, value), as a raster's.
        no_data: say in the file that the id 255 stands where there is no picture.
    """

    def __init__(self, file: BinaryIO, size: tuple[int, int], table: ClassTable, tags: Mapping[int, tuple[int, Any]], *, no_data: bool) -> None:
        self._file, self._table = file, table
        self._tags = {**tags, **({_NO_DATA: (2, str(IGNORE))} if no_data else {})}
        self._sizes = level_sizes(size)
        self._places = [np.zeros((-(-height // SIDE), -(-width // SIDE), 2), np.uint64) for width, height in self._sizes]  # offset, bytes
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))

    def write(self, row: int, column: int, label: Label, level: int = 0) -> None:
        """Write the tile in this row and column of tiles; at the lower and right edge it may be smaller than ``SIDE``."""
        import imagecodecs

        whole = np.pad(label, [(0, SIDE - length) for length in label.shape], "edge")
        content = imagecodecs.deflate_encode(whole.tobytes(), LEVEL)
        self._places[level][row, column] = self._file.seek(0, 2), len(content)
        self._file.write(content)

    def finish(self) -> None:
        """Make the overviews from the tiles, all of which are there now, and write the directories."""
        for level in range(1, len(self._sizes)):
            rows, columns = self._places[level].shape[:2]
            for row, column in np.ndindex(rows, columns):
                four = [[self._read(level - 1, 2 * row + i, 2 * column + j) for j in (0, 1)] for i in (0, 1)]
                self.write(row, column, halved(np.block(four)), level)
        linked = 8  # where the place of the first directory belongs
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
        tile = np.frombuffer(imagecodecs.deflate_decode(self._file.read(int(length)), out=SIDE * SIDE), np.uint8).reshape(SIDE, SIDE)
        tile = np.broadcast_to(tile[-1:], tile.shape) if row >= rows else tile  # beyond the edge its pixels go on
        return np.broadcast_to(tile[:, -1:], tile.shape) if column >= columns else tile

    def _entries(self, level: int) -> dict[int, tuple[int, Any]]:
        """Return the tags of one level: tag -> (type, value). The numbers are those of TIFF 6.0."""
        width, height = self._sizes[level]
        places = self._places[level].reshape(-1, 2)
        colors = palette(self._table).T.astype(np.uint16) * 257
        return {
            254: (4, int(level > 0)),  # an overview, or not
            256: (4, width),
            257: (4, height),
            258: (3, 8),  # bits
            259: (3, 8),  # deflate
            262: (3, 3),  # indices of a palette
            277: (3, 1),
            320: (3, colors.ravel().tolist()),
            322: (3, SIDE),
            323: (3, SIDE),
            324: (16, places[:, 0].tolist()),
            325: (16, places[:, 1].tolist()),
            **(self._tags if level == 0 else {}),
        }

    def _write_directory(self, start: int, entries: Mapping[int, tuple[int, Any]]) -> int:
        """Write a directory and, behind it, the values that do not fit into it; return where the place of the next one belongs."""
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
    """Return the sizes of a picture's resolutions, each half of the one before, down to one that a tile holds."""
    sizes = [size]
    while max(sizes[-1]) > SIDE:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def halved(label: Label) -> NDArray[np.uint8]:
    """Reduce a label map of even height and width to half: of each four pixels the most frequent class, of equals the first."""
    a, b, c, d = label[::2, ::2], label[::2, 1::2], label[1::2, ::2], label[1::2, 1::2]
    return np.where((a == b) | (a == c) | (a == d), a, np.where((b == c) | (b == d), b, np.where(c == d, c, a)))


def _packed(kind: int, value: Any) -> tuple[int, bytes]:
    """Return how many values a tag has, and their bytes."""
    if kind == 2:
        content = value.encode() + b"\0"
        return len(content), content
    values: Sequence[Any] = value if isinstance(value, tuple | list) else (value,)
    form = _FORMS[kind]
    content = struct.pack(f"<{form * (len(values) // len(form))}", *values)
    return len(content) // struct.calcsize(f"<{form}"), content
