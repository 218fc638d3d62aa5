"""The scores of connected regions against a loop over all pairs."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from useg.objects.scores import count_components, score_components

BOTH = st.tuples(st.integers(1, 8), st.integers(1, 8)).flatmap(
    lambda shape: st.tuples(arrays.arrays(bool, shape), arrays.arrays(bool, shape))
)


@given(BOTH)
def test_components_equal_a_loop_over_pairs(both: tuple[np.ndarray, np.ndarray]) -> None:
    prediction, truth = both
    (predicted, num_predicted), (true, num_true) = ndimage.label(prediction), ndimage.label(truth)
    ious = np.zeros((num_true, num_predicted))
    in_predicted, in_true = np.zeros_like(ious, bool), np.zeros_like(ious, bool)
    for t in range(num_true):
        for p in range(num_predicted):
            a, b = true == t + 1, predicted == p + 1
            ious[t, p] = (a & b).sum() / (a | b).sum()
            in_predicted[t, p] = (a & b).sum() > 0.5 * a.sum()
            in_true[t, p] = (a & b).sum() > 0.5 * b.sum()
    matched = int((ious > 0.5).sum())
    merged, split = int((in_predicted.sum(0) > 1).sum()), int((in_true.sum(1) > 1).sum())
    counts = count_components(prediction, truth)
    assert counts.tolist() == [num_true, num_predicted, matched, merged, split]
    assert matched <= min(num_true, num_predicted)


def test_touching_cells_are_merged_and_a_cut_cell_is_split() -> None:
    truth = np.zeros((20, 45), bool)
    for k in range(4):
        # Four cells, one pixel apart.
        truth[5:15, 1 + 11 * k : 11 + 11 * k] = True
    prediction = truth.copy()
    # The first two touch, and the third is cut in two.
    prediction[10, 11] = True
    prediction[5:15, 26] = False
    scores = score_components(count_components(prediction, truth))
    assert (scores.num_true, scores.num_predicted, scores.matched) == (4, 4, 2)
    assert (scores.merged, scores.split) == (1, 1)
    assert (scores.f1, scores.precision, scores.recall) == (0.5, 0.5, 0.5)


def test_scores_without_objects_are_nan() -> None:
    nothing, one = np.zeros((4, 4), bool), np.eye(4, dtype=bool)
    assert math.isnan(score_components(count_components(nothing, nothing)).f1)
    assert score_components(count_components(nothing, one)).f1 == 0
    assert math.isnan(score_components(count_components(one, nothing)).recall)
