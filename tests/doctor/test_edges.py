"""Edges of an image are strongest where its mask fits."""

from __future__ import annotations

import numpy as np
import pytest
from made_doctor import make_blobs

from useg.doctor.edges import (
    describe_shift,
    find_strongest_shift,
    find_unsupported_boundaries,
    measure_edge_alignment,
    shift_label,
    shift_z_score,
    strength_at,
)


@pytest.mark.parametrize("shift", [(0, 0), (4, 0), (-3, 5)])
def test_edges_are_strongest_where_the_mask_fits(shift: tuple[int, int]) -> None:
    image, label = make_blobs(3)
    moved = np.roll(label, (-shift[1], -shift[0]), (0, 1))
    alignment = measure_edge_alignment(image.astype(np.uint8)[..., None], moved)
    assert alignment is not None
    assert alignment.mean() == pytest.approx(1, abs=1e-3)
    assert max(abs(np.subtract(find_strongest_shift(alignment), shift))) <= 1
    assert strength_at(alignment, shift) == pytest.approx(alignment.max(), rel=0.05)
    assert shift_z_score(alignment, shift) > 4


def test_blank_image_small_mask_and_mask_without_boundaries_have_no_alignment() -> None:
    image, label = make_blobs(3)
    image = image.astype(np.uint8)[..., None]
    assert measure_edge_alignment(np.zeros_like(image), label) is None
    assert measure_edge_alignment(image, np.zeros_like(label)) is None
    assert measure_edge_alignment(image[:20, :20], label[:20, :20]) is None


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (-2, 5), (4, -1)])
def test_shifting_back_restores_all_pixels_that_stayed_inside(shift: tuple[int, int]) -> None:
    label = np.arange(12 * 10, dtype=np.uint8).reshape(12, 10)
    right, down = shift
    back = shift_label(shift_label(label, shift, 255), (-right, -down), 255)
    inside = back != 255
    assert (back[inside] == label[inside]).all()
    assert inside.sum() == (12 - abs(down)) * (10 - abs(right))


def test_shift_is_described_in_words() -> None:
    assert describe_shift((3, -2)) == "3 pixels right and 2 pixels up"
    assert describe_shift((-1, 0)) == "1 pixel left"


def test_boundaries_are_unsupported_only_where_the_image_is_flat() -> None:
    image = np.zeros((60, 60, 1), np.uint8)
    image[:, 20:] = 100
    image[:, 40:] += np.random.default_rng(0).integers(0, 50, (60, 20, 1), np.uint8)
    codes = np.zeros((60, 60), np.uint8)
    codes[:, 20:] = 1
    codes[:, 30:] = 2
    marked = find_unsupported_boundaries(image, codes)
    assert marked[:, 30].all()
    assert not marked[:, 20].any()
