"""Logits + truth -> is a pixel that the model is 80 % sure of right 8 times in 10? And the temperature that makes it so.

Pixels are counted into bins of confidence, image by image: nothing is stored but three numbers a bin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label
from useg.scoring.answers import confidence
from useg.scoring.metrics import plain

BINS = 15
HOTTEST = 10.0  # temperatures lie between this and its inverse: a model without an error on the pixels fitted asks for 0
FIT_PIXELS = 50_000  # of all images together are enough to fit one number

Reliability = NDArray[np.float64]  # (3, BINS): pixels, their summed confidence, how many of them are right


@dataclass(frozen=True)
class Bin:
    """Pixels of like confidence: their mean confidence, the share of them that is right, their share of all pixels."""

    confidence: float
    accuracy: float
    share: float


@dataclass(frozen=True)
class Calibration:
    """How far confidence and accuracy are apart.

    Args:
        error: expected calibration error: the distance between confidence and accuracy, averaged over all pixels (Guo et al. 2017).
        confidence: mean confidence of all pixels; above the pixel accuracy, the model thinks too well of itself.
        temperature: what the logits were divided by.
        curve: the bins that hold pixels, from low confidence to high.
    """

    error: float
    confidence: float
    temperature: float
    curve: tuple[Bin, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        curve = [{"confidence": bin_.confidence, "accuracy": bin_.accuracy, "share": bin_.share} for bin_ in self.curve]
        content: dict[str, Any] = plain({"error": self.error, "confidence": self.confidence, "temperature": self.temperature, "curve": curve})
        return content


def reliability(logits: NDArray[np.float32], prediction: Label, label: Label, temperature: float = 1.0) -> Reliability:
    """Count the pixels of one image into equal bins of confidence, the probability of the most probable class.

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
    """Compute the expected calibration error and the reliability curve from summed counts ``(3, BINS)``."""
    pixels, confident, right = counts
    total = pixels.sum()
    if not total:
        return Calibration(float("nan"), float("nan"), temperature, ())
    curve = tuple(Bin(*(float(value) for value in (c / n, r / n, n / total))) for n, c, r in counts.T if n)
    return Calibration(float(np.abs(confident - right).sum() / total), float(confident.sum() / total), temperature, curve)


def some_pixels(logits: NDArray[np.float32], label: Label, count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
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
    drawn = known[np.random.default_rng(seed).integers(0, known.size, count)] if known.size else known
    return logits.reshape(len(logits), -1)[:, drawn].T, label.reshape(-1)[drawn]


def fit_temperature(logits: NDArray[np.float32], truth: NDArray[np.uint8]) -> float:
    """Find the temperature at which the true classes of pixels are most probable (Guo et al., "On calibration", ICML 2017, section 4.2).

    The mean log likelihood is concave in the inverse of the temperature, so its slope is followed to where it is 0. No label map changes.

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
        low, high = (low, middle) if expected < of_truth else (middle, high)  # the truth scores above what is expected: be bolder
    return float(np.exp((low + high) / 2))
