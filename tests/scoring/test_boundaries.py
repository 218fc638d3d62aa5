"""Edges and thin things against definitions written out pixel by pixel."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from useg.classes import IGNORE
from useg.scoring import boundaries
from useg.scoring.boundaries import boundary_counts, default_tolerance, score_boundaries

K = 4
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@st.composite
def maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(SHAPES)
    label = draw(arrays.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 3, IGNORE])))
    prediction = draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, K - 1)))
    return prediction, label


def blobs(
    seed: int, shape: tuple[int, int] = (60, 80), num_classes: int = K, ignored: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """A prediction that nearly agrees with its label, in patches of some pixels."""
    rng = np.random.default_rng(seed)
    fields = np.stack(
        [ndimage.gaussian_filter(rng.normal(size=shape), 4) for _ in range(num_classes)]
    )
    noise = (
        np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 2) for _ in range(num_classes)])
        * 0.2
    )
    label, prediction = (
        fields.argmax(0).astype(np.uint8),
        (fields + noise).argmax(0).astype(np.uint8),
    )
    if ignored:
        label[20:30, 10:40] = IGNORE
    return prediction, label


def loops(prediction: np.ndarray, label: np.ndarray, tolerance: int) -> np.ndarray:
    """The nine counts by their definitions, one pixel after the other."""
    H, W = label.shape
    diagonal = math.hypot(H, W)
    width, thin_radius = max(1, round(0.02 * diagonal)), max(1, round(0.005 * diagonal))
    prediction = np.where(label == IGNORE, IGNORE, prediction)

    def around(y: int, x: int, radius: int) -> list[tuple[int, int]]:
        return [
            (y + dy, x + dx)
            for dy in range(-radius, radius + 1)
            for dx in range(-radius, radius + 1)
        ]

    def inside(place: tuple[int, int]) -> bool:
        return 0 <= place[0] < H and 0 <= place[1] < W

    def in_band(labels: np.ndarray, y: int, x: int) -> bool:
        return any(
            not inside(place) or labels[place] != labels[y, x] for place in around(y, x, width)
        )

    def on_contour(labels: np.ndarray, y: int, x: int) -> bool:
        if labels[y, x] == IGNORE:
            return False
        beside = [
            place for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)) if inside(place)
        ]
        return any(labels[place] not in (IGNORE, labels[y, x]) for place in beside)

    def one_class(y: int, x: int) -> bool:
        return (
            len({label[place] for place in around(y, x, thin_radius) if inside(place)} - {IGNORE})
            == 1
        )

    def is_thin(y: int, x: int) -> bool:
        return not any(one_class(*centre) for centre in around(y, x, thin_radius))

    counts = np.zeros((9, K), np.int64)
    contours = [
        [(y, x) for y in range(H) for x in range(W) if on_contour(labels, y, x)]
        for labels in (label, prediction)
    ]
    for y in range(H):
        for x in range(W):
            if label[y, x] == IGNORE:
                continue
            true, predicted = int(label[y, x]), int(prediction[y, x])
            bands = in_band(label, y, x), in_band(prediction, y, x)
            counts[0, true] += all(bands) and true == predicted
            counts[1, true] += bands[0]
            counts[2, predicted] += bands[1]
            if is_thin(y, x):
                counts[7, true] += 1
                counts[8, true] += true == predicted
    for row, labels, own, other, others in (
        (3, label, 0, 1, prediction),
        (5, prediction, 1, 0, label),
    ):
        for place in contours[own]:
            near = [
                p
                for p in contours[other]
                if others[p] == labels[place]
                and (p[0] - place[0]) ** 2 + (p[1] - place[1]) ** 2 <= tolerance**2
            ]
            counts[row, labels[place]] += 1
            counts[row + 1, labels[place]] += bool(near)
    return counts


@settings(max_examples=60)
@given(maps(), st.integers(0, 3))
def test_equals_the_definitions(both: tuple[np.ndarray, np.ndarray], tolerance: int) -> None:
    np.testing.assert_array_equal(boundary_counts(*both, K, tolerance), loops(*both, tolerance))


@pytest.mark.parametrize("seed", range(2))
def test_equals_the_definitions_on_patches(seed: int) -> None:
    prediction, label = blobs(seed, (36, 44))
    np.testing.assert_array_equal(
        boundary_counts(prediction, label, K),
        loops(prediction, label, default_tolerance(label.shape)),
    )


def test_equals_erosion_distance_and_opening() -> None:
    prediction, label = blobs(7, (90, 120), ignored=False)
    counts = boundary_counts(prediction, label, K)
    width, tolerance = 3, 2  # 2 % and 0.8 % of a diagonal of 150
    square = np.ones((3, 3), bool)
    for k in range(K):
        truth, predicted = label == k, prediction == k
        bands = [
            mask & ~ndimage.binary_erosion(mask, square, width) for mask in (truth, predicted)
        ]  # outside the image: not of the class
        assert counts[:3, k].tolist() == [
            (bands[0] & bands[1]).sum(),
            bands[0].sum(),
            bands[1].sum(),
        ]
        edges = [mask & ndimage.binary_dilation(~mask) for mask in (truth, predicted)]
        for row, own, other in ((3, 0, 1), (5, 1, 0)):
            distance = (
                ndimage.distance_transform_edt(~edges[other])
                if edges[other].any()
                else np.full(label.shape, np.inf)
            )
            assert counts[row : row + 2, k].tolist() == [
                edges[own].sum(),
                (edges[own] & (distance <= tolerance)).sum(),
            ]
        framed = np.pad(truth, 1, mode="edge")
        opened = ndimage.binary_opening(framed, square)[1:-1, 1:-1]
        inner = np.s_[1:-1, 1:-1]  # at the frame, what fits is a matter of definition
        assert (boundaries._thin(label, 1)[inner] & truth[inner]).sum() == (truth & ~opened)[
            inner
        ].sum()


def test_a_perfect_prediction_scores_1_whatever_is_ignored() -> None:
    _, label = blobs(3)
    scores = score_boundaries(
        boundary_counts(np.where(label == IGNORE, 2, label).astype(np.uint8), label, K)
    )
    assert (scores.mean_boundary_iou, scores.mean_boundary_f) == (1, 1)
    assert all(entry.thin_recall == 1 for entry in scores.classes if entry.thin_pixels)


def test_shifted_by_the_tolerance_is_right_and_by_one_more_is_not() -> None:
    label = np.zeros((40, 40), np.uint8)
    label[:, 20:] = 1
    for shift, expected in ((2, 1.0), (3, 0.0)):
        prediction = np.zeros_like(label)
        prediction[:, 20 + shift :] = 1
        assert (
            score_boundaries(boundary_counts(prediction, label, 2, tolerance=2)).mean_boundary_f
            == expected
        )


def test_a_pole_is_thin_and_a_house_is_not_also_at_the_frame() -> None:
    label = np.zeros((120, 160), np.uint8)  # diagonal 200: what no 3x3 square fits into is thin
    label[30:, 40:42] = 1
    label[40:80, 80:120] = 2
    label[:, :1] = 3  # cut by the frame: it may be as wide as it likes outside
    counts = boundary_counts(np.zeros_like(label), label, K)
    assert counts[7].tolist() == [0, 180, 0, 0]
    assert score_boundaries(counts).classes[1].thin_recall == 0


def test_absent_classes_and_classes_without_an_edge_have_no_value() -> None:
    label = np.zeros((10, 10), np.uint8)
    scores = score_boundaries(boundary_counts(label, label, 2))
    assert scores.classes[0].boundary_iou == 1  # the frame is an edge
    assert math.isnan(scores.classes[0].boundary_f)
    assert math.isnan(scores.classes[0].thin_recall)
    assert math.isnan(scores.classes[1].boundary_iou)
    ignored = score_boundaries(boundary_counts(label, np.full_like(label, IGNORE), 2))
    assert math.isnan(ignored.mean_boundary_iou)
    assert math.isnan(ignored.mean_boundary_f)


def test_255_classes() -> None:
    rng = np.random.default_rng(0)
    label = rng.permutation(np.arange(255, dtype=np.uint8)).reshape(15, 17)
    scores = score_boundaries(boundary_counts(label, label, 255))
    assert (scores.mean_boundary_iou, scores.mean_boundary_f, len(scores.classes)) == (1, 1, 255)


def test_all_classes_at_once_take_little_more_than_two() -> None:
    def seconds(num_classes: int) -> float:
        both = blobs(0, (200, 300), num_classes)
        boundary_counts(*both, num_classes)
        began = time.process_time()
        for _ in range(5):
            boundary_counts(*both, num_classes)
        return time.process_time() - began

    assert seconds(30) < 8 * seconds(2)
