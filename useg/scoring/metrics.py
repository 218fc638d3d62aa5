"""Counts of an image that add up over images, and every score computed from them.

The confusion matrix counts pixels at the mask's own resolution. So each score has a single
definition, and images can be added up in any order or grouping.

A mean IoU counts pixels: a class whose large objects are found and whose small ones are all missed
scores well. So the connected regions of the ground truth are also counted by size, and errors on a
grid of places that is the same for images of every size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label
from useg.errors import DataError

# (K, K) pixel counts: rows are true classes, columns predicted classes.
Confusion = NDArray[np.int64]
# (3, K): correct, true and predicted pixels of each class; all scores need only these.
Tally = NDArray[np.int64]
# (H, W): the number of the region of each pixel.
RegionNumbers = NDArray[np.int64]

REGION_SIZES = ("tiny", "small", "medium", "large")
# Upper limits of the sizes but the last, as shares of the image: up to 12, 120 and 1,200 pixels of
# 400x300.
REGION_BOUNDS = (0.0001, 0.001, 0.01)
# (4, K, 4): the number of regions, of found regions, of their pixels and of correct pixels; for
# each class and each of REGION_SIZES.
RegionCounts = NDArray[np.int64]

# Rows and columns of the grid of places.
GRID_ROWS, GRID_COLUMNS = 12, 16
# (2, GRID_ROWS, GRID_COLUMNS): labelled pixels of each cell of the grid, and those that are wrong.
PlaceCounts = NDArray[np.int64]


@dataclass(frozen=True)
class ClassScore:
    """Scores of one class, fractions 0..1; ``nan`` if absent. ``pixels`` counts its true pixels."""

    id: int
    name: str
    iou: float
    dice: float
    precision: float
    recall: float
    pixels: int


@dataclass(frozen=True)
class Scores:
    """All scores of a set of images, as fractions 0..1.

    A class without a true pixel is absent and is left out of every mean.

    Args:
        mean_iou: mean IoU of the classes present, unweighted (macro average).
        pixel_accuracy: share of correct pixels; equals the recall weighted by class frequency.
        mean_dice: mean Dice score (F1) of the classes present, unweighted.
        frequency_weighted_iou: the IoUs weighted by the classes' true pixels.
        micro_iou: IoU of all pixels pooled, ``a / (2 - a)`` of the pixel accuracy ``a``; large
            classes dominate it.
        num_images: number of images.
        classes: every class, also absent ones.
        absent: names of the absent classes.
    """

    mean_iou: float
    pixel_accuracy: float
    mean_dice: float
    frequency_weighted_iou: float
    micro_iou: float
    num_images: int
    classes: tuple[ClassScore, ...]
    absent: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: ``nan`` becomes ``None``."""
        content: dict[str, Any] = plain(asdict(self))
        return content


def plain(value: Any) -> Any:
    """Convert a nested value to JSON types: ``nan`` becomes ``None``, a tuple becomes a list."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def confusion(
    prediction: NDArray[np.uint8], label: NDArray[np.uint8], num_classes: int
) -> Confusion:
    """Count pixels by (true class, predicted class); pixels labelled ``IGNORE`` do not count.

    Args:
        prediction: predicted ids ``(H, W)`` uint8, 0..K-1.
        label: true ids of the same shape, 0..K-1 or ``IGNORE``.
        num_classes: K.

    Returns:
        ``(K, K)`` int64.

    Raises:
        DataError: the sizes differ (scores at a reduced size are too high) or an id is not a class.

    >>> confusion(np.uint8([[0, 1]]), np.uint8([[0, 0]]), 2)
    array([[1, 1],
           [0, 0]])
    """
    if prediction.shape != label.shape:
        raise DataError(
            f"a prediction of shape {prediction.shape} cannot be scored against a label of "
            f"shape {label.shape}; enlarge the logits to the label's size before you choose the "
            "class, and leave the label as it is"
        )
    # Ignored pixels fall into rows from K on, which is cheaper than selecting the others.
    pairs = label.astype(np.uint16) * np.uint16(num_classes) + prediction
    counts = np.bincount(pairs.ravel(), minlength=256 * num_classes)
    for name, highest in (
        ("prediction", int(prediction.max(initial=0))),
        ("label", _highest(counts[: IGNORE * num_classes]) // num_classes),
    ):
        if highest >= num_classes:
            raise DataError(
                f"the {name} has the id {highest}, but there are {num_classes} classes "
                f"(0-{num_classes - 1}); check the class table"
            )
    return counts[: num_classes**2].reshape(num_classes, num_classes).astype(np.int64)


def _highest(counts: NDArray[np.int64]) -> int:
    return int(np.flatnonzero(counts).max(initial=0))


def tally(counts: Confusion) -> Tally:
    """Return the correct, true and predicted pixels of each class, ``(3, K)``."""
    return np.stack([np.diagonal(counts), counts.sum(1), counts.sum(0)])


def class_ious(tallies: NDArray[Any]) -> NDArray[np.float64]:
    """Return each class's IoU, ``(..., K)`` from tallies ``(..., 3, K)``; ``nan`` if absent."""
    hits, truth, predicted = np.moveaxis(np.asarray(tallies, np.float64), -2, 0)
    return _ratio(hits, np.where(truth > 0, truth + predicted - hits, 0))


def mean_iou(tallies: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean IoU of the present classes, ``(...)`` from ``(..., 3, K)``; else ``nan``."""
    return mean_present(class_ious(tallies))


def pixel_accuracy(tallies: NDArray[Any]) -> NDArray[np.float64]:
    """Return the share of correct pixels, ``(...)`` from ``(..., 3, K)``; else ``nan``."""
    hits, truth, _ = np.moveaxis(np.asarray(tallies, np.float64).sum(-1), -1, 0)
    return _ratio(hits, truth)


def mean_present(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean along the last axis, ignoring ``nan``; ``nan`` where all entries are."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(-1), known.sum(-1))


def score(counts: Confusion, names: Sequence[str], num_images: int) -> Scores:
    """Compute every score from a summed confusion matrix ``(K, K)``.

    An absent class has no scores and enters no mean, whatever was predicted. Pixels wrongly
    assigned to it still count against their true classes.
    """
    sums = tally(counts)
    hits, truth, predicted = sums.astype(np.float64)
    ious = class_ious(sums)
    dice = np.where(truth > 0, _ratio(2 * hits, truth + predicted), math.nan)
    # The precision of a class that was never predicted is 0.
    precision = np.where(truth > 0, np.nan_to_num(_ratio(hits, predicted)), math.nan)
    recall = _ratio(hits, truth)
    classes = tuple(
        ClassScore(
            k,
            name,
            float(ious[k]),
            float(dice[k]),
            float(precision[k]),
            float(recall[k]),
            int(truth[k]),
        )
        for k, name in enumerate(names)
    )
    return Scores(
        mean_iou=float(mean_iou(sums)),
        pixel_accuracy=float(pixel_accuracy(sums)),
        mean_dice=float(mean_present(dice)),
        frequency_weighted_iou=float(_ratio(np.nansum(ious * truth), truth.sum())),
        micro_iou=float(_ratio(hits.sum(), 2 * truth.sum() - hits.sum())),
        num_images=num_images,
        classes=classes,
        absent=tuple(entry.name for entry in classes if not entry.pixels),
    )


def _ratio(part: Any, whole: Any) -> NDArray[np.float64]:
    """Divide; ``nan`` where the whole is 0."""
    nonzero = np.asarray(whole) > 0
    return np.where(nonzero, part / np.where(nonzero, whole, 1), math.nan)


def components(mask: NDArray[np.bool_]) -> RegionNumbers:
    """Number the 4-connected regions of a mask ``(H, W)``: 1, 2, ...; 0 is outside.

    The numbers follow the order of the first pixels.
    >>> components(np.array([[1, 0, 1], [1, 0, 0], [0, 1, 1]], bool))
    array([[1, 0, 2],
           [1, 0, 0],
           [0, 3, 3]])
    """
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    numbered = _number_regions(starts, mask[1:] & mask[:-1])
    return np.where(mask, numbered + 1, 0)


def regions(label: NDArray[Any]) -> RegionNumbers:
    """Number the 4-connected regions of equal values of a label map ``(H, W)``: 0, 1, ...

    The numbers follow the order of the first pixels.
    >>> regions(np.array([[7, 2, 7], [7, 2, 2]]))
    array([[0, 1, 2],
           [0, 1, 1]])
    """
    starts = np.ones(label.shape, bool)
    starts[:, 1:] = label[:, 1:] != label[:, :-1]
    return _number_regions(starts, label[1:] == label[:-1])


# Each round attaches every region to a neighbour with a lower number, which leaves at most half of
# those that still have one.
def _number_regions(starts: NDArray[np.bool_], touching: NDArray[np.bool_]) -> RegionNumbers:
    """Join runs of pixels along rows, and number the regions that they form.

    Args:
        starts: the first pixel of each run, ``(H, W)``.
        touching: pixels that belong to the same region as the pixel below, ``(H - 1, W)``.
    """
    # Row by row: other threads would have to wait for one sum over all pixels.
    run = np.cumsum(starts, axis=1, dtype=np.int64) - 1
    run[1:] += np.cumsum(run[:-1, -1:].sum(axis=1) + 1)[:, np.newaxis]
    # Elsewhere the same two runs touch as one pixel further left.
    new = touching & (starts[1:] | starts[:-1])
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


@dataclass(frozen=True)
class SizeScore:
    """Scores of the regions of one size; fractions 0..1, ``nan`` if there are none.

    Args:
        size: one of ``REGION_SIZES``.
        up_to: largest share of the image that such a region covers.
        num_regions: number of 4-connected regions of one class in the ground truth.
        found: share of the regions of which at least half the pixels are correct.
        recall: share of their pixels that are correct.
        pixels: number of their pixels.
    """

    size: str
    up_to: float
    num_regions: int
    found: float
    recall: float
    pixels: int


@dataclass(frozen=True)
class Sizes:
    """Scores of regions by size: for all classes together, and for each class."""

    overall: tuple[SizeScore, ...]
    classes: tuple[tuple[SizeScore, ...], ...]


def region_counts(prediction: Label, label: Label, num_classes: int) -> RegionCounts:
    """Count the true regions of one image by class and size.

    Args:
        prediction: ``(H, W)`` uint8, 0..K-1.
        label: the same shape, 0..K-1 or ``IGNORE``, which forms no region.
        num_classes: K.

    Returns:
        ``(4, K, 4)`` int64; images add up.
    """
    numbers = regions(label)
    pixels = np.bincount(numbers.ravel())
    hits = np.bincount(numbers[prediction == label], minlength=pixels.size)
    owner = np.empty(pixels.size, np.intp)
    owner[numbers] = label
    group = owner * len(REGION_SIZES) + np.searchsorted(REGION_BOUNDS, pixels / label.size)
    labelled = owner != IGNORE
    values = (np.ones_like(pixels), 2 * hits >= pixels, pixels, hits)
    counts = [
        np.bincount(group[labelled], value[labelled], num_classes * len(REGION_SIZES))
        for value in values
    ]
    return np.array(counts, np.int64).reshape(len(values), num_classes, len(REGION_SIZES))


def score_regions(counts: RegionCounts) -> Sizes:
    """Compute the scores from summed counts ``(4, K, 4)``."""
    return Sizes(
        _score_sizes(counts.sum(1)),
        tuple(_score_sizes(counts[:, k]) for k in range(counts.shape[1])),
    )


def _score_sizes(counts: NDArray[np.int64]) -> tuple[SizeScore, ...]:
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


def place_counts(prediction: Label, label: Label) -> PlaceCounts:
    """Count the errors of one image ``(H, W)`` on the grid; images add up.

    >>> place_counts(np.zeros((24, 32), np.uint8), np.ones((24, 32), np.uint8))[:, 0, 0]
    array([4, 4])
    """
    down, across = (
        _cell_indicator(length, cells)
        for length, cells in zip(label.shape, (GRID_ROWS, GRID_COLUMNS), strict=True)
    )
    known = label != IGNORE
    # Sums over cells as matrix products. They are exact in fp32, because a cell of the largest
    # image has fewer than 2**24 pixels.
    return np.stack(
        [
            (down.T @ mask.astype(np.float32) @ across).astype(np.int64)
            for mask in (known, known & (prediction != label))
        ]
    )


def _cell_indicator(length: int, cells: int) -> NDArray[np.float32]:
    """Return ``(length, cells)``: for each pixel along one axis, a 1 in the column of its cell."""
    return np.eye(cells, dtype=np.float32)[np.arange(length) * cells // length]


def error_rates(counts: PlaceCounts) -> NDArray[np.float64]:
    """Return the share of wrong pixels of each cell; ``nan`` if none is labelled.

    The shape is ``(GRID_ROWS, GRID_COLUMNS)``.
    """
    labelled, wrong = counts
    return np.where(labelled > 0, wrong / np.maximum(labelled, 1), np.nan)
