"""Label maps + truth -> one confusion matrix of counts -> every score.

All scores come from one int64 matrix at the label's native resolution, so there is a single definition of each, and adding
up images in any order or grouping gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE
from useg.errors import UsageError

Confusion = NDArray[np.int64]  # (K, K): rows are the truth, columns the prediction


Tally = NDArray[
    np.int64
]  # (3, K): pixels of each class that are right, that are truly of it, that are called it; all scores need only these


@dataclass(frozen=True)
class ClassScore:
    """One class against the truth. Scores are fractions 0..1, ``nan`` when the class is absent; ``pixels`` counts its true pixels."""

    id: int
    name: str
    iou: float
    dice: float
    precision: float
    recall: float
    pixels: int


@dataclass(frozen=True)
class Scores:
    """All scores of a set of images, fractions 0..1. ``absent`` names the classes without a true pixel, which are left out of every mean.

    Args:
        mean_iou: the IoUs of the classes present, each class counting the same (macro).
        pixel_accuracy: share of the counted pixels that are right; the mean recall weighted by class frequency is the same number.
        mean_dice: the Dice scores (F1) of the classes present, each class counting the same.
        frequency_weighted_iou: the IoUs weighted by the classes' true pixels.
        micro_iou: one IoU of all pixels pooled, ``a / (2 - a)`` of the pixel accuracy ``a``: flattered by large classes.
        num_images: images counted.
        classes: every class, absent ones too.
        absent: names.
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
    """Return a value as JSON knows it, at any depth: ``nan`` becomes ``None``, a tuple a list."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def confusion(
    prediction: NDArray[np.uint8], label: NDArray[np.uint8], num_classes: int
) -> Confusion:
    """Count pixels by (true class, predicted class); pixels whose label is ``IGNORE`` do not count.

    Args:
        prediction: predicted ids ``(H, W)`` uint8, 0..K-1.
        label: true ids of the same shape, 0..K-1 or ``IGNORE``.
        num_classes: K.

    Returns:
        ``(K, K)`` int64.

    Raises:
        UsageError: two sizes (scores at a network's reduced size flatter it), or an id that is no class.

    >>> confusion(np.uint8([[0, 1]]), np.uint8([[0, 0]]), 2)
    array([[1, 1],
           [0, 0]])
    """
    if prediction.shape != label.shape:
        raise UsageError(
            f"a prediction of the shape {prediction.shape} cannot be scored against a label of {label.shape}; "
            f"enlarge the logits to the label's size before the class is chosen, and leave the label as it is"
        )
    pairs = (
        label.astype(np.uint16) * np.uint16(num_classes) + prediction
    )  # ignored pixels too, as rows from K on: no need to pick the others out
    counts = np.bincount(pairs.ravel(), minlength=256 * num_classes)
    for name, highest in (
        ("prediction", int(prediction.max(initial=0))),
        ("label", _highest(counts[: IGNORE * num_classes]) // num_classes),
    ):
        if highest >= num_classes:
            raise UsageError(
                f"the {name} has the id {highest}, but there are {num_classes} classes (0-{num_classes - 1}); check the class table"
            )
    return counts[: num_classes**2].reshape(num_classes, num_classes).astype(np.int64)


def _highest(counts: NDArray[np.int64]) -> int:
    return int(np.flatnonzero(counts).max(initial=0))


def tally(counts: Confusion) -> Tally:
    """Return what the scores need of confusion counts ``(K, K)``: ``(3, K)``, right, true and predicted pixels of each class."""
    return np.stack([np.diagonal(counts), counts.sum(1), counts.sum(0)])


def class_ious(tallies: NDArray[Any]) -> NDArray[np.float64]:
    """Return the IoU of each class, ``(..., K)`` from ``(..., 3, K)``; ``nan`` where it is absent from the truth."""
    hits, truth, predicted = np.moveaxis(np.asarray(tallies, np.float64), -2, 0)
    return _ratio(hits, np.where(truth > 0, truth + predicted - hits, 0))


def mean_iou(tallies: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean IoU over the classes present, ``(...)`` from ``(..., 3, K)``; ``nan`` where there is none."""
    return mean_present(class_ious(tallies))


def pixel_accuracy(tallies: NDArray[Any]) -> NDArray[np.float64]:
    """Return the share of pixels that are right, ``(...)`` from ``(..., 3, K)``; ``nan`` where there is no pixel."""
    hits, truth, _ = np.moveaxis(np.asarray(tallies, np.float64).sum(-1), -1, 0)
    return _ratio(hits, truth)


def mean_present(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean along the last axis without the entries that are ``nan``; ``nan`` where all are."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0).sum(-1), known.sum(-1))


def score(counts: Confusion, names: Sequence[str], num_images: int) -> Scores:
    """Compute every score from summed confusion counts ``(K, K)``.

    A class without a true pixel is absent: it has no scores and does not enter a mean, whatever was predicted; pixels
    wrongly given to it still count against the classes that they really are.
    """
    sums = tally(counts)
    hits, truth, predicted = sums.astype(np.float64)
    ious = class_ious(sums)
    dice = np.where(truth > 0, _ratio(2 * hits, truth + predicted), math.nan)
    precision = np.where(
        truth > 0, np.nan_to_num(_ratio(hits, predicted)), math.nan
    )  # never predicted: nothing of it was found
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
    return np.where(
        np.asarray(whole) > 0, part / np.where(np.asarray(whole) > 0, whole, 1), math.nan
    )
