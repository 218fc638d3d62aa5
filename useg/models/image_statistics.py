"""How an image looks, in a few numbers, and whether it is unlike the training images.

Scores of training hold for images like those of training. So the description of a model has the
statistics of some training images: brightness, contrast, colour and sharpness. A new image is
compared with the training image that is nearest to it; the limit is such that about 3 % of the
held-out images are beyond it. This is a nearest-neighbour test for out-of-distribution inputs (Sun
and others 2022) on statistics of the pixels, which take less than a thousandth of a second and do
not depend on what computes the model. It does not notice new things in familiar light.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.models.geometry import WorkingSize

Statistics = NDArray[np.float64]  # (F,)

# Training images in a description: so many, but fewer numbers than this in all.
MAX_EXAMPLES, MAX_EXAMPLE_NUMBERS = 64, 10_000

# Share of the held-out images that are beyond the limit.
FALSE_ALARM_SHARE = 0.03

# At most this number of rows and columns of an image is looked at.
SAMPLED_SIDE = 32

# Differences to neighbours at these distances show how sharp an image is; in pixels of the size at
# which the model works.
NEIGHBOUR_DISTANCES = 1, 4

# Smallest deviation of a number among the training images, and smallest limit: tiny differences
# from images that are all alike do not count.
MIN_DEVIATION, MIN_LIMIT = 0.05, 0.25

# Pixels, and steps from one to the next, are clipped to so many deviations.
MAX_PIXEL = 1e4

# Examples are stored in whole hundredths of the deviations.
EXAMPLE_UNIT = 0.01


def measure_image(
    image: NDArray[np.generic], mean: Sequence[float], std: Sequence[float], working: WorkingSize
) -> Statistics:
    """Return the statistics of an image, as many as :func:`count_statistics` says.

    Args:
        image: ``(H, W, C)`` raw pixels, none of them NaN or infinite.
        mean, std: Of the bands, in raw pixel units.
        working: The size at which the model works.
    """
    height, width = image.shape[:2]
    down, across = (-(-side // SAMPLED_SIDE) for side in (height, width))
    scale = np.asarray(std, np.float32)

    def standardize(values: NDArray[np.generic], base: Any) -> NDArray[np.float32]:
        with np.errstate(over="ignore"):
            deviations = (values.astype(np.float32) - base) / scale
        clipped: NDArray[np.float32] = np.clip(deviations, -MAX_PIXEL, MAX_PIXEL)
        return clipped.reshape(-1, len(scale))

    pixels = standardize(image[::down, ::across], np.asarray(mean, np.float32))
    ordered = np.sort(pixels, axis=0)
    end = len(ordered) // 20
    zoom = height / working.of(width, height)[1]
    steps = []
    for away in (max(1, round(distance * zoom)) for distance in NEIGHBOUR_DISTANCES):
        pairs = (
            (image[:-away:down, ::across], image[away::down, ::across]),
            (image[::down, :-away:across], image[::down, away::across]),
        )
        for first, second in pairs:
            step = np.abs(standardize(second, first.astype(np.float32)))
            steps.append(float(step.mean()) if step.size else 0.0)
    colour = pixels - pixels.mean(1, keepdims=True)
    spread = np.concatenate([pixels.std(0), colour.std(0), steps])
    levels = (pixels.mean(0), ordered[end], ordered[-1 - end])
    found: Statistics = np.concatenate([*levels, np.log(spread + MIN_DEVIATION)])
    return found.astype(np.float64)


def count_statistics(channels: int) -> int:
    """Return how many numbers :func:`measure_image` returns for images of so many bands."""
    return 5 * channels + 2 * len(NEIGHBOUR_DISTANCES)


@dataclass(frozen=True)
class TrainingImages:
    """The statistics of some training images.

    Args:
        mean, deviation: Of each number among the training images, ``(F,)``.
        examples: Numbers of some images ``(N, F)``, less the mean, in deviations.
        limit: Distance, in deviations, beyond which an image is unlike them.
    """

    mean: Statistics
    deviation: Statistics
    examples: NDArray[np.float64]
    limit: float

    def distance(self, statistics: Statistics) -> float:
        """Return how far an image is from the nearest of the training images; the limit is 1."""
        differences = (statistics - self.mean) / self.deviation - self.examples
        return float(np.sqrt((differences**2).mean(1)).min()) / self.limit

    def distance_of(
        self,
        image: NDArray[np.generic],
        mean: Sequence[float],
        std: Sequence[float],
        working: WorkingSize,
    ) -> float:
        """Return the distance of an image; arguments are those of :func:`measure_image`."""
        return self.distance(measure_image(image, mean, std, working))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for the description of a model."""
        return {
            "mean": [round(value, 5) for value in self.mean.tolist()],
            "deviation": [round(value, 5) for value in self.deviation.tolist()],
            "examples": np.rint(self.examples / EXAMPLE_UNIT).astype(int).tolist(),
            "limit": self.limit,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TrainingImages:
        """Return what :meth:`as_dict` has stored."""
        mean, deviation = (np.array(content[key], np.float64) for key in ("mean", "deviation"))
        examples = np.array(content["examples"], np.float64) * EXAMPLE_UNIT
        return cls(mean, deviation, examples, content["limit"])


def fit_training_images(
    train: Sequence[Statistics], held_out: Sequence[Statistics]
) -> TrainingImages:
    """Describe training images, with the limit that held-out images give.

    Args:
        train: Statistics of at least one training image.
        held_out: Statistics of at least one image that the model was not trained on.
    """
    numbers = np.stack(train)
    mean, deviation = numbers.mean(0), np.maximum(numbers.std(0), MIN_DEVIATION)
    count = max(1, min(len(train), MAX_EXAMPLES, MAX_EXAMPLE_NUMBERS // numbers.shape[1]))
    chosen = [k * len(train) // count for k in range(count)]
    examples = (numbers[chosen] - mean) / deviation
    # What is stored decides about the limit.
    stored = TrainingImages.from_dict(TrainingImages(mean, deviation, examples, 1.0).as_dict())
    distances = sorted(stored.distance(each) for each in held_out)
    beyond = math.floor(FALSE_ALARM_SHARE * len(distances))
    limit = max(MIN_LIMIT, distances[-1 - beyond])
    return TrainingImages(stored.mean, stored.deviation, stored.examples, limit)
