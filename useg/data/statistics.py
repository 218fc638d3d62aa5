"""Cached samples -> mean and deviation of each band, and each class's share of the pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from useg.data.samples import Samples

PICKED = 1_000_000  # pixels that stand for all of a set of 16-bit or float pictures
_TAIL = 0.5  # per cent of them at either end that count as the last value before: hot pixels, dead ones


def pixel_statistics(samples: Samples) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each band, in raw pixel units; a constant band has deviation 1.

    8-bit pixels all count. Of 16-bit and float pixels, which have no bounds to speak of, a million evenly spread over all pictures do, each
    band clipped to its percentiles 0.5 and 99.5, so that a few hot pixels do not flatten the rest.
    """
    mean, std = _exact(samples) if samples.pixels == "uint8" else _robust(samples)
    # What is left of a constant by rounding is no deviation, in whatever unit.
    return mean.tolist(), [value if value > 1e-6 * abs(middle) else 1.0 for value, middle in zip(std.tolist(), mean.tolist(), strict=True)]


def _exact(samples: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    count = samples.ledger.areas.sum()
    total, squares = samples.ledger.moments.sum(0)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def _robust(samples: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    each = max(1, PICKED // len(samples))
    picked = []
    for sample in samples:
        pixels = sample.image.reshape(-1, sample.image.shape[2])
        picked.append(pixels[np.linspace(0, len(pixels) - 1, min(each, len(pixels))).astype(np.intp)].astype(np.float64))
    values = np.concatenate(picked)
    clipped = np.clip(values, *np.percentile(values, (_TAIL, 100 - _TAIL), axis=0))
    std = clipped.std(0)
    return clipped.mean(0), np.where(std > 0, std, values.std(0))  # the rest is all there is where nearly every pixel has one value


def class_shares(samples: Samples) -> NDArray[np.float64]:
    """Return each class's share of the counted pixels, ``(K,)``, summing to 1 (all 0 when every pixel is ignored)."""
    counts = samples.ledger.counts.sum(0)
    shares: NDArray[np.float64] = counts / max(1, counts.sum())
    return shares
