"""The scores of objects equal other implementations, recomputed here by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from useg.objects.scores import IOU_THRESHOLDS, score_tallies, tally_objects

Ids = NDArray[np.int64]


def blobs(shape: tuple[int, int] = (7, 9), most: int = 5) -> st.SearchStrategy[Ids]:
    return arrays.arrays(np.int64, shape, elements=st.integers(0, most), fill=st.just(0))


def iou_matrix(predicted: Ids, true: Ids) -> NDArray[np.float64]:
    """IoU of each true with each predicted object, one pair at a time."""
    rows = []
    for t in sorted(set(true.ravel().tolist()) - {0}):
        row = []
        for p in sorted(set(predicted.ravel().tolist()) - {0}):
            both, either = (true == t) & (predicted == p), (true == t) | (predicted == p)
            row.append(both.sum() / either.sum())
        rows.append(row)
    count = len(set(predicted.ravel().tolist()) - {0})
    return np.array(rows, np.float64).reshape(len(rows), count)


def matches_by_assignment(iou: NDArray[np.float64], least: float) -> int:
    """The matching of StarDist and cellpose: an optimal assignment, then the threshold."""
    if not iou.size:
        return 0
    cost = -(iou >= least).astype(float) - iou / (2 * min(iou.shape))
    t, p = linear_sum_assignment(cost)
    return int((iou[t, p] >= least).sum())


@settings(max_examples=60, deadline=None)
@given(blobs(), blobs())
def test_ap_is_that_of_an_optimal_assignment(predicted: Ids, true: Ids) -> None:
    iou = iou_matrix(predicted, true)
    scores = score_tallies(tally_objects(predicted, true)[None], [0])
    for least, ap in zip(IOU_THRESHOLDS, scores.ap, strict=True):
        matched = matches_by_assignment(iou, least)
        whole = sum(iou.shape) - matched
        assert ap == pytest.approx(matched / whole) if whole else math.isnan(ap)


def panoptic_quality(predicted: Ids, true: Ids, void: NDArray[np.bool_]) -> float:
    """Panoptic quality as panopticapi computes it for one class, with a void region."""
    pairs, total = set(), 0.0
    of_true, of_predicted = (set(ids.ravel().tolist()) - {0} for ids in (true, predicted))
    true = np.where(void, 0, true)
    of_true = {t for t in of_true if (true == t).any()}
    for t in of_true:
        for p in of_predicted:
            both = ((true == t) & (predicted == p)).sum()
            hidden = ((predicted == p) & void).sum()
            union = (predicted == p).sum() + (true == t).sum() - both - hidden
            if union and both / union > 0.5:
                pairs.add((t, p))
                total += both / union
    missed = len(of_true) - len({t for t, _ in pairs})
    invented = 0
    for p in of_predicted - {p for _, p in pairs}:
        area = (predicted == p).sum()
        invented += ((predicted == p) & void).sum() / area <= 0.5
    whole = len(pairs) + 0.5 * (missed + invented)
    return total / whole if whole else math.nan


@settings(max_examples=60, deadline=None)
@given(blobs(), blobs(), arrays.arrays(np.bool_, (7, 9)))
def test_panoptic_quality_is_that_of_panopticapi(
    predicted: Ids, true: Ids, void: NDArray[np.bool_]
) -> None:
    # panopticapi keeps an object that is mostly void if the rest of it matches.
    for p in set(predicted.ravel().tolist()) - {0}:
        if 2 * ((predicted == p) & void).sum() > (predicted == p).sum():
            predicted = np.where(predicted == p, 0, predicted)
    scores = score_tallies(tally_objects(predicted, true, void)[None], [0])
    expected = panoptic_quality(predicted, true, void)
    assert scores.panoptic_quality == pytest.approx(expected, nan_ok=True)


def test_two_touching_objects_that_are_one_count_as_merged() -> None:
    true = np.array([[1, 1, 2, 2, 0, 3]])
    predicted = np.array([[7, 7, 7, 7, 0, 9]])
    scores = score_tallies(tally_objects(predicted, true)[None], [0])
    assert (scores.merged, scores.split) == (1, 0)
    assert (scores.count_bias, scores.count_error) == (-1, 1)
    assert score_tallies(tally_objects(true, predicted)[None], [0]).split == 1


def test_errors_of_counts_do_not_cancel_in_their_absolute_mean() -> None:
    one, two = np.array([[1, 0, 0]]), np.array([[1, 0, 2]])
    rows = np.stack([tally_objects(one, two), tally_objects(two, one)])
    scores = score_tallies(rows, [0, 1])
    assert (scores.count_bias, scores.count_error) == (0, 1)


def test_objects_that_are_mostly_ignored_do_not_count() -> None:
    predicted, true = np.array([[1, 1, 1, 0, 2]]), np.array([[0, 0, 0, 0, 1]])
    ignored = np.array([[True, True, False, False, False]])
    scores = score_tallies(tally_objects(predicted, true, ignored)[None], [0])
    assert (scores.num_predicted, scores.ap50) == (1, 1)


def test_numbers_of_any_size_and_type_are_objects() -> None:
    true = np.array([[4_000_000_000, 0, 5]], np.uint32)
    scores = score_tallies(tally_objects(true.astype(np.int64), true)[None], [0])
    assert (scores.mean_ap, scores.panoptic_quality, scores.num_true) == (1, 1, 2)


def test_intervals_contain_the_scores_and_need_several_images() -> None:
    rng = np.random.default_rng(0)
    true = np.zeros((20, 40), np.int64)
    for k in range(8):
        true[2:8, 5 * k : 5 * k + 4] = k + 1
    rows = []
    for _ in range(12):
        kept = rng.random(9) < 0.7
        rows.append(tally_objects(np.where(kept[true], true, 0), true))
    scores = score_tallies(np.stack(rows), range(12))
    interval = scores.intervals["ap50"]
    assert interval
    assert interval.low < scores.ap50 < interval.high
    assert score_tallies(np.stack(rows[:2]), range(2)).intervals["ap50"] is None
