"""Drawn shapes -> label map: the one rule by which outlines and run lengths become pixels.

Pixel (row r, column c) covers the square from (c, r) to (c + 1, r + 1). It belongs to an outline if
its centre does: by the even-odd rule within one outline, as in COCO's own tools, and by union over
a shape's outlines. A centre exactly on an outline belongs to what lies right of or below it, so
that neighbours share no pixel and leave none out. What lies outside the image is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label
from useg.errors import DataError, suggest

BACKGROUND = "background"

# Pixels of a shape with this name are ignored; LabelMe's word.
IGNORE_NAME = "__ignore__"

# No image is that large, and products of such numbers are exact enough.
_MAX_COORDINATE = 1e7

# Crossings of edges and rows that are in memory at once.
_MAX_CROSSINGS = 10_000_000

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
class Shape:
    """One annotated object.

    Args:
        name: The name of its class.
        outlines: Closed outlines, float64 x, y, x, y, ... as bytes (see :func:`pack_outline`).
        runs: A mask instead of outlines.
    """

    name: str
    outlines: tuple[bytes, ...] = ()
    runs: RunLengths | None = None


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


def draw_shapes(drawing: Drawing, size: tuple[int, int], table: ClassTable, source: str) -> Label:
    """Paint the shapes of one image.

    Args:
        drawing: The shapes.
        size: (width, height) of the label map.
        table: The classes, which are found by name. Pixels that no shape covers have the class
            ``background``; they are ignored if there is no such class.
        source: The annotation file's name, for the error message.

    Returns:
        Label map ``(H, W)`` uint8: class ids, 255 where ignored.

    Raises:
        DataError: A shape has a class that the table does not have.
    """
    ids = {name: k for k, name in enumerate(table.names)} | {IGNORE_NAME: IGNORE}
    label = np.full((size[1], size[0]), ids.get(BACKGROUND, IGNORE), np.uint8)
    scale = (1.0, 1.0) if drawing.size else (float(size[0]), float(size[1]))
    for shape in drawing.shapes:
        if shape.name not in ids:
            raise DataError(
                f"{source} has a shape of the class {shape.name!r}, but the {len(table)} classes "
                f"are {', '.join(table.names)}; "
                f"add it to classes.toml{suggest(shape.name, table.names)}"
            )
        for outline in shape.outlines:
            points = np.frombuffer(outline).reshape(-1, 2) * scale
            _paint(label, *_fill_outline(points, size), ids[shape.name])
        if shape.runs:
            _paint(label, shape.runs.left, shape.runs.top, decode_rle(shape.runs), ids[shape.name])
    return label


def _paint(label: Label, left: int, top: int, mask: Mask, value: int) -> None:
    """Set ``label`` where the mask, placed at (``left``, ``top``), covers it."""
    H, W = label.shape
    mask = mask[max(0, -top) : max(0, H - top), max(0, -left) : max(0, W - left)]
    place = label[max(0, top) :, max(0, left) :][: mask.shape[0], : mask.shape[1]]
    place[mask] = value


def _fill_outline(points: NDArray[np.float64], size: tuple[int, int]) -> tuple[int, int, Mask]:
    """Find the pixels whose centres lie inside a closed outline, by the even-odd rule.

    Args:
        points: The outline's corners, ``(N, 2)``.
        size: (width, height) of the image, at which the mask is cut off.

    Returns:
        The left column and the top row of the mask in the image, and the mask.
    """
    # Half a pixel is subtracted, so that pixel centres are whole numbers: a row or column belongs
    # to the outline from the first whole number on, and ends before the last.
    x, y = points.T - 0.5
    left, right = np.clip(np.ceil((x.min(), x.max())), 0, size[0]).astype(int)
    top, bottom = np.clip(np.ceil((y.min(), y.max())), 0, size[1]).astype(int)
    flips = np.zeros((bottom - top, right - left + 1), np.uint8)
    # Each edge starts at its upper end: an edge that two neighbours share, in opposite directions,
    # is crossed at exactly the same numbers.
    begins, ends = np.stack([x, y]), np.stack([np.roll(x, -1), np.roll(y, -1)])
    is_downward = begins[1] <= ends[1]
    upper, lower = np.where(is_downward, begins, ends), np.where(is_downward, ends, begins)
    first, last = (np.clip(np.ceil(end[1]), top, bottom).astype(int) for end in (upper, lower))
    across, down = lower - upper
    slope = np.divide(across, down, out=np.zeros_like(x), where=first < last)
    step = max(1, _MAX_CROSSINGS // max(1, bottom - top))
    for begin in range(0, len(x), step):
        counts = (last - first)[begin : begin + step]
        edge = np.repeat(np.arange(len(counts)) + begin, counts)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
        crossing = upper[0, edge] + (row - upper[1, edge]) * slope[edge]
        column = np.clip(np.ceil(crossing), left, right).astype(int)
        # Counts are modulo 256, so that odd numbers stay odd.
        np.add.at(flips, (row - top, column - left), 1)
    is_inside = (np.cumsum(flips, axis=1, dtype=np.uint8) & 1).astype(bool)
    return int(left), int(top), is_inside[:, :-1]


def pack_outline(points: Iterable[Sequence[Any]], source: str) -> bytes:
    """Pack an outline's corners (x, y) for :class:`Shape`; they may lie outside the image.

    Raises:
        DataError: There are fewer than three corners, or a coordinate is not a finite number.
    """
    try:
        corners = np.array([[float(x), float(y)] for x, y in points], np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{source} has a shape whose points are not pairs of numbers ({error}); "
            "draw it again, or remove it"
        ) from error
    if not np.isfinite(corners).all():
        raise DataError(
            f"{source} has a shape with a coordinate that is NaN or infinite; "
            "draw it again, or remove it"
        )
    if len(corners) < 3:
        raise DataError(
            f"{source} has an outline of {len(corners)} points, but it needs at least three; "
            "draw it again, or remove it"
        )
    return np.clip(corners, -_MAX_COORDINATE, _MAX_COORDINATE).tobytes()


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


def line_outlines(points: Points, width: float) -> list[Points]:
    """Return the outlines of a line with round joints and ends: all within ``width / 2`` of it."""
    outlines: list[Points] = [ellipse_outline(x, y, width / 2, width / 2) for x, y in points]
    for (x0, y0), (x1, y1) in pairwise(points):
        length = math.hypot(x1 - x0, y1 - y0)
        if length:
            across, down = (y0 - y1) / length * width / 2, (x1 - x0) / length * width / 2
            outlines.append(
                [
                    (x0 + across, y0 + down),
                    (x1 + across, y1 + down),
                    (x1 - across, y1 - down),
                    (x0 - across, y0 - down),
                ]
            )
    return outlines


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


def compute_shape_area(shape: Shape) -> float:
    """Return the approximate area of a shape in its own units, without rasterizing it."""
    covered = 0.0
    for outline in shape.outlines:
        x, y = np.frombuffer(outline).reshape(-1, 2).T
        covered += abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
    if shape.runs:
        covered += float(np.frombuffer(shape.runs.lengths, np.uint32)[1::2].sum())
    return covered


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


def decompress_rle(text: str) -> list[int]:
    """Read run lengths that :func:`compress_rle` or COCO's tools have written.

    Raises:
        ValueError: The text is not a compressed list of run lengths.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 35:
            raise ValueError(f"compressed run lengths cannot have {character!r} there")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("compressed run lengths end in the middle of a number")
    return lengths
