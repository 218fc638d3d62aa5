"""Drawn shapes -> label map: the one rule by which outlines, lines and masks become pixels.

Pixel (row r, column c) covers the square from (c, r) to (c + 1, r + 1). It belongs to an outline if
its centre does: by the even-odd rule within one outline, as in COCO's own tools, and by union over
a shape's outlines. A centre exactly on an outline belongs to what lies right of or below it, so
that neighbours share no pixel and leave none out. What lies outside the image is cut off.

Annotation files come from anywhere: curves are expanded only while they are drawn, masks are never
larger than the image, and the work for one image is limited.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label, pack_colors
from useg.errors import DataError, suggest
from useg.images.files import read_colors, read_mask, read_size

BACKGROUND = "background"

# Pixels of a shape with this name are ignored; LabelMe's word.
IGNORE_NAME = "__ignore__"

# No image is that large, and products of such numbers are exact enough.
_MAX_COORDINATE = 1e7

# Crossings of edges and rows, and pixels, that are in memory at once.
_MAX_CROSSINGS = 1_000_000
_MAX_BAND_PIXELS = 8_000_000

# Corners of the discs and strips of a line that are drawn together.
_MAX_CORNERS_TOGETHER = 65_536

# Work that one image may take: pixels of masks and of the boxes around outlines. A crossing of an
# edge and a row takes as long as so many pixels. 5,000 objects as large as a small image are
# possible, and 20 as large as a huge one.
_MAX_WORK, _MAX_WORK_PER_PIXEL = 1_000_000_000, 20
_PIXELS_PER_CROSSING = 32
# To make and to draw any outline, however small, and each of its corners.
_PIXELS_PER_OUTLINE, _PIXELS_PER_CORNER = 30_000, 70

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
    for shape in drawing.shapes:
        if shape.name not in ids:
            raise DataError(
                f"{source} has a shape of the class {shape.name!r}, but the {len(table)} classes "
                f"are {', '.join(table.names)}; "
                f"add it to classes.toml{suggest(shape.name, table.names)}"
            )
    _paint_shapes(label, drawing, [ids[shape.name] for shape in drawing.shapes], source)
    return label


def number_shapes(drawing: Drawing, size: tuple[int, int], source: str) -> NDArray[np.int32]:
    """Paint every shape with its number, from 1 on: ``(H, W)``, 0 where there is none.

    The arguments are those of :func:`draw_shapes`.
    """
    numbers = np.zeros((size[1], size[0]), np.int32)
    _paint_shapes(numbers, drawing, range(1, len(drawing.shapes) + 1), source)
    return numbers


def _paint_shapes(
    label: NDArray[Any], drawing: Drawing, values: Sequence[int], source: str
) -> None:
    """Set ``label`` ``(H, W)`` to a value for each shape, where the shape covers it."""
    size = label.shape[1], label.shape[0]
    scale = (1.0, 1.0) if drawing.size else (float(size[0]), float(size[1]))
    read_stored = lru_cache(maxsize=1)(_read_stored_mask)
    # What so many shapes take at least, before any is drawn.
    _check_work(_PIXELS_PER_OUTLINE * sum(map(_count_parts, drawing.shapes)), size, source)
    work = 0
    for shape, value in zip(drawing.shapes, values, strict=True):
        for outlines in _expand(shape.outlines):
            work += _draw_outlines(label, outlines * scale, value)
            _check_work(work, size, source)
        if shape.runs:
            work += shape.runs.width * shape.runs.height + _PIXELS_PER_OUTLINE
            _check_work(work, size, source)
            left, top, mask = _crop_rle(shape.runs)
            _paint(label, left, top, mask, value)
        if shape.mask:
            work += label.size + _PIXELS_PER_OUTLINE
            _check_work(work, size, source)
            stored = read_stored(shape.mask.path, bool(shape.mask.codes), size)
            _paint(
                label,
                0,
                0,
                np.isin(stored, shape.mask.codes or (0,)) ^ (not shape.mask.codes),
                value,
            )


def _count_parts(shape: Shape) -> int:
    return len(shape.outlines) + (shape.runs is not None) + (shape.mask is not None)


def _check_work(work: int, size: tuple[int, int], source: str) -> None:
    if work > _MAX_WORK + _MAX_WORK_PER_PIXEL * size[0] * size[1]:
        raise DataError(
            f"{source} has too many or too large shapes for {size[0]}x{size[1]} pixels: drawing "
            "them would take minutes; simplify or remove them"
        )


def _expand(outlines: Outlines) -> Iterator[NDArray[np.float64]]:
    """Turn lines and ellipses into outlines: few at a time, ``(M, corners, 2)``."""
    for outline in outlines:
        if isinstance(outline, bytes):
            yield np.frombuffer(outline).reshape(1, -1, 2)
        elif isinstance(outline, Ellipse):
            corners = rotate_outline(
                ellipse_outline(outline.x, outline.y, outline.across, outline.down),
                outline.degrees,
                (outline.x, outline.y),
            )
            yield np.asarray(corners)[None]
        else:
            points = np.frombuffer(outline.points).reshape(-1, 2)
            yield from line_outlines(points, outline.width)


def _read_stored_mask(path: Path, by_color: bool, size: tuple[int, int]) -> NDArray[Any]:
    """Read a mask of the image's size: values ``(H, W)``, or colours as ``0xRRGGBB``."""
    if read_size(path) != size:
        raise DataError(
            f"mask '{path}' is {'x'.join(map(str, read_size(path)))} pixels, but its image is "
            f"{size[0]}x{size[1]}; they must have the same size; export it again"
        )
    if not by_color:
        mask = read_mask(path)
        return np.asarray(mask.any(axis=2)) if mask.ndim == 3 else mask
    return pack_colors(read_colors(path))


def _paint(label: NDArray[Any], left: int, top: int, mask: Mask, value: int) -> None:
    """Set ``label`` where the mask, placed at (``left``, ``top``), covers it."""
    H, W = label.shape
    mask = mask[max(0, -top) : max(0, H - top), max(0, -left) : max(0, W - left)]
    place = label[max(0, top) :, max(0, left) :][: mask.shape[0], : mask.shape[1]]
    place[mask] = value


def _draw_outlines(label: NDArray[Any], outlines: NDArray[np.float64], value: int) -> int:
    """Set the pixels whose centres lie inside a closed outline.

    One outline is filled by the even-odd rule. Several are joined: all of them are convex and run
    in the same direction, so that a pixel is in one of them if any outline winds around it.

    Args:
        label: The label map, at which the outlines are cut off.
        outlines: Their corners, ``(M, N, 2)``.
        value: The class id.

    Returns:
        The work that it took, in pixels.
    """
    # Half a pixel is subtracted, so that pixel centres are whole numbers: a row or column belongs
    # to the outline from the first whole number on, and ends before the last.
    begins = outlines.reshape(-1, 2).T - 0.5
    ends = np.roll(outlines, -1, axis=1).reshape(-1, 2).T - 0.5
    x, y = begins
    left, right = np.clip(np.ceil((x.min(), x.max())), 0, label.shape[1]).astype(int)
    top, bottom = np.clip(np.ceil((y.min(), y.max())), 0, label.shape[0]).astype(int)
    # Each edge starts at its upper end: an edge that two neighbours share, in opposite directions,
    # is crossed at exactly the same numbers.
    is_downward = begins[1] <= ends[1]
    upper, lower = np.where(is_downward, begins, ends), np.where(is_downward, ends, begins)
    rows = np.clip(np.ceil((upper[1], lower[1])), top, bottom).astype(int)
    across, down = lower - upper
    slope = np.divide(across, down, out=np.zeros_like(x), where=rows[0] < rows[1])
    crossings = int((rows[1] - rows[0]).sum())
    work = int((bottom - top) * (right - left)) + _PIXELS_PER_CROSSING * crossings
    work += _PIXELS_PER_OUTLINE + _PIXELS_PER_CORNER * len(x)
    if work > _MAX_WORK + _MAX_WORK_PER_PIXEL * label.size:
        return work
    is_one = len(outlines) == 1
    turns: NDArray[Any]
    turns = np.ones(len(x), np.uint8) if is_one else np.where(is_downward, 1, -1).astype(np.int32)
    height = max(1, _MAX_BAND_PIXELS // turns.itemsize // (int(right - left) + 1))
    for start in range(int(top), int(bottom), height):
        band = (start, min(start + height, int(bottom)))
        edges = _Edges(np.clip(rows, *band), upper, slope, turns)
        changes = _count_crossings(edges, band, (int(left), int(right)))
        windings = np.cumsum(changes, axis=1, dtype=turns.dtype)[:, :-1]
        is_inside = windings & 1 == 1 if is_one else windings != 0
        label[band[0] : band[1], left:right][is_inside] = value
    return work


@dataclass(frozen=True)
class _Edges:
    """Edges of outlines.

    Args:
        rows: ``(2, N)``: the first row of each edge, and the row behind its last.
        upper: ``(2, N)``: x and y of the upper end of each edge.
        slope: How far x goes with each row.
        turns: What is added to the pixels right of each edge.
    """

    rows: NDArray[np.int64]
    upper: NDArray[np.float64]
    slope: NDArray[np.float64]
    turns: NDArray[Any]


def _count_crossings(
    edges: _Edges, band: tuple[int, int], columns: tuple[int, int]
) -> NDArray[Any]:
    """Add up, where edges are crossed in a band of rows, what they add.

    Args:
        edges: The edges.
        band: The first row of the band, and the row behind its last.
        columns: The same of the columns; what lies further left or right counts at the border.
    """
    changes = np.zeros((band[1] - band[0], columns[1] - columns[0] + 1), edges.turns.dtype)
    rows, upper = edges.rows, edges.upper
    crossed = np.flatnonzero(rows[0] < rows[1])
    step = max(1, _MAX_CROSSINGS // max(1, band[1] - band[0]))
    for begin in range(0, len(crossed), step):
        chosen = crossed[begin : begin + step]
        counts = rows[1, chosen] - rows[0, chosen]
        edge = np.repeat(chosen, counts)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + rows[0, edge]
        crossing = upper[0, edge] + (row - upper[1, edge]) * edges.slope[edge]
        column = np.clip(np.ceil(crossing), *columns).astype(int)
        np.add.at(changes, (row - band[0], column - columns[0]), edges.turns[edge])
    return changes


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


def _crop_rle(runs: RunLengths) -> tuple[int, int, Mask]:
    """Decode run lengths from the first covered row or column to the last.

    Returns:
        The left column and the top row in the image, and the mask.
    """
    ends = np.cumsum(np.frombuffer(runs.lengths, np.uint32), dtype=np.int64)
    covered = np.flatnonzero(np.diff(ends, prepend=0)[1::2]) * 2 + 1
    if not len(covered):
        return 0, 0, np.zeros((0, 0), bool)
    side = runs.height if runs.by_columns else runs.width
    first = int(ends[covered[0] - 1]) // side
    last = -(-int(ends[covered[-1]]) // side)
    cut = np.clip(ends, first * side, last * side)
    lengths = cut - np.concatenate([[first * side], cut[:-1]])
    flat = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    if runs.by_columns:
        return runs.left + first, runs.top, flat.reshape((side, last - first), order="F")
    return runs.left, runs.top + first, flat.reshape(last - first, side)


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
