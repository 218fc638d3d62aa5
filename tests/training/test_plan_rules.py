"""What labels say about sizes, shares and places."""

from __future__ import annotations

import numpy as np
import pytest

from useg.training.plan_rules import LabelStatistics


def test_iou_of_reduced_labels() -> None:
    label = np.zeros((8, 8), np.uint8)
    label[:, 4:] = 1
    label[0] = 255
    statistics = LabelStatistics((label,), ("a", "b", "c"))
    assert statistics.shares() == pytest.approx([0.5, 0.5, 0])
    assert statistics.iou_after_reduction(0.5) == pytest.approx(1)
    # A line of 1 pixel is lost, or becomes 4 pixels wide; the background does not count.
    label[:] = 0
    label[4] = 2
    assert statistics.iou_after_reduction(0.25) in (0.0, pytest.approx(0.25))
    assert statistics.iou_after_reduction(1.0) == pytest.approx(1)


def statistics_of(*labels: np.ndarray) -> LabelStatistics:
    return LabelStatistics(tuple(labels), ("a", "b"))


def test_places_say_all_in_the_same_scene_and_nothing_in_random_ones() -> None:
    rng = np.random.default_rng(0)
    scene = np.zeros((64, 64), np.uint8)
    scene[32:] = 1
    assert statistics_of(*[scene] * 8).position_information() == pytest.approx(1, abs=0.03)
    shifted = [np.roll(scene, rng.integers(64), 0) for _ in range(16)]
    assert statistics_of(*shifted).position_information() < 0.1
    assert statistics_of(scene).position_information() == 0
    assert statistics_of(np.zeros((9, 9), np.uint8)).position_information() == 0


def test_up_and_down_say_nothing_about_what_is_in_the_middle() -> None:
    scene, middle = np.zeros((2, 64, 64), np.uint8)
    scene[32:] = 1
    middle[16:48, 16:48] = 1
    assert statistics_of(scene, scene).vertical_information() == pytest.approx(1)
    assert statistics_of(middle, middle).vertical_information() == pytest.approx(0)


def test_ignored_pixels_say_nothing() -> None:
    scene = np.zeros((64, 64), np.uint8)
    scene[32:] = 255
    assert statistics_of(scene, scene).position_information() == 0
