"""Bootstrap intervals against a plain loop and their coverage, and with too few blocks."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from useg.scoring import uncertainty
from useg.scoring.metrics import confusion, score, tally
from useg.scoring.uncertainty import Interval, compare_tallies, score_intervals


def made(count: int, num_classes: int = 3, seed: int = 0, skill: float = 0.8) -> np.ndarray:
    """Tallies of images of 400 pixels that are right more or less often."""
    rng = np.random.default_rng(seed)
    tallies = []
    for _ in range(count):
        label = rng.integers(0, num_classes, (20, 20)).astype(np.uint8)
        right = rng.random((20, 20)) < np.clip(rng.normal(skill, 0.1), 0, 1)
        guess = rng.integers(0, num_classes, (20, 20)).astype(np.uint8)
        tallies.append(tally(confusion(np.where(right, label, guess), label, num_classes)))
    return np.stack(tallies)


def test_intervals_equal_a_plain_resampling_loop() -> None:
    rng = np.random.default_rng(0)
    matrices = rng.integers(0, 50, (7, 3, 3))
    sums = uncertainty._by_block(np.stack([tally(counts) for counts in matrices]), range(7))
    drawn = uncertainty._resample(sums, 4)
    draws = np.random.default_rng(4).integers(0, 7, (uncertainty.NUM_RESAMPLES, 7))
    for k in (0, 1, 1999):
        counts = sum(matrices[place] for place in draws[k])
        assert (drawn[k] == tally(counts)).all()
        assert uncertainty.mean_iou(drawn[k]) == pytest.approx(score(counts, "abc", 7).mean_iou)


def test_intervals_are_seeded_and_similar_for_other_seeds() -> None:
    tallies = made(40)
    assert score_intervals(tallies, range(40)) == score_intervals(tallies, range(40))
    first, other = (score_intervals(tallies, range(40), seed=seed).mean_iou for seed in (0, 1))
    assert first
    assert other
    assert first != other
    assert abs(first.low - other.low) < 0.2 * (first.high - first.low)


@pytest.mark.parametrize(("count", "least"), [(6, 0.88), (12, 0.9), (40, 0.91)])
def test_95_of_100_intervals_hold_the_truth(
    count: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uncertainty, "NUM_RESAMPLES", 1000)
    population = made(3000, seed=1)
    truth = float(uncertainty.mean_iou(population.sum(0)))
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = score_intervals(population[rng.integers(0, 3000, count)], range(count)).mean_iou
        assert found
        held += found.low <= truth <= found.high
    assert least <= held / 200 <= 0.99


def test_student_t_equals_the_tables() -> None:
    from scipy import stats

    for freedom in (4, 5, 9, 30, 1000):
        assert uncertainty._student_t(freedom) == pytest.approx(
            stats.t.ppf(0.975, freedom), rel=3e-3
        )


def test_neighbours_in_one_block_make_the_interval_wider() -> None:
    scenes = made(12, seed=3)
    # Each scene ten times, like the nearly equal frames of a video.
    film = np.repeat(scenes, 10, axis=0)
    naive, honest, scene = (
        score_intervals(film, range(120)),
        score_intervals(film, np.arange(120) // 10),
        score_intervals(scenes, range(12)),
    )
    assert naive.mean_iou
    assert honest.mean_iou
    assert honest.mean_iou == scene.mean_iou
    assert honest.mean_iou.high - honest.mean_iou.low > 2.5 * (
        naive.mean_iou.high - naive.mean_iou.low
    )
    assert (honest.num_blocks, honest.note, naive.note) == (12, "", "")


@pytest.mark.parametrize(
    ("blocks", "note"),
    [
        (
            [0, 0, 0, 0, 0, 0],
            "no interval: 1 block of neighbouring images is "
            "too few to estimate how much the scores vary (at least 5 are needed)",
        ),
        (
            [0, 0, 1, 1, 2, 3],
            "no interval: 4 blocks of neighbouring images are "
            "too few to estimate how much the scores vary (at least 5 are needed)",
        ),
        (range(6), "the intervals come from only 6 images, so they are a rough guide"),
        (
            [4, 4, 3, 2, 1, 0],
            "the intervals come from only 5 blocks of neighbouring images, "
            "so they are a rough guide",
        ),
    ],
)
def test_note_says_that_there_are_too_few_blocks(blocks: list[int], note: str) -> None:
    found = score_intervals(made(6), blocks)
    assert found.note == note
    assert (found.mean_iou is None) == note.startswith("no interval")
    assert (found.classes == (None,) * 3) == note.startswith("no interval")


def test_one_image_and_only_ignored_images_give_no_interval() -> None:
    assert score_intervals(made(1), [0]).note.startswith("no interval: 1 image is too few")
    nothing = score_intervals(np.zeros((8, 3, 2), np.int64), range(8))
    assert (nothing.mean_iou, nothing.num_blocks) == (None, 0)


def test_a_class_in_few_images_has_no_interval_while_the_others_do() -> None:
    tallies = made(20)
    tallies[4:, :, 2] = 0
    found = score_intervals(tallies, range(20))
    assert found.classes[0] is not None
    assert found.classes[2] is None
    absent = tallies.copy()
    absent[:, :, 2] = 0
    assert score_intervals(absent, range(20)).classes[2] is None


def test_images_without_a_counted_pixel_change_nothing() -> None:
    tallies = made(12)
    padded = np.concatenate([tallies, np.zeros_like(tallies[:3])])
    assert (
        score_intervals(padded, range(15)).mean_iou == score_intervals(tallies, range(12)).mean_iou
    )


def test_a_little_better_on_every_image_is_surely_better() -> None:
    # The same seed gives the same images and the same luck.
    first, second = made(60, seed=5, skill=0.82), made(60, seed=5, skill=0.8)
    found = compare_tallies(first, second, range(60))
    alone = score_intervals(first, range(60)).mean_iou
    assert alone
    assert found.interval
    assert found.probability_better
    assert found.probability_better > 0.99
    assert found.interval.low > 0
    # How hard the images are is common to both models.
    assert found.interval.high - found.interval.low < alone.high - alone.low
    assert found.mean_iou == pytest.approx(
        float(uncertainty.mean_iou(first.sum(0)) - uncertainty.mean_iou(second.sum(0)))
    )


def test_swapped_models_give_the_opposite_difference() -> None:
    first, second = made(30, seed=6), made(30, seed=7)
    one, other = (
        compare_tallies(first, second, range(30)),
        compare_tallies(second, first, range(30)),
    )
    assert one.interval
    assert other.interval
    assert one.probability_better == pytest.approx(1 - (other.probability_better or 0))
    assert (one.mean_iou, one.interval.low) == (
        pytest.approx(-other.mean_iou),
        pytest.approx(-other.interval.high),
    )


def test_the_same_model_is_neither_better_nor_worse() -> None:
    tallies = made(20)
    found = compare_tallies(tallies, tallies, range(20))
    assert (found.mean_iou, found.interval, found.probability_better) == (0, Interval(0, 0), 0.5)


def test_few_blocks_that_all_agree_are_not_certainty() -> None:
    first, second = made(5, seed=8, skill=0.9), made(5, seed=8, skill=0.4)
    assert compare_tallies(first, second, range(5)).probability_better == 1 - 1 / 32
    few = compare_tallies(first[:4], second[:4], range(4))
    assert (few.probability_better, few.interval, few.note[:11]) == (None, None, "no interval")


def test_equal_models_are_called_better_about_as_often_as_worse() -> None:
    probabilities = [
        compare_tallies(
            made(20, seed=2 * k), made(20, seed=2 * k + 1), range(20)
        ).probability_better
        or 0
        for k in range(30)
    ]
    assert 0.3 < float(np.mean(probabilities)) < 0.7
    assert sum(not 0.025 < value < 0.975 for value in probabilities) <= 5


def test_1000_images_of_13_classes_take_seconds_at_most() -> None:
    tallies = np.tile(made(20, 13), (50, 1, 1))
    began = time.process_time()
    found = score_intervals(tallies, range(1000))
    assert time.process_time() - began < 10
    assert found.mean_iou
    assert not math.isnan(found.mean_iou.low)


def test_many_images_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tallies = made(30)
    whole = score_intervals(tallies, range(30))
    monkeypatch.setattr(uncertainty, "_MAX_DRAWS", 100)
    assert score_intervals(tallies, range(30)) == whole
