"""Clicks -> the region that they mean, by superpixels and random walks between them.

Superpixels are those of SLIC (Achanta et al., 2012). A random walk that starts at the clicks and
often returns to them (personalized PageRank) rarely crosses strong edges. The region is the set of
superpixels, in the order in which the walk visits them, with the smallest conductance: a sweep cut
(Andersen, Chung and Lang, 2006).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from useg.images.files import Image, resize_image
from useg.pictures import to_picture
from useg.scoring.regions import regions

# An excerpt is analysed at this number of pixels at most.
MAX_EXCERPT_PIXELS = 250_000
# Superpixels of an excerpt, about; the finest ones are this number of pixels wide.
NUM_SUPERPIXELS = 1200
MIN_SUPERPIXEL_SIDE = 6
_SLIC_ROUNDS = 4
# How much a superpixel prefers to be compact; colours differ by up to 3.
_COMPACTNESS = 0.25
# How often a walk returns to the clicks, and its steps.
_RETURN = 0.02
_WALK_STEPS = 120
# Share of the excerpt that a region may have.
_MAX_SHARE = 0.6
# How far a model's answer counts beside colours.
_MODEL_WEIGHT = 0.6

Clicks = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Superpixels:
    """The superpixels of an excerpt, and what connects them.

    Args:
        numbers: Number of the superpixel at each analysed pixel, ``(h, w)``.
        size: ``(width, height)`` of the excerpt.
        edges: Neighbouring superpixels, ``(E, 2)``.
        weights: How strongly they belong together, ``(E,)``.
    """

    numbers: NDArray[np.int64]
    size: tuple[int, int]
    edges: NDArray[np.int64]
    weights: NDArray[np.float64]


def find_superpixels(image: Image, answers: NDArray[np.float32] | None = None) -> Superpixels:
    """Divide an image ``(H, W, C)`` into superpixels.

    Args:
        image: The image or an excerpt.
        answers: A model's probabilities ``(K, h, w)`` for it, at any size; or None.
    """
    height, width = image.shape[:2]
    factor = min(1.0, (MAX_EXCERPT_PIXELS / (width * height)) ** 0.5)
    small = (max(1, round(width * factor)), max(1, round(height * factor)))
    features = _opponent_colors(resize_image(to_picture(image), small))
    numbers = regions(_slic(features))
    count = int(numbers.max()) + 1
    means = _means(features, numbers, count)
    if answers is not None:
        rows = np.arange(small[1]) * answers.shape[1] // small[1]
        columns = np.arange(small[0]) * answers.shape[2] // small[0]
        moved = np.moveaxis(answers[:, rows][:, :, columns], 0, -1)
        means = np.hstack((means, _MODEL_WEIGHT * _means(moved, numbers, count)))
    edges, lengths = _neighbours(numbers, count)
    distances = ((means[edges[:, 0]] - means[edges[:, 1]]) ** 2).sum(1)
    scale = 2 * max(float(np.median(distances)) if len(distances) else 1.0, 1e-4)
    return Superpixels(numbers, (width, height), edges, lengths * np.exp(-distances / scale) + 1e-6)


def _opponent_colors(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return brightness and two colour differences, 0 to about 1 each."""
    red, green, blue = np.moveaxis(np.sqrt(picture.astype(np.float32) / 255), -1, 0)
    return np.stack(((red + green + blue) / 3, red - green, (red + green) / 2 - blue), -1)


def _slic(features: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the cluster of each pixel; a cluster may have several parts."""
    height, width = features.shape[:2]
    side = max(float(MIN_SUPERPIXEL_SIDE), (height * width / NUM_SUPERPIXELS) ** 0.5)
    num_rows, num_columns = max(1, round(height / side)), max(1, round(width / side))
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    place = np.stack((rows, columns), -1) * np.float32(_COMPACTNESS / side)
    points = np.concatenate((features, place), -1)
    cell_row = (np.arange(height) * num_rows // height)[:, None]
    cell_column = (np.arange(width) * num_columns // width)[None]
    clusters: NDArray[np.int64] = cell_row * num_columns + cell_column
    count = num_rows * num_columns
    for _ in range(_SLIC_ROUNDS):
        centres = _means(points, clusters, count)
        best = np.full((height, width), np.inf, np.float32)
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                row = np.clip(cell_row + down, 0, num_rows - 1)
                column = np.clip(cell_column + right, 0, num_columns - 1)
                candidate = row * num_columns + column
                difference = points - centres[candidate]
                distance = np.einsum("hwc,hwc->hw", difference, difference)
                nearer = distance < best
                best[nearer] = distance[nearer]
                clusters = np.where(nearer, candidate, clusters)
    return clusters


def _means(
    values: NDArray[np.float32], numbers: NDArray[np.int64], count: int
) -> NDArray[np.float32]:
    """Return the mean of ``values`` ``(h, w, C)`` in each region, ``(count, C)``."""
    flat = numbers.ravel()
    sizes = np.maximum(1, np.bincount(flat, minlength=count))
    sums = [
        np.bincount(flat, values[..., c].ravel(), minlength=count) for c in range(values.shape[2])
    ]
    means: NDArray[np.float32] = (np.stack(sums, 1) / sizes[:, None]).astype(np.float32)
    return means


def _neighbours(
    numbers: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return pairs of regions that touch, and how many pixels long their border is."""
    pairs = np.concatenate(
        [
            np.stack((one.ravel(), other.ravel()), 1)
            for one, other in (
                (numbers[:, 1:], numbers[:, :-1]),
                (numbers[1:], numbers[:-1]),
            )
        ]
    )
    pairs = np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
    codes, lengths = np.unique(pairs[:, 0] * count + pairs[:, 1], return_counts=True)
    return np.stack((codes // count, codes % count), 1), lengths.astype(np.float64)


def propose_region(
    superpixels: Superpixels, inside: Clicks, outside: Clicks = ()
) -> NDArray[np.bool_]:
    """Return the region that clicks mean.

    Args:
        superpixels: Of the excerpt.
        inside: (column, row) in the excerpt of clicks inside the region, at least one.
        outside: Of clicks outside.

    Returns:
        ``(height, width)`` of the excerpt.
    """
    count = int(superpixels.numbers.max()) + 1
    first, second = superpixels.edges.T
    degrees = np.bincount(first, superpixels.weights, count) + np.bincount(
        second, superpixels.weights, count
    )
    degrees = np.maximum(degrees, 1e-12)
    starts = _superpixels_at(superpixels, inside)
    stops = _superpixels_at(superpixels, outside)
    visits = _walk(superpixels, starts, degrees)
    order = np.argsort(-visits / degrees, kind="stable")
    if len(stops):
        away = _walk(superpixels, stops, degrees)
        order = order[visits[order] > away[order]]
    order = np.concatenate((starts, order[~np.isin(order, np.concatenate((starts, stops)))]))
    chosen = np.zeros(count, bool)
    chosen[order[: _best_prefix(superpixels, order, degrees, len(starts))]] = True
    return _enlarge(chosen[superpixels.numbers], superpixels.size)


def superpixel_at(superpixels: Superpixels, point: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the superpixel at (column, row), ``(height, width)`` of the excerpt."""
    mine = superpixels.numbers == _superpixels_at(superpixels, [point])[0]
    return _enlarge(mine, superpixels.size)


def _enlarge(region: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return a region of the analysed pixels at ``size = (width, height)`` of the excerpt."""
    width, height = size
    rows = np.arange(height) * region.shape[0] // height
    columns = np.arange(width) * region.shape[1] // width
    enlarged: NDArray[np.bool_] = region[rows][:, columns]
    return enlarged


def _superpixels_at(superpixels: Superpixels, points: Clicks) -> NDArray[np.int64]:
    width, height = superpixels.size
    h, w = superpixels.numbers.shape
    found = [superpixels.numbers[y * h // height, x * w // width] for x, y in points]
    return np.unique(np.array(found, np.int64))


def _walk(
    superpixels: Superpixels, starts: NDArray[np.int64], degrees: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return how often a walk from the starts visits each superpixel."""
    first, second = superpixels.edges.T
    count = len(degrees)
    source = np.zeros(count)
    source[starts] = 1 / len(starts)
    visits = source.copy()
    for _ in range(_WALK_STEPS):
        leaving = visits / degrees
        moved = np.bincount(second, superpixels.weights * leaving[first], count)
        moved += np.bincount(first, superpixels.weights * leaving[second], count)
        # Half of the time the walk stays where it is, so that it does not alternate.
        visits = _RETURN * source + (1 - _RETURN) * (visits + moved) / 2
    return visits


def _best_prefix(
    superpixels: Superpixels,
    order: NDArray[np.int64],
    degrees: NDArray[np.float64],
    fewest: int,
) -> int:
    """Return how many superpixels of an order have the smallest conductance together."""
    count = len(degrees)
    rank = np.full(count, len(order))
    rank[order] = np.arange(len(order))
    ends = np.sort(rank[superpixels.edges], axis=1)
    # An edge is cut by the prefixes that hold one of its ends.
    opened = np.bincount(ends[:, 0], superpixels.weights, len(order) + 1)
    closed = np.bincount(ends[:, 1], superpixels.weights, len(order) + 1)
    cut = np.cumsum(opened - closed)[: len(order)]
    volume = np.cumsum(degrees[order])
    total = float(degrees.sum())
    conductance = cut / np.maximum(np.minimum(volume, total - volume), 1e-12)
    sizes = np.bincount(superpixels.numbers.ravel(), minlength=count)
    share = np.cumsum(sizes[order]) / sizes.sum()
    allowed = share <= _MAX_SHARE
    allowed[: max(1, fewest) - 1] = False
    allowed[max(1, fewest) - 1] = True
    return int(np.where(allowed, conductance, np.inf).argmin()) + 1
