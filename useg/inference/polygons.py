"""Convert label maps to polygons and GeoJSON, and remove small holes and regions (numpy only).

Every 4-connected region becomes one polygon that follows the borders of its pixels exactly: an
outer ring and one ring for each hole. Where a region touches itself or another one only at a
corner, its rings turn so that no ring touches itself: the polygons are valid everywhere. Nothing
is simplified.

Cleaning follows exact rules, and is off by default:

- A hole of a class is a 4-connected set of pixels of other classes that the class encloses: it
  does not reach the edge of the image, and all pixels next to it are of that class. A hole with
  fewer than N pixels is filled with the class, whatever it contains, unless it contains an ignored
  pixel. Holes are those of the given label map. Where several overlap, the largest counts; of
  equal ones, that of the lowest class.
- A region is a 4-connected set of pixels of one class. A region with fewer than N pixels takes the
  class with which it shares the longest border, counted in pixel sides, among its neighbours with
  at least N pixels; of equal ones, the lowest class. All such regions change at once. This repeats
  for regions that have such a neighbour only now. In the end no region below N pixels is left,
  except where everything connected is small: an image with fewer pixels, or an island among
  ignored pixels. Ignored pixels never change and never spread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label
from useg.scoring.metrics import components, regions

if TYPE_CHECKING:
    from useg.images.tiff import GeoReference

Ring = NDArray[np.int64]  # (N, 2): x, y of its corners, each once

_ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Polygon:
    """A 4-connected region of a label map.

    Args:
        value: Its class id.
        pixels: Its number of pixels.
        number: The number of its object; 0 if it is not part of one.
        rings: The outer ring, then its holes. The pixel in row r and column c covers the square
            from (c, r) to (c + 1, r + 1). With y pointing down, as in images, the outer ring runs
            clockwise and holes run counter-clockwise: the region lies to the right of every edge.
    """

    value: int
    pixels: int
    rings: tuple[Ring, ...]
    number: int = 0


def count_corners(label: Label) -> int:
    """Return how many corners the polygons of a label map have, without tracing them.

    Four pixels meet at each point, beyond the edges ``IGNORE``. Two rings have a corner where two
    regions touch only there.

    >>> count_corners(np.uint8([[3, 255]])), len(to_polygons(np.uint8([[3, 255]]))[0].rings[0])
    (4, 4)
    """
    padded = np.pad(label, 1, constant_values=IGNORE)
    count = 0
    for top in range(0, len(padded) - 1, _ROWS_AT_A_TIME):
        rows = padded[top : top + _ROWS_AT_A_TIME + 1]
        around = (rows[:-1, :-1], rows[:-1, 1:], rows[1:, 1:], rows[1:, :-1])
        for k in range(4):
            # A region has a corner in one of the four pixels if it continues to neither side, or
            # to both but not across.
            own, left, across, right = (around[(k + turn) % 4] for turn in range(4))
            convex = (own != left) & (own != right)
            concave = (own == left) & (own == right) & (own != across)
            count += int(np.count_nonzero((convex | concave) & (own != IGNORE)))
    return count


def to_polygons(label: Label) -> list[Polygon]:
    """Outline the regions of a label map ``(H, W)``, in the order of their first pixels.

    Regions of ``IGNORE`` are left out.

    >>> to_polygons(np.uint8([[3, 255]]))[0].rings[0].tolist()
    [[0, 0], [1, 0], [1, 1], [0, 1]]
    """
    return [Polygon(*region) for region in _outline_regions(label, IGNORE)]


def object_polygons(objects: NDArray[np.uint32], class_ids: NDArray[np.int64]) -> list[Polygon]:
    """Outline numbered objects ``(H, W)``, each as one polygon, in the order of their numbers.

    An object of several parts has a polygon for each.

    Args:
        objects: The number of each pixel's object, 0 for none.
        class_ids: The class of object k + 1.
    """
    polygons = [
        Polygon(int(class_ids[number - 1]), pixels, rings, number)
        for number, pixels, rings in _outline_regions(objects, 0)
    ]
    return sorted(polygons, key=lambda polygon: polygon.number)


def _outline_regions(
    ids: NDArray[np.generic], outside: int
) -> Iterator[tuple[int, int, tuple[Ring, ...]]]:
    """Yield the id, the number of pixels and the rings of each region of a map ``(H, W)``.

    Regions of ``outside`` are left out.
    """
    numbers = regions(ids)
    sizes = np.bincount(numbers.ravel())
    id_of = np.empty(len(sizes), ids.dtype)
    id_of[numbers] = ids
    rings: list[list[Ring]] = [[] for _ in sizes]
    for number, ring in zip(*_trace_rings(np.where(ids == outside, 0, numbers + 1)), strict=True):
        rings[number - 1].append(ring)
    for k, found in enumerate(rings):
        if found:
            yield int(id_of[k]), int(sizes[k]), tuple(found)


def to_geojson(
    polygons: Iterable[Polygon], table: ClassTable, place: GeoReference | None = None
) -> dict[str, Any]:
    """Describe polygons as a GeoJSON feature collection.

    Each feature has the properties ``class``, ``id``, ``pixels``, for objects ``object`` with its
    number, and, on a map, ``area``.

    Args:
        polygons: Regions of a label map.
        table: The classes.
        place: Where the image lies on a map. Without it, coordinates are pixels from the top left
            corner, with y pointing down. The coordinate system is given in the member ``crs`` of
            GeoJSON 2008, which GDAL and QGIS read; RFC 7946 allows degrees only.

    Returns:
        JSON-ready content. Outer rings have positive area and holes negative, as GeoJSON requires.
    """
    features = list(geojson_features(polygons, table, place))
    return {"type": "FeatureCollection", **_crs_member(place), "features": features}


def geojson_features(
    polygons: Iterable[Polygon], table: ClassTable, place: GeoReference | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the features of :func:`to_geojson` one by one."""
    a, b, c, d, e, f = place.transform if place else (1, 0, 0, 0, 1, 0)
    # Where y points up, as on most maps, the rings run the other way round.
    step = -1 if a * e - b * d < 0 else 1
    for polygon in polygons:
        coordinates = []
        for ring in polygon.rings:
            x, y = np.concatenate([ring, ring[:1]])[::step].T
            coordinates.append(np.stack([a * x + b * y + c, d * x + e * y + f], axis=1).tolist())
        properties: dict[str, Any] = {
            "class": table.names[polygon.value],
            "id": polygon.value,
            "pixels": polygon.pixels,
        }
        if polygon.number:
            properties["object"] = polygon.number
        if place:
            properties["area"] = polygon.pixels * place.pixel_area
        geometry = {"type": "Polygon", "coordinates": coordinates}
        yield {"type": "Feature", "properties": properties, "geometry": geometry}


def _crs_member(place: GeoReference | None) -> dict[str, Any]:
    authority, _, code = (place.crs if place else "").partition(":")
    if not code:
        return {}
    name = f"urn:ogc:def:crs:{authority}::{code}"
    return {"crs": {"type": "name", "properties": {"name": name}}}


def _trace_rings(numbers: NDArray[np.int64]) -> tuple[list[int], list[Ring]]:
    """Return the rings around numbered regions, and the number of the region of each.

    Outer rings come first, in the order of first pixels. The number 0 has no rings.

    A ring consists of straight edges in four directions: right, down, left and up, with its region
    on the right. The edges of one direction along one line start and end alternately, so the k-th
    edge that starts is the k-th that ends, and where one edge ends another starts.
    """
    padded = np.pad(numbers, 1)
    # The four pixels around each corner: lower right, lower left, upper left, upper right.
    around = (padded[1:, 1:], padded[1:, :-1], padded[:-1, :-1], padded[:-1, 1:])
    is_corner = (around[0] != around[1]) | (around[2] != around[3]) | (around[0] != around[3])
    rows, columns = np.nonzero(is_corner)
    if not rows.size:
        return [], []
    corners = [part[rows, columns] for part in around]
    # Corners along the rows, and along the columns.
    orders = (np.arange(len(rows)), np.argsort(columns, kind="stable"))
    starts, ends, left_turns = [], [], []
    for direction in range(4):
        ahead, behind, behind_left, ahead_left = (corners[(direction + k) % 4] for k in range(4))
        continues = (ahead == behind) & (ahead != 0)
        is_start = (ahead != 0) & (ahead != ahead_left) & ~(continues & (behind != behind_left))
        is_end = (behind != 0) & (behind != behind_left) & ~(continues & (ahead != ahead_left))
        order = orders[direction % 2]
        starts.append(order[is_start[order]])
        ends.append(order[is_end[order]])
        # A ring also turns left across a corner where its region touches itself, so that no ring
        # touches itself.
        left_turns.append((ahead_left == behind)[ends[-1]])
    first_edge = np.cumsum([0, *(len(part) for part in starts)])
    # The edge that starts at a corner, by direction.
    edge_at = np.zeros((4, len(rows)), np.int64)
    for direction in range(4):
        edges = np.arange(first_edge[direction], first_edge[direction + 1])
        edge_at[direction, starts[direction]] = edges
    following = np.concatenate(
        [edge_at[(k + np.where(left_turns[k], 3, 1)) % 4, ends[k]] for k in range(4)]
    )
    members, ring_starts = _follow_cycles(following.tolist(), len(starts[0]))
    places = np.concatenate(starts)[members]
    points = np.stack([columns[places], rows[places]], axis=1)
    return corners[0][places[ring_starts]].tolist(), np.split(points, ring_starts[1:])


def _follow_cycles(following: list[int], count: int) -> tuple[list[int], list[int]]:
    """Follow the cycles of a permutation that have a member below ``count``, lowest first.

    Returns:
        The members of all cycles, and the index at which each cycle starts.
    """
    order: list[int] = []
    starts = []
    visited = bytearray(len(following))
    for edge in range(count):
        if not visited[edge]:
            starts.append(len(order))
        while not visited[edge]:
            visited[edge] = 1
            order.append(edge)
            edge = following[edge]
    return order, starts


def clean_label_map(label: Label, min_region: int = 0, max_hole: int = 0) -> Label:
    """Fill small holes, then merge small regions, by the rules of this module.

    Args:
        label: Class ids ``(H, W)``; it is not changed.
        min_region: Regions with fewer pixels change their class; 0: none.
        max_hole: Holes with fewer pixels are filled; 0: none.
    """
    if max_hole > 1:
        label = fill_holes(label, max_hole)
    return merge_regions(label, min_region) if min_region > 1 else label


def fill_holes(label: Label, below: int) -> Label:
    """Fill every hole with fewer than ``below`` pixels with the class around it."""
    filled, largest = label.copy(), np.zeros(label.shape, np.int64)
    for value in np.setdiff1d(label, [IGNORE]).tolist():
        numbers = components(label != value)
        sizes = np.bincount(numbers.ravel())
        edge_and_ignored = (
            numbers[[0, -1]].ravel(),
            numbers[:, [0, -1]].ravel(),
            numbers[label == IGNORE],
        )
        sizes[np.concatenate(edge_and_ignored)] = 0
        sizes[(sizes >= below) | (np.arange(len(sizes)) == 0)] = 0
        hole = sizes[numbers]
        wins = hole > largest
        filled[wins], largest[wins] = value, hole[wins]
    return filled


def merge_regions(label: Label, below: int) -> Label:
    """Give every region with fewer than ``below`` pixels the class of its surroundings."""
    while True:
        numbers = regions(label)
        sizes = np.bincount(numbers.ravel())
        values = np.empty(len(sizes), np.uint8)
        values[numbers] = label
        small, known = sizes < below, values != IGNORE
        own, other = _region_borders(numbers)
        counts = (small & known)[own] & (~small & known)[other]
        if not counts.any():
            return label
        pairs, lengths = np.unique(own[counts] * 256 + values[other[counts]], return_counts=True)
        region, value = np.divmod(pairs, 256)
        # Of the candidates of a region the one that is assigned last stays.
        order = np.lexsort((-value, lengths))
        values[region[order]] = value[order]
        label = values[numbers]


def _region_borders(
    numbers: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the regions on both sides of every border between pixels, each border twice."""
    across, down = numbers[:, 1:] != numbers[:, :-1], numbers[1:] != numbers[:-1]
    first = np.concatenate([numbers[:, 1:][across], numbers[1:][down]])
    second = np.concatenate([numbers[:, :-1][across], numbers[:-1][down]])
    return np.concatenate([first, second]), np.concatenate([second, first])
