"""Numbered objects -> the depth of each pixel, which a network learns, and back from it to objects.

The depth of a pixel is its distance to the outline of its object, as a share of the largest such
distance in that object. It is 1 in the middle of an object, falls towards the outline, and so has a
valley wherever two objects touch. As a share it does not depend on the scale, so it can be cut,
flipped and zoomed like a label.

To separate objects, the depths are cut at ``DEPTHS``. At the lowest cut, touching objects form one
region; at a higher cut they separate, because the depth has a valley between them. A region that
falls into several parts is split: its parts are the seeds of objects. Small parts do not count
(:func:`_min_part_pixels`). Every other region is one object. Then all seeds grow simultaneously,
one pixel at a time, until they fill their regions.

If the objects of an image are larger than those of every training image, parts have to be deeper
than the cut by :attr:`Cuts.rise`: the network sees the image reduced, with more detail inside of
objects, which makes shallow valleys.

Regions are connected across tile borders, and a pixel gets the number of a direct neighbour by a
fixed rule, so the result does not depend on the tiles. Arrays may be memory-mapped files: only a
few tiles are in memory at a time, plus the tables of the regions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import Label


@dataclass(frozen=True)
class Cuts:
    """Where depths are cut, to separate objects.

    Args:
        depths: The cuts, as shares of the largest depth.
        rise: How many cuts further the depth of a part has to reach.
    """

    depths: tuple[float, ...]
    rise: int = 0


USUAL_CUTS = Cuts((0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8))
CUTS_OF_LARGER_OBJECTS = Cuts(tuple(percent / 100 for percent in range(10, 87, 4)), rise=3)

# A part of a region does not become a separate object if it has fewer pixels, or if it belongs to
# an object of less than this share of the area of a typical one.
MIN_PART_PIXELS, MIN_PART_SHARE = 6, 0.2

# The uncertainty of an object is 1 minus the mean probability of its class. An object is dropped if
# its uncertainty is above this, and this many times that of the median object of the image.
MIN_UNCERTAINTY, UNCERTAIN_RATIO = 0.1, 3

# Maximum growth of seeds. Pixels that they do not reach become separate objects.
MAX_GROWTH_PIXELS = 128

# (H, W): 0 outside of objects. In them 1, plus the number of cuts that the depth exceeds; for a
# model that computes no depth 1 plus the class.
Levels = NDArray[np.uint8]

# (H, W) uint32: the number of the object of each pixel, from 1 on; 0 for none.
ObjectMap = NDArray[np.uint32]

# A rectangle of an image: rows and columns.
Tile = tuple[slice, slice]

# An array ``(H, W)`` or a file that is read and written by rectangles like one.
Stored = Any


# (H, W): the number of the object of each pixel; 0 for none.
ObjectIds = NDArray[Any]
# Objects at most this number of pixels apart count as touching: a network joins them, too.
MAX_GAP_PIXELS = 1
# Found objects are specks if they are smaller than this share of the middle training object, and
# smaller than all training objects but this percentage.
SPECK_SHARE, SMALL_PERCENT = 0.2, 1
# Depths are stored in a byte.
_MAX_DEPTH = 255
# Uncertainties are summed as whole numbers of such steps, so sums do not depend on the tiles.
_UNCERTAINTY_STEPS = 10_000


@dataclass(frozen=True)
class ObjectStatistics:
    """Statistics of the objects in the training masks.

    Args:
        touching: The largest share of an image's objects that touch another one.
        min_pixels: The minimum number of pixels of an object; 0 without objects.
        side: The side of a typical object (:func:`typical_side`) in a typical image; 0 without
            objects.
        largest_side: The same in the image with the largest objects.
    """

    touching: float = 0.0
    min_pixels: int = 0
    side: float = 0.0
    largest_side: float = 0.0

    @classmethod
    def of(cls, maps: Iterable[ObjectIds]) -> ObjectStatistics:
        """Measure the true objects of some images, each ``(H, W)``."""
        touching, areas = [0.0], []
        for objects in maps:
            touching.append(share_touching(objects))
            areas.append(np.unique(objects[objects > 0], return_counts=True)[1])
        sides = [typical_side(each) for each in areas if each.size]
        side, largest_side = (np.median(sides), max(sides)) if sides else (0, 0)
        return cls(max(touching), measure_min_pixels(areas), float(side), float(largest_side))


def typical_side(areas: NDArray[Any]) -> float:
    """Return the side of a square as large as the middle one of some objects, in pixels.

    Args:
        areas: The pixels of each object ``(n,)``, at least one.

    >>> typical_side(np.array([4, 9, 400]))
    3.0
    """
    return float(np.sqrt(np.median(areas)))


def measure_depth(objects: ObjectIds) -> NDArray[np.uint8]:
    """Return the depth of each pixel ``(H, W)``: 0 outside of objects, 1 to 255 in them.

    The image edge is not an outline: an object that it cuts continues beyond it.

    >>> measure_depth(np.array([[0, 2, 2, 2, 2, 2, 0]])).tolist()
    [[0, 85, 170, 255, 170, 85, 0]]
    """
    from scipy import ndimage

    depth = np.zeros(objects.shape, np.uint8)
    numbers = np.unique(objects, return_inverse=True)[1].reshape(objects.shape)
    # The numbers of the objects may have gaps, and 0 may be missing.
    numbers = np.where(objects > 0, numbers + 1, 0)
    for number, place in enumerate(ndimage.find_objects(numbers), 1):
        if place is None:
            continue
        own = numbers[place] == number
        # A frame of outside, but for the sides at which the image ends.
        frame = [
            (int(side.start > 0), int(side.stop < length))
            for side, length in zip(place, objects.shape, strict=True)
        ]
        framed = np.pad(own, frame)
        inside = tuple(
            slice(before, before + length)
            for (before, _), length in zip(frame, own.shape, strict=True)
        )
        if framed.all():
            depth[place][own] = _MAX_DEPTH
            continue
        distance = ndimage.distance_transform_edt(framed)[inside]
        share = np.rint(_MAX_DEPTH * distance[own] / distance.max())
        depth[place][own] = np.maximum(1, share).astype(np.uint8)
    return depth


def share_touching(objects: ObjectIds) -> float:
    """Return the share of the objects next to another one, with a gap of at most one pixel.

    >>> share_touching(np.array([[1, 1, 2, 0, 3, 0, 0, 4]]))
    0.75
    """
    found: list[NDArray[Any]] = []
    for axis in (0, 1):
        for step in range(1, MAX_GAP_PIXELS + 2):
            along = np.moveaxis(objects, axis, 0)
            first, second = along[:-step], along[step:]
            near = (first != second) & (first > 0) & (second > 0)
            found += [first[near], second[near]]
    total = np.count_nonzero(np.unique(objects))
    touching = len(np.unique(np.concatenate(found)))
    return float(touching / total) if total else 0.0


def measure_min_pixels(areas: Iterable[NDArray[Any]]) -> int:
    """Return the minimum number of pixels of a predicted object; smaller ones are specks.

    Args:
        areas: The pixels of each true object, ``(n,)`` for each image.

    >>> measure_min_pixels([np.array([30, 50]), np.array([50])])
    10
    >>> measure_min_pixels([np.array([5, 5, 50, 50, 50])])
    5
    """
    found = np.concatenate([np.zeros(0, np.int64), *areas])
    if not found.size:
        return 0
    small, middle = np.percentile(found, (SMALL_PERCENT, 50))
    return int(min(small, SPECK_SHARE * middle))


def choose_cuts(are_larger: bool) -> Cuts:
    """Return the cuts for an image whose objects are, or are not, larger than in training."""
    return CUTS_OF_LARGER_OBJECTS if are_larger else USUAL_CUTS


def find_levels(
    label: Label,
    depth: NDArray[np.float32] | None,
    object_classes: Sequence[int],
    cuts: Cuts = USUAL_CUTS,
) -> Levels:
    """Return the level of each pixel ``(H, W)``.

    Args:
        label: Class ids ``(H, W)``.
        depth: Logits of the depth ``(H, W)``; None if the model computes none.
        object_classes: The classes that consist of objects.
        cuts: The cuts.

    >>> find_levels(np.uint8([[0, 1, 1]]), np.float32([[9, -9, 0.1]]), [1]).tolist()
    [[0, 1, 5]]
    """
    is_object = np.zeros(256, np.uint8)
    is_object[list(object_classes)] = 1
    inside = is_object[label]
    if depth is None:
        return inside * (label + np.uint8(1))
    logits = [np.float32(np.log(cut / (1 - cut))) for cut in cuts.depths]
    levels: Levels = inside * (1 + np.searchsorted(logits, depth)).astype(np.uint8)
    return levels


def separate(
    levels: Stored,
    numbers: Sequence[Stored],
    *,
    by_class: bool = False,
    min_pixels: int = 0,
    side: float = 0.0,
    cuts: Cuts = USUAL_CUTS,
    confidences: Stored | None = None,
    tile: int | None = None,
) -> int:
    """Number the objects in the order of their first pixels, row by row.

    Args:
        levels: As :func:`find_levels` returns them.
        numbers: Two maps ``(H, W)`` uint32: the first receives the number of each pixel's object,
            the second is working memory.
        by_class: Whether the levels are classes: each connected region of one class is an object.
        min_pixels: An object with fewer pixels gets no number.
        side: The side of a typical object (:func:`typical_side`); 0 if it is unknown.
        cuts: Those of the levels.
        confidences: The probability of each pixel's class ``(H, W)``: uncertain objects get no
            number. If None, they do.
        tile: Side of the tiles in pixels; None works on the whole at once.

    Returns:
        The number of objects.
    """
    tiles = list(split_tiles(levels.shape, tile))
    highest = 1 if by_class else max(int(levels[place].max(initial=1)) for place in tiles)
    regions = _connect(lambda place: levels[place], tiles, highest, by_class=by_class)
    seeds = _choose_seeds(regions, side, cuts)
    for k, place in enumerate(tiles):
        found = np.zeros(levels[place].shape, np.uint32)
        for cut, (region, seed) in enumerate(zip(regions, seeds, strict=True), 1):
            if seed.any():
                part = seed[region.of_tile(_label(levels[place], cut, by_class=by_class), k)]
                np.copyto(found, part, where=part > 0)
        numbers[1][place] = found
    for place in tiles:
        numbers[0][place] = _grow_tile(numbers[1], levels, place)
    num_seeds = max(int(each.max()) for each in seeds)
    return _number(levels, numbers[0], tiles, num_seeds, min_pixels, confidences)


def split_tiles(shape: tuple[int, ...], tile: int | None) -> Iterator[Tile]:
    """Cover ``(H, W)`` with squares of ``tile`` pixels, row by row, or with one rectangle."""
    sides = [tile or max(1, length) for length in shape]
    starts = [range(0, length, side) for length, side in zip(shape, sides, strict=True)]
    for top, left in product(*starts):
        yield (
            slice(top, min(top + sides[0], shape[0])),
            slice(left, min(left + sides[1], shape[1])),
        )


def _label(values: Levels, cut: int, *, by_class: bool = False) -> NDArray[np.int64]:
    """Number the 4-connected regions of at least ``cut``: 1, 2, ...; 0 is outside."""
    from scipy import ndimage

    if not by_class:
        return np.asarray(ndimage.label(values >= cut)[0], np.int64)
    numbered = np.zeros(values.shape, np.int64)
    for value in np.flatnonzero(np.bincount(values.ravel(), minlength=2)[1:]) + 1:
        own = values == value
        numbered[own] = ndimage.label(own)[0][own] + numbered.max()
    return numbered


@dataclass(frozen=True)
class _Regions:
    """The connected regions at one cut.

    Args: offsets: What is added to the numbers 1, 2, ... of each tile's regions, to keep them
    different. root: ``(M + 1,)``: the region of the whole image, from 1 on, for each of these.
    areas: ``(N + 1,)``: the pixels of each region of the whole image. parents: ``(N + 1,)``:
    the region at the cut below that contains it.
    """

    offsets: list[int]
    root: NDArray[np.int64]
    areas: NDArray[np.int64]
    parents: NDArray[np.int64]

    def of_tile(self, numbered: NDArray[np.int64], k: int) -> NDArray[np.int64]:
        """Return the region of the whole image for each pixel of tile ``k``."""
        return self.root[np.where(numbered > 0, numbered + self.offsets[k], 0)]


class _TileRegions:
    """Collects the regions of all tiles at one cut, and which of them touch across a border."""

    def __init__(self, width: int) -> None:
        self.offsets: list[int] = []
        self.count = 0
        self._areas: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self._parents: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
        self._links: list[NDArray[np.int64]] = []
        # The lowest row of the tiles above, and the last column of the tile on the left.
        self._above = np.zeros((2, width), np.int64)
        self._left = np.zeros((2, 0), np.int64)

    def add(
        self, numbered: NDArray[np.int64], values: Levels, place: Tile, lower: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Add a tile; ``lower`` has its numbers at the cut below. Return its numbers here."""
        self.offsets.append(self.count)
        sizes = np.bincount(numbered.ravel())
        parents = np.zeros(len(sizes), np.int64)
        parents[numbered] = lower
        self._areas.append(sizes[1:])
        self._parents.append(parents[1:])
        shifted = np.where(numbered > 0, numbered + self.count, 0)
        self.count += len(sizes) - 1
        rows, columns = place
        known = np.stack([shifted, values])
        if rows.start:
            self._link(self._above[:, columns], known[:, 0])
        if columns.start:
            self._link(self._left, known[:, :, 0])
        self._above[:, columns], self._left = known[:, -1], known[:, :, -1]
        return shifted

    def _link(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> None:
        touching = (first[0] > 0) & (second[0] > 0) & (first[1] == second[1])
        self._links.append(np.stack([first[0], second[0]])[:, touching])

    def join(self, lower: _Regions | None) -> _Regions:
        """Join the regions that touch; ``lower`` are those at the cut below."""
        from scipy import sparse

        links = np.concatenate([np.zeros((2, 0), np.int64), *self._links], axis=1)
        size = self.count + 1
        graph = sparse.coo_matrix((np.ones(links.shape[1], bool), tuple(links)), (size, size))
        # The outside, number 0, is the first component.
        root = sparse.csgraph.connected_components(graph, directed=False)[1].astype(np.int64)
        areas = np.bincount(root, np.concatenate(self._areas)).astype(np.int64)
        parents = np.zeros(len(areas), np.int64)
        if lower:
            parents[root] = lower.root[np.concatenate(self._parents)]
        return _Regions(self.offsets, root, areas, parents)


def _connect(
    read: Callable[[Tile], Levels], tiles: Sequence[Tile], highest: int, *, by_class: bool = False
) -> list[_Regions]:
    """Find the regions of the whole image at each cut from 1 to ``highest``."""
    width = max(columns.stop for _, columns in tiles)
    found = [_TileRegions(width) for _ in range(highest)]
    for place in tiles:
        values = read(place)
        numbers = np.zeros(values.shape, np.int64)
        for cut, each in enumerate(found, 1):
            numbered = _label(values, cut, by_class=by_class)
            # Above the lowest cut, neighbours with different values are connected, too.
            compared = values if by_class else np.zeros_like(values)
            numbers = each.add(numbered, compared, place, numbers)
    regions: list[_Regions] = []
    for each in found:
        regions.append(each.join(regions[-1] if regions else None))
    return regions


def _min_part_pixels(cut: float, side: float) -> float:
    """Return the pixels that a part needs at a cut, to become a separate object.

    The pixels of a disc that are deeper than the cut have ``(1 - cut) ** 2`` of its area.
    """
    return max(MIN_PART_PIXELS, MIN_PART_SHARE * (side * (1 - cut)) ** 2)


def _choose_seeds(regions: Sequence[_Regions], side: float, cuts: Cuts) -> list[NDArray[np.uint32]]:
    """Return the number of the seed of each region, at each cut; 0 if it is not a seed."""
    chain = np.arange(len(regions[0].areas), dtype=np.int64)
    seeds, count = [chain.copy()], len(chain)
    split: list[NDArray[np.int64]] = []
    for k, (cut, region) in enumerate(zip(cuts.depths, regions[1:], strict=False), 1):
        own = chain[region.parents]
        own[region.areas < _min_part_pixels(cut, side)] = 0
        own[~_reach_higher(regions[k : k + cuts.rise + 1], cuts.rise)] = 0
        own[0] = 0
        parts = np.bincount(region.parents[own > 0], minlength=len(chain))
        is_part = (own > 0) & (parts[region.parents] > 1)
        split.append(own[is_part])
        fresh = np.where(is_part, np.cumsum(is_part) + count - 1, 0)
        count += int(is_part.sum())
        chain = np.where(is_part, fresh, own)
        seeds.append(fresh)
    is_split = np.zeros(count, bool)
    is_split[np.concatenate([np.zeros(0, np.int64), *split])] = True
    return [np.where(is_split[each], 0, each).astype(np.uint32) for each in seeds]


def _reach_higher(regions: Sequence[_Regions], rise: int) -> NDArray[np.bool_]:
    """Return which regions at the first of some cuts contain one that is ``rise`` cuts higher."""
    reached = np.full(len(regions[-1].areas), len(regions) > rise)
    for lower, higher in zip(regions[-2::-1], regions[:0:-1], strict=True):
        below = np.zeros(len(lower.areas), bool)
        below[higher.parents[reached]] = True
        reached = below
    return reached


def _grow_tile(seeds: Stored, levels: Stored, place: Tile) -> ObjectMap:
    """Grow the seeds in and around a tile; return their numbers in the tile."""
    own = np.array(seeds[place])
    if not ((own == 0) & (levels[place] > 0)).any():
        return own
    starts = [max(0, side.start - MAX_GROWTH_PIXELS) for side in place]
    around = tuple(
        slice(start, side.stop + MAX_GROWTH_PIXELS)
        for start, side in zip(starts, place, strict=True)
    )
    grown = grow(np.array(seeds[around]), levels[around] > 0)
    inside = tuple(
        slice(side.start - start, side.stop - start)
        for start, side in zip(starts, place, strict=True)
    )
    return grown[inside]


def grow(seeds: ObjectMap, inside: NDArray[np.bool_]) -> ObjectMap:
    """Let seeds grow into the free pixels next to them, one pixel at a time and all at once.

    A pixel that several reach at the same time goes to the one above it, else left, right, below.

    Args:
        seeds: ``(H, W)``: numbers from 1 on, 0 where free.
        inside: Where they may grow.

    >>> grow(np.uint32([[1, 0, 0, 0, 2]]), np.ones((1, 5), bool)).tolist()
    [[1, 1, 1, 2, 2]]
    """
    # A frame of pixels that are not free, so that no step leaves the array.
    numbers = np.pad(seeds, 1).ravel()
    free = (np.pad(inside, 1)).ravel() & (numbers == 0)
    step = seeds.shape[1] + 2
    edge = np.flatnonzero(numbers)
    for _ in range(MAX_GROWTH_PIXELS):
        reached = []
        # What is written last counts.
        for shift in (-step, -1, 1, step):
            target = edge + shift
            is_free = free[target]
            numbers[target[is_free]] = numbers[edge[is_free]]
            reached.append(target[is_free])
        edge = np.unique(np.concatenate(reached))
        if not edge.size:
            break
        free[edge] = False
    return numbers.reshape(-1, step)[1:-1, 1:-1]


def _number(
    levels: Stored,
    numbers: Stored,
    tiles: Sequence[Tile],
    num_seeds: int,
    min_pixels: int,
    confidences: Stored | None,
) -> int:
    """Make objects of pixels that no seed has reached, and number all by their first pixels.

    Args:
        levels: The level of each pixel.
        numbers: The seed that has reached each pixel; receives the result.
        tiles: All tiles.
        num_seeds: The highest number of a seed.
        min_pixels: Smaller objects get no number.
        confidences: The probability of each pixel's class, or None.
    """

    def read_rest(place: Tile) -> Levels:
        rest: Levels = ((levels[place] > 0) & (numbers[place] == 0)).astype(np.uint8)
        return rest

    (rest,) = _connect(read_rest, tiles, 1)
    first = np.full(num_seeds + len(rest.areas), levels.size, np.int64)
    areas, uncertainties = np.zeros_like(first), np.zeros_like(first)
    for k, place in enumerate(tiles):
        found = np.array(numbers[place])
        left = rest.of_tile(_label(read_rest(place), 1), k)
        np.copyto(found, (left + num_seeds).astype(np.uint32), where=left > 0)
        numbers[place] = found
        values, index, inverse, counts = np.unique(
            found, return_index=True, return_inverse=True, return_counts=True
        )
        areas[values] += counts
        if confidences is not None:
            steps = np.rint(_UNCERTAINTY_STEPS * (1 - confidences[place])).ravel()
            uncertainties[values] += np.bincount(inverse.ravel(), steps).astype(np.int64)
        row, column = np.divmod(index, found.shape[1])
        position = (row + place[0].start) * levels.shape[1] + column + place[1].start
        first[values] = np.minimum(first[values], position)
    first[areas < min_pixels] = levels.size
    means = uncertainties / (_UNCERTAINTY_STEPS * np.maximum(1, areas))
    first[_are_uncertain(means, first < levels.size)] = levels.size
    first[0] = -1
    order = np.argsort(first, kind="stable")
    rank = np.empty(len(first), np.uint32)
    rank[order] = np.arange(len(first), dtype=np.uint32)
    rank[first == levels.size] = 0
    for place in tiles:
        numbers[place] = rank[numbers[place]]
    return int((first < levels.size).sum()) - 1


def _are_uncertain(
    uncertainties: NDArray[np.float64], is_object: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return which objects are much less certain than the median object of the image.

    Args:
        uncertainties: 1 minus the mean probability of each number's pixels ``(N,)``.
        is_object: Which numbers are objects ``(N,)``; number 0 is not one.
    """
    counted = uncertainties[1:][is_object[1:]]
    typical = np.median(counted) if counted.size else 0.0
    limit = max(MIN_UNCERTAINTY, UNCERTAIN_RATIO * typical)
    return uncertainties > limit
