"""A picture, its truth and a prediction -> where the mistakes of one class lie: at a border, in small things, against the picture's edges.

Counts add up over pictures, in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label
from useg.data.images import Image, Sample, resize_image
from useg.scoring.answers import confidence, most_probable
from useg.scoring.components import components

if TYPE_CHECKING:
    from useg.inference.predictor import Predictor

SLIP = 1.5  # pixels at the working size by which a border may be missed: an edge between pixels, averaged in reducing, enlarged again
_AROUND = 8  # pixels: how far around a place its edges are compared with

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class View:
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
    known: Mask
    working: tuple[int, int]

    @property
    def scale(self) -> float:
        """By which the network saw the picture reduced."""
        return math.sqrt(math.prod(self.working) / self.label.size)

    @property
    def reach(self) -> int:
        """Pixels by which a border may be missed and still be the same border: at least 2, which people miss it by."""
        return max(2, math.ceil(SLIP / self.scale))


@dataclass(frozen=True)
class Mistakes:
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

    def __add__(self, other: Mistakes) -> Mistakes:
        sums = {part.name: getattr(self, part.name) + getattr(other, part.name) for part in fields(self)[:4]}
        return Mistakes(**sums, things=np.concatenate([self.things, other.things]))

    @property
    def near_border(self) -> float:
        """How far the pixels confused with the partner keep to the border with it: 0 as where whole regions are confused, 1 all of them."""
        pixels, near, expected = self.confused
        return float((near - expected) / (pixels - expected)) if pixels > expected else 1.0

    @property
    def sureness(self) -> float:
        """Mean confidence where the prediction is wrong, as a share of that where it is right; ``nan`` where either is missing."""
        pixels, confidences = self.sure[:, 0], self.sure[:, 1]
        return float(confidences[0] / pixels[0] / (confidences[1] / pixels[1])) if pixels.all() else math.nan

    @property
    def best_iou(self) -> float:
        """IoU of the best answer that can be given at the working size."""
        return float(self.best[0] / max(1, self.best[1] + self.best[2] - self.best[0]))

    @property
    def support(self) -> NDArray[np.float64]:
        """The picture's mean edges on outlines of the prediction alone, of the truth alone, of both, ``(3,)``; 1 is as anywhere else."""
        return np.where(self.outlines[:, 0] > 0, self.outlines[:, 1] / np.maximum(self.outlines[:, 0], 1), 1.0)

    @property
    def taken_side(self) -> float:
        """How far the picture sides with the prediction where it and the truth differ in an outline, 0 to 1; ``nan`` where it shows nothing.

        An outline of the prediction that lies on edges as strong as those under the outlines that both have speaks for the prediction, and so
        does an outline of the truth where there is no edge.
        """
        (predicted, true, _), (drawn, given, both) = self.outlines[:, 0], self.support
        if predicted + true == 0 or both <= 1:
            return math.nan
        for_prediction, for_truth = (np.clip((strength - 1) / (both - 1), 0, 1) for strength in (drawn, given))
        return float((predicted * for_prediction + true * (1 - for_truth)) / (predicted + true))


def view(predictor: Predictor, sample: Sample) -> View:
    """Predict a picture, and measure what all its classes need.

    Raises:
        UsageError: an image that does not fit the model.
    """
    logits = predictor.logits(sample.image)
    label, prediction = sample.label, most_probable(logits)
    sure, edges = confidence(logits, predictor.temperature), edge_strength(sample.image)
    working = predictor.runtime.card.working.of(label.shape[1], label.shape[0])
    return of_maps(label, prediction, sure, edges, working)


def of_maps(label: Label, prediction: Label, sure: NDArray[np.float32], edges: NDArray[np.float32], working: tuple[int, int]) -> View:
    """Sum up what is right in a picture, to compare the mistakes with."""
    bare = View(label, prediction, sure, np.zeros(2), edges, np.zeros(2), label != IGNORE, working)
    known = ~grown(label == IGNORE, bare.reach + 1)
    shared = _outline(label) & grown(_outline(prediction), 1) & known
    return replace(bare, right=_summed(label == prediction, sure), agreed=_summed(shared, edges), known=known)


def mistakes(seen: View, class_id: int, partner: int) -> Mistakes:
    """Count the mistakes of one class in one picture; ``partner`` is the class that it is most often confused with."""
    true, called = seen.label == class_id, (seen.prediction == class_id) & (seen.label != IGNORE)
    wrong = true ^ called
    swapped = wrong & np.where(true, seen.prediction == partner, seen.label == partner)
    return Mistakes(
        _confused(swapped, true, seen.label == partner, seen.reach),
        np.stack([_summed(wrong, seen.sure), seen.right]),
        _outlines(true, called, seen),
        _best(true, seen.working),
        _things(true, called, seen.scale),
    )


def _confused(swapped: Mask, true: Mask, partner: Mask, reach: int) -> NDArray[np.float64]:
    """Count swapped pixels of the two classes, those near the border between them, and those that would be were they anywhere in their class."""
    counts = np.zeros(3)
    for own, other in ((true, partner), (partner, true)):
        near = own & grown(other, reach)
        pixels, beside, whole = (int(np.count_nonzero(part)) for part in (swapped & own, near, own))
        counts += pixels, int(np.count_nonzero(swapped & near)), pixels * beside / max(1, whole)
    return counts


def _outlines(true: Mask, called: Mask, seen: View) -> NDArray[np.float64]:
    """Sum up outlines that only one of the two has within reach of it; what borders on ignored pixels is left out."""
    drawn, given = (_outline(mask) & seen.known for mask in (called, true))
    only_drawn, only_given = drawn & ~grown(given, seen.reach), given & ~grown(drawn, seen.reach)
    return np.stack([_summed(only_drawn, seen.edges), _summed(only_given, seen.edges), seen.agreed])


def _best(true: Mask, working: tuple[int, int]) -> NDArray[np.int64]:
    """Score the mask that is left of a mask when it is averaged to the working size and enlarged again."""
    height, width = true.shape
    back = resize_image(resize_image(true[..., None].astype(np.float32), working), (width, height))[..., 0] > 0.5
    return np.array([np.count_nonzero(mask) for mask in (back & true, true, back)])


def _things(true: Mask, called: Mask, scale: float) -> NDArray[np.float64]:
    """Measure the connected regions of a mask, ``(M, 3)``: width, pixels, pixels found.

    The width is twice the area over the length of the outline: a pole's own width, half a square's side. At a width of w, 2 / w of the pixels
    lie on the outline.
    """
    numbers = components(true)
    length = int(numbers.max(initial=0)) + 1
    outline = np.zeros(length)
    for map_ in (numbers, numbers.T):
        differ = map_[1:] != map_[:-1]
        outline += sum(np.bincount(side[differ], minlength=length) for side in (map_[1:], map_[:-1]))
    pixels = np.bincount(numbers.ravel(), minlength=length)
    found = np.bincount(numbers.ravel(), called.ravel(), minlength=length)
    return np.stack([2 * pixels / np.maximum(outline, 1) * scale, pixels, found], axis=1)[1:]


def edge_strength(image: Image) -> NDArray[np.float32]:
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
        sums.append(total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side])
    mean: NDArray[np.float64] = sums[0] / sums[1]
    return np.where(mean > 1e-9, mean, 0)  # what rounding leaves of nothing


def _outline(map_: NDArray[Any]) -> Mask:
    """Mark the pixels of a mask or label map whose right or lower neighbour differs."""
    outline = np.zeros(map_.shape, bool)
    outline[:-1] = map_[1:] != map_[:-1]
    outline[:, :-1] |= map_[:, 1:] != map_[:, :-1]
    return outline


def _summed(mask: Mask, values: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.array([np.count_nonzero(mask), values[mask].sum(dtype=np.float64)])


def grown(mask: Mask, reach: int) -> Mask:
    """Mark all within ``reach`` steps of the 8-neighbourhood of what is marked."""
    for _ in range(2):  # rows, then (transposed) columns
        wider = mask.copy()
        for step in range(1, reach + 1):
            wider[step:] |= mask[:-step]
            wider[:-step] |= mask[step:]
        mask = np.ascontiguousarray(wider.T)  # strides would cost more than the copy
    return mask
