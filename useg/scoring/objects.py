"""Mask of things + truth -> how many things were found, missed, invented, merged and split."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from useg.scoring.components import components

ObjectCounts = NDArray[np.int64]  # (5,): true objects, predicted ones, matched, merged, split


@dataclass(frozen=True)
class Objects:
    """What became of the objects of a class; fractions 0..1, ``nan`` where there is no object at all.

    Args:
        f1: ``2 * matched / (true + predicted)``.
        precision: share of the predicted objects that match a true one.
        recall: share of the true objects that match a predicted one.
        num_true: connected regions in the truth.
        num_predicted: connected regions in the prediction.
        matched: pairs with an IoU above 0.5; above it, no object can have two partners (Kirillov et al., "Panoptic segmentation", 2019).
        merged: predicted objects that cover more than half of each of several true ones, as where touching cells became one.
        split: true objects that cover more than half of each of several predicted ones.
    """

    f1: float
    precision: float
    recall: float
    num_true: int
    num_predicted: int
    matched: int
    merged: int
    split: int


def object_counts(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> ObjectCounts:
    """Count the 4-connected regions of two masks ``(H, W)`` of one image; ``(5,)`` int64, images add up."""
    predicted, true = components(prediction), components(truth)
    num_predicted, num_true = int(predicted.max(initial=0)), int(true.max(initial=0))
    area_predicted, area_true = np.bincount(predicted.ravel()), np.bincount(true.ravel())
    both = prediction & truth
    codes, shared = np.unique(true[both] * (num_predicted + 1) + predicted[both], return_counts=True)
    t, p = np.divmod(codes, num_predicted + 1)
    matched = 2 * shared > area_true[t] + area_predicted[p] - shared
    merged = np.bincount(p[2 * shared > area_true[t]]) > 1
    split = np.bincount(t[2 * shared > area_predicted[p]]) > 1
    return np.array([num_true, num_predicted, *(np.count_nonzero(found) for found in (matched, merged, split))], np.int64)


def score_objects(counts: ObjectCounts) -> Objects:
    """Compute the scores from summed counts ``(5,)``."""
    true, predicted, matched, merged, split = (int(value) for value in counts)
    f1, precision, recall = (matched / whole if whole else math.nan for whole in ((true + predicted) / 2, predicted, true))
    return Objects(f1, precision, recall, true, predicted, matched, merged, split)
