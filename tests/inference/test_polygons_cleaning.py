"""Small holes and regions vanish by the rules of polygons.py, written here as pixel loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from useg.classes import IGNORE
from useg.inference.polygons import clean_label_map, fill_holes, merge_regions

LABELS = arrays.arrays(
    np.uint8,
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    elements=st.sampled_from([0, 0, 0, 1, 1, 2, IGNORE]),
)
NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))


def parts(mask: np.ndarray) -> list[np.ndarray]:
    numbers, count = ndimage.label(mask)
    return [numbers == k + 1 for k in range(count)]


def neighbours(label: np.ndarray, part: np.ndarray) -> list[tuple[int, int]]:
    """The pixel beyond every side of a part, once for each side; None beyond the picture's edge."""
    found = []
    for row, column in np.argwhere(part):
        for place in ((row + down, column + right) for down, right in NEIGHBOURS):
            inside = 0 <= place[0] < label.shape[0] and 0 <= place[1] < label.shape[1]
            if not inside or not part[place]:
                found.append(place if inside else None)
    return found  # type: ignore[return-value]


def slowly_filled(label: np.ndarray, below: int) -> np.ndarray:
    holes = []
    for value in set(label.ravel().tolist()) - {IGNORE}:
        for part in parts(label != value):
            if (
                part.sum() < below
                and None not in neighbours(label, part)
                and IGNORE not in label[part]
            ):
                assert {label[place] for place in neighbours(label, part)} == {value}
                holes.append((part.sum(), -value, part))
    filled = label.copy()
    for _, value, part in sorted(holes, key=lambda hole: hole[:2]):
        filled[part] = -value
    return filled


def slowly_merged(label: np.ndarray, below: int) -> np.ndarray:
    while True:
        found = [
            part
            for value in set(label.ravel().tolist()) - {IGNORE}
            for part in parts(label == value)
        ]
        large = np.any(
            [part for part in found if part.sum() >= below] or [np.zeros(label.shape, bool)], axis=0
        )
        merged = label.copy()
        for part in found:
            beyond = [
                label[place]
                for place in neighbours(label, part)
                if place is not None and large[place]
            ]
            if part.sum() < below and beyond:
                merged[part] = max(sorted(set(beyond)), key=beyond.count)
        if (merged == label).all():
            return label
        label = merged


HOLE_IN_A_HOLE = np.pad(np.pad(np.uint8([[2]]), 1, constant_values=1), 1)
ENCLOSED_BY_CORNERS = np.uint8([[255, 0, 255], [0, 1, 0], [255, 0, 255]])


@given(LABELS, st.integers(0, 12))
@example(HOLE_IN_A_HOLE, 10)
@example(np.uint8([[0, 0, 0], [0, 255, 0], [0, 0, 0]]), 5)
@example(ENCLOSED_BY_CORNERS, 5)
def test_holes_are_filled_as_in_the_pixel_loops(label: np.ndarray, below: int) -> None:
    before = label.copy()
    assert (fill_holes(label, below) == slowly_filled(label, below)).all()
    assert (label == before).all(), "its argument stays as it is"


@given(LABELS, st.integers(0, 12))
@example(np.uint8([[0, 0, 0, 1, 2, 2, 2]]), 3)  # equal borders
@example(np.uint8([[0, 0, 0, 1, 2, 1, 2]]), 3)  # one after the other
def test_regions_are_merged_as_in_the_pixel_loops(label: np.ndarray, below: int) -> None:
    before = label.copy()
    merged = merge_regions(label, below)
    assert (merged == slowly_merged(label, below)).all()
    assert (label == before).all(), "its argument stays as it is"
    assert ((merged == IGNORE) == (label == IGNORE)).all()


@given(LABELS.filter(lambda label: IGNORE not in label), st.integers(0, 8))
def test_no_small_region_remains_where_there_was_a_large_one(label: np.ndarray, below: int) -> None:
    sizes = [part.sum() for value in np.unique(label) for part in parts(label == value)]
    merged = merge_regions(label, below)
    if max(sizes) >= below:
        assert all(
            part.sum() >= below for value in np.unique(merged) for part in parts(merged == value)
        )
    else:
        assert (merged == label).all()


@given(LABELS)
def test_cleaning_is_off_by_default(label: np.ndarray) -> None:
    assert (clean_label_map(label) == label).all()
    assert (clean_label_map(label, 1, 1) == label).all(), "nothing is smaller than one pixel"


def test_holes_are_filled_before_regions_are_merged() -> None:
    label = np.zeros((9, 9), np.uint8)
    label[2:7, 2:7] = 1
    label[4, 4:6] = 2, 3  # two regions in one hole
    label[0, 0] = 3
    assert np.unique(clean_label_map(label, max_hole=3)).tolist() == [0, 1, 3]
    assert np.unique(clean_label_map(label, max_hole=2)).tolist() == [0, 1, 2, 3]
    assert np.unique(clean_label_map(label, min_region=2, max_hole=3)).tolist() == [0, 1]
    assert np.unique(clean_label_map(label, min_region=26, max_hole=3)).tolist() == [0]


@pytest.mark.parametrize("value", [0, IGNORE])
def test_one_value_everywhere(value: int) -> None:
    label = np.full((3, 4), value, np.uint8)
    assert (clean_label_map(label, 100, 100) == label).all()


def test_the_longest_border_counts_not_the_largest_neighbour() -> None:
    label = np.uint8(
        [
            [0, 0, 0, 0, 0, 0],
            [0, 0, 0, 2, 1, 1],
            [0, 0, 0, 2, 1, 1],
            [0, 0, 0, 2, 1, 1],
            [0, 0, 0, 1, 1, 1],
        ]
    )
    assert (merge_regions(label, 4) == np.where(label == 2, 0, label)).all(), (
        "four sides of 0, four of 1: the lowest"
    )
    label[0, 3] = 1
    assert (merge_regions(label, 4)[label == 2] == 1).all()
