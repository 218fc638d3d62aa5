"""Measure where the errors of a class are, and how the images of two splits differ.

The errors of one class in one image are counted at the border with another class, by the width of
the regions, against the edges of the image and by the confidence of the model. These counts add up
over images, in any order. The images of two splits differ in brightness, contrast, colour or size.
:mod:`useg.reporting.cause_rules` draws its conclusions from both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label, confidence, count_pixels, most_probable
from useg.data.dataset import Dataset, Pair, read_sample
from useg.images.image_files import Image, Sample, resize_image
from useg.machine import in_parallel
from useg.scoring.metrics import components

if TYPE_CHECKING:
    from useg.inference.predictor import Predictor

# Pixels at the working size by which a predicted border may miss the true one: the edge is between
# pixels, averaged when the image is reduced, and enlarged again.
BORDER_TOLERANCE_PIXELS = 1.5

# Edges are compared with those of the square that reaches this many pixels in each direction.
_EDGE_WINDOW_RADIUS = 8

# Pixels that are sampled from an image; enough for its mean and deviation.
_STATISTICS_PIXELS = 20_000

# Differences between splits that augmentation covers anyway do not count (training/augment.py).
# Brightness and colour are in standard deviations of the pixels. Augmentation changes all bands
# alike, so colour has the smaller limit. Contrast and side length are differences of logarithms.
_MIN_BRIGHTNESS_SHIFT = 0.35
_MIN_CONTRAST_SHIFT = 0.3
_MIN_COLOR_SHIFT = 0.2
_MIN_SIDE_SHIFT = 0.5

# Standard deviations, among the images of a split, by which the means of two splits must differ.
_MIN_SHIFT_DEVIATIONS = 1.5

BoolMask = NDArray[np.bool_]


@dataclass(frozen=True)
class PredictedImage:
    """An image with its prediction, and what the errors of all its classes are compared with.

    Args:
        label: ``(H, W)`` true ids, or ``IGNORE``.
        prediction: ``(H, W)`` predicted ids.
        confidence: ``(H, W)`` probability of the predicted class.
        correct: ``(2,)`` correct pixels, and their summed confidence.
        edges: ``(H, W)`` strength of the image's edges relative to their surroundings, where 1 is
            the mean.
        shared_outlines: ``(2,)`` pixels on outlines that label and prediction share, and the
            summed edges there.
        countable: ``(H, W)`` whether an outline counts: not near ignored pixels.
        working: (width, height) of the image in the network.
    """

    label: Label
    prediction: Label
    confidence: NDArray[np.float32]
    correct: NDArray[np.float64]
    edges: NDArray[np.float32]
    shared_outlines: NDArray[np.float64]
    countable: BoolMask
    working: tuple[int, int]

    @property
    def scale(self) -> float:
        """Side length in the network as a share of the native side length."""
        return math.sqrt(math.prod(self.working) / self.label.size)

    @property
    def tolerance(self) -> int:
        """Native pixels by which a predicted border may miss the true one.

        At least 2, because people do not draw borders more exactly.
        """
        return max(2, math.ceil(BORDER_TOLERANCE_PIXELS / self.scale))


@dataclass(frozen=True)
class ClassErrors:
    """The errors of one class, and its confusion with one other class.

    Args:
        confusions: ``(3,)`` pixels confused with the other class; those of them near a true border
            between the two; how many would be near it if they were anywhere in their class.
        confidences: ``(2, 2)`` a row for the wrong pixels of the class and a row for the correct
            pixels of all classes; columns are their number and their summed confidence.
        outlines: ``(3, 2)`` a row for outlines of the class in the prediction alone, a row for
            those in the label alone, and a row for outlines of all classes in both; columns are
            the number of pixels and the summed edges.
        best_overlap: ``(3,)`` correct, true and predicted pixels of the best possible answer at
            the working size.
        regions: ``(M, 3)`` true connected regions: width in pixels at the working size, pixels,
            pixels found.
    """

    confusions: NDArray[np.float64]
    confidences: NDArray[np.float64]
    outlines: NDArray[np.float64]
    best_overlap: NDArray[np.int64]
    regions: NDArray[np.float64]

    def __add__(self, other: ClassErrors) -> ClassErrors:
        return ClassErrors(
            self.confusions + other.confusions,
            self.confidences + other.confidences,
            self.outlines + other.outlines,
            self.best_overlap + other.best_overlap,
            np.concatenate([self.regions, other.regions]),
        )

    @property
    def border_share(self) -> float:
        """How far the confused pixels keep to the border.

        0 if they are as near to it as pixels anywhere in the class, 1 if all of them are near it.
        """
        pixels, near, expected = self.confusions
        return float((near - expected) / (pixels - expected)) if pixels > expected else 1.0

    @property
    def relative_confidence(self) -> float:
        """Mean confidence of wrong pixels divided by that of correct pixels.

        ``nan`` if there are no wrong or no correct pixels.
        """
        pixels, confidences = self.confidences[:, 0], self.confidences[:, 1]
        if not pixels.all():
            return math.nan
        return float(confidences[0] / pixels[0] / (confidences[1] / pixels[1]))

    @property
    def best_iou(self) -> float:
        """IoU of the best possible answer at the working size."""
        correct, truth, predicted = self.best_overlap
        return float(correct / max(1, truth + predicted - correct))

    @property
    def edge_support(self) -> NDArray[np.float64]:
        """Mean edge strength on the three kinds of outlines, ``(3,)``; 1 is the overall mean."""
        pixels, edges = self.outlines.T
        return np.where(pixels > 0, edges / np.maximum(pixels, 1), 1.0)

    @property
    def prediction_support(self) -> float:
        """How far the edges of the image agree with the prediction where it contradicts the label.

        0 if they agree with the label, 1 if they agree with the prediction, ``nan`` if they show
        nothing. An outline in the prediction alone supports the prediction if the edges under it
        are as strong as those under shared outlines. An outline in the label alone supports the
        prediction if there is no edge under it.
        """
        predicted, true, _ = self.outlines[:, 0]
        under_predicted, under_true, under_shared = self.edge_support
        if predicted + true == 0 or under_shared <= 1:
            return math.nan
        for_prediction, for_label = (
            np.clip((strength - 1) / (under_shared - 1), 0, 1)
            for strength in (under_predicted, under_true)
        )
        return float((predicted * for_prediction + true * (1 - for_label)) / (predicted + true))


def predict_image(predictor: Predictor, sample: Sample) -> PredictedImage:
    """Predict an image, and measure what the errors of all its classes are compared with.

    Raises:
        UsageError: the image does not fit the model.
    """
    logits = predictor.logits(sample.image)
    label, prediction = sample.label, most_probable(logits)
    working = predictor.runtime.description.working.of(label.shape[1], label.shape[0])
    certainty = confidence(logits, predictor.temperature)
    return measure_maps(label, prediction, certainty, relative_edge_strength(sample.image), working)


def measure_maps(
    label: Label,
    prediction: Label,
    confidence: NDArray[np.float32],
    edges: NDArray[np.float32],
    working: tuple[int, int],
) -> PredictedImage:
    """Complete a predicted image; the arguments are its fields."""
    image = PredictedImage(
        label=label,
        prediction=prediction,
        confidence=confidence,
        correct=_count_and_sum(label == prediction, confidence),
        edges=edges,
        shared_outlines=np.zeros(2),
        countable=label != IGNORE,
        working=working,
    )
    countable = ~dilate_mask(label == IGNORE, image.tolerance + 1)
    shared = _outline(label) & dilate_mask(_outline(prediction), 1) & countable
    return replace(image, shared_outlines=_count_and_sum(shared, edges), countable=countable)


def measure_class_errors(image: PredictedImage, class_id: int, other_id: int) -> ClassErrors:
    """Count the errors of one class in one image.

    Args:
        image: the image and its prediction.
        class_id: the class.
        other_id: the class that it is most often confused with.
    """
    label, prediction = image.label, image.prediction
    true, predicted = label == class_id, (prediction == class_id) & (label != IGNORE)
    wrong = true ^ predicted
    swapped = wrong & np.where(true, prediction == other_id, label == other_id)
    return ClassErrors(
        confusions=_count_confusions(swapped, true, label == other_id, image.tolerance),
        confidences=np.stack([_count_and_sum(wrong, image.confidence), image.correct]),
        outlines=_measure_outlines(true, predicted, image),
        best_overlap=_count_best_overlap(true, image.working),
        regions=_measure_regions(true, predicted, image.scale),
    )


def _count_confusions(
    swapped: BoolMask, true: BoolMask, other: BoolMask, tolerance: int
) -> NDArray[np.float64]:
    """Return ``ClassErrors.confusions`` of an image, counted in both directions."""
    counts = np.zeros(3)
    for own, opposite in ((true, other), (other, true)):
        near = own & dilate_mask(opposite, tolerance)
        pixels, near_border, total = (
            int(np.count_nonzero(part)) for part in (swapped & own, near, own)
        )
        expected = pixels * near_border / max(1, total)
        counts += pixels, int(np.count_nonzero(swapped & near)), expected
    return counts


def _measure_outlines(
    true: BoolMask, predicted: BoolMask, image: PredictedImage
) -> NDArray[np.float64]:
    """Return ``ClassErrors.outlines`` of an image."""
    drawn, given = (_outline(mask) & image.countable for mask in (predicted, true))
    only_predicted = drawn & ~dilate_mask(given, image.tolerance)
    only_true = given & ~dilate_mask(drawn, image.tolerance)
    return np.stack(
        [
            _count_and_sum(only_predicted, image.edges),
            _count_and_sum(only_true, image.edges),
            image.shared_outlines,
        ]
    )


def _count_best_overlap(true: BoolMask, working: tuple[int, int]) -> NDArray[np.int64]:
    """Compare a mask with itself after averaging to the working size and enlarging again."""
    height, width = true.shape
    small = resize_image(true[..., None].astype(np.float32), working)
    best = resize_image(small, (width, height))[..., 0] > 0.5
    return np.array([np.count_nonzero(mask) for mask in (best & true, true, best)])


def _measure_regions(true: BoolMask, predicted: BoolMask, scale: float) -> NDArray[np.float64]:
    """Measure the connected regions of a mask, ``(M, 3)``: width, pixels, pixels found.

    The width is twice the area divided by the length of the outline: the width of a pole, half the
    side of a square. At a width of w, 2 / w of the pixels are on the outline.
    """
    numbers = components(true)
    length = int(numbers.max(initial=0)) + 1
    outline = np.zeros(length)
    for map_ in (numbers, numbers.T):
        before, after = map_[:-1], map_[1:]
        differ = after != before
        for side in (after, before):
            outline += np.bincount(side[differ], minlength=length)
    pixels = np.bincount(numbers.ravel(), minlength=length)
    found = np.bincount(numbers.ravel(), predicted.ravel(), minlength=length)
    width = 2 * pixels / np.maximum(outline, 1) * scale
    # The first row is the outside.
    return np.stack([width, pixels, found], axis=1)[1:]


def relative_edge_strength(image: Image) -> NDArray[np.float32]:
    """Return the strength of edges relative to their surroundings, ``(H, W)``.

    An edge is the largest difference between neighbouring pixels within one pixel of each place.
    """
    grey = np.nan_to_num(image.astype(np.float32), posinf=0, neginf=0).mean(2)
    step = np.zeros(grey.shape, np.float32)
    step[:-1] = np.abs(grey[1:] - grey[:-1])
    np.maximum(step[:, :-1], np.abs(grey[:, 1:] - grey[:, :-1]), out=step[:, :-1])
    # The maximum over rows, then (transposed) over columns.
    for _ in range(2):
        padded = np.pad(step, ((1, 1), (0, 0)))
        step = np.maximum(step, np.maximum(padded[:-2], padded[2:])).T
    # The root reduces the weight of single strong edges.
    strongest = np.sqrt(step)
    mean = _window_mean(strongest)
    return np.where(mean > 0, strongest / np.where(mean > 0, mean, 1), 1).astype(np.float32)


def _window_mean(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean over the window around each place, as far as the window is inside."""
    radius = _EDGE_WINDOW_RADIUS
    side = 2 * radius + 1
    sums = []
    for part in (values, np.ones_like(values)):
        total = np.pad(part.astype(np.float64), (radius + 1, radius)).cumsum(0).cumsum(1)
        sums.append(
            total[side:, side:]
            - total[:-side, side:]
            - total[side:, :-side]
            + total[:-side, :-side]
        )
    mean: NDArray[np.float64] = sums[0] / sums[1]
    # Rounding leaves a tiny rest where all values are 0.
    return np.where(mean > 1e-9, mean, 0)


def _outline(map_: NDArray[Any]) -> BoolMask:
    """Mark the pixels of a mask or label map whose right or lower neighbour differs."""
    outline = np.zeros(map_.shape, bool)
    outline[:-1] = map_[1:] != map_[:-1]
    outline[:, :-1] |= map_[:, 1:] != map_[:, :-1]
    return outline


def _count_and_sum(mask: BoolMask, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the number of pixels in a mask, and the sum of their values."""
    return np.array([np.count_nonzero(mask), values[mask].sum(dtype=np.float64)])


def dilate_mask(mask: BoolMask, radius: int) -> BoolMask:
    """Dilate a mask by a square that reaches ``radius`` pixels in each direction."""
    # First along the rows, then (transposed) along the columns.
    for _ in range(2):
        dilated = mask.copy()
        for step in range(1, radius + 1):
            dilated[step:] |= mask[:-step]
            dilated[:-step] |= mask[step:]
        # Working on a transposed view would take longer than this copy.
        mask = np.ascontiguousarray(dilated.T)
    return mask


@dataclass(frozen=True)
class SplitStatistics:
    """Statistics of some images of a split.

    Args:
        pixels: ``(N, K)`` pixels of each class in each image.
        bands: ``(N, C)`` mean of each band in each image.
        contrast: ``(N,)`` standard deviation of the pixels of each image, mean of the bands.
        side: ``(N,)`` square root of the number of pixels of each image.
    """

    pixels: NDArray[np.int64]
    bands: NDArray[np.float64]
    contrast: NDArray[np.float64]
    side: NDArray[np.float64]

    @property
    def shares(self) -> NDArray[np.float64]:
        """Share of each class in the labelled pixels of each image, ``(N, K)``."""
        shares: NDArray[np.float64] = self.pixels / np.maximum(self.pixels.sum(1, keepdims=True), 1)
        return shares


@dataclass(frozen=True)
class SplitDifference:
    """A difference between two splits: an adjective, such as ``"darker"``, and the numbers."""

    adjective: str
    numbers: str


def measure_split(dataset: Dataset, pairs: Sequence[Pair]) -> SplitStatistics:
    """Read pairs, on all cores, and compute their statistics.

    Raises:
        UsageError: a pair cannot be read.
    """
    num_classes = len(dataset.classes)

    def measure(pair: Pair) -> tuple[NDArray[np.int64], NDArray[np.float64], float, float]:
        sample = read_sample(pair, dataset)
        pixels = count_pixels(sample.label, num_classes)
        return pixels, *image_statistics(sample.image)

    pixels, bands, contrast, side = zip(*in_parallel(measure, pairs), strict=True)
    return SplitStatistics(np.stack(pixels), np.stack(bands), np.array(contrast), np.array(side))


def image_statistics(image: Image) -> tuple[NDArray[np.float64], float, float]:
    """Return the mean of each band ``(C,)``, the contrast and the side of an image."""
    height, width = image.shape[:2]
    step = max(1, int((height * width / _STATISTICS_PIXELS) ** 0.5))
    some = np.nan_to_num(image[::step, ::step].astype(np.float64), posinf=0, neginf=0)
    return some.mean((0, 1)), float(some.std((0, 1)).mean()), (height * width) ** 0.5


def find_split_differences(
    train: SplitStatistics, held_out: SplitStatistics
) -> list[SplitDifference]:
    """Find how held-out images differ from training images.

    A difference counts if it exceeds what augmentation covers and how much the images of one split
    differ among themselves.
    """
    if train.bands.shape[1] != held_out.bands.shape[1]:
        return []
    splits = (train, held_out)
    deviation = float(np.sqrt(np.mean(train.contrast**2) + train.bands.mean(1).var())) or 1.0
    differences = []
    grey = [split.bands.mean(1) for split in splits]
    if shift := _mean_shift(grey[0] / deviation, grey[1] / deviation, _MIN_BRIGHTNESS_SHIFT):
        numbers = _format_means("mean brightness", *(values.mean() for values in grey))
        differences.append(SplitDifference("brighter" if shift > 0 else "darker", numbers))
    contrasts = [np.log(np.maximum(split.contrast, 1e-6 * deviation)) for split in splits]
    if shift := _mean_shift(contrasts[0], contrasts[1], _MIN_CONTRAST_SHIFT):
        numbers = _format_means(
            "mean standard deviation of the pixels", *(split.contrast.mean() for split in splits)
        )
        adjective = "higher in contrast" if shift > 0 else "lower in contrast"
        differences.append(SplitDifference(adjective, numbers))
    casts = [(split.bands - split.bands.mean(1, keepdims=True)) / deviation for split in splits]
    if any(
        _mean_shift(casts[0][:, band], casts[1][:, band], _MIN_COLOR_SHIFT)
        for band in range(train.bands.shape[1])
    ):
        numbers = _format_means("mean of each band", *(split.bands.mean(0) for split in splits))
        differences.append(SplitDifference("different in colour", numbers))
    if shift := _mean_shift(np.log(train.side), np.log(held_out.side), _MIN_SIDE_SHIFT):
        sides = [f"{np.median(split.side):.0f}" for split in splits]
        numbers = f"side length about {sides[0]} pixels in training, {sides[1]} held out"
        differences.append(SplitDifference("larger" if shift > 0 else "smaller", numbers))
    return differences


def _format_means(quantity: str, train: Any, held_out: Any) -> str:
    """Format a quantity of both splits; it is a number, or one number per band."""
    formatted = [
        " ".join(f"{value:.4g}" for value in np.atleast_1d(mean)) for mean in (train, held_out)
    ]
    return f"{quantity} {formatted[0]} in training, {formatted[1]} held out"


def _mean_shift(train: NDArray[np.float64], held_out: NDArray[np.float64], least: float) -> float:
    """Return by how much the mean differs, or 0 if that is too little to count."""
    shift = float(held_out.mean() - train.mean())
    deviation = float(np.sqrt((train.var() + held_out.var()) / 2))
    return shift if abs(shift) > max(least, _MIN_SHIFT_DEVIATIONS * deviation) else 0.0
