"""Label map + truth -> how much was found of small things and of large ones.

A mean IoU counts pixels, so a class whose large things are found and whose small ones are all missed looks good. Here the connected regions
of the truth are sorted by their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label
from useg.scoring.components import regions

SIZES = ("tiny", "small", "medium", "large")
BOUNDS = (0.0001, 0.001, 0.01)  # of the image: up to 12, 120 and 1,200 pixels of 400x300

RegionCounts = NDArray[np.int64]  # (4, K, 4): regions, those found, their pixels, those found; of each class; of each of `SIZES`


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
    place = owner * len(SIZES) + np.searchsorted(BOUNDS, pixels / label.size)
    judged = owner != IGNORE
    values = (np.ones_like(pixels), 2 * hits >= pixels, pixels, hits)
    counts = [np.bincount(place[judged], value[judged], num_classes * len(SIZES)) for value in values]
    return np.array(counts, np.int64).reshape(len(values), num_classes, len(SIZES))


def score_regions(counts: RegionCounts) -> Sizes:
    """Compute the scores from summed counts ``(4, K, 4)``."""
    return Sizes(_scored(counts.sum(1)), tuple(_scored(counts[:, k]) for k in range(counts.shape[1])))


def _scored(counts: NDArray[np.int64]) -> tuple[SizeScore, ...]:
    rows: Sequence[tuple[str, float, list[int]]] = [*zip(SIZES, (*BOUNDS, 1.0), counts.T.tolist(), strict=True)]
    return tuple(
        SizeScore(size, up_to, number, found / number if number else math.nan, hits / pixels if pixels else math.nan, pixels)
        for size, up_to, (number, found, pixels, hits) in rows
    )
