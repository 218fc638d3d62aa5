"""Errors of a class are counted by border, width, edges and confidence; splits by their images."""

from __future__ import annotations

import numpy as np
import pytest

from useg.classes import IGNORE
from useg.reporting.error_analysis import (
    PredictedImage,
    SplitStatistics,
    dilate_mask,
    find_split_differences,
    measure_class_errors,
    measure_maps,
    relative_edge_strength,
)


def predicted_image(
    label: np.ndarray,
    prediction: np.ndarray,
    image: np.ndarray | None = None,
    working: tuple[int, int] | None = None,
) -> PredictedImage:
    """An image with the confidence 0.5 everywhere, and without edges unless one is given."""
    height, width = label.shape
    edges = np.ones(label.shape, np.float32) if image is None else relative_edge_strength(image)
    confidence = np.full(label.shape, 0.5, np.float32)
    return measure_maps(label, prediction, confidence, edges, working or (width, height))


def test_errors_of_images_add_up() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(3):
        label, prediction = rng.integers(0, 3, (2, 12, 16)).astype(np.uint8)
        label[:2] = IGNORE
        parts.append((label, prediction))
    errors = [measure_class_errors(predicted_image(*part), 1, 2) for part in parts]
    total = errors[0] + errors[1] + errors[2]
    labels, predictions = (np.stack(maps) for maps in zip(*parts, strict=True))
    is_true, is_predicted = labels == 1, predictions == 1
    swapped = (is_true & (predictions == 2)) | ((labels == 2) & is_predicted)
    wrong = np.count_nonzero((is_true != is_predicted) & (labels != IGNORE))
    correct = np.count_nonzero(labels == predictions)
    assert total.confusions[0] == swapped.sum()
    assert total.confidences.tolist() == [[wrong, wrong / 2], [correct, correct / 2]]
    assert total.regions[:, 1].sum() == is_true.sum()
    assert total.regions[:, 2].sum() == (is_true & is_predicted).sum()
    assert total.relative_confidence == 1


def test_width_of_a_region_is_twice_its_area_over_its_outline() -> None:
    label = np.zeros((60, 60), np.uint8)
    # A pole, 3 pixels wide, and a square with a side of 12 pixels.
    label[5:45, 10:13] = 1
    label[20:32, 30:42] = 1
    errors = measure_class_errors(predicted_image(label, label), 1, 0)
    assert errors.regions[:, 0].tolist() == pytest.approx([2 * 120 / 86, 6])
    halved = measure_class_errors(predicted_image(label, label, working=(30, 30)), 1, 0)
    assert halved.regions[:, 0].tolist() == pytest.approx([120 / 86, 3])


def test_best_iou_falls_when_regions_disappear_at_the_working_size() -> None:
    def best_iou(label: np.ndarray, working: tuple[int, int]) -> float:
        return measure_class_errors(predicted_image(label, label, None, working), 1, 0).best_iou

    label = np.zeros((64, 64), np.uint8)
    label[:, 8:10] = 1
    assert best_iou(label, (64, 64)) == 1
    assert best_iou(label, (8, 8)) == 0
    label[:, 32:] = 1
    assert best_iou(label, (8, 8)) > 0.9


def test_border_share_distinguishes_borders_from_regions() -> None:
    label = np.zeros((80, 80), np.uint8)
    label[:, 40:] = 1
    misplaced, half_lost = label.copy(), label.copy()
    misplaced[:, 38:] = 1
    half_lost[:40] = 0
    border = measure_class_errors(predicted_image(label, misplaced), 1, 0)
    region = measure_class_errors(predicted_image(label, half_lost), 1, 0)
    assert border.border_share == 1
    assert region.border_share == pytest.approx(0)


def test_edges_support_the_map_that_follows_them() -> None:
    rng = np.random.default_rng(0)
    true, other = np.zeros((2, 80, 80), np.uint8)
    # Both contain the first square; the second is at different places.
    true[10:40, 10:40] = other[10:40, 10:40] = 1
    true[45:75, 45:75] = 1
    other[45:75, 5:35] = 1
    grey = np.where(true == 1, 200, 60)[..., None]
    image = (grey + rng.normal(0, 5, (80, 80, 3))).astype(np.uint8)

    def support(label: np.ndarray, prediction: np.ndarray, image: np.ndarray) -> float:
        errors = measure_class_errors(predicted_image(label, prediction, image), 1, 0)
        return errors.prediction_support

    assert support(true, other, image) < 0.1
    assert support(other, true, image) > 0.9
    assert np.isnan(support(true, true, image))
    assert np.isnan(support(true, other, np.zeros_like(image)))


def test_border_within_the_tolerance_is_not_disputed() -> None:
    def disputed(
        label: np.ndarray, prediction: np.ndarray, working: tuple[int, int] = (80, 80)
    ) -> list[float]:
        image = predicted_image(label, prediction, None, working)
        return measure_class_errors(image, 1, 0).outlines[:2, 0].tolist()

    label, near, far = np.zeros((3, 80, 80), np.uint8)
    label[:, 40:], near[:, 42:], far[:, 43:] = 1, 1, 1
    assert disputed(label, near) == [0, 0]
    assert disputed(label, far) == [80, 80]
    assert disputed(label, far, working=(40, 40)) == [0, 0]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 40, 3), (40, 2, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_edge_strength_is_finite_for_any_image(shape: tuple[int, int, int], dtype: type) -> None:
    image = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    if dtype is np.float32:
        image[0, 0] = np.nan
    edges = relative_edge_strength(image)
    assert edges.shape == shape[:2]
    assert np.isfinite(edges).all()
    assert (relative_edge_strength(np.full(shape, 7, dtype)) == 1).all()


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_dilation_marks_everything_within_the_radius(radius: int) -> None:
    mask = np.random.default_rng(radius).random((13, 9)) < 0.05
    rows, columns = np.indices(mask.shape)
    expected = np.zeros_like(mask)
    for row, column in zip(*np.nonzero(mask), strict=True):
        expected |= np.maximum(abs(rows - row), abs(columns - column)) <= radius
    assert (dilate_mask(mask, radius) == expected).all()


def split_statistics(
    brightness: float = 100, contrast: float = 50, red: float = 0, side: float = 300
) -> SplitStatistics:
    """Statistics of 20 images that differ a little among themselves."""
    spread = np.linspace(-1, 1, 20)
    bands = brightness + spread[:, None] + np.array([red, 0, 0])
    return SplitStatistics(
        np.ones((20, 2), np.int64), bands, contrast + spread, np.full(20, side, np.float64)
    )


@pytest.mark.parametrize(
    ("held_out", "adjectives"),
    [
        (split_statistics(), []),
        (split_statistics(brightness=140), ["brighter"]),
        (split_statistics(brightness=60), ["darker"]),
        (split_statistics(contrast=25), ["lower in contrast"]),
        (split_statistics(contrast=100), ["higher in contrast"]),
        (split_statistics(red=30), ["different in colour"]),
        (split_statistics(side=600), ["larger"]),
        (split_statistics(side=100, brightness=60), ["darker", "smaller"]),
    ],
)
def test_differences_between_splits_are_named(
    held_out: SplitStatistics, adjectives: list[str]
) -> None:
    differences = find_split_differences(split_statistics(), held_out)
    assert [difference.adjective for difference in differences] == adjectives
    assert all(" in training, " in difference.numbers for difference in differences)


def test_splits_with_other_bands_are_not_compared() -> None:
    grey = split_statistics()
    grey = SplitStatistics(grey.pixels, grey.bands[:, :1], grey.contrast, grey.side)
    assert find_split_differences(split_statistics(brightness=10), grey) == []
