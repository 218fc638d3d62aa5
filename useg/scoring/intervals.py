"""Counts of every image -> how far the scores could lie from those of other images of the same kind: bootstrap intervals.

What is drawn again and again is not a pixel but an image, or where images are neighbours in a film or a stack, a block of them: neighbours
say nearly the same, and an interval that took each for news of its own would be far too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.scoring.metrics import class_ious, mean_iou, pixel_accuracy

RESAMPLES = 2000
FEWEST = 5  # blocks; with fewer, no way of drawing them says how much others would differ
FEW = 10  # with fewer, an interval is a rough guide
_DRAWN_AT_ONCE = 2_000_000

Tallies = NDArray[np.int64]  # (N, 3, K): :func:`useg.scoring.metrics.tally` of each image
Statistic = Callable[[NDArray[Any]], NDArray[np.float64]]  # (..., 3, K) -> (...) or (..., K)


@dataclass(frozen=True)
class Interval:
    """Where 95 of 100 repetitions of the measurement on other images would find the score."""

    low: float
    high: float


@dataclass(frozen=True)
class Intervals:
    """95 % intervals of the scores; None where there are too few blocks for one.

    Args:
        mean_iou: of the mean IoU.
        pixel_accuracy: of the pixel accuracy.
        classes: of each class's IoU; None also where fewer than ``FEWEST`` blocks hold the class.
        num_blocks: how many images, or blocks of neighbouring images, were drawn from.
        note: what limits these intervals, in a sentence; empty when nothing does.
    """

    mean_iou: Interval | None
    pixel_accuracy: Interval | None
    classes: tuple[Interval | None, ...]
    num_blocks: int
    note: str


@dataclass(frozen=True)
class Difference:
    """How much better the first of two models is on the same images; negative where it is worse.

    Args:
        mean_iou: difference of the mean IoUs, first - second.
        interval: its 95 % interval; None where there are too few blocks.
        probability_better: share of the resamples in which the first has the higher mean IoU (ties count half); None likewise. It is never
            nearer to 0 or 1 than ``n`` blocks that all agree could bring a toss of coins: ``2**-n``.
        classes: difference of each class's IoU, ``nan`` where absent, and its interval.
        num_blocks: how many blocks were drawn from.
        note: as in :class:`Intervals`.
    """

    mean_iou: float
    interval: Interval | None
    probability_better: float | None
    classes: tuple[tuple[float, Interval | None], ...]
    num_blocks: int
    note: str


def score_intervals(tallies: Tallies, blocks: Sequence[int], seed: int = 0) -> Intervals:
    """Compute 95 % intervals by drawing blocks with replacement.

    Args:
        tallies: ``(N, 3, K)`` counts of each image.
        blocks: the block that each image belongs to, N numbers; a number for each image where images are independent.
        seed: of the draws.
    """
    sums = _by_block(tallies, blocks)
    count, holding = len(sums), (sums[:, 1] > 0).sum(0)
    note = _note(count, len(tallies))
    if count < FEWEST:
        return Intervals(None, None, (None,) * tallies.shape[2], count, note)
    drawn = _resample(sums, seed)
    classes = tuple(_interval(values, int(n)) for values, n in zip(class_ious(drawn).T, holding, strict=True))
    return Intervals(_interval(mean_iou(drawn), count), _interval(pixel_accuracy(drawn), count), classes, count, note)


def compare(first: Tallies, second: Tallies, blocks: Sequence[int], seed: int = 0) -> Difference:
    """Compare two models on the same images by drawing the same blocks for both; arguments as for :func:`score_intervals`."""
    totals = [tallies.sum(0) for tallies in (first, second)]
    by_class = class_ious(totals[0]) - class_ious(totals[1])
    difference = float(mean_iou(totals[0]) - mean_iou(totals[1]))
    both = [_by_block(tallies, blocks) for tallies in (first, second)]
    count, holding = len(both[0]), (both[0][:, 1] > 0).sum(0)
    note = _note(count, len(first))
    if count < FEWEST:
        return Difference(difference, None, None, tuple((float(value), None) for value in by_class), count, note)
    drawn = [_resample(sums, seed) for sums in both]
    gains = mean_iou(drawn[0]) - mean_iou(drawn[1])
    class_gains = (class_ious(drawn[0]) - class_ious(drawn[1])).T
    classes = tuple((float(value), _interval(gain, int(n))) for value, gain, n in zip(by_class, class_gains, holding, strict=True))
    better = float(np.clip(np.mean((gains > 0) + 0.5 * (gains == 0)), 2.0**-count, 1 - 2.0**-count))
    return Difference(difference, _interval(gains, count), better, classes, count, note)


def _by_block(tallies: Tallies, blocks: Sequence[int]) -> NDArray[np.float64]:
    """Sum the counts of each block, ``(B, 3, K)``, leaving out those without a counted pixel."""
    _, place = np.unique(np.asarray(blocks), return_inverse=True)
    sums = np.zeros((place.max(initial=-1) + 1, *tallies.shape[1:]))
    np.add.at(sums, place, tallies)
    return sums[sums[:, 1].any(1)]


def _resample(sums: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Draw as many blocks as there are, with replacement, ``RESAMPLES`` times, and sum each draw's counts: ``(RESAMPLES, 3, K)``."""
    generator = np.random.default_rng(seed)
    count = len(sums)
    flat = sums.reshape(count, -1)
    step = max(1, _DRAWN_AT_ONCE // count)
    parts = []
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        draws = generator.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(draws.ravel(), minlength=rows * count).reshape(rows, count)
        parts.append(times.astype(np.float64) @ flat)  # whole numbers below 2**53: exact
    return np.concatenate(parts).reshape(RESAMPLES, *sums.shape[1:])


def _interval(values: NDArray[np.float64], count: int) -> Interval | None:
    """Return the expanded percentile interval of bootstrap values from ``count`` blocks; ``nan`` is left out.

    Plain percentiles are too narrow for few blocks by ``sqrt((n - 1) / n)`` and by the step from Student's t to the normal distribution;
    wider percentiles make up for both (Hesterberg, "What teachers should know about the bootstrap", 2015, section 5.3).
    """
    values = values[~np.isnan(values)]
    if count < FEWEST or not values.size:
        return None
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * _student_t(count - 1))
    low, high = np.quantile(values, (tail, 1 - tail))
    return Interval(float(low), float(high))


def _student_t(freedom: int) -> float:
    """Return the 97.5 % point of Student's t for at least 4 degrees of freedom (Abramowitz and Stegun 26.7.5; within 0.3 %)."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))


def _note(count: int, num_images: int) -> str:
    """Say in a sentence what the number of blocks does not allow."""
    plural = "" if count == 1 else "s"
    what = f"{count} block{plural} of neighbouring images" if count < num_images else f"{count} image{plural}"
    if count < FEWEST:
        return f"no interval: {what} cannot say how much others would differ (at least {FEWEST} are needed)"
    return f"from only {what}: read the intervals as a rough guide" if count < FEW else ""
