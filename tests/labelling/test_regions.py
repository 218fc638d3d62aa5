"""Superpixels and the regions that clicks mean."""

from __future__ import annotations

import numpy as np
import pytest

from useg.labelling.regions import find_superpixels, propose_region, superpixel_at


def blobs(factor: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Two discs of one colour on a textured ground; which of them each pixel belongs to."""
    rows, columns = np.mgrid[: 120 * factor, : 160 * factor] / factor
    numbers = np.zeros(rows.shape, int)
    numbers[(rows - 60) ** 2 + (columns - 45) ** 2 < 30**2] = 1
    numbers[(rows - 60) ** 2 + (columns - 115) ** 2 < 25**2] = 2
    noise = np.random.default_rng(0).integers(0, 24, (*rows.shape, 3))
    return (np.where(numbers[..., None], [180, 60, 50], [60, 110, 70]) + noise).astype(
        np.uint8
    ), numbers


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("factor", [1, 5])
def test_a_click_finds_one_object_among_equal_ones(factor: int) -> None:
    image, numbers = blobs(factor)
    superpixels = find_superpixels(image)
    for number, click in ((1, (45, 60)), (2, (120, 55))):
        region = propose_region(superpixels, [(click[0] * factor, click[1] * factor)])
        assert region.shape == numbers.shape
        assert iou(region, numbers == number) > 0.9


def test_an_object_of_few_pixels_is_found_in_its_place() -> None:
    rows, columns = np.mgrid[:32, :32]
    inside = (rows - 16) ** 2 + (columns - 14) ** 2 < 5**2
    noise = np.random.default_rng(0).integers(0, 24, (32, 32, 3))
    image = (np.where(inside[..., None], 170, 70) + noise).astype(np.uint8)
    assert iou(propose_region(find_superpixels(image), [(14, 16)]), inside) > 0.95


def test_further_clicks_correct_a_proposal() -> None:
    image, _ = blobs()
    superpixels = find_superpixels(image)
    both = propose_region(superpixels, [(45, 60), (115, 60)])
    assert both[60, 45]
    assert both[60, 115]
    less = propose_region(superpixels, [(45, 60)], [(45, 35)])
    assert less[60, 45]
    assert not less[35, 45]


def test_superpixels_keep_to_the_edges_of_objects() -> None:
    image, numbers = blobs()
    superpixels = find_superpixels(image)
    h, w = superpixels.numbers.shape
    rows, columns = np.arange(h) * 120 // h, np.arange(w) * 160 // w
    inside = numbers[rows][:, columns] > 0
    mixed = sum(
        min(np.bincount(inside[superpixels.numbers == k], minlength=2))
        for k in range(superpixels.numbers.max() + 1)
    )
    assert mixed / inside.size < 0.02
    patch = superpixel_at(superpixels, (45, 60))
    assert patch[60, 45]
    assert not patch[numbers == 0].any()


def test_probabilities_separate_objects_of_one_colour() -> None:
    image = np.full((60, 80, 3), 120, np.uint8)
    answers = np.zeros((2, 60, 80), np.float32)
    answers[0, :, :40] = answers[1, :, 40:] = 1
    region = propose_region(find_superpixels(image, answers), [(20, 30)])
    assert iou(region, answers[0] > 0) > 0.85


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 50, 1), (7, 3, 4)])
def test_tiny_and_odd_images_have_regions(shape: tuple[int, int, int]) -> None:
    superpixels = find_superpixels(np.zeros(shape, np.uint8))
    assert propose_region(superpixels, [(0, 0)])[0, 0]
