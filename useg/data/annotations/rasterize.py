"""Drawn shapes -> label map: the one rule by which outlines and runs of annotation files become pixels.

Pixel (row r, column c) covers the square from (c, r) to (c + 1, r + 1). It belongs to an outline when its centre does: by the even-odd rule
within one outline, as COCO's own tools have it, and by union over a shape's outlines. A centre exactly on an outline belongs to what lies
right of or below it, so that neighbours share no pixel and leave none out. What lies outside the picture is cut off.
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


IGNORE_NAME = "__ignore__"  # a shape of this name does not count; LabelMe's word


_FARTHEST = 1e7  # pixels: no picture is that large, and products of such numbers are exact enough


_CROSSINGS = 10_000_000  # at most so many at a time


Points = Sequence[tuple[float, float]]


Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class RunLengths:
    """A mask as the lengths of its runs, not covered and covered by turns, in a box at (``left``, ``top``); made by :func:`encode_runs`.

    Args:
        lengths: uint32 numbers as bytes; they sum to ``width * height``.
        by_columns: they run down the columns (COCO) and not along the rows.
    """

    lengths: bytes
    width: int
    height: int
    left: int = 0
    top: int = 0
    by_columns: bool = False


@dataclass(frozen=True)
class Shape:
    """One drawn thing of the class ``name``: closed outlines (float64 x, y, x, y, ... as bytes, made by :func:`ring`), or runs."""

    name: str
    rings: tuple[bytes, ...] = ()
    runs: RunLengths | None = None


@dataclass(frozen=True)
class Drawing:
    """What is drawn on one picture; later shapes lie over earlier ones.

    Args:
        shapes: from the lowest to the topmost.
        size: the picture's (width, height) as the annotation file has it; None: coordinates are fractions of the picture's own.
    """

    shapes: tuple[Shape, ...]
    size: tuple[int, int] | None = None


def draw_shapes(drawing: Drawing, size: tuple[int, int], table: ClassTable, source: str) -> Label:
    """Paint a drawing.

    Args:
        drawing: the shapes.
        size: (width, height) of the label map.
        table: classes, found by name. What no shape covers is the class ``background``, or ignored where there is no such class.
        source: the annotation file's name, for the error message.

    Returns:
        Label map ``(H, W)`` uint8: class ids, 255 where ignored.

    Raises:
        DataError: a shape of a class that the table does not have.
    """
    ids = {name: k for k, name in enumerate(table.names)} | {IGNORE_NAME: IGNORE}
    label = np.full((size[1], size[0]), ids.get(BACKGROUND, IGNORE), np.uint8)
    scale = (1.0, 1.0) if drawing.size else (float(size[0]), float(size[1]))
    for shape in drawing.shapes:
        if shape.name not in ids:
            raise DataError(
                f"{source} has a shape of the class {shape.name!r}, which is none of the {len(table)} classes ({', '.join(table.names)}); "
                f"add it to classes.toml{suggest(shape.name, table.names)}"
            )
        for outline in shape.rings:
            _paint(
                label,
                *_inside(np.frombuffer(outline).reshape(-1, 2) * scale, size),
                ids[shape.name],
            )
        if shape.runs:
            _paint(label, shape.runs.left, shape.runs.top, decode_rle(shape.runs), ids[shape.name])
    return label


def _paint(label: Label, left: int, top: int, mask: Mask, value: int) -> None:
    """Set ``label`` where the mask, placed at (``left``, ``top``), covers it."""
    H, W = label.shape
    mask = mask[max(0, -top) : max(0, H - top), max(0, -left) : max(0, W - left)]
    place = label[max(0, top) :, max(0, left) :][: mask.shape[0], : mask.shape[1]]
    place[mask] = value


def _inside(points: NDArray[np.float64], size: tuple[int, int]) -> tuple[int, int, Mask]:
    """Return left, top and the mask of the pixels whose centres lie inside a closed outline ``(N, 2)``: even-odd, cut off at the picture's edge."""
    # In units in which pixel centres are whole numbers: a row or column belongs from the first whole number on, and ends before the last.
    x, y = points.T - 0.5
    left, right = np.clip(np.ceil((x.min(), x.max())), 0, size[0]).astype(int)
    top, bottom = np.clip(np.ceil((y.min(), y.max())), 0, size[1]).astype(int)
    flips = np.zeros((bottom - top, right - left + 1), np.uint8)
    # Each edge from its upper end: an edge that two neighbours share, in opposite directions, is crossed at the very same number.
    upper, lower = np.stack([x, y]), np.stack([np.roll(x, -1), np.roll(y, -1)])
    upper, lower = (
        np.where(upper[1] <= lower[1], upper, lower),
        np.where(upper[1] <= lower[1], lower, upper),
    )
    first, last = (np.clip(np.ceil(ends[1]), top, bottom).astype(int) for ends in (upper, lower))
    across, down = lower - upper
    slope = np.divide(across, down, out=np.zeros_like(x), where=first < last)
    step = max(1, _CROSSINGS // max(1, bottom - top))
    for begin in range(0, len(x), step):
        counts = (last - first)[begin : begin + step]
        edge = np.repeat(np.arange(len(counts)) + begin, counts)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
        column = np.clip(
            np.ceil(upper[0, edge] + (row - upper[1, edge]) * slope[edge]), left, right
        ).astype(int)
        np.add.at(flips, (row - top, column - left), 1)  # modulo 256, which keeps odd odd
    return int(left), int(top), (np.cumsum(flips, axis=1, dtype=np.uint8) & 1).astype(bool)[:, :-1]


def pack_outline(points: Iterable[Sequence[Any]], source: str) -> bytes:
    """Pack an outline's corners (x, y) for :class:`Shape`; they may lie outside the picture.

    Raises:
        DataError: fewer than three corners, or a coordinate that is no finite number.
    """
    try:
        corners = np.array([[float(x), float(y)] for x, y in points], np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{source} has a shape whose points are not pairs of numbers ({error}); draw it again, or remove it"
        ) from error
    if not np.isfinite(corners).all():
        raise DataError(
            f"{source} has a shape with a coordinate that is no finite number; draw it again, or remove it"
        )
    if len(corners) < 3:
        raise DataError(
            f"{source} has an outline of {len(corners)} points, but an area needs three; draw it again, or remove it"
        )
    return np.clip(corners, -_FARTHEST, _FARTHEST).tobytes()


def box_outline(x0: float, y0: float, x1: float, y1: float) -> Points:
    """Return the corners of an upright rectangle."""
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def ellipse_outline(x: float, y: float, across: float, down: float) -> Points:
    """Return corners so close that they are nowhere a hundredth of a pixel off the ellipse with these half-axes (up to 10,000 pixels)."""
    count = math.ceil(min(3000.0, 8 + 24 * math.sqrt(max(abs(across), abs(down)))))
    turns = (2 * math.pi * k / count for k in range(count))
    return [(x + across * math.cos(turn), y + down * math.sin(turn)) for turn in turns]


def line_outlines(points: Points, width: float) -> list[Points]:
    """Return the outlines of a line with round joints and ends: what lies within ``width / 2`` of it."""
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
    """Turn a mask ``(H, W)`` into runs; :func:`decode_runs` gives it back."""
    flat = np.concatenate([[False], mask.ravel("F" if by_columns else "C")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    lengths = np.diff(np.concatenate([[0], changes, [mask.size]])).astype(np.uint32)
    return RunLengths(lengths.tobytes(), mask.shape[1], mask.shape[0], left, top, by_columns)


def decode_rle(runs: RunLengths) -> Mask:
    """Turn runs into the mask ``(height, width)`` of their box."""
    lengths = np.frombuffer(runs.lengths, np.uint32)
    flat = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return flat.reshape((runs.height, runs.width), order="F" if runs.by_columns else "C")


def compute_shape_area(shape: Shape) -> float:
    """Return about how much a shape covers, in its own units: what decides which of two lies on top."""
    covered = 0.0
    for outline in shape.rings:
        x, y = np.frombuffer(outline).reshape(-1, 2).T
        covered += abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
    return covered + (
        float(np.frombuffer(shape.runs.lengths, np.uint32)[1::2].sum()) if shape.runs else 0.0
    )


def compress_rle(lengths: NDArray[np.int64]) -> str:
    """Write run lengths as COCO's compressed text; :func:`decompress` gives them back."""
    values = lengths.astype(np.int64)
    values[3:] -= lengths[1:-2]
    shifts = 5 * np.arange(8)
    more = values[:, None] >> (
        shifts + 4
    )  # what is left when it is neither 0 nor -1 is more than the sign
    goes_on = (more != 0) & (more != -1)
    characters = (values[:, None] >> shifts & 31) + 32 * goes_on + 48
    written = np.hstack([np.ones((len(values), 1), bool), goes_on[:, :-1]])
    return bytes(characters[written].tolist()).decode("ascii")


def decompress_rle(text: str) -> list[int]:
    """Read COCO's compressed run lengths: five bits a character, from 48 on, the lowest first; from the fourth, changes to the last but one.

    Raises:
        ValueError: not such a text.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 35:
            raise ValueError(
                f"its compressed runs have {character!r} where no such character can be"
            )
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("its compressed runs end in the middle of a number")
    return lengths
