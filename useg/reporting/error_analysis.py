"""A picture, its truth and a prediction -> where the mistakes of one class lie: at a border, in small things, against the picture's edges.

Counts add up over pictures, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label, confidence, most_probable
from useg.data.dataset import Dataset, Pair, read_sample
from useg.images.files import Image, Sample, resize_image
from useg.machine import in_parallel
from useg.scoring.regions import components

if TYPE_CHECKING:
    from useg.inference.predictor import Predictor

BORDER_TOLERANCE_PIXELS = 1.5  # pixels at the working size by which a border may be missed: an edge between pixels, averaged in reducing, enlarged again


_AROUND = 8  # pixels: how far around a place its edges are compared with


BoolMask = NDArray[np.bool_]


@dataclass(frozen=True)
class PredictedImage:
    """A picture as its mistakes are looked for: all ``(H, W)`` at native size.

    Args:
        label: true ids, or ``IGNORE``.
        prediction: predicted ids.
        sure: probability of the predicted class.
        right: ``(2,)`` pixels that are right, and their summed confidence.
        edges: strength of the picture's edges at a place, compared with all places around it, which are 1 on average.
        agreed: ``(2,)`` places on outlines that label and prediction share, and the summed edges there.
        known: whether an outline counts: away from ignored pixels.
        working: (width, height) at which the network saw the picture.
    """

    label: Label
    prediction: Label
    sure: NDArray[np.float32]
    right: NDArray[np.float64]
    edges: NDArray[np.float32]
    agreed: NDArray[np.float64]
    known: BoolMask
    working: tuple[int, int]

    @property
    def scale(self) -> float:
        """By which the network saw the picture reduced."""
        return math.sqrt(math.prod(self.working) / self.label.size)

    @property
    def reach(self) -> int:
        """Pixels by which a border may be missed and still be the same border: at least 2, which people miss it by."""
        return max(2, math.ceil(BORDER_TOLERANCE_PIXELS / self.scale))


@dataclass(frozen=True)
class ClassErrors:
    """The mistakes of one class with its partner, the class that it is most often confused with.

    Args:
        confused: ``(3,)`` pixels confused with the partner; those of them that lie near a true border with it; how many would if whole regions
            of the two were confused.
        sure: ``(2, 2)`` pixels that are wrong, of the class; that are right, of any; their summed confidence.
        outlines: ``(3, 2)`` places on outlines of the class that only the prediction has, only the truth; on those of any class that both
            have; the summed edges there.
        best: ``(3,)`` pixels right, true and called in the best answer that can be given at the working size.
        things: ``(M, 3)`` true connected regions: width in pixels at the working size, pixels, pixels found.
    """

    confused: NDArray[np.float64]
    sure: NDArray[np.float64]
    outlines: NDArray[np.float64]
    best: NDArray[np.int64]
    things: NDArray[np.float64]

    def __add__(self, other: ClassErrors) -> ClassErrors:
        sums = {
            part.name: getattr(self, part.name) + getattr(other, part.name)
            for part in fields(self)[:4]
        }
        return ClassErrors(**sums, things=np.concatenate([self.things, other.things]))

    @property
    def near_border(self) -> float:
        """How far the pixels confused with the partner keep to the border with it: 0 as where whole regions are confused, 1 all of them."""
        pixels, near, expected = self.confused
        return float((near - expected) / (pixels - expected)) if pixels > expected else 1.0

    @property
    def sureness(self) -> float:
        """Mean confidence where the prediction is wrong, as a share of that where it is right; ``nan`` where either is missing."""
        pixels, confidences = self.sure[:, 0], self.sure[:, 1]
        return (
            float(confidences[0] / pixels[0] / (confidences[1] / pixels[1]))
            if pixels.all()
            else math.nan
        )

    @property
    def best_iou(self) -> float:
        """IoU of the best answer that can be given at the working size."""
        return float(self.best[0] / max(1, self.best[1] + self.best[2] - self.best[0]))

    @property
    def support(self) -> NDArray[np.float64]:
        """The picture's mean edges on outlines of the prediction alone, of the truth alone, of both, ``(3,)``; 1 is as anywhere else."""
        return np.where(
            self.outlines[:, 0] > 0, self.outlines[:, 1] / np.maximum(self.outlines[:, 0], 1), 1.0
        )

    @property
    def taken_side(self) -> float:
        """How far the picture sides with the prediction where it and the truth differ in an outline, 0 to 1; ``nan`` where it shows nothing.

        An outline of the prediction that lies on edges as strong as those under the outlines that both have speaks for the prediction, and so
        does an outline of the truth where there is no edge.
        """
        (predicted, true, _), (drawn, given, both) = self.outlines[:, 0], self.support
        if predicted + true == 0 or both <= 1:
            return math.nan
        for_prediction, for_truth = (
            np.clip((strength - 1) / (both - 1), 0, 1) for strength in (drawn, given)
        )
        return float((predicted * for_prediction + true * (1 - for_truth)) / (predicted + true))


def predict_image(predictor: Predictor, sample: Sample) -> PredictedImage:
    """Predict a picture, and measure what all its classes need.

    Raises:
        UsageError: an image that does not fit the model.
    """
    logits = predictor.logits(sample.image)
    label, prediction = sample.label, most_probable(logits)
    sure, edges = confidence(logits, predictor.temperature), relative_edge_strength(sample.image)
    working = predictor.runtime.description.working.of(label.shape[1], label.shape[0])
    return measure_maps(label, prediction, sure, edges, working)


def measure_maps(
    label: Label,
    prediction: Label,
    sure: NDArray[np.float32],
    edges: NDArray[np.float32],
    working: tuple[int, int],
) -> PredictedImage:
    """Sum up what is right in a picture, to compare the mistakes with."""
    bare = PredictedImage(
        label, prediction, sure, np.zeros(2), edges, np.zeros(2), label != IGNORE, working
    )
    known = ~dilate_mask(label == IGNORE, bare.reach + 1)
    shared = _outline(label) & dilate_mask(_outline(prediction), 1) & known
    return replace(
        bare, right=_summed(label == prediction, sure), agreed=_summed(shared, edges), known=known
    )


def measure_class_errors(seen: PredictedImage, class_id: int, partner: int) -> ClassErrors:
    """Count the mistakes of one class in one picture; ``partner`` is the class that it is most often confused with."""
    true, called = seen.label == class_id, (seen.prediction == class_id) & (seen.label != IGNORE)
    wrong = true ^ called
    swapped = wrong & np.where(true, seen.prediction == partner, seen.label == partner)
    return ClassErrors(
        _confused(swapped, true, seen.label == partner, seen.reach),
        np.stack([_summed(wrong, seen.sure), seen.right]),
        _outlines(true, called, seen),
        _best(true, seen.working),
        _things(true, called, seen.scale),
    )


def _confused(
    swapped: BoolMask, true: BoolMask, partner: BoolMask, reach: int
) -> NDArray[np.float64]:
    """Count swapped pixels of the two classes, those near the border between them, and those that would be were they anywhere in their class."""
    counts = np.zeros(3)
    for own, other in ((true, partner), (partner, true)):
        near = own & dilate_mask(other, reach)
        pixels, beside, whole = (int(np.count_nonzero(part)) for part in (swapped & own, near, own))
        counts += pixels, int(np.count_nonzero(swapped & near)), pixels * beside / max(1, whole)
    return counts


def _outlines(true: BoolMask, called: BoolMask, seen: PredictedImage) -> NDArray[np.float64]:
    """Sum up outlines that only one of the two has within reach of it; what borders on ignored pixels is left out."""
    drawn, given = (_outline(mask) & seen.known for mask in (called, true))
    only_drawn, only_given = (
        drawn & ~dilate_mask(given, seen.reach),
        given & ~dilate_mask(drawn, seen.reach),
    )
    return np.stack([_summed(only_drawn, seen.edges), _summed(only_given, seen.edges), seen.agreed])


def _best(true: BoolMask, working: tuple[int, int]) -> NDArray[np.int64]:
    """Score the mask that is left of a mask when it is averaged to the working size and enlarged again."""
    height, width = true.shape
    back = (
        resize_image(resize_image(true[..., None].astype(np.float32), working), (width, height))[
            ..., 0
        ]
        > 0.5
    )
    return np.array([np.count_nonzero(mask) for mask in (back & true, true, back)])


def _things(true: BoolMask, called: BoolMask, scale: float) -> NDArray[np.float64]:
    """Measure the connected regions of a mask, ``(M, 3)``: width, pixels, pixels found.

    The width is twice the area over the length of the outline: a pole's own width, half a square's side. At a width of w, 2 / w of the pixels
    lie on the outline.
    """
    numbers = components(true)
    length = int(numbers.max(initial=0)) + 1
    outline = np.zeros(length)
    for map_ in (numbers, numbers.T):
        differ = map_[1:] != map_[:-1]
        outline += sum(
            np.bincount(side[differ], minlength=length) for side in (map_[1:], map_[:-1])
        )
    pixels = np.bincount(numbers.ravel(), minlength=length)
    found = np.bincount(numbers.ravel(), called.ravel(), minlength=length)
    return np.stack([2 * pixels / np.maximum(outline, 1) * scale, pixels, found], axis=1)[1:]


def relative_edge_strength(image: Image) -> NDArray[np.float32]:
    """Return the strongest step between neighbouring pixels within a pixel of each place, relative to the places around it: ``(H, W)``."""
    grey = np.nan_to_num(image.astype(np.float32), posinf=0, neginf=0).mean(2)
    step = np.zeros(grey.shape, np.float32)
    step[:-1] = np.abs(grey[1:] - grey[:-1])
    np.maximum(step[:, :-1], np.abs(grey[:, 1:] - grey[:, :-1]), out=step[:, :-1])
    for _ in range(2):  # rows, then (transposed) columns
        framed = np.pad(step, ((1, 1), (0, 0)))
        step = np.maximum(step, np.maximum(framed[:-2], framed[2:])).T
    strongest = np.sqrt(step)  # the root tames single strong edges
    usual = _mean_around(strongest)
    return np.where(usual > 0, strongest / np.where(usual > 0, usual, 1), 1).astype(np.float32)


def _mean_around(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean over the square of side ``2 * _AROUND + 1`` around each place, as far as it lies inside."""
    side = 2 * _AROUND + 1
    sums = []
    for part in (values, np.ones_like(values)):
        total = np.pad(part.astype(np.float64), (_AROUND + 1, _AROUND)).cumsum(0).cumsum(1)
        sums.append(
            total[side:, side:]
            - total[:-side, side:]
            - total[side:, :-side]
            + total[:-side, :-side]
        )
    mean: NDArray[np.float64] = sums[0] / sums[1]
    return np.where(mean > 1e-9, mean, 0)  # what rounding leaves of nothing


def _outline(map_: NDArray[Any]) -> BoolMask:
    """Mark the pixels of a mask or label map whose right or lower neighbour differs."""
    outline = np.zeros(map_.shape, bool)
    outline[:-1] = map_[1:] != map_[:-1]
    outline[:, :-1] |= map_[:, 1:] != map_[:, :-1]
    return outline


def _summed(mask: BoolMask, values: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.array([np.count_nonzero(mask), values[mask].sum(dtype=np.float64)])


def dilate_mask(mask: BoolMask, reach: int) -> BoolMask:
    """Mark all within ``reach`` steps of the 8-neighbourhood of what is marked."""
    for _ in range(2):  # rows, then (transposed) columns
        wider = mask.copy()
        for step in range(1, reach + 1):
            wider[step:] |= mask[:-step]
            wider[:-step] |= mask[step:]
        mask = np.ascontiguousarray(wider.T)  # strides would cost more than the copy
    return mask


# What augmentation shows the network of it anyway (data/augment.py); a difference within that is none to it.
_BRIGHTNESS = 0.35  # deviations of the pixels


_CONTRAST = 0.3  # of its logarithm


_ZOOM = 0.5  # of the logarithm of the side


_COLOR = 0.2  # deviations of the pixels; augmentation moves all bands alike


_APART = 1.5  # deviations between pictures of one side: less is within what they differ by among themselves


@dataclass(frozen=True)
class SplitStatistics:
    """Some pictures of one side of a split.

    Args:
        pixels: of each class in each picture, ``(N, K)``.
        bands: mean of each band in each picture, ``(N, C)``.
        contrast: deviation of the pixels in each picture, mean of the bands, ``(N,)``.
        side: root of the number of its pixels, ``(N,)``.
    """

    pixels: NDArray[np.int64]
    bands: NDArray[np.float64]
    contrast: NDArray[np.float64]
    side: NDArray[np.float64]

    @property
    def shares(self) -> NDArray[np.float64]:
        """Each class's share of the counted pixels in each picture, ``(N, K)``."""
        shares: NDArray[np.float64] = self.pixels / np.maximum(self.pixels.sum(1, keepdims=True), 1)
        return shares


@dataclass(frozen=True)
class SplitDifference:
    """What differs, in words: ``what`` (such as ``"darker"``) and the numbers."""

    what: str
    numbers: str


def measure_split(dataset: Dataset, pairs: Sequence[Pair]) -> SplitStatistics:
    """Read pairs, on all cores, and measure what may differ.

    Raises:
        UsageError: an unreadable pair.
    """
    num_classes = len(dataset.classes)

    def look(pair: Pair) -> tuple[NDArray[np.int64], NDArray[np.float64], float, float]:
        sample = read_sample(pair, dataset)
        pixels = np.bincount(sample.label.ravel(), minlength=256)[:num_classes]
        return pixels, *image_statistics(sample.image)

    pixels, bands, contrast, side = zip(*in_parallel(look, pairs), strict=True)
    return SplitStatistics(np.stack(pixels), np.stack(bands), np.array(contrast), np.array(side))


def image_statistics(image: Image) -> tuple[NDArray[np.float64], float, float]:
    """Return a picture's mean of each band ``(C,)``, the deviation of its pixels, and the root of their number."""
    height, width = image.shape[:2]
    step = max(1, int((height * width / 20_000) ** 0.5))  # so many pixels are enough for a mean
    some = np.nan_to_num(image[::step, ::step].astype(np.float64), posinf=0, neginf=0)
    return some.mean((0, 1)), float(some.std((0, 1)).mean()), (height * width) ** 0.5


def find_split_differences(
    trained: SplitStatistics, held: SplitStatistics
) -> list[SplitDifference]:
    """Say how held-out pictures differ from training pictures, beyond what augmentation shows and what pictures differ by among themselves."""
    if trained.bands.shape[1] != held.bands.shape[1]:
        return []
    unit = float(np.sqrt(np.mean(trained.contrast**2) + trained.bands.mean(1).var())) or 1.0
    found = []
    grey = [side.bands.mean(1) for side in (trained, held)]
    if change := _moved(grey[0] / unit, grey[1] / unit, _BRIGHTNESS):
        found.append(
            SplitDifference(
                "brighter" if change > 0 else "darker",
                f"mean brightness {grey[0].mean():.4g} in training, {grey[1].mean():.4g} held out",
            )
        )
    contrasts = [np.log(np.maximum(side.contrast, 1e-6 * unit)) for side in (trained, held)]
    if change := _moved(contrasts[0], contrasts[1], _CONTRAST):
        values = [side.contrast.mean() for side in (trained, held)]
        found.append(
            SplitDifference(
                "richer in contrast" if change > 0 else "flatter",
                f"mean deviation of the pixels {values[0]:.4g} in training, {values[1]:.4g} held out",
            )
        )
    casts = [(side.bands - side.bands.mean(1, keepdims=True)) / unit for side in (trained, held)]
    bands = [
        band
        for band in range(casts[0].shape[1])
        if _moved(casts[0][:, band], casts[1][:, band], _COLOR)
    ]
    if bands:
        said = (
            " ".join(f"{value:.4g}" for value in side.bands.mean(0)) for side in (trained, held)
        )
        found.append(
            SplitDifference(
                "of another colour",
                f"mean of the bands {next(said)} in training, {next(said)} held out",
            )
        )
    if change := _moved(np.log(trained.side), np.log(held.side), _ZOOM):
        values = [np.median(side.side) for side in (trained, held)]
        found.append(
            SplitDifference(
                "larger" if change > 0 else "smaller",
                f"about {values[0]:.0f} pixels each way in training, {values[1]:.0f} held out",
            )
        )
    return found


def _moved(trained: NDArray[np.float64], held: NDArray[np.float64], least: float) -> float:
    """Return by how much the mean moved, or 0 where that is less than ``least`` or than pictures of one side differ by."""
    change = float(held.mean() - trained.mean())
    spread = float(np.sqrt((trained.var() + held.var()) / 2))
    return change if abs(change) > max(least, _APART * spread) else 0.0
