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

Confusion = NDArray[np.int64]  # (K, K): rows are the truth, columns the prediction


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
    """All scores of a set of images. Means are over the classes present in the truth; ``absent`` names those left out."""

    mean_iou: float
    pixel_accuracy: float
    mean_dice: float
    num_images: int
    classes: tuple[ClassScore, ...]
    absent: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: ``nan`` becomes ``None``."""
        content = asdict(self)
        content["classes"] = [{k: _none_if_nan(v) for k, v in entry.items()} for entry in content["classes"]]
        content["absent"] = list(self.absent)
        return {k: _none_if_nan(v) for k, v in content.items()}


def confusion(prediction: NDArray[np.uint8], label: NDArray[np.uint8], num_classes: int) -> Confusion:
    """Count pixels by (true class, predicted class); pixels whose label is ``IGNORE`` do not count.

    Args:
        prediction: predicted ids ``(H, W)`` uint8, 0..K-1.
        label: true ids of the same shape, 0..K-1 or ``IGNORE``.
        num_classes: K.

    Returns:
        ``(K, K)`` int64.

    >>> confusion(np.uint8([[0, 1]]), np.uint8([[0, 0]]), 2)
    array([[1, 1],
           [0, 0]])
    """
    assert prediction.shape == label.shape, (prediction.shape, label.shape)
    counted = label != IGNORE
    pairs = label[counted].astype(np.intp) * num_classes + prediction[counted]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.int64)


def score(counts: Confusion, names: Sequence[str], num_images: int) -> Scores:
    """Compute every score from summed confusion counts ``(K, K)``.

    A class without a true pixel is absent: it has no scores and does not enter a mean, whatever was predicted; pixels
    wrongly given to it still count against the classes that they really are.
    """
    hits = np.diagonal(counts).astype(np.float64)
    truth = counts.sum(1)
    predicted = counts.sum(0)
    total = int(counts.sum())
    classes = []
    for k, name in enumerate(names):
        if truth[k] == 0:
            classes.append(ClassScore(k, name, math.nan, math.nan, math.nan, math.nan, 0))
            continue
        classes.append(
            ClassScore(
                id=k,
                name=name,
                iou=float(hits[k] / (truth[k] + predicted[k] - hits[k])),
                dice=float(2 * hits[k] / (truth[k] + predicted[k])),
                precision=float(hits[k] / predicted[k]) if predicted[k] else 0.0,
                recall=float(hits[k] / truth[k]),
                pixels=int(truth[k]),
            )
        )
    present = [entry for entry in classes if entry.pixels]
    return Scores(
        mean_iou=float(np.mean([entry.iou for entry in present])) if present else math.nan,
        pixel_accuracy=float(hits.sum() / total) if total else math.nan,
        mean_dice=float(np.mean([entry.dice for entry in present])) if present else math.nan,
        num_images=num_images,
        classes=tuple(classes),
        absent=tuple(entry.name for entry in classes if not entry.pixels),
    )


def _none_if_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
