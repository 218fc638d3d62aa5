"""Label map + truth -> where in the picture the errors are: a grid of counts that is the same for pictures of every size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label

ROWS, COLUMNS = 12, 16

PlaceCounts = NDArray[np.int64]  # (2, ROWS, COLUMNS): judged pixels in each field of the grid, and those that are wrong


def place_counts(prediction: Label, label: Label) -> PlaceCounts:
    """Count one image ``(H, W)`` on the grid; ``(2, ROWS, COLUMNS)`` int64, images add up.

    >>> place_counts(np.zeros((24, 32), np.uint8), np.ones((24, 32), np.uint8))[:, 0, 0]
    array([4, 4])
    """
    down, across = (_fields(length, fields) for length, fields in zip(label.shape, (ROWS, COLUMNS), strict=True))
    known = label != IGNORE
    # Sums over fields as products of matrices: exact, as a field of the largest picture has fewer than 2**24 pixels.
    return np.stack([(down.T @ mask.astype(np.float32) @ across).astype(np.int64) for mask in (known, known & (prediction != label))])


def _fields(length: int, fields: int) -> NDArray[np.float32]:
    """Which of the fields along one side each pixel lies in: ``(length, fields)``, a single 1 in each row."""
    return np.eye(fields, dtype=np.float32)[np.arange(length) * fields // length]


def error_rates(counts: PlaceCounts) -> NDArray[np.float64]:
    """Return the share of the judged pixels of each field that are wrong, ``(ROWS, COLUMNS)``; ``nan`` where none is judged."""
    judged, wrong = counts
    return np.where(judged > 0, wrong / np.maximum(judged, 1), np.nan)
