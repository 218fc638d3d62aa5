"""Clicks -> the region that they select, with superpixels and random walks between them.

Superpixels are computed with SLIC (Achanta et al., 2012). A random walk from a superpixel rarely
crosses strong edges, and may end at each step. Superpixels are sorted by the probability that a
walk reaches a click inside the region before it reaches one outside or ends (after Grady, 2006). A
sweep cut selects the first ones, with the smallest conductance (Andersen, Chung and Lang, 2006).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from useg.images.image_files import Image, resize_image
from useg.scoring.metrics import regions
from useg.visualization import to_picture

# The view is resized to a number of pixels in this range, but enlarged at most 4 times per side.
MAX_EXCERPT_PIXELS = 250_000
MIN_EXCERPT_PIXELS = 60_000
MAX_ENLARGED = 4.0
# Approximate number of superpixels in a view, and their minimum width in pixels.
NUM_SUPERPIXELS = 2000
MIN_SUPERPIXEL_SIDE = 5
_SLIC_ROUNDS = 4
# Weight of compactness against colour in SLIC; colours differ by up to 3.
_COMPACTNESS = 0.25
# Scale of colour differences between neighbours, relative to the typical difference.
_SOFTNESS = 1.0
# Probability that a walk ends at each step.
_END = 0.001
# Share of the view that a region may cover.
_MAX_SHARE = 0.6
# Weight of the model's probabilities relative to colours.
_MODEL_WEIGHT = 0.6

Clicks = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Superpixels:
    """The superpixels of a view, and the graph that connects them.

    Args:
        numbers: The superpixel of each pixel of the resized view, ``(h, w)``.
        size: ``(width, height)`` of the view.
        edges: Pairs of neighbouring superpixels, ``(E, 2)``.
        weights: The similarity of each pair, ``(E,)``.
    """

    numbers: NDArray[np.int64]
    size: tuple[int, int]
    edges: NDArray[np.int64]
    weights: NDArray[np.float64]


def find_superpixels(image: Image, probabilities: NDArray[np.float32] | None = None) -> Superpixels:
    """Divide an image ``(H, W, C)`` into superpixels.

    Args:
        image: The image, or a view of it.
        probabilities: The probabilities ``(K, h, w)`` of a model for it, at any size; or None.
    """
    height, width = image.shape[:2]
    factor = min(1.0, (MAX_EXCERPT_PIXELS / (width * height)) ** 0.5)
    factor = max(factor, min(MAX_ENLARGED, (MIN_EXCERPT_PIXELS / (width * height)) ** 0.5))
    small = (max(1, round(width * factor)), max(1, round(height * factor)))
    features = _opponent_colors(resize_image(to_picture(image), small))
    numbers = regions(_slic(features))
    count = int(numbers.max()) + 1
    means = _means(features, numbers, count)
    if probabilities is not None:
        rows = np.arange(small[1]) * probabilities.shape[1] // small[1]
        columns = np.arange(small[0]) * probabilities.shape[2] // small[0]
        moved = np.moveaxis(probabilities[:, rows][:, :, columns], 0, -1)
        means = np.hstack((means, _MODEL_WEIGHT * _means(moved, numbers, count)))
    edges, lengths = _neighbours(numbers, count)
    distances = ((means[edges[:, 0]] - means[edges[:, 1]]) ** 2).sum(1)
    # A scene has many strong edges, a single object few. The geometric mean of median and mean
    # works for both.
    typical = float(np.median(distances) * distances.mean()) ** 0.5 if len(distances) else 1.0
    scale = _SOFTNESS * max(typical, 1e-4)
    return Superpixels(numbers, (width, height), edges, lengths * np.exp(-distances / scale) + 1e-6)


def _opponent_colors(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return brightness and two colour differences, each from 0 to about 1."""
    red, green, blue = np.moveaxis(np.sqrt(image.astype(np.float32) / 255), -1, 0)
    return np.stack(((red + green + blue) / 3, red - green, (red + green) / 2 - blue), -1)


def _slic(features: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the cluster of each pixel; a cluster may be disconnected."""
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
    """Return pairs of adjacent regions, and the length of each border in pixels."""
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
    """Return the region that clicks select.

    Args:
        superpixels: The superpixels of the view.
        inside: Clicks inside the region, (column, row) in the view; at least one.
        outside: Clicks outside the region.

    Returns:
        A mask ``(height, width)`` of the view.
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
    return _resize_to_view(chosen[superpixels.numbers], superpixels.size)


def superpixel_at(superpixels: Superpixels, point: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask ``(height, width)`` of the superpixel at (column, row) of the view."""
    mask = superpixels.numbers == _superpixels_at(superpixels, [point])[0]
    return _resize_to_view(mask, superpixels.size)


def _resize_to_view(region: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Resize a region to ``size = (width, height)`` of the view.

    Pixel centres are mapped, so the region is not shifted.
    """
    width, height = size
    rows = (2 * np.arange(height) + 1) * region.shape[0] // (2 * height)
    columns = (2 * np.arange(width) + 1) * region.shape[1] // (2 * width)
    resized: NDArray[np.bool_] = region[rows][:, columns]
    return resized


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
    """Return, for each superpixel, the probability that a walk from it reaches a start.

    A walk ends with probability ``_END`` at each step, and always at a stop.
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
    """Return the length of the prefix of ``order`` with the smallest conductance."""
    count = len(degrees)
    rank = np.full(count, len(order))
    rank[order] = np.arange(len(order))
    ends = np.sort(rank[superpixels.edges], axis=1)
    # A prefix cuts an edge if it contains exactly one of its ends.
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
