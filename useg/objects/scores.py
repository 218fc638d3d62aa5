"""Two maps of numbered objects -> AP, F1, panoptic quality, count error, merges and splits.

A predicted object matches a true one if their IoU (intersection over union) reaches a threshold.
Each object has at most one partner. The average precision (AP) at a threshold is ``matched /
(matched + missed + invented)``, as in the Data Science Bowl 2018, StarDist and cellpose. Panoptic
quality is defined by Kirillov et al., "Panoptic segmentation" (2019), whose rules for ignored
pixels apply to all scores here.

The connected regions of one class are matched in the same way, where no object is numbered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, Label
from useg.objects.separation import ObjectIds
from useg.objects.table import FoundObjects
from useg.scoring.metrics import components
from useg.scoring.uncertainty import Interval, resampled_intervals

# Smallest IoU of a match.
IOU_THRESHOLDS = tuple(k / 100 for k in range(50, 100, 5))

# Counts per image, in this order, followed by the matches at each of IOU_THRESHOLDS.
_COLUMNS = ("true", "predicted", "quality_matches", "iou", "merged", "split", "error", "abs_error")

_WITH_INTERVAL = ("ap50", "mean_ap", "f1", "panoptic_quality", "count_bias", "count_error")

# (N, 8 + 10) float64: a row of counts for each image.
ObjectTally = NDArray[np.float64]

# (5,): these counts of connected regions.
_COMPONENT_COLUMNS = ("true", "predicted", "quality_matches", "merged", "split")
ComponentCounts = NDArray[np.int64]


@dataclass(frozen=True)
class ObjectScores:
    """Scores of the objects of one class or of all; ``nan`` where there is no object at all.

    Args:
        ap50: AP at an IoU of 0.5.
        mean_ap: Mean of the AP at 0.5, 0.55, ... 0.95.
        ap: AP at each of ``IOU_THRESHOLDS``.
        f1: Harmonic mean of precision and recall at an IoU of 0.5.
        precision, recall: Share of the predicted and of the true objects that match at 0.5.
        panoptic_quality: Mean IoU of the matches above 0.5 times their F1.
        count_bias: Mean over the images of the number of predicted less that of true objects.
        count_error: Mean over the images of the absolute value of that difference.
        merged: Number of predicted objects that cover more than half of each of several true ones.
        split: Number of true objects that cover more than half of each of several predicted ones.
        num_true, num_predicted: Number of objects.
        intervals: 95 % intervals of ``ap50``, ``mean_ap``, ``f1``, ``panoptic_quality``,
            ``count_bias`` and ``count_error``; None if there are too few images.
    """

    ap50: float
    mean_ap: float
    ap: tuple[float, ...]
    f1: float
    precision: float
    recall: float
    panoptic_quality: float
    count_bias: float
    count_error: float
    merged: int
    split: int
    num_true: int
    num_predicted: int
    intervals: dict[str, Interval | None]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__}
        content["ap"] = dict(zip(map(str, IOU_THRESHOLDS), self.ap, strict=True))
        content["intervals"] = {
            name: [interval.low, interval.high] if interval else None
            for name, interval in self.intervals.items()
        }
        return content


def tally_objects(
    predicted: NDArray[Any], true: NDArray[Any], ignored: NDArray[np.bool_] | None = None
) -> ObjectTally:
    """Count and match the objects of one image.

    Args:
        predicted: ``(H, W)`` whole numbers: the object of each pixel, 0 for none.
        true: The same for the truth.
        ignored: Where the truth is unknown. These pixels belong to no object, and a predicted
            object with more than half of its pixels there does not count.

    Returns:
        The counts, a row of an :data:`ObjectTally`. Rows of several images are stacked.
    """
    true_ids, true_areas, t = _number(true)
    predicted_ids, predicted_areas, p = _number(predicted)
    if ignored is not None:
        hidden = np.bincount(p[ignored.ravel()], minlength=len(predicted_ids))
        dropped = 2 * hidden > predicted_areas
        p, t = np.where(ignored.ravel() | dropped[p], 0, p), np.where(ignored.ravel(), 0, t)
        true_areas = np.bincount(t, minlength=len(true_ids))
        predicted_areas = np.bincount(p, minlength=len(predicted_ids))
    both = (t > 0) & (p > 0)
    codes, shared = np.unique(t[both] * len(predicted_ids) + p[both], return_counts=True)
    of_true, of_predicted = np.divmod(codes, len(predicted_ids))
    union = true_areas[of_true] + predicted_areas[of_predicted] - shared
    iou = shared / union
    sure = 2 * shared > union
    num_true, num_predicted = (
        np.count_nonzero(areas[1:]) for areas in (true_areas, predicted_areas)
    )
    merged = np.bincount(of_predicted[2 * shared > true_areas[of_true]]) > 1
    split = np.bincount(of_true[2 * shared > predicted_areas[of_predicted]]) > 1
    error = num_predicted - num_true
    matches = [_count_matches(iou, of_true, of_predicted, least) for least in IOU_THRESHOLDS]
    totals = (num_true, num_predicted, sure.sum(), iou[sure].sum(), merged.sum(), split.sum())
    return np.array([*totals, error, abs(error), *matches], np.float64)


def tally_classes(
    found: FoundObjects, true: ObjectIds, label: Label, classes: Sequence[int]
) -> ObjectTally:
    """Count and match the objects of one image class by class.

    A true object has the class of most of its pixels.

    Args:
        found: What the model finds.
        true: ``(H, W)``: the true object of each pixel, 0 for none.
        label: The true classes ``(H, W)``; ``IGNORE`` where the truth is unknown.
        classes: The classes that consist of objects.

    Returns:
        ``(C, 18)``.
    """
    values, place = np.unique(true, return_inverse=True)
    place = place.reshape(true.shape)
    pixels = np.stack([np.bincount(place[label == k], minlength=len(values)) for k in classes])
    true_class = np.array(classes)[pixels.argmax(0)]
    predicted_class = np.concatenate([[-1], found.table.class_ids])
    ignored = label == IGNORE
    return np.stack(
        [
            tally_objects(
                np.where(predicted_class[found.numbers] == k, found.numbers, 0),
                np.where(true_class[place] == k, true, 0),
                ignored,
            )
            for k in classes
        ]
    )


def _number(ids: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of a map with 0 first, their pixels, and each pixel's place in them."""
    values = np.unique(np.append(ids.ravel(), 0))
    values = np.concatenate([[0], values[values != 0]])
    order = np.argsort(values, kind="stable")
    place = order[np.searchsorted(values[order], ids.ravel())]
    return values, np.bincount(place, minlength=len(values)), place


def _count_matches(
    iou: NDArray[np.float64],
    of_true: NDArray[np.int64],
    of_predicted: NDArray[np.int64],
    least: float,
) -> int:
    """Count the pairs with at least this IoU, each object in one pair only.

    Above 0.5 no object is in two pairs. At exactly 0.5 a true object can consist of two predicted
    ones, or the reverse; then one of the two counts.
    """
    chosen = iou >= least
    # Of such stars, each leaf beyond the first is a pair too many.
    num_objects = len(np.unique(of_true[chosen])) + len(np.unique(of_predicted[chosen]))
    return num_objects - int(np.count_nonzero(chosen))


def score_tallies(tallies: ObjectTally, blocks: Sequence[int]) -> ObjectScores:
    """Compute the scores from the rows of all images ``(N, 18)``, with 95 % intervals.

    Args:
        tallies: What :func:`tally_objects` returned for each image, stacked.
        blocks: The block of each image with which it is resampled.
    """
    # Blocks differ in their number of images, so it is a count like the others.
    rows = np.column_stack([np.ones(len(tallies)), tallies])
    values = _score(rows.sum(0))
    intervals = resampled_intervals(
        rows, blocks, lambda sums: {name: _score(sums)[name] for name in _WITH_INTERVAL}
    )
    totals = dict(zip(_COLUMNS, tallies.sum(0)[: len(_COLUMNS)].tolist(), strict=True))
    return ObjectScores(
        **{name: float(values[name]) for name in _WITH_INTERVAL},
        ap=tuple(float(value) for value in values["ap"]),
        precision=float(values["precision"]),
        recall=float(values["recall"]),
        merged=int(totals["merged"]),
        split=int(totals["split"]),
        num_true=int(totals["true"]),
        num_predicted=int(totals["predicted"]),
        intervals=intervals,
    )


def _score(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Compute scores from sums ``(..., 1 + 18)``: the number of images, then the counts."""
    images = sums[..., 0]
    named = {name: sums[..., k] for k, name in enumerate(_COLUMNS, 1)}
    matches = sums[..., 1 + len(_COLUMNS) :]
    both = (named["true"] + named["predicted"])[..., None]
    ap = _divide(matches, both - matches)
    f1 = _divide(2 * matches[..., 0], both[..., 0])
    return {
        "ap": ap,
        "ap50": ap[..., 0],
        "mean_ap": ap.mean(-1),
        "f1": f1,
        "precision": _divide(matches[..., 0], named["predicted"]),
        "recall": _divide(matches[..., 0], named["true"]),
        # The mean IoU of the matches times their F1.
        "panoptic_quality": _divide(2 * named["iou"], both[..., 0]),
        "count_bias": named["error"] / images,
        "count_error": named["abs_error"] / images,
    }


def _divide(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(whole, 1), math.nan)


@dataclass(frozen=True)
class ComponentScores:
    """Scores of the connected regions of one class; fractions 0..1, ``nan`` if there is none.

    Args:
        f1: ``2 * matched / (true + predicted)``.
        precision: Share of the predicted regions that match a true one.
        recall: Share of the true regions that match a predicted one.
        num_true: Number of regions in the ground truth.
        num_predicted: Number of regions in the prediction.
        matched: Number of pairs with an IoU above 0.5. Above it, no region can have two partners.
        merged: Number of predicted regions that cover more than half of each of several true ones,
            as where touching cells became one.
        split: Number of true regions that cover more than half of each of several predicted ones.
    """

    f1: float
    precision: float
    recall: float
    num_true: int
    num_predicted: int
    matched: int
    merged: int
    split: int


def count_components(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> ComponentCounts:
    """Count and match the 4-connected regions of two masks ``(H, W)``; images add up."""
    counts = tally_objects(components(prediction), components(truth))
    return counts[[_COLUMNS.index(name) for name in _COMPONENT_COLUMNS]].astype(np.int64)


def score_components(counts: ComponentCounts) -> ComponentScores:
    """Compute the scores from summed counts ``(5,)``."""
    true, predicted, matched, merged, split = (int(value) for value in counts)
    f1, precision, recall = (
        matched / whole if whole else math.nan
        for whole in ((true + predicted) / 2, predicted, true)
    )
    return ComponentScores(f1, precision, recall, true, predicted, matched, merged, split)
