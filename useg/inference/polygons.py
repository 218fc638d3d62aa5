"""Label map <-> polygons that follow the borders of its pixels exactly, and those polygons as
GeoJSON (numpy only).

Every 4-connected region becomes one polygon: an outer ring and one for each hole. Where a region
touches itself or another at a corner alone, its rings turn such that none meets itself, so that the
polygons are valid wherever they are used. Nothing is simplified.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label
from useg.data.annotations.rasterize import Drawing, Shape, draw_shapes, pack_outline
from useg.images.tiff import GeoReference
from useg.scoring.regions import components, regions

Ring = NDArray[np.int64]  # (N, 2): x, y of its corners, each once


@dataclass(frozen=True)
class Polygon:
    """A 4-connected region of a label map.

    Args:
        value: its class id.
        pixels: how many it has.
        rings: the outer ring, then its holes; pixel (row r, column c) covers the square from (c, r)
            to (c + 1, r + 1). With y pointing down, as in pictures, the outer ring runs clockwise
            and holes the other way: the region lies to the right of every edge.
    """

    value: int
    pixels: int
    rings: tuple[Ring, ...]


def to_polygons(label: Label) -> list[Polygon]:
    """Outline the regions of a label map ``(H, W)``, in the order of their first pixels; those of
    ``IGNORE`` are left out.

    >>> to_polygons(np.uint8([[3, 255]]))[0].rings[0].tolist()
    [[0, 0], [1, 0], [1, 1], [0, 1]]
    """
    numbers = regions(label)
    sizes = np.bincount(numbers.ravel())
    values = np.empty(len(sizes), np.uint8)
    values[numbers] = label
    rings: list[list[Ring]] = [[] for _ in sizes]
    for number, corners in zip(
        *_trace_rings(np.where(label == IGNORE, 0, numbers + 1)), strict=True
    ):
        rings[number - 1].append(corners)
    return [
        Polygon(int(values[k]), int(sizes[k]), tuple(found))
        for k, found in enumerate(rings)
        if found
    ]


def polygons_to_label(polygons: Iterable[Polygon], size: tuple[int, int]) -> Label:
    """Paint polygons on a label map of ``size`` (width, height) that is ``IGNORE`` elsewhere: the
    inverse of :func:`to_polygons`.

    They are drawn by the one rule of :mod:`useg.data.annotations.rasterize`: each as one outline
    that goes to every hole, around it and back the same way.
    """
    shapes = []
    for polygon in polygons:
        closed = [np.concatenate([corners, corners[:1]]) for corners in polygon.rings]
        home = closed[0][:1]
        outline = np.concatenate([part for corners in closed for part in (corners, home)])
        shapes.append(Shape(str(polygon.value), (pack_outline(outline, "a polygon"),)))
    return draw_shapes(
        Drawing(tuple(shapes), size),
        size,
        ClassTable(tuple(str(value) for value in range(IGNORE))),
        "a polygon",
    )


def to_geojson(
    polygons: Iterable[Polygon], table: ClassTable, place: GeoReference | None = None
) -> dict[str, Any]:
    """Describe polygons as a GeoJSON feature collection: one feature each, with ``class``, ``id``,
    ``pixels`` and on a map ``area``.

    Args:
        polygons: regions of a label map.
        table: the classes.
        place: where the picture lies on a map; without it coordinates are pixels from the top left
            corner, y pointing down. A coordinate system is named in the member ``crs`` of GeoJSON
            2008, which GDAL and QGIS read; RFC 7946 knows degrees alone.

    Returns:
        What ``json.dumps`` takes. Outer rings have positive area, holes negative, as the format
        asks.
    """
    a, b, c, d, e, f = place.transform if place else (1, 0, 0, 0, 1, 0)
    turned = a * e - b * d < 0  # a map's y points up: the way around the rings is the other one
    features = []
    for polygon in polygons:
        coordinates = []
        for corners in polygon.rings:
            x, y = np.concatenate([corners, corners[:1]])[:: -1 if turned else 1].T
            coordinates.append(np.stack([a * x + b * y + c, d * x + e * y + f], axis=1).tolist())
        properties: dict[str, Any] = {
            "class": table.names[polygon.value],
            "id": polygon.value,
            "pixels": polygon.pixels,
        }
        if place:
            properties["area"] = polygon.pixels * place.pixel_area
        features.append(
            {
                "type": "Feature",
                "properties": properties,
                "geometry": {"type": "Polygon", "coordinates": coordinates},
            }
        )
    authority, _, code = (place.crs if place else "").partition(":")
    crs = (
        {"crs": {"type": "name", "properties": {"name": f"urn:ogc:def:crs:{authority}::{code}"}}}
        if code
        else {}
    )
    return {"type": "FeatureCollection", **crs, "features": features}


def _trace_rings(numbers: NDArray[np.int64]) -> tuple[list[int], list[Ring]]:
    """Return the rings around numbered regions and the region of each: outer ones first, in the
    order of first pixels; 0 has none.

    A ring is made of straight edges in four directions, right, down, left, up, with its region to
    the right. The edges of a direction begin and end by turns along their line, so the k-th to
    begin is the k-th to end, and where one ends another begins.
    """
    padded = np.pad(numbers, 1)
    around = (
        padded[1:, 1:],
        padded[1:, :-1],
        padded[:-1, :-1],
        padded[:-1, 1:],
    )  # of each corner: lower right, lower left, upper left, right
    rows, columns = np.nonzero(
        (around[0] != around[1]) | (around[2] != around[3]) | (around[0] != around[3])
    )
    if not rows.size:
        return [], []
    corners = [part[rows, columns] for part in around]
    orders = (
        np.arange(len(rows)),
        np.argsort(columns, kind="stable"),
    )  # along the rows and along the columns
    begins, ends, left_turns = [], [], []
    for direction in range(4):
        ahead, behind, behind_left, ahead_left = (corners[(direction + k) % 4] for k in range(4))
        goes_on = (ahead == behind) & (ahead != 0)
        order = orders[direction % 2]
        begins.append(
            order[
                ((ahead != 0) & (ahead != ahead_left) & ~(goes_on & (behind != behind_left)))[order]
            ]
        )
        ends.append(
            order[
                ((behind != 0) & (behind != behind_left) & ~(goes_on & (ahead != ahead_left)))[
                    order
                ]
            ]
        )
        left_turns.append(
            (ahead_left == behind)[ends[-1]]
        )  # also across a corner where the region touches itself: no ring meets itself
    first = np.cumsum([0, *(len(part) for part in begins)])
    edge_at = np.zeros((4, len(rows)), np.int64)  # that begins at a corner, by direction
    for direction in range(4):
        edge_at[direction, begins[direction]] = np.arange(first[direction], first[direction + 1])
    following = np.concatenate(
        [edge_at[(k + np.where(left_turns[k], 3, 1)) % 4, ends[k]] for k in range(4)]
    )
    members, starts = _follow_cycles(following.tolist(), len(begins[0]))
    places = np.concatenate(begins)[members]
    points = np.stack([columns[places], rows[places]], axis=1)
    return corners[0][places[starts]].tolist(), np.split(points, starts[1:])


def _follow_cycles(following: list[int], count: int) -> tuple[list[int], list[int]]:
    """Follow the cycles of a permutation that have a member below ``count``, from the lowest on:
    all members, and where each cycle starts.
    """
    order: list[int] = []
    starts = []
    seen = bytearray(len(following))
    for edge in range(count):
        if not seen[edge]:
            starts.append(len(order))
        while not seen[edge]:
            seen[edge] = 1
            order.append(edge)
            edge = following[edge]
    return order, starts


def clean_label_map(label: Label, min_region: int = 0, max_hole: int = 0) -> Label:
    """Fill holes, then merge regions; 0 leaves out a step.

    Args:
        label: class ids ``(H, W)``; it is not changed.
        min_region: smallest number of pixels that a region keeps its class with.
        max_hole: number of pixels from which on a hole stays.
    """
    if max_hole > 1:
        label = fill_holes(label, max_hole)
    return merge_regions(label, min_region) if min_region > 1 else label


def fill_holes(label: Label, below: int) -> Label:
    """Fill every hole of fewer than ``below`` pixels with the class around it."""
    filled, largest = label.copy(), np.zeros(label.shape, np.int64)
    for value in np.setdiff1d(label, [IGNORE]).tolist():
        numbers = components(label != value)
        sizes = np.bincount(numbers.ravel())
        reaching = (numbers[[0, -1]].ravel(), numbers[:, [0, -1]].ravel(), numbers[label == IGNORE])
        sizes[np.concatenate(reaching)] = 0
        sizes[(sizes >= below) | (np.arange(len(sizes)) == 0)] = 0
        hole = sizes[numbers]
        wins = hole > largest
        filled[wins], largest[wins] = value, hole[wins]
    return filled


def merge_regions(label: Label, below: int) -> Label:
    """Give every region of fewer than ``below`` pixels the class of its surroundings."""
    while True:
        numbers = regions(label)
        sizes = np.bincount(numbers.ravel())
        values = np.empty(len(sizes), np.uint8)
        values[numbers] = label
        small, known = sizes < below, values != IGNORE
        own, other = _region_borders(numbers)
        takes = (small & known)[own] & (~small & known)[other]
        if not takes.any():
            return label
        pairs, lengths = np.unique(own[takes] * 256 + values[other[takes]], return_counts=True)
        region, value = np.divmod(pairs, 256)
        order = np.lexsort(
            (-value, lengths)
        )  # of what a region may take, the last one written stays
        values[region[order]] = value[order]
        label = values[numbers]


def _region_borders(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the regions on both sides of every pixel side that is a border, both ways round."""
    across, down = numbers[:, 1:] != numbers[:, :-1], numbers[1:] != numbers[:-1]
    first = np.concatenate([numbers[:, 1:][across], numbers[1:][down]])
    second = np.concatenate([numbers[:, :-1][across], numbers[:-1][down]])
    return np.concatenate([first, second]), np.concatenate([second, first])
