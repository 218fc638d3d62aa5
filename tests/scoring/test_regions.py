"""Regions by size and errors by place, against counting one by one."""

import math

import numpy as np
import pytest

from useg.classes import IGNORE
from useg.scoring.metrics import (
    REGION_SIZES,
    components,
    error_rates,
    place_counts,
    region_counts,
    regions,
    score_regions,
)

rng = np.random.default_rng(4)


def flooded(labels):
    """Regions of equal values, numbered by flood fill."""
    numbers = np.full(labels.shape, -1)
    for place in np.ndindex(labels.shape):
        if numbers[place] < 0:
            front, number = [place], numbers.max() + 1
            while front:
                row, column = front.pop()
                if (
                    0 <= row < labels.shape[0]
                    and 0 <= column < labels.shape[1]
                    and numbers[row, column] < 0
                    and labels[row, column] == labels[place]
                ):
                    numbers[row, column] = number
                    front += [
                        (row + 1, column),
                        (row - 1, column),
                        (row, column + 1),
                        (row, column - 1),
                    ]
    return numbers


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (1, 30), (30, 1), (16, 16)])
@pytest.mark.parametrize("values", [1, 2, 5])
def test_regions_equal_flood_fill(shape, values):
    labels = rng.integers(0, values, shape, dtype=np.uint8)
    assert (regions(labels) == flooded(labels)).all()


def test_components_are_the_regions_of_a_mask_numbered_from_one():
    mask = rng.random((20, 30)) < 0.6
    numbers = flooded(mask)
    order = {number: k for k, number in enumerate(dict.fromkeys(numbers[mask].tolist()), 1)}
    expected = np.array(
        [
            [order[number] if inside else 0 for number, inside in zip(*row, strict=True)]
            for row in zip(numbers, mask, strict=True)
        ]
    )
    assert (components(mask) == expected).all()
    assert not components(np.zeros((3, 4), bool)).any()


def test_regions_are_counted_by_class_and_size():
    label = np.full((100, 100), 0, np.uint8)
    label[10, 10] = 1  # 1 of 10,000 pixels: tiny, at the bound
    label[20, 20:22] = 1  # 2: small
    label[40:44, 40:50] = 200  # 40: medium
    label[60, 60:70] = IGNORE
    prediction = label.copy()
    prediction[prediction == IGNORE] = 0
    prediction[10, 10] = 0
    prediction[20, 20] = 0
    prediction[40:44, 44:] = 0
    counts = region_counts(prediction, label, 201)
    assert counts[:, 1].tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 2, 0, 0], [0, 1, 0, 0]]
    assert counts[:, 200].tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 40, 0], [0, 0, 16, 0]]
    assert counts[:, 0, 3].tolist() == [1, 1, 10_000 - 53, 10_000 - 53]
    assert counts[2].sum() == (label != IGNORE).sum()
    found = score_regions(counts + counts)
    assert [size.size for size in found.overall] == list(REGION_SIZES)
    assert [size.num_regions for size in found.overall] == [2, 2, 2, 2]
    assert (
        found.classes[1][1].found,
        found.classes[1][1].recall,
        found.classes[200][2].found,
        found.classes[200][2].recall,
    ) == (1, 0.5, 0, 0.4)
    assert math.isnan(found.classes[5][0].found)


@pytest.mark.parametrize("shape", [(12, 16), (37, 53), (5, 4), (240, 320)])
def test_places_equal_counting_pixel_by_pixel(shape):
    label = rng.choice(np.uint8([0, 1, IGNORE]), shape)
    prediction = rng.integers(0, 2, shape, dtype=np.uint8)
    counts = place_counts(prediction, label)
    expected = np.zeros((2, 12, 16), int)
    for (row, column), true in np.ndenumerate(label):
        if true != IGNORE:
            expected[:, row * 12 // shape[0], column * 16 // shape[1]] += (
                1,
                prediction[row, column] != true,
            )
    assert (counts == expected).all()
    rates = error_rates(counts)
    assert np.isnan(rates).sum() == (expected[0] == 0).sum()
    assert np.nanmax(rates) <= 1
