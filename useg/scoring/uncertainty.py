"""Calibration of probabilities, and bootstrap intervals of scores.

A calibrated model is right for 80 % of the pixels to which it gives a probability of 80 %. Pixels
are counted into bins of confidence, image by image; only three numbers per bin are stored. The
temperature that calibrates a model is fitted here, too.

The intervals say how far the scores of other images of the same kind could lie. The bootstrap
resamples images, not pixels, or blocks of images where these are neighbours in a video or a stack:
neighbours are nearly the same, and counting each as independent would give intervals that are far
too narrow.
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

NUM_BINS = 15
# Temperatures lie between this and its inverse. The best one for a model without any error on the
# fitted pixels would be 0.
MAX_TEMPERATURE = 10.0
# Number of pixels of all images together on which the temperature is fitted.
FIT_PIXELS = 50_000
# (3, NUM_BINS): pixels, their summed confidence, correct pixels.
Reliability = NDArray[np.float64]

NUM_RESAMPLES = 2000
# With fewer blocks, the bootstrap cannot estimate how much others would differ.
MIN_BLOCKS = 5
# With fewer blocks, an interval is only a rough guide.
MIN_RELIABLE_BLOCKS = 10
# Block indices drawn at once; limits the memory.
_MAX_DRAWS = 2_000_000

# (N, 3, K): :func:`useg.scoring.metrics.tally` of each image.
Tallies = NDArray[np.int64]


@dataclass(frozen=True)
class Bin:
    """Pixels of similar confidence: mean confidence, accuracy, and share of all pixels."""

    confidence: float
    accuracy: float
    share: float


@dataclass(frozen=True)
class Calibration:
    """How well the confidence of a model matches its accuracy.

    Args:
        error: expected calibration error: the absolute difference between confidence and accuracy,
            averaged over all pixels (Guo et al. 2017).
        confidence: mean confidence of all pixels; above the pixel accuracy, the model is
            overconfident.
        temperature: divisor of the logits.
        curve: reliability curve: the bins with pixels, in ascending order of confidence.
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
    """Count the pixels of one image into equal bins of confidence.

    The confidence of a pixel is the probability of its most probable class.

    Args:
        logits: ``(K, H, W)``.
        prediction: the most probable class of each pixel, ``(H, W)``.
        label: true ids ``(H, W)``; ``IGNORE`` does not count.
        temperature: divisor of the logits.

    Returns:
        ``(3, NUM_BINS)`` float64; images add up.
    """
    known = label != IGNORE
    confident = confidence(logits, temperature)[known]
    correct = (prediction == label)[known]
    bins = np.minimum((confident * NUM_BINS).astype(np.uint8), NUM_BINS - 1)
    by_bin = np.bincount(bins + correct * np.uint8(NUM_BINS), minlength=2 * NUM_BINS).reshape(
        2, NUM_BINS
    )
    return np.stack([by_bin.sum(0), np.bincount(bins, confident, minlength=NUM_BINS), by_bin[1]])


def calibration(counts: Reliability, temperature: float) -> Calibration:
    """Compute the calibration error and reliability curve from summed counts ``(3, NUM_BINS)``."""
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


def sample_pixels(
    logits: NDArray[np.float32], label: Label, count: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Sample pixels of one image, to fit a temperature on.

    Args:
        logits: ``(K, H, W)``.
        label: true ids ``(H, W)``.
        count: number of pixels, drawn with replacement from those that are not ignored.
        seed: seed of the sampling.

    Returns:
        Logits ``(count, K)`` and true ids ``(count,)``; empty if every pixel is ignored.
    """
    known = np.flatnonzero(label != IGNORE)
    drawn = (
        known[np.random.default_rng(seed).integers(0, known.size, count)] if known.size else known
    )
    return logits.reshape(len(logits), -1)[:, drawn].T, label.reshape(-1)[drawn]


def fit_temperature(logits: NDArray[np.float32], truth: NDArray[np.uint8]) -> float:
    """Fit the temperature at which the true classes of pixels are most probable.

    The mean log likelihood is concave in the inverse of the temperature, so bisection finds the
    zero of its slope. Label maps do not change (Guo et al., "On calibration", ICML 2017, section
    4.2).

    Args:
        logits: ``(N, K)``.
        truth: ``(N,)`` class ids.

    Returns:
        A number from 1 / ``MAX_TEMPERATURE`` to ``MAX_TEMPERATURE``; 1 if there is nothing to fit.
    """
    if not truth.size or logits.shape[1] < 2:
        return 1.0
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    of_truth = shifted[np.arange(truth.size), truth].mean()
    low, high = -np.log(MAX_TEMPERATURE), np.log(MAX_TEMPERATURE)
    while high - low > 1e-4:
        middle = (low + high) / 2
        weights = np.exp(shifted * np.exp(-middle))
        expected = ((weights * shifted).sum(1) / weights.sum(1)).mean()
        # Underconfident if the true classes have higher logits than the probabilities predict.
        low, high = (low, middle) if expected < of_truth else (middle, high)
    return float(np.exp((low + high) / 2))


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval: 95 of 100 repetitions with other images lie in it."""

    low: float
    high: float


@dataclass(frozen=True)
class Intervals:
    """95 % intervals of the scores; None if there are too few blocks.

    Args:
        mean_iou: of the mean IoU.
        pixel_accuracy: of the pixel accuracy.
        classes: of each class's IoU; None also if fewer than ``MIN_BLOCKS`` blocks contain the
            class.
        num_blocks: number of resampled images, or blocks of neighbouring images.
        note: what limits these intervals, in one sentence; empty if nothing does.
    """

    mean_iou: Interval | None
    pixel_accuracy: Interval | None
    classes: tuple[Interval | None, ...]
    num_blocks: int
    note: str


@dataclass(frozen=True)
class PairedDifference:
    """How much better the first of two models is on the same images; negative if it is worse.

    Args:
        mean_iou: difference of the mean IoUs, first - second.
        interval: its 95 % interval; None if there are too few blocks.
        probability_better: share of the resamples in which the first model has the higher mean IoU
            (ties count half); None if there are too few blocks. It is at least ``2**-n`` away from
            0 and 1: the probability that ``n`` fair coins all agree.
        classes: difference of each class's IoU, ``nan`` where absent, and its interval.
        num_blocks: number of resampled blocks.
        note: as in :class:`Intervals`.
    """

    mean_iou: float
    interval: Interval | None
    probability_better: float | None
    classes: tuple[tuple[float, Interval | None], ...]
    num_blocks: int
    note: str


def score_intervals(tallies: Tallies, blocks: Sequence[int], seed: int = 0) -> Intervals:
    """Compute 95 % intervals by resampling blocks with replacement.

    Args:
        tallies: ``(N, 3, K)`` counts of each image.
        blocks: the block of each image, N numbers; all different where images are independent.
        seed: seed of the resampling.
    """
    sums = _by_block(tallies, blocks)
    count, holding = len(sums), (sums[:, 1] > 0).sum(0)
    note = _note(count, len(tallies))
    if count < MIN_BLOCKS:
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


def compare_tallies(first: Tallies, second: Tallies, blocks: Sequence[int]) -> PairedDifference:
    """Compare two models on the same images by the same resamples of both.

    The arguments are those of :func:`score_intervals`.
    """
    totals = [tallies.sum(0) for tallies in (first, second)]
    by_class = class_ious(totals[0]) - class_ious(totals[1])
    difference = float(mean_iou(totals[0]) - mean_iou(totals[1]))
    both = [_by_block(tallies, blocks) for tallies in (first, second)]
    count, holding = len(both[0]), (both[0][:, 1] > 0).sum(0)
    note = _note(count, len(first))
    if count < MIN_BLOCKS:
        return PairedDifference(
            difference, None, None, tuple((float(value), None) for value in by_class), count, note
        )
    drawn = [_resample(sums) for sums in both]
    gains = mean_iou(drawn[0]) - mean_iou(drawn[1])
    class_gains = (class_ious(drawn[0]) - class_ious(drawn[1])).T
    classes = tuple(
        (float(value), _interval(gain, int(n)))
        for value, gain, n in zip(by_class, class_gains, holding, strict=True)
    )
    better = float(np.clip(np.mean((gains > 0) + 0.5 * (gains == 0)), 2.0**-count, 1 - 2.0**-count))
    return PairedDifference(difference, _interval(gains, count), better, classes, count, note)


def resampled_intervals(
    rows: NDArray[np.float64],
    blocks: Sequence[int],
    score: Callable[[NDArray[np.float64]], dict[str, NDArray[np.float64]]],
) -> dict[str, Interval | None]:
    """Compute 95 % intervals of any scores of summed counts, as :func:`score_intervals` does.

    Args:
        rows: ``(N, M)`` counts of each image.
        blocks: the block of each image.
        score: computes the scores ``(...)``, by name, of sums ``(..., M)``.
    """
    sums = _sum_blocks(rows, blocks)
    count = len(sums)
    if count < MIN_BLOCKS:
        return dict.fromkeys(score(rows.sum(0)))
    drawn = score(_resample(sums))
    return {name: _interval(values, count) for name, values in drawn.items()}


def _by_block(tallies: Tallies, blocks: Sequence[int]) -> NDArray[np.float64]:
    """Sum the counts of each block, ``(B, 3, K)``, leaving out those without a counted pixel."""
    sums = _sum_blocks(tallies, blocks)
    return sums[sums[:, 1].any(1)]


def _sum_blocks(counts: NDArray[np.generic], blocks: Sequence[int]) -> NDArray[np.float64]:
    """Sum the counts ``(N, ...)`` of the images of each block: ``(B, ...)``."""
    _, place = np.unique(np.asarray(blocks), return_inverse=True)
    sums = np.zeros((place.max(initial=-1) + 1, *counts.shape[1:]))
    np.add.at(sums, place, counts)
    return sums


def _resample(sums: NDArray[np.float64], seed: int = 0) -> NDArray[np.float64]:
    """Resample all blocks with replacement ``NUM_RESAMPLES`` times, and sum their counts.

    Returns:
        ``(NUM_RESAMPLES, 3, K)``.
    """
    generator = np.random.default_rng(seed)
    count = len(sums)
    flat = sums.reshape(count, -1)
    step = max(1, _MAX_DRAWS // count)
    parts = []
    for start in range(0, NUM_RESAMPLES, step):
        rows = min(step, NUM_RESAMPLES - start)
        draws = generator.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(draws.ravel(), minlength=rows * count).reshape(rows, count)
        # Exact, because all numbers are integers below 2**53.
        parts.append(times.astype(np.float64) @ flat)
    return np.concatenate(parts).reshape(NUM_RESAMPLES, *sums.shape[1:])


def _interval(values: NDArray[np.float64], count: int) -> Interval | None:
    """Return the expanded percentile interval of bootstrap values; ``nan`` is left out.

    Plain percentiles are too narrow for few blocks: by ``sqrt((n - 1) / n)``, and by the step from
    Student's t to the normal distribution. Wider percentiles make up for both (Hesterberg, "What
    teachers should know about the bootstrap", 2015, section 5.3).

    Args:
        values: the score of each resample.
        count: number of blocks.
    """
    values = values[~np.isnan(values)]
    if count < MIN_BLOCKS or not values.size:
        return None
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * _student_t(count - 1))
    low, high = np.quantile(values, (tail, 1 - tail))
    return Interval(float(low), float(high))


def _student_t(freedom: int) -> float:
    """Return the 97.5 % point of Student's t for at least 4 degrees of freedom, within 0.3 %.

    Abramowitz and Stegun 26.7.5.
    """
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))


def _note(count: int, num_images: int) -> str:
    """Return one sentence about what too few blocks do not allow, or an empty string."""
    plural = "" if count == 1 else "s"
    what = (
        f"{count} block{plural} of neighbouring images"
        if count < num_images
        else f"{count} image{plural}"
    )
    if count < MIN_BLOCKS:
        return (
            f"no interval: {what} {'is' if count == 1 else 'are'} too few to estimate how much the "
            f"scores vary (at least {MIN_BLOCKS} are needed)"
        )
    return (
        f"the intervals come from only {what}, so they are a rough guide"
        if count < MIN_RELIABLE_BLOCKS
        else ""
    )
