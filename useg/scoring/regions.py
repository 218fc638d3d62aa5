"""Label map + truth -> how much was found of small things and of large ones.

A mean IoU counts pixels, so a class whose large things are found and whose small ones are all
missed looks good. Here the connected regions of the truth are sorted by their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label

Numbers = NDArray[np.int64]


def components(mask: NDArray[np.bool_]) -> Numbers:
    """Number the 4-connected regions of a mask ``(H, W)``: 1, 2, ... in the order of their first
    pixels, 0 outside.

    >>> components(np.array([[1, 0, 1], [1, 0, 0], [0, 1, 1]], bool))
    array([[1, 0, 2],
           [1, 0, 0],
           [0, 3, 3]])
    """
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    numbered = _joined(starts, mask[1:] & mask[:-1])
    return np.where(mask, numbered + 1, 0)


def regions(label: NDArray[Any]) -> Numbers:
    """Number the 4-connected regions of equal values of a label map ``(H, W)``: 0, 1, ... in the
    order of their first pixels.

    >>> regions(np.array([[7, 2, 7], [7, 2, 2]]))
    array([[0, 1, 2],
           [0, 1, 1]])
    """
    starts = np.ones(label.shape, bool)
    starts[:, 1:] = label[:, 1:] != label[:, :-1]
    return _joined(starts, label[1:] == label[:-1])


def _joined(starts: NDArray[np.bool_], touching: NDArray[np.bool_]) -> Numbers:
    """Number runs of pixels along rows, given where they start and which pixels ``(H - 1, W)``
    belong together with the one below.
    """
    run = (np.cumsum(starts) - 1).reshape(starts.shape)
    new = touching & (
        starts[1:] | starts[:-1]
    )  # elsewhere the same two runs touch as one pixel further left
    upper, lower = run[:-1][new], run[1:][new]
    parent = np.arange(np.count_nonzero(starts))
    while True:
        first, second = parent[upper], parent[lower]
        apart = first != second
        if not apart.any():
            break
        np.minimum.at(parent, np.maximum(first, second)[apart], np.minimum(first, second)[apart])
        while not np.array_equal(parent, above := parent[parent]):
            parent = above
    numbers = np.unique(parent, return_inverse=True)[1]
    return numbers[run] if numbers.size else run


REGION_SIZES = ("tiny", "small", "medium", "large")


REGION_BOUNDS = (0.0001, 0.001, 0.01)  # of the image: up to 12, 120 and 1,200 pixels of 400x300


RegionCounts = NDArray[
    np.int64
]  # (4, K, 4): regions, those found, their pixels, those found; of each class; of each of `SIZES`


@dataclass(frozen=True)
class SizeScore:
    """What became of the regions of one size; fractions 0..1, ``nan`` where there is none.

    Args:
        size: one of ``SIZES``.
        up_to: the largest share of the image that such a region has.
        num_regions: 4-connected regions of one class in the truth.
        found: share of them of which at least half the pixels are called what they are.
        recall: share of their pixels that are called what they are.
        pixels: how many they have.
    """

    size: str
    up_to: float
    num_regions: int
    found: float
    recall: float
    pixels: int


@dataclass(frozen=True)
class Sizes:
    """Regions by size: of all classes together, and of each class."""

    overall: tuple[SizeScore, ...]
    classes: tuple[tuple[SizeScore, ...], ...]


def region_counts(prediction: Label, label: Label, num_classes: int) -> RegionCounts:
    """Count the true regions of one image by class and size.

    Args:
        prediction: ``(H, W)`` uint8, 0..K-1.
        label: the same shape, 0..K-1 or ``IGNORE``, which makes no region.
        num_classes: K.

    Returns:
        ``(4, K, 4)`` int64; images add up.
    """
    numbers = regions(label)
    pixels = np.bincount(numbers.ravel())
    hits = np.bincount(numbers[prediction == label], minlength=pixels.size)
    owner = np.empty(pixels.size, np.intp)
    owner[numbers] = label
    place = owner * len(REGION_SIZES) + np.searchsorted(REGION_BOUNDS, pixels / label.size)
    judged = owner != IGNORE
    values = (np.ones_like(pixels), 2 * hits >= pixels, pixels, hits)
    counts = [
        np.bincount(place[judged], value[judged], num_classes * len(REGION_SIZES))
        for value in values
    ]
    return np.array(counts, np.int64).reshape(len(values), num_classes, len(REGION_SIZES))


def score_regions(counts: RegionCounts) -> Sizes:
    """Compute the scores from summed counts ``(4, K, 4)``."""
    return Sizes(
        _scored(counts.sum(1)), tuple(_scored(counts[:, k]) for k in range(counts.shape[1]))
    )


def _scored(counts: NDArray[np.int64]) -> tuple[SizeScore, ...]:
    rows: Sequence[tuple[str, float, list[int]]] = [
        *zip(REGION_SIZES, (*REGION_BOUNDS, 1.0), counts.T.tolist(), strict=True)
    ]
    return tuple(
        SizeScore(
            size,
            up_to,
            number,
            found / number if number else math.nan,
            hits / pixels if pixels else math.nan,
            pixels,
        )
        for size, up_to, (number, found, pixels, hits) in rows
    )


ROWS, COLUMNS = 12, 16


PlaceCounts = NDArray[
    np.int64
]  # (2, ROWS, COLUMNS): judged pixels in each field of the grid, and those that are wrong


def place_counts(prediction: Label, label: Label) -> PlaceCounts:
    """Count one image ``(H, W)`` on the grid; ``(2, ROWS, COLUMNS)`` int64, images add up.

    >>> place_counts(np.zeros((24, 32), np.uint8), np.ones((24, 32), np.uint8))[:, 0, 0]
    array([4, 4])
    """
    down, across = (
        _fields(length, fields) for length, fields in zip(label.shape, (ROWS, COLUMNS), strict=True)
    )
    known = label != IGNORE
    # Sums over fields as products of matrices: exact, as a field of the largest picture has fewer
    # than 2**24 pixels.
    return np.stack(
        [
            (down.T @ mask.astype(np.float32) @ across).astype(np.int64)
            for mask in (known, known & (prediction != label))
        ]
    )


def _fields(length: int, fields: int) -> NDArray[np.float32]:
    """Which of the fields along one side each pixel lies in: ``(length, fields)``, a single 1 in
    each row.
    """
    return np.eye(fields, dtype=np.float32)[np.arange(length) * fields // length]


def error_rates(counts: PlaceCounts) -> NDArray[np.float64]:
    """Return the share of the judged pixels of each field that are wrong, ``(ROWS, COLUMNS)``;
    ``nan`` where none is judged.
    """
    judged, wrong = counts
    return np.where(judged > 0, wrong / np.maximum(judged, 1), np.nan)


ObjectCounts = NDArray[np.int64]  # (5,): true objects, predicted ones, matched, merged, split


@dataclass(frozen=True)
class Objects:
    """What became of the objects of a class; fractions 0..1, ``nan`` where there is no object at
    all.

    Args:
        f1: ``2 * matched / (true + predicted)``.
        precision: share of the predicted objects that match a true one.
        recall: share of the true objects that match a predicted one.
        num_true: connected regions in the truth.
        num_predicted: connected regions in the prediction.
        matched: pairs with an IoU above 0.5; above it, no object can have two partners (Kirillov et
            al., "Panoptic segmentation", 2019).
        merged: predicted objects that cover more than half of each of several true ones, as where
            touching cells became one.
        split: true objects that cover more than half of each of several predicted ones.
    """

    f1: float
    precision: float
    recall: float
    num_true: int
    num_predicted: int
    matched: int
    merged: int
    split: int


def object_counts(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> ObjectCounts:
    """Count the 4-connected regions of two masks ``(H, W)`` of one image; ``(5,)`` int64, images
    add up.
    """
    predicted, true = components(prediction), components(truth)
    num_predicted, num_true = int(predicted.max(initial=0)), int(true.max(initial=0))
    area_predicted, area_true = np.bincount(predicted.ravel()), np.bincount(true.ravel())
    both = prediction & truth
    codes, shared = np.unique(
        true[both] * (num_predicted + 1) + predicted[both], return_counts=True
    )
    t, p = np.divmod(codes, num_predicted + 1)
    matched = 2 * shared > area_true[t] + area_predicted[p] - shared
    merged = np.bincount(p[2 * shared > area_true[t]]) > 1
    split = np.bincount(t[2 * shared > area_predicted[p]]) > 1
    return np.array(
        [num_true, num_predicted, *(np.count_nonzero(found) for found in (matched, merged, split))],
        np.int64,
    )


def score_objects(counts: ObjectCounts) -> Objects:
    """Compute the scores from summed counts ``(5,)``."""
    true, predicted, matched, merged, split = (int(value) for value in counts)
    f1, precision, recall = (
        matched / whole if whole else math.nan
        for whole in ((true + predicted) / 2, predicted, true)
    )
    return Objects(f1, precision, recall, true, predicted, matched, merged, split)
