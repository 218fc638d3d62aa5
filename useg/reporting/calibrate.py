"""Held-out pictures through a predictor -> the temperature at which its probabilities mean what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from useg.data.dataset import Dataset, Pair, read_sample, spread
from useg.inference import runtimes
from useg.inference.predictor import Predictor
from useg.models import segmenter
from useg.scoring.calibration import FIT_PIXELS, fit_temperature, some_pixels

MOST_PICTURES = 40  # evenly spread over those held out: enough for one number, and soon done


def find_temperature(predictor: Predictor, dataset: Dataset, pairs: Sequence[Pair]) -> float:
    """Fit the temperature on some pixels of pictures that training has not seen.

    Args:
        predictor: the model; the temperature that it has does not matter.
        dataset: where the pairs come from.
        pairs: held-out pictures; at most ``MOST_PICTURES`` of them are looked at.

    Raises:
        UsageError: an unreadable file, or a picture that does not fit the model.
    """
    chosen = spread(pairs, MOST_PICTURES)
    parts = []
    for k, pair in enumerate(chosen):
        sample = read_sample(pair, dataset)
        parts.append(some_pixels(predictor.logits(sample.image), sample.label, FIT_PIXELS // len(chosen), seed=k))
    return fit_temperature(*(np.concatenate(part) for part in zip(*parts, strict=True))) if parts else 1.0


def calibrate(run: Path, dataset: Dataset) -> None:
    """Fit the temperature of the model in a run folder on its validation pictures, and write it into the model file.

    Raises:
        UsageError: as for :func:`find_temperature`; also no model, or a file that cannot be written.
    """
    model = segmenter.load(run)
    model.temperature = find_temperature(Predictor(runtimes.of_model(model, run)), dataset, dataset.of("val"))
    segmenter.save(model, run / segmenter.MODEL_NAME)


def at_temperature(predictor: Predictor, temperature: float) -> Predictor:
    """Return the same predictor with another temperature; its label maps are the same."""
    return Predictor(replace(predictor.runtime, card=replace(predictor.runtime.card, temperature=temperature)))
