"""Logits + truth -> is a pixel that the model is 80 % sure of right 8 times in 10? And the
temperature that makes it so.

Pixels are counted into bins of confidence, image by image: nothing is stored but three numbers a
    bin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label, confidence
from useg.scoring.metrics import class_ious, mean_iou, pixel_accuracy, plain

BINS = 15


# temperatures lie between this and its inverse: a model without an error on the pixels fitted asks
# for 0
HOTTEST = 10.0


FIT_PIXELS = 50_000  # of all images together are enough to fit one number


Reliability = NDArray[
    np.float64
]  # (3, BINS): pixels, their summed confidence, how many of them are right


@dataclass(frozen=True)
class Bin:
    """Pixels of like confidence: their mean confidence, the share of them that is right, their
    share of all pixels.
    """

    confidence: float
    accuracy: float
    share: float


@dataclass(frozen=True)
class Calibration:
    """How far confidence and accuracy are apart.

    Args:
        error: expected calibration error: the distance between confidence and accuracy, averaged
            over all pixels (Guo et al. 2017).
        confidence: mean confidence of all pixels; above the pixel accuracy, the model thinks too
            well of itself.
        temperature: what the logits were divided by.
        curve: the bins that hold pixels, from low confidence to high.
    """

    error: float
    confidence: float
    temperature: float
    curve: tuple[Bin, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        curve = [
            {"confidence": bin_.confidence, "accuracy": bin_.accuracy, "share": bin_.share}
            for bin_ in self.curve
        ]
        content: dict[str, Any] = plain(
            {
                "error": self.error,
                "confidence": self.confidence,
                "temperature": self.temperature,
                "curve": curve,
            }
        )
        return content


def reliability(
    logits: NDArray[np.float32], prediction: Label, label: Label, temperature: float = 1.0
) -> Reliability:
    """Count the pixels of one image into equal bins of confidence, the probability of the most
    probable class.

    Args:
        logits: ``(K, H, W)``.
        prediction: the most probable class of each pixel, ``(H, W)``.
        label: true ids ``(H, W)``; those that are ``IGNORE`` do not count.
        temperature: what the logits are divided by.

    Returns:
        ``(3, BINS)`` float64; images add up.
    """
    known = label != IGNORE
    confident = confidence(logits, temperature)[known]
    right = (prediction == label)[known]
    places = np.minimum((confident * BINS).astype(np.uint8), BINS - 1)
    by_place = np.bincount(places + right * np.uint8(BINS), minlength=2 * BINS).reshape(2, BINS)
    return np.stack([by_place.sum(0), np.bincount(places, confident, minlength=BINS), by_place[1]])


def calibration(counts: Reliability, temperature: float) -> Calibration:
    """Compute the expected calibration error and the reliability curve from summed counts ``(3,
    BINS)``.
    """
    pixels, confident, right = counts
    total = pixels.sum()
    if not total:
        return Calibration(float("nan"), float("nan"), temperature, ())
    curve = tuple(
        Bin(*(float(value) for value in (c / n, r / n, n / total))) for n, c, r in counts.T if n
    )
    return Calibration(
        float(np.abs(confident - right).sum() / total),
        float(confident.sum() / total),
        temperature,
        curve,
    )


def some_pixels(
    logits: NDArray[np.float32], label: Label, count: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Pick pixels of one image to fit a temperature on.

    Args:
        logits: ``(K, H, W)``.
        label: true ids ``(H, W)``.
        count: how many, drawn from those that are not ignored (one may be drawn twice).
        seed: of the draw.

    Returns:
        Logits ``(count, K)`` and true ids ``(count,)``; none where every pixel is ignored.
    """
    known = np.flatnonzero(label != IGNORE)
    drawn = (
        known[np.random.default_rng(seed).integers(0, known.size, count)] if known.size else known
    )
    return logits.reshape(len(logits), -1)[:, drawn].T, label.reshape(-1)[drawn]


def fit_temperature(logits: NDArray[np.float32], truth: NDArray[np.uint8]) -> float:
    """Find the temperature at which the true classes of pixels are most probable (Guo et al., "On
    calibration", ICML 2017, section 4.2).

    The mean log likelihood is concave in the inverse of the temperature, so its slope is followed
    to where it is 0. No label map changes.

    Args:
        logits: ``(N, K)``.
        truth: ``(N,)`` class ids.

    Returns:
        1 / ``HOTTEST`` .. ``HOTTEST``; 1 where there is nothing to fit.
    """
    if not truth.size or logits.shape[1] < 2:
        return 1.0
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    of_truth = shifted[np.arange(truth.size), truth].mean()
    low, high = -np.log(HOTTEST), np.log(HOTTEST)
    while high - low > 1e-4:
        middle = (low + high) / 2
        weights = np.exp(shifted * np.exp(-middle))
        expected = ((weights * shifted).sum(1) / weights.sum(1)).mean()
        low, high = (
            (low, middle) if expected < of_truth else (middle, high)
        )  # the truth scores above what is expected: be bolder
    return float(np.exp((low + high) / 2))


RESAMPLES = 2000


FEWEST_BLOCKS = 5  # blocks; with fewer, no way of drawing them says how much others would differ


FEW_BLOCKS = 10  # with fewer, an interval is a rough guide


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
class PairedDifference:
    """How much better the first of two models is on the same images; negative where it is worse.

    Args:
        mean_iou: difference of the mean IoUs, first - second.
        interval: its 95 % interval; None where there are too few blocks.
        probability_better: share of the resamples in which the first has the higher mean IoU (ties
            count half); None likewise. It is never nearer to 0 or 1 than ``n`` blocks that all
            agree could bring a toss of coins: ``2**-n``.
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
        blocks: the block that each image belongs to, N numbers; a number for each image where
            images are independent.
        seed: of the draws.
    """
    sums = _by_block(tallies, blocks)
    count, holding = len(sums), (sums[:, 1] > 0).sum(0)
    note = _note(count, len(tallies))
    if count < FEWEST_BLOCKS:
        return Intervals(None, None, (None,) * tallies.shape[2], count, note)
    drawn = _resample(sums, seed)
    classes = tuple(
        _interval(values, int(n)) for values, n in zip(class_ious(drawn).T, holding, strict=True)
    )
    return Intervals(
        _interval(mean_iou(drawn), count),
        _interval(pixel_accuracy(drawn), count),
        classes,
        count,
        note,
    )


def compare_tallies(
    first: Tallies, second: Tallies, blocks: Sequence[int], seed: int = 0
) -> PairedDifference:
    """Compare two models on the same images by drawing the same blocks for both; arguments as for
    :func:`score_intervals`.
    """
    totals = [tallies.sum(0) for tallies in (first, second)]
    by_class = class_ious(totals[0]) - class_ious(totals[1])
    difference = float(mean_iou(totals[0]) - mean_iou(totals[1]))
    both = [_by_block(tallies, blocks) for tallies in (first, second)]
    count, holding = len(both[0]), (both[0][:, 1] > 0).sum(0)
    note = _note(count, len(first))
    if count < FEWEST_BLOCKS:
        return PairedDifference(
            difference, None, None, tuple((float(value), None) for value in by_class), count, note
        )
    drawn = [_resample(sums, seed) for sums in both]
    gains = mean_iou(drawn[0]) - mean_iou(drawn[1])
    class_gains = (class_ious(drawn[0]) - class_ious(drawn[1])).T
    classes = tuple(
        (float(value), _interval(gain, int(n)))
        for value, gain, n in zip(by_class, class_gains, holding, strict=True)
    )
    better = float(np.clip(np.mean((gains > 0) + 0.5 * (gains == 0)), 2.0**-count, 1 - 2.0**-count))
    return PairedDifference(difference, _interval(gains, count), better, classes, count, note)


def _by_block(tallies: Tallies, blocks: Sequence[int]) -> NDArray[np.float64]:
    """Sum the counts of each block, ``(B, 3, K)``, leaving out those without a counted pixel."""
    _, place = np.unique(np.asarray(blocks), return_inverse=True)
    sums = np.zeros((place.max(initial=-1) + 1, *tallies.shape[1:]))
    np.add.at(sums, place, tallies)
    return sums[sums[:, 1].any(1)]


def _resample(sums: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Draw as many blocks as there are, with replacement, ``RESAMPLES`` times, and sum each draw's
    counts: ``(RESAMPLES, 3, K)``.
    """
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
    """Return the expanded percentile interval of bootstrap values from ``count`` blocks; ``nan`` is
    left out.

    Plain percentiles are too narrow for few blocks by ``sqrt((n - 1) / n)`` and by the step from
    Student's t to the normal distribution; wider percentiles make up for both (Hesterberg, "What
    teachers should know about the bootstrap", 2015, section 5.3).
    """
    values = values[~np.isnan(values)]
    if count < FEWEST_BLOCKS or not values.size:
        return None
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * _student_t(count - 1))
    low, high = np.quantile(values, (tail, 1 - tail))
    return Interval(float(low), float(high))


def _student_t(freedom: int) -> float:
    """Return the 97.5 % point of Student's t for at least 4 degrees of freedom (Abramowitz and
    Stegun 26.7.5; within 0.3 %).
    """
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
    what = (
        f"{count} block{plural} of neighbouring images"
        if count < num_images
        else f"{count} image{plural}"
    )
    if count < FEWEST_BLOCKS:
        return (
            f"no interval: {what} cannot say how much others would differ (at least "
            f"{FEWEST_BLOCKS} are needed)"
        )
    return f"from only {what}: read the intervals as a rough guide" if count < FEW_BLOCKS else ""
