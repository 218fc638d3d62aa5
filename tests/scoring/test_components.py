"""Connected regions against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from useg.scoring.metrics import components

MASKS = arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


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
