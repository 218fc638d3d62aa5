"""Scores against scikit-learn and a counting loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as oracle

from useg.classes import IGNORE
from useg.scoring.metrics import confusion, score

NAMES = ("a", "b", "c", "d")


@given(st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, IGNORE]), st.integers(0, 3)), min_size=1, max_size=60))
def test_equals_scikit_learn(pixels: list[tuple[int, int]]) -> None:
    label, prediction = np.array(pixels, np.uint8).T[:, None]
    scores = score(confusion(prediction, label, 4), NAMES, 1)
    kept = label != IGNORE
    truth, predicted = label[kept], prediction[kept]
    present = sorted(set(truth.tolist()))
    assert list(scores.absent) == [name for k, name in enumerate(NAMES) if k not in present]
    if not present:
        assert math.isnan(scores.mean_iou)
        return
    assert scores.pixel_accuracy == pytest.approx(oracle.accuracy_score(truth, predicted))
    assert scores.mean_iou == pytest.approx(oracle.jaccard_score(truth, predicted, labels=present, average="macro", zero_division=0))
    assert scores.mean_dice == pytest.approx(oracle.f1_score(truth, predicted, labels=present, average="macro", zero_division=0))
    precision, recall, _, support = oracle.precision_recall_fscore_support(truth, predicted, labels=present, zero_division=0)
    for entry, p, r, pixels_true in zip([scores.classes[k] for k in present], precision, recall, support, strict=True):
        assert (entry.precision, entry.recall, entry.pixels) == (pytest.approx(p), pytest.approx(r), pixels_true)


def test_confusion_equals_a_counting_loop() -> None:
    rng = np.random.default_rng(0)
    label = rng.choice([0, 1, 2, IGNORE], (9, 7)).astype(np.uint8)
    prediction = rng.integers(0, 3, (9, 7)).astype(np.uint8)
    counts = np.zeros((3, 3), np.int64)
    for t, p in zip(label.flat, prediction.flat, strict=True):
        if t != IGNORE:
            counts[t, p] += 1
    assert (confusion(prediction, label, 3) == counts).all()


def test_255_classes_do_not_overflow() -> None:
    label = np.full((300, 300), 254, np.uint8)
    counts = confusion(label, label, 255)
    assert counts[254, 254] == 90_000
    assert counts.sum() == 90_000


def test_grouping_of_images_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    label, prediction = rng.integers(0, 4, (2, 20, 20)).astype(np.uint8)
    whole = confusion(prediction, label, 4)
    parts = sum(confusion(p, t, 4) for p, t in zip(np.split(prediction, 4), np.split(label, 4), strict=True))
    assert (whole == parts).all()


def test_absent_class_is_left_out_and_json_has_no_nan() -> None:
    content = score(np.array([[8, 0, 2], [0, 0, 0], [0, 0, 0]]), ("a", "b", "c"), 1).as_dict()
    assert content["absent"] == ["b", "c"]
    assert content["mean_iou"] == 0.8
    assert content["classes"][1]["iou"] is None
