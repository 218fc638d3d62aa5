"""What labels say about sizes, shares and places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_training import make_disc_dataset

from useg.classes import ClassTable
from useg.data.dataset import Dataset, Pair
from useg.training import plan_rules
from useg.training.plan_rules import LabelStatistics, choose_checked, choose_images


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


def dataset_of(num_train: int, num_val: int) -> Dataset:
    splits = ["train"] * num_train + ["val"] * num_val
    pairs = (Pair(Path(f"{k}.png"), Path(f"{k}_mask.png"), each) for k, each in enumerate(splits))
    return Dataset(Path(), "folders", tuple(pairs), ClassTable(("a", "b")))


@pytest.mark.parametrize(
    ("seconds_each", "num_train", "num_val", "train_every", "val_every"),
    [
        # Of 100,000 seconds there are 25,000 to read images in 1.25 seconds, and 10,000 to score
        # some and 60 more in 23 seconds.
        (1.0, 20_000, 374, 1, 1),
        (1.0, 20_001, 375, 2, 2),
        (1.0, 90_000, 1200, 5, 4),
        # never fewer than 200 and 20
        (1000.0, 900, 90, 4, 4),
        (1000.0, 200, 20, 1, 1),
        (1000.0, 900, 0, 4, 1),
        (1e-9, 10**5, 10**4, 1, 1),
    ],
)
def test_a_run_leaves_out_images_that_it_has_no_time_for(
    seconds_each: float,
    num_train: int,
    num_val: int,
    train_every: int,
    val_every: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_rules, "measure_decoding", lambda _: seconds_each)
    chosen = choose_images(dataset_of(num_train, num_val), 100_000)
    assert {key: every for key, (every, _) in chosen.items()} == {
        "data.train_every": train_every,
        "data.val_every": val_every,
    }


def test_a_run_checks_as_many_images_as_it_has_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_rules, "measure_decoding", lambda _: 1.0)
    dataset = dataset_of(900, 100)
    checked = choose_checked(dataset, 9000)
    assert len(checked) == 400
    assert [pair.split for pair in checked].count("val") == 40
    assert len(choose_checked(dataset, 1)) == 200
    assert choose_checked(dataset, 10**6) == dataset.pairs


def test_all_images_are_checked_if_one_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_rules, "MIN_CHECKED_IMAGES", 4)
    dataset = make_disc_dataset(tmp_path)
    assert len(choose_checked(dataset, 1e-9)) == 4
    dataset.pairs[0].image.write_bytes(b"not an image")
    assert choose_checked(dataset, 1e-9) == dataset.pairs
