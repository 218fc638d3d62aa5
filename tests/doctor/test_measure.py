"""Edge alignment, specks, codes and thumbnails equal what a loop over the pixels finds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_doctor import SIZE

from useg.data.dataset import COLOR_FLAG
from useg.data.mask_content import color_code
from useg.doctor import measure
from useg.doctor.mask_codes import map_codes
from useg.doctor.measure import THUMBNAIL_SHAPE, find_specks


def count_specks(codes: np.ndarray) -> int:
    """A spot of at most 3 x 3 pixels is a speck if the ring around its box has one other code."""
    H, W = codes.shape
    return sum(
        codes[y, x] != codes[y - 1, x]
        and codes[y, x] != codes[y, x - 1]
        and len(np.unique(ring(codes, y, x))) == 1
        for y in range(4, H - 4)
        for x in range(4, W - 4)
    )


def ring(codes: np.ndarray, y: int, x: int) -> np.ndarray:
    box = codes[y - 1 : y + 5, x - 3 : x + 5]
    return np.concatenate((box[0], box[-1], box[:, 0], box[:, -1]))


def find_specks_of(codes: np.ndarray) -> measure.Specks:
    flat = codes.ravel()
    starts = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
    return find_specks(codes, starts, np.diff(starts, append=len(flat)))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=12, unique=True))
def test_specks_are_those_that_a_loop_counts(cells: list[tuple[int, int]]) -> None:
    codes = np.ones((48, 60), np.uint8)
    for row, column in cells:
        y, x = 6 + 11 * row, 6 + 11 * column
        codes[y : y + 1 + (row + column) % 3, x : x + 1 + row % 3] = 2
    found = find_specks_of(codes)
    assert found.number == count_specks(codes) == len(cells)
    if cells:
        assert codes[found.first[1], found.first[0]] == 2


def test_larger_spots_and_spots_at_the_border_are_no_specks() -> None:
    codes = np.zeros((40, 40), np.uint8)
    codes[20:24, 20:24] = 1
    codes[0:2, 10:12] = 1
    assert find_specks_of(codes).number == 0


def test_codes_are_mapped_and_others_get_the_default() -> None:
    codes = np.array([[0, 7], [9, 300]])
    assert map_codes(codes, {7: 1, 0: 5}, -1).tolist() == [[5, 1], [-1, -1]]
    assert color_code((1, 2, 3)) == COLOR_FLAG | 0x010203


@pytest.mark.parametrize("shape", [SIZE[::-1], (600, 800), (10, 13)])
def test_thumbnail_is_the_mean_of_its_cells(shape: tuple[int, int]) -> None:
    ramp = np.broadcast_to(np.linspace(0, 200, shape[1]), shape)
    image = np.stack([ramp, ramp + 30, ramp - 30], axis=2).astype(np.float32)
    thumbnail = measure._make_thumbnail(image)
    assert thumbnail.shape == THUMBNAIL_SHAPE
    expected = (np.arange(THUMBNAIL_SHAPE[1]) + 0.5) / THUMBNAIL_SHAPE[1] * 200
    assert abs(thumbnail - expected).max() < 200 / (min(shape[1], THUMBNAIL_SHAPE[1]) - 1)
