"""Drawn shapes -> label map: the one rule by which outlines, lines and masks become pixels.

A pixel belongs to an outline if its centre does: by the even-odd rule within one outline, as in
COCO's own tools, and by union over a shape's outlines. A centre exactly on an outline belongs to
what lies right of or below it, so that neighbours share no pixel and leave none out. What lies
outside the image is cut off.

Curves are expanded only while they are drawn, masks are never larger than the image, and the work
for one image is limited.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label, pack_colors
from useg.data.annotations.shapes import (
    BACKGROUND,
    IGNORE_NAME,
    Drawing,
    Ellipse,
    Mask,
    Outlines,
    RunLengths,
    Shape,
    ellipse_outline,
    line_outlines,
    rotate_outline,
)
from useg.errors import DataError, suggest
from useg.images.image_files import read_colors, read_mask, read_size

# Crossings of edges and rows, and pixels, that are in memory at once.
_MAX_CROSSINGS = 1_000_000

_MAX_BAND_PIXELS = 8_000_000

# Work that one image may take: pixels of masks and of the boxes around outlines. 5,000 objects as
# large as a small image are possible, and 20 as large as a huge one.
_MAX_WORK, _MAX_WORK_PER_PIXEL = 1_000_000_000, 20

# A crossing of an edge and a row takes as long as this many pixels.
_PIXELS_PER_CROSSING = 32

# So do any outline, however small, and each of its corners.
_PIXELS_PER_OUTLINE, _PIXELS_PER_CORNER = 30_000, 70


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
    # The least work for this number of shapes is checked before any is drawn.
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
