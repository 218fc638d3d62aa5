"""The confusion matrix, and every score computed from it.

All scores come from one int64 matrix of pixel counts at the mask's own resolution. So each score
has a single definition, and images can be added up in any order or grouping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE
from useg.errors import DataError

# (K, K) pixel counts: rows are true classes, columns predicted classes.
Confusion = NDArray[np.int64]
# (3, K): correct, true and predicted pixels of each class; all scores need only these.
Tally = NDArray[np.int64]


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
        DataError: the sizes differ (scores at a reduced size are too high) or an id is no class.

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
