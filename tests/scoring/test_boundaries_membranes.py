"""Membrane errors of the U-Net paper against scipy, scikit-learn and their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage
from sklearn.metrics.cluster import contingency_matrix

from useg.scoring import boundaries
from useg.scoring.boundaries import (
    THRESHOLDS,
    membrane_counts,
    rand_error,
    score_membranes,
    warp,
    warping_error,
)

BOTH = st.tuples(st.integers(1, 8), st.integers(1, 8)).flatmap(
    lambda shape: st.tuples(arrays.arrays(bool, shape), arrays.arrays(bool, shape))
)
CROSS, SQUARE = ndimage.generate_binary_structure(2, 1), ndimage.generate_binary_structure(2, 2)


def blobs(seed: int, shape: tuple[int, int] = (80, 100), sigma: float = 3) -> np.ndarray:
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma) > 0


@given(BOTH)
def test_rand_error_equals_counting_pairs_of_pixels(both: tuple[np.ndarray, np.ndarray]) -> None:
    predicted, truth = both
    cells, segments = ndimage.label(truth)[0][truth], ndimage.label(predicted)[0][truth]
    if not cells.size:
        assert rand_error(predicted, truth) == 0
        return
    same_cell, same_segment = cells[:, None] == cells, segments[:, None] == segments
    precision, recall = (
        (same_cell & same_segment).sum() / part.sum() for part in (same_segment, same_cell)
    )
    assert rand_error(predicted, truth) == pytest.approx(
        1 - 2 * precision * recall / (precision + recall)
    )
    table = contingency_matrix(cells, segments).astype(float)
    assert rand_error(predicted, truth) == pytest.approx(
        1 - 2 * (table**2).sum() / ((table.sum(0) ** 2).sum() + (table.sum(1) ** 2).sum())
    )


def topology(cells: np.ndarray) -> tuple[int, int]:
    """Count the 4-connected regions of cell and the 8-connected regions of membrane and outside."""
    framed = np.pad(cells, 1)
    return ndimage.label(framed, CROSS)[1], ndimage.label(~framed, SQUARE)[1]


def test_simple_points_are_those_whose_flip_keeps_all_regions() -> None:
    for code in range(256):
        around = [bool(code >> bit & 1) for bit in range(8)]
        image = np.zeros((3, 3), bool)
        for value, (row, column) in zip(around, boundaries._NEIGHBOUR_OFFSETS, strict=True):
            image[1 + row, 1 + column] = value
        turned = image.copy()
        turned[1, 1] = True
        # Regions of the neighbourhood that might be joined outside it count as separate.
        before, after = (
            (ndimage.label(part, CROSS)[1], ndimage.label(~part, SQUARE)[1])
            for part in (image, turned)
        )
        edges = [image[0, 1], image[1, 0], image[1, 2], image[2, 1]]
        cell_regions = len(
            set(ndimage.label(image, CROSS)[0][[0, 1, 1, 2], [1, 0, 2, 1]][edges].tolist())
        )
        corners_and_edges = np.delete(ndimage.label(~turned, SQUARE)[0].ravel(), 4)
        ground_regions = len(set(corners_and_edges[corners_and_edges > 0].tolist()))
        assert boundaries._simple_points()[code] == (cell_regions == 1 and ground_regions == 1), (
            code,
            before,
            after,
        )


@given(BOTH)
def test_warping_keeps_the_topology_and_ends_where_no_pixel_can_flip(
    both: tuple[np.ndarray, np.ndarray],
) -> None:
    towards, truth = both
    result = warp(truth, towards)
    assert topology(result) == topology(truth)
    assert ((result == truth) | (result == towards)).all()
    for place in zip(*np.nonzero(result != towards), strict=True):
        turned = result.copy()
        turned[place] = ~turned[place]
        code = sum(
            int(np.pad(result, 1)[1 + place[0] + row, 1 + place[1] + column]) << bit
            for bit, (row, column) in enumerate(boundaries._NEIGHBOUR_OFFSETS)
        )
        assert not boundaries._simple_points()[code]
    assert warping_error(towards, truth) == (result != towards).mean()


def test_warping_forgives_shifts_but_not_mergers() -> None:
    truth = np.ones((40, 63), bool)
    truth[:, 30:33] = False
    shifted, apart = np.ones_like(truth), np.ones_like(truth)
    shifted[:, 27:30] = False
    apart[:, 25:28] = False
    assert warping_error(shifted, truth) == 0
    assert warping_error(apart, truth) > 0, (
        "only pixels that differ are turned, so a membrane cannot cross a gap"
    )
    leaking = truth.copy()
    # A gap of one row in the membrane: a merger.
    leaking[20, 30:33] = True
    assert warping_error(leaking, truth) == 1 / truth.size
    assert rand_error(leaking, truth) == pytest.approx(1 / 3)
    assert rand_error(shifted, truth) > 0


def test_membranes_take_the_best_threshold_for_each_error() -> None:
    truth = ~(np.indices((30, 30)).sum(0) % 10 == 0)
    cell = np.where(truth, 0.65, 0.25).astype(np.float32)
    known = np.ones_like(truth)
    scores = score_membranes(
        membrane_counts(cell, truth, known) + membrane_counts(cell, truth, known)
    )
    assert (scores.warping_error, scores.rand_error, scores.pixel_error) == (0, 0, 0)
    assert set(scores.thresholds) == {0.3}
    counts = membrane_counts(cell, truth, known)
    # At this threshold nothing is cell.
    k = THRESHOLDS.index(0.7)
    assert counts[k, 3:].tolist() == [0, truth.sum(), 0]
    assert counts[k, 2] == pytest.approx(rand_error(np.zeros_like(truth), truth))


def test_pixel_error_is_1_minus_the_f_score_of_the_cells() -> None:
    rng = np.random.default_rng(0)
    truth, cell = rng.random((20, 20)) < 0.7, rng.random((20, 20)).astype(np.float32)
    best = 1.0
    for threshold in THRESHOLDS:
        predicted = cell > threshold
        best = min(best, 1 - 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()))
    assert score_membranes(
        membrane_counts(cell, truth, np.ones_like(truth))
    ).pixel_error == pytest.approx(best)


def test_ignored_pixels_of_membranes_do_not_count() -> None:
    truth = blobs(1)
    known = np.ones_like(truth)
    known[10:20, 10:30] = False
    cell = truth.astype(np.float32)
    cell[10:20, 10:30] = 1 - cell[10:20, 10:30]
    scores = score_membranes(membrane_counts(cell, truth & known, known))
    assert (scores.warping_error, scores.rand_error, scores.pixel_error) == (0, 0, 0)
