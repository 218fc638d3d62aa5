"""A trained model and its data -> its temperature, and how its training images look.

The temperature calibrates the probabilities on held-out images. The statistics of the training
images tell later which images are unlike them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from useg.data.dataset import (
    Dataset,
    Pair,
    pair_name,
    pick_evenly,
    read_pair_image,
    read_pair_size,
    read_sample,
)
from useg.device import CPU, choose_device
from useg.inference import runtimes
from useg.inference.predictor import Predictor
from useg.machine import in_parallel
from useg.models import segmenter
from useg.models.description import (
    Statistics,
    TrainingImages,
    fit_training_images,
    measure_image,
)
from useg.models.geometry import fit_bands
from useg.scoring.uncertainty import FIT_PIXELS, fit_temperature, sample_pixels

# More images would take longer and hardly change the one number that is fitted.
MAX_TEMPERATURE_IMAGES = 40
# Training and held-out images that are described: at most this many images and pixels in all, but
# always some.
MAX_TRAINING_IMAGES, MAX_HELD_OUT_IMAGES = 64, 100
MAX_DESCRIBED_PIXELS, MIN_DESCRIBED_IMAGES = 64_000_000, 12


def find_temperature(predictor: Predictor, dataset: Dataset, pairs: Sequence[Pair]) -> float:
    """Fit the temperature on some pixels of images that the model was not trained on.

    Args:
        predictor: the model; its present temperature does not matter.
        dataset: the data set of the pairs.
        pairs: held-out images; at most ``MAX_TEMPERATURE_IMAGES`` of them are used.

    Raises:
        UsageError: an unreadable file, or an image that does not fit the model.
    """
    chosen = pick_evenly(pairs, MAX_TEMPERATURE_IMAGES)
    if not chosen:
        return 1.0
    num_pixels = FIT_PIXELS // len(chosen)
    parts = []
    for k, pair in enumerate(chosen):
        sample = read_sample(pair, dataset)
        logits = predictor.logits(sample.image)
        parts.append(sample_pixels(logits, sample.label, num_pixels, seed=k))
    logits, truth = (np.concatenate(part) for part in zip(*parts, strict=True))
    return fit_temperature(logits, truth)


def describe_images(model: segmenter.Segmenter, dataset: Dataset) -> TrainingImages:
    """Describe how some training images look, with a limit from held-out images.

    Raises:
        UsageError: an unreadable file.
    """
    mean, std = (part.flatten().tolist() for part in (model.mean, model.std))

    def measure(pair: Pair) -> Statistics:
        image = fit_bands(read_pair_image(pair), model.channels, model.pixels, pair_name(pair))
        return measure_image(image, mean, std, model.working)

    parts = []
    for split, most in (("train", MAX_TRAINING_IMAGES), ("val", MAX_HELD_OUT_IMAGES)):
        pairs = dataset.of(split)
        width, height = read_pair_size(pairs[0])
        count = max(MIN_DESCRIBED_IMAGES, min(most, MAX_DESCRIBED_PIXELS // (width * height)))
        parts.append(list(in_parallel(measure, pick_evenly(pairs, count))))
    return fit_training_images(*parts)


def calibrate(run: Path, dataset: Dataset) -> None:
    """Fit the temperature of a run and describe its images, and write both into the model file.

    A GPU computes if there is one.

    Raises:
        UsageError: as for :func:`find_temperature`; also if there is no model, or the file cannot
            be written.
    """
    model = segmenter.load_model(run)
    name = "torch" if choose_device() == CPU else "gpu"
    predictor = Predictor(runtimes.runtime_of_model(model, run, name))
    model.temperature = find_temperature(predictor, dataset, dataset.of("val"))
    if dataset.of("train") and dataset.of("val"):
        model.provenance["training_images"] = describe_images(model, dataset).as_dict()
    segmenter.save_model(model, run / segmenter.MODEL_NAME)


def with_temperature(predictor: Predictor, temperature: float) -> Predictor:
    """Return the predictor with another temperature; its label maps stay the same."""
    description = replace(predictor.runtime.description, temperature=temperature)
    return Predictor(replace(predictor.runtime, description=description))
