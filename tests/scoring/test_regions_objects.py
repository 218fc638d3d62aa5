"""Connected regions and objects against scipy and a loop over all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from useg.scoring.regions import components, object_counts, score_objects

MASKS = arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))
BOTH = st.tuples(st.integers(1, 8), st.integers(1, 8)).flatmap(
    lambda shape: st.tuples(arrays.arrays(bool, shape), arrays.arrays(bool, shape))
)


def blobs(seed: int, shape: tuple[int, int] = (80, 100), sigma: float = 3) -> np.ndarray:
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma) > 0


@given(MASKS)
def test_components_equal_scipy(mask: np.ndarray) -> None:
    assert (components(mask) == ndimage.label(mask)[0]).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (0, 5), (5, 0)])
def test_components_of_lines_and_empty_masks_equal_scipy(shape: tuple[int, int]) -> None:
    for mask in (np.zeros(shape, bool), np.ones(shape, bool), np.indices(shape).sum(0) % 2 == 0):
        assert (components(mask) == ndimage.label(mask)[0]).all()


def test_components_of_a_spiral_and_a_comb_equal_scipy() -> None:
    spiral = np.zeros((61, 61), bool)
    y = x = 30
    spiral[y, x] = True
    for k in range(1, 29):
        for dy, dx in (((0, 1), (1, 0)), ((0, -1), (-1, 0)))[k % 2]:
            for _ in range(2 * k):
                y, x = y + dy, x + dx
                spiral[max(0, min(60, y)), max(0, min(60, x))] = True
    comb = np.zeros((60, 61), bool)
    comb[:, ::2] = True
    comb[-1] = True
    for mask in (spiral, spiral.T, ~spiral, comb, comb[::-1], blobs(0)):
        assert (components(mask) == ndimage.label(mask)[0]).all()


@given(BOTH)
def test_objects_equal_a_loop_over_pairs(both: tuple[np.ndarray, np.ndarray]) -> None:
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
    counts = object_counts(prediction, truth)
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
    scores = score_objects(object_counts(prediction, truth))
    assert (scores.num_true, scores.num_predicted, scores.matched) == (4, 4, 2)
    assert (scores.merged, scores.split) == (1, 1)
    assert (scores.f1, scores.precision, scores.recall) == (0.5, 0.5, 0.5)


def test_scores_without_objects_are_nan() -> None:
    nothing, one = np.zeros((4, 4), bool), np.eye(4, dtype=bool)
    assert math.isnan(score_objects(object_counts(nothing, nothing)).f1)
    assert score_objects(object_counts(nothing, one)).f1 == 0
    assert math.isnan(score_objects(object_counts(one, nothing)).recall)
