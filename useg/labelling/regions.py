"""Clicks -> the region that they mean, by superpixels and random walks between them.

Superpixels are those of SLIC (Achanta et al., 2012). From each one, random walks that rarely cross
strong edges meet a click inside with some probability before they meet one outside or end (Grady,
2006, with walks that end). The region is the set of superpixels, in the order of this probability,
with the smallest conductance: a sweep cut (Andersen, Chung and Lang, 2006).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from useg.images.files import Image, resize_image
from useg.pictures import to_picture
from useg.scoring.regions import regions

# An excerpt is analysed at this number of pixels at most; small ones are enlarged, up to 4 times.
MAX_EXCERPT_PIXELS = 250_000
MIN_EXCERPT_PIXELS = 60_000
MAX_ENLARGED = 4.0
# Superpixels of an excerpt, about; the finest ones are this number of pixels wide.
NUM_SUPERPIXELS = 2000
MIN_SUPERPIXEL_SIDE = 5
_SLIC_ROUNDS = 4
# How much a superpixel prefers to be compact; colours differ by up to 3.
_COMPACTNESS = 0.25
# How much neighbours may differ, in units of their usual difference.
_SOFTNESS = 1.0
# How likely a walk ends at each step.
_END = 0.001
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
    factor = max(factor, min(MAX_ENLARGED, (MIN_EXCERPT_PIXELS / (width * height)) ** 0.5))
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
    # Many edges are strong in a scene, few around a single object: between both usual differences.
    usual = float(np.median(distances) * distances.mean()) ** 0.5 if len(distances) else 1.0
    scale = _SOFTNESS * max(usual, 1e-4)
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
    stops = np.setdiff1d(_superpixels_at(superpixels, outside), starts)
    reached = _reach(superpixels, starts, stops, degrees)
    order = np.argsort(-reached, kind="stable")
    order = order[(reached[order] > 0) & ~np.isin(order, np.concatenate((starts, stops)))]
    order = np.concatenate((starts, order))
    chosen = np.zeros(count, bool)
    chosen[order[: _best_prefix(superpixels, order, degrees, len(starts))]] = True
    return _enlarge(chosen[superpixels.numbers], superpixels.size)


def superpixel_at(superpixels: Superpixels, point: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the superpixel at (column, row), ``(height, width)`` of the excerpt."""
    mine = superpixels.numbers == _superpixels_at(superpixels, [point])[0]
    return _enlarge(mine, superpixels.size)


def _enlarge(region: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return a region of the analysed pixels at ``size = (width, height)`` of the excerpt.

    Centres of pixels count, so nothing is shifted.
    """
    width, height = size
    rows = (2 * np.arange(height) + 1) * region.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * region.shape[1] // (2 * width)
    enlarged: NDArray[np.bool_] = region[rows][:, columns]
    return enlarged


def _superpixels_at(superpixels: Superpixels, points: Clicks) -> NDArray[np.int64]:
    width, height = superpixels.size
    h, w = superpixels.numbers.shape
    found = [
        superpixels.numbers[(2 * y + 1) * h // (2 * height), (2 * x + 1) * w // (2 * width)]
        for x, y in points
    ]
    return np.unique(np.array(found, np.int64))


def _reach(
    superpixels: Superpixels,
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    degrees: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the probability that a walk from each superpixel meets a start first.

    At each step it ends with the probability ``_END``, and at a stop always.
    """
    from scipy import sparse
    from scipy.sparse.linalg import spsolve

    first, second = superpixels.edges.T
    count = len(degrees)
    weights = sparse.coo_matrix((superpixels.weights, (first, second)), (count, count))
    laplacian = (sparse.diags(degrees * (1 + _END)) - weights - weights.T).tocsc()
    reached = np.zeros(count)
    reached[starts] = 1
    free = np.setdiff1d(np.arange(count), np.concatenate((starts, stops)))
    if len(free):
        given = laplacian[free][:, starts] @ reached[starts]
        reached[free] = spsolve(laplacian[free][:, free], -given)
    return reached


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
