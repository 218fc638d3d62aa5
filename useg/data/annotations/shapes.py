"""The shapes that annotations are made of: outlines, lines, ellipses and run lengths.

Coordinates are in pixels: pixel (row r, column c) covers the square from (c, r) to (c + 1, r + 1).
Annotation files come from anywhere, so coordinates are checked here, and a curve stays a curve
until it is drawn (:mod:`useg.data.annotations.rasterize`).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.errors import DataError

BACKGROUND = "background"

# Pixels of a shape with this name are ignored; LabelMe's word.
IGNORE_NAME = "__ignore__"

# No image is that large, and products of such numbers are exact enough.
_MAX_COORDINATE = 1e7

# Corners of the discs and strips of a line that are drawn together.
_MAX_CORNERS_TOGETHER = 65_536

Points = Sequence[tuple[float, float]]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class RunLengths:
    """A run-length encoded mask (RLE), as :func:`encode_rle` returns it.

    Args:
        lengths: uint32 numbers as bytes: lengths of uncovered and covered runs in turn, starting
            with an uncovered one. They add up to ``width * height``.
        width: Width of the mask.
        height: Height of the mask.
        left: Column of the image at which the mask starts.
        top: Row of the image at which the mask starts.
        by_columns: Whether the runs follow the columns (as in COCO) and not the rows.
    """

    lengths: bytes
    width: int
    height: int
    left: int = 0
    top: int = 0
    by_columns: bool = False


@dataclass(frozen=True)
class Line:
    """A line with round joints and ends: all within ``width / 2`` of it. One point makes a disc.

    Args:
        points: float64 x, y, x, y, ... as bytes (see :func:`pack_points`).
        width: Its width in pixels.
    """

    points: bytes
    width: float


@dataclass(frozen=True)
class Ellipse:
    """An ellipse around (x, y) with these half-axes, rotated clockwise (y points down)."""

    x: float
    y: float
    across: float
    down: float
    degrees: float = 0.0


# Packed outlines, lines and ellipses, whose union is a shape.
Outlines = Sequence[bytes | Line | Ellipse]


@dataclass(frozen=True)
class StoredMask:
    """A picture of the image's size that covers some of its pixels.

    Args:
        path: Its file.
        codes: Colours (``0xRRGGBB``) that mean the shape; empty: everything that is not 0.
    """

    path: Path
    codes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shape:
    """One annotated object.

    Args:
        name: The name of its class.
        outlines: Closed outlines, float64 x, y, x, y, ... as bytes (see :func:`pack_outline`),
            lines and ellipses; the shape is their union.
        runs: A mask instead of outlines.
        mask: A mask in a file instead of outlines.
    """

    name: str
    outlines: tuple[bytes | Line | Ellipse, ...] = ()
    runs: RunLengths | None = None
    mask: StoredMask | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the shape covers nothing."""
        return not (self.outlines or self.runs or self.mask)


@dataclass(frozen=True)
class Drawing:
    """The shapes on one image.

    Args:
        shapes: From the lowest to the topmost: later shapes are painted over earlier ones.
        size: The image's (width, height) as the annotation file has it. None: coordinates are
            fractions of the image's own size.
    """

    shapes: tuple[Shape, ...]
    size: tuple[int, int] | None = None

    def __hash__(self) -> int:
        # An image may have thousands of shapes.
        return hash((self.size, len(self.shapes)))


def pack_outline(points: Iterable[Sequence[Any]], source: str) -> bytes:
    """Pack an outline's corners (x, y) for :class:`Shape`; they may lie outside the image.

    Raises:
        DataError: There are fewer than three corners, or a coordinate is not a finite number.
    """
    packed = pack_points(points, source)
    if (count := len(packed) // 16) < 3:
        raise DataError(
            f"{source} has an outline of {count} points, but it needs at least three; "
            "draw it again, or remove it"
        )
    return packed


def pack_points(points: Iterable[Sequence[Any]], source: str) -> bytes:
    """Pack points (x, y) for :class:`Line`; they may lie outside the image.

    Raises:
        DataError: There is no point, or a coordinate is not a finite number.
    """
    return pack_coordinates((number for x, y in points for number in (x, y)), source)


def pack_coordinates(coordinates: Iterable[Any], source: str) -> bytes:
    """Do what :func:`pack_points` does with the coordinates x, y, x, y, ..., an even number.

    Raises:
        DataError: As :func:`pack_points`.
    """
    try:
        packed = array("d", map(float, coordinates))
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{source} has a shape whose points are not pairs of numbers ({error}); "
            "draw it again, or remove it"
        ) from error
    if not packed:
        raise DataError(f"{source} has a shape without points; draw it again, or remove it")
    # Large files have millions of short outlines, for which calls of NumPy take longest.
    if math.hypot(*packed) <= _MAX_COORDINATE:
        return packed.tobytes()
    corners = np.frombuffer(packed)
    if not np.isfinite(corners).all():
        raise DataError(
            f"{source} has a shape with a coordinate that is NaN or infinite; "
            "draw it again, or remove it"
        )
    return np.clip(corners, -_MAX_COORDINATE, _MAX_COORDINATE).tobytes()


def pack_rings(rings: Sequence[Iterable[Sequence[Any]]], source: str) -> bytes:
    """Pack an outer ring and its holes as one outline: to every hole, around it and back.

    Raises:
        DataError: As :func:`pack_outline`.
    """
    packed = [np.frombuffer(pack_outline(ring, source)).reshape(-1, 2) for ring in rings]
    closed = [np.concatenate([ring, ring[:1]]) for ring in packed]
    start = closed[0][:1]
    return np.concatenate([part for ring in closed for part in (ring, start)]).tobytes()


def pack_ellipse(numbers: Iterable[Any], source: str, degrees: Any = 0.0) -> Ellipse:
    """Make an ellipse of (x, y, across, down).

    Raises:
        DataError: A number is missing, not finite, or too large.
    """
    try:
        x, y, across, down, turn = (float(number) for number in (*numbers, degrees))
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{source} has an ellipse that is not described by numbers ({error}); "
            "draw it again, or remove it"
        ) from error
    if not max(map(abs, (x, y, across, down, turn))) <= _MAX_COORDINATE:
        raise DataError(
            f"{source} has an ellipse with a number that is NaN, infinite or above "
            f"{_MAX_COORDINATE:,.0f}; draw it again, or remove it"
        )
    return Ellipse(x, y, across, down, turn)


def box_outline(x0: float, y0: float, x1: float, y1: float) -> Points:
    """Return the corners of an upright rectangle."""
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def ellipse_outline(x: float, y: float, across: float, down: float) -> Points:
    """Return the outline of an ellipse around (x, y) with these half-axes.

    It is less than 0.011 pixels off the true ellipse, up to half-axes of 10,000 pixels.
    """
    count = math.ceil(min(3000.0, 8 + 24 * math.sqrt(max(abs(across), abs(down)))))
    turns = (2 * math.pi * k / count for k in range(count))
    return [(x + across * math.cos(turn), y + down * math.sin(turn)) for turn in turns]


def rotate_outline(points: Points, degrees: float, center: tuple[float, float]) -> Points:
    """Rotate an outline clockwise (y points down) about a point."""
    if not degrees:
        return points
    (x, y), turn = center, math.radians(degrees)
    cos, sin = math.cos(turn), math.sin(turn)
    return [
        (x + (px - x) * cos - (py - y) * sin, y + (px - x) * sin + (py - y) * cos)
        for px, py in points
    ]


def line_outlines(points: NDArray[np.float64], width: float) -> Iterator[NDArray[np.float64]]:
    """Yield the outlines of a :class:`Line`: a disc at each point, and the strips between them.

    Those that are yielded together, ``(M, corners, 2)``, run in the same direction.
    """
    disc = np.asarray(ellipse_outline(0, 0, width / 2, width / 2))
    step = max(1, _MAX_CORNERS_TOGETHER // len(disc))
    for start in range(0, len(points), step):
        yield points[start : start + step, None] + disc
    begins, ends = points[:-1], points[1:]
    moved = (ends != begins).any(axis=1)
    begins, ends = begins[moved], ends[moved]
    dx, dy = (ends - begins).T
    side = np.stack([-dy, dx], axis=1) / np.hypot(dx, dy)[:, None] * width / 2
    strips = np.stack([begins + side, ends + side, ends - side, begins - side], axis=1)
    for start in range(0, len(strips), _MAX_CORNERS_TOGETHER // 4):
        yield strips[start : start + _MAX_CORNERS_TOGETHER // 4]


def compute_shape_area(shape: Shape) -> float:
    """Return the approximate area of a shape in its own units, without rasterising it."""
    covered = 0.0
    for outline in shape.outlines:
        if isinstance(outline, Ellipse):
            covered += math.pi * abs(outline.across * outline.down)
        elif isinstance(outline, Line):
            points = np.frombuffer(outline.points).reshape(-1, 2)
            lengths = np.hypot(*np.diff(points, axis=0).T) + outline.width
            covered += outline.width * float(lengths.sum() + outline.width)
        else:
            x, y = np.frombuffer(outline).reshape(-1, 2).T
            twice = x[:-1] @ y[1:] - y[:-1] @ x[1:] + x[-1] * y[0] - y[-1] * x[0]
            covered += abs(float(twice)) / 2
    if shape.runs:
        covered += float(np.frombuffer(shape.runs.lengths, np.uint32)[1::2].sum(dtype=np.float64))
    return covered


def encode_rle(mask: Mask, left: int = 0, top: int = 0, *, by_columns: bool = False) -> RunLengths:
    """Encode a mask ``(H, W)`` as run lengths; :func:`decode_rle` reverses it."""
    flat = np.concatenate([[False], mask.ravel("F" if by_columns else "C")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    lengths = np.diff(np.concatenate([[0], changes, [mask.size]])).astype(np.uint32)
    return RunLengths(lengths.tobytes(), mask.shape[1], mask.shape[0], left, top, by_columns)


def decode_rle(runs: RunLengths) -> Mask:
    """Decode run lengths to a mask ``(height, width)``."""
    lengths = np.frombuffer(runs.lengths, np.uint32)
    flat = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return flat.reshape((runs.height, runs.width), order="F" if runs.by_columns else "C")


def compress_rle(lengths: NDArray[np.int64]) -> str:
    """Write run lengths as COCO's compressed text; :func:`decompress_rle` reverses it.

    Each number takes five bits per character, the lowest first; from the fourth number on, the
    difference from the last but one is stored.
    """
    values = lengths.astype(np.int64)
    values[3:] -= lengths[1:-2]
    shifts = 5 * np.arange(8)
    # What remains is more than the sign if it is neither 0 nor -1.
    rest = values[:, None] >> (shifts + 4)
    goes_on = (rest != 0) & (rest != -1)
    characters = (values[:, None] >> shifts & 31) + 32 * goes_on + 48
    written = np.hstack([np.ones((len(values), 1), bool), goes_on[:, :-1]])
    return bytes(characters[written].tolist()).decode("ascii")


def decompress_rle(text: str) -> NDArray[np.int64]:
    """Read run lengths that :func:`compress_rle` or COCO's tools have written.

    Raises:
        ValueError: The text is not a compressed list of run lengths.
    """
    # Characters that are not ASCII have bytes above it.
    characters = (
        np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - 48
    )
    ends = np.flatnonzero(characters & 32 == 0) + 1
    if len(characters) and (not len(ends) or ends[-1] < len(characters)):
        ends = np.append(ends, len(characters))
    sizes = np.diff(ends, prepend=0)
    places = np.arange(len(characters)) - np.repeat(ends - sizes, sizes)
    wrong = np.flatnonzero((characters < 0) | (characters >= 64) | (places >= 8))
    if len(wrong):
        raise ValueError(f"compressed run lengths cannot have {text[wrong[0]]!r} there")
    if len(characters) and characters[-1] & 32:
        raise ValueError("compressed run lengths end in the middle of a number")
    parts = np.add.accumulate((characters & 31) << 5 * places)
    values = np.diff(parts[ends - 1], prepend=0)
    values -= np.where(characters[ends - 1] & 16, 1 << 5 * sizes, 0)
    for first in (1, 2):
        values[first::2] = np.add.accumulate(values[first::2])
    return values
