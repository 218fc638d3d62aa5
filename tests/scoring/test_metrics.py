"""Scores against scikit-learn and a counting loop."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import oracle as library
from sklearn import metrics as oracle

from useg.classes import CITYSCAPES, IGNORE
from useg.errors import UsageError
from useg.scoring.metrics import (
    Confusion,
    class_ious,
    confusion,
    mean_iou,
    mean_present,
    pixel_accuracy,
    score,
    tally,
)

NAMES = ("a", "b", "c", "d")


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 3, IGNORE]), st.integers(0, 3)), min_size=1, max_size=60
    )
)
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
    assert scores.mean_iou == pytest.approx(
        oracle.jaccard_score(truth, predicted, labels=present, average="macro", zero_division=0)
    )
    assert scores.mean_dice == pytest.approx(
        oracle.f1_score(truth, predicted, labels=present, average="macro", zero_division=0)
    )
    assert scores.frequency_weighted_iou == pytest.approx(
        oracle.jaccard_score(truth, predicted, labels=present, average="weighted", zero_division=0)
    )
    assert scores.micro_iou == pytest.approx(
        oracle.jaccard_score(truth, predicted, labels=range(4), average="micro", zero_division=0)
    )
    precision, recall, _, support = oracle.precision_recall_fscore_support(
        truth, predicted, labels=present, zero_division=0
    )
    for entry, p, r, pixels_true in zip(
        [scores.classes[k] for k in present], precision, recall, support, strict=True
    ):
        assert (entry.precision, entry.recall, entry.pixels) == (
            pytest.approx(p),
            pytest.approx(r),
            pixels_true,
        )


def counting_loop(prediction: np.ndarray, label: np.ndarray, num_classes: int) -> Confusion:
    counts = np.zeros((num_classes, num_classes), np.int64)
    for t, p in zip(label.flat, prediction.flat, strict=True):
        if t != IGNORE:
            counts[t, p] += 1
    return counts


@pytest.mark.parametrize("num_classes", [1, 2, 3, 254, 255])
@pytest.mark.parametrize("shape", [(9, 7), (1, 1), (0, 4)])
def test_confusion_equals_a_counting_loop(num_classes: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(num_classes)
    label = rng.choice([*range(num_classes), IGNORE], shape).astype(np.uint8)
    prediction = rng.integers(0, num_classes, shape).astype(np.uint8)
    counts = confusion(prediction, label, num_classes)
    assert (counts == counting_loop(prediction, label, num_classes)).all()
    assert counts.dtype == np.int64


def test_equals_torchmetrics() -> None:
    classification = library("torchmetrics.functional.classification")
    rng = np.random.default_rng(3)
    label = rng.choice([0, 1, 2, 3, IGNORE], (40, 50)).astype(np.uint8)
    prediction = rng.integers(0, 4, (40, 50)).astype(np.uint8)
    scores = score(confusion(prediction, label, 4), NAMES, 1)
    given = torch.from_numpy(prediction).long(), torch.from_numpy(label).long()
    options = {"num_classes": 4, "ignore_index": IGNORE}
    for average, value in (
        ("macro", scores.mean_iou),
        ("micro", scores.micro_iou),
        ("weighted", scores.frequency_weighted_iou),
    ):
        assert value == pytest.approx(
            float(classification.multiclass_jaccard_index(*given, average=average, **options)),
            abs=1e-6,
        )
    assert scores.pixel_accuracy == pytest.approx(
        float(classification.multiclass_accuracy(*given, average="micro", **options)), abs=1e-6
    )
    f1 = classification.multiclass_f1_score(*given, average="none", **options)
    assert [entry.dice for entry in scores.classes] == pytest.approx(f1.tolist(), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_equals_cityscapes_own_scripts(seed: int) -> None:
    scripts = library("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    labels = sorted(
        (entry for entry in scripts.id2label.values() if not entry.ignoreInEval),
        key=lambda entry: entry.trainId,
    )
    assert [entry.name for entry in labels] == list(CITYSCAPES.names)
    rng = np.random.default_rng(seed)
    label = rng.choice([*range(15), IGNORE], (60, 80)).astype(
        np.uint8
    )  # the last four do not occur
    prediction = rng.integers(0, 17, (60, 80)).astype(np.uint8)
    scores = score(confusion(prediction, label, 19), CITYSCAPES.names, 1)
    ids = [entry.id for entry in labels]
    theirs = np.zeros((34, 34), np.ulonglong)
    theirs[np.ix_(ids, ids)] = confusion(prediction, label, 19)
    arguments = SimpleNamespace(evalLabels=ids)
    ious = [scripts.getIouScoreForLabel(k, theirs, arguments) for k in ids]
    assert [entry.iou for entry in scores.classes][:15] == pytest.approx(ious[:15])
    # A class that is predicted but never true counts as 0 in theirs. Here it is absent, named and
    # left out of the mean.
    assert scores.mean_iou == pytest.approx(np.mean(ious[:15]))
    assert ious[15] == 0
    assert "train" in scores.absent


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        (
            np.zeros((2, 3), np.uint8),
            np.zeros((4, 6), np.uint8),
            r"of shape \(2, 3\) cannot be scored against a label of shape \(4, 6\); enlarge",
        ),
        (
            np.full((2, 3), 3, np.uint8),
            np.zeros((2, 3), np.uint8),
            r"the prediction has the id 3, but there are 3 classes \(0-2\); check",
        ),
        (
            np.zeros((2, 3), np.uint8),
            np.full((2, 3), 7, np.uint8),
            r"the label has the id 7, but there are 3 classes",
        ),
        (
            np.full((2, 3), 2, np.uint8),
            np.full((2, 3), 254, np.uint8),
            r"the label has the id 254, but there are 3 classes",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused_not_miscounted(
    prediction: np.ndarray, label: np.ndarray, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        confusion(prediction, label, 3)


def test_all_ignored_has_no_scores() -> None:
    scores = score(
        confusion(np.ones((3, 3), np.uint8), np.full((3, 3), IGNORE, np.uint8), 4), NAMES, 1
    )
    values = (
        scores.mean_iou,
        scores.pixel_accuracy,
        scores.mean_dice,
        scores.frequency_weighted_iou,
        scores.micro_iou,
    )
    assert all(math.isnan(value) for value in values)
    assert scores.absent == NAMES
    assert scores.as_dict()["micro_iou"] is None


def test_a_single_class_is_perfect_and_alone_in_the_mean() -> None:
    scores = score(
        confusion(np.zeros((3, 3), np.uint8), np.zeros((3, 3), np.uint8), 1), ("all",), 1
    )
    assert (scores.mean_iou, scores.pixel_accuracy, scores.micro_iou, scores.absent) == (
        1,
        1,
        1,
        (),
    )


def test_a_class_that_is_never_predicted_has_no_precision_and_counts_as_0() -> None:
    entry = score(np.array([[0, 5], [0, 5]]), ("a", "b"), 1).classes[0]
    assert (entry.iou, entry.dice, entry.precision, entry.recall) == (0, 0, 0, 0)


def test_scores_of_many_tallies_at_once_are_those_of_each() -> None:
    rng = np.random.default_rng(5)
    matrices = rng.integers(0, 9, (6, 4, 4))
    matrices[0, 2] = 0
    tallies = np.stack([tally(counts) for counts in matrices])
    each = [score(counts, NAMES, 1) for counts in matrices]
    np.testing.assert_allclose(mean_iou(tallies), [scores.mean_iou for scores in each])
    np.testing.assert_allclose(pixel_accuracy(tallies), [scores.pixel_accuracy for scores in each])
    np.testing.assert_allclose(
        class_ious(tallies), [[entry.iou for entry in scores.classes] for scores in each]
    )
    np.testing.assert_equal(mean_present(np.array([[1, np.nan, 2], [np.nan] * 3])), [1.5, np.nan])


def test_255_classes_do_not_overflow() -> None:
    label = np.full((300, 300), 254, np.uint8)
    counts = confusion(label, label, 255)
    assert counts[254, 254] == 90_000
    assert counts.sum() == 90_000


def test_grouping_of_images_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    label, prediction = rng.integers(0, 4, (2, 20, 20)).astype(np.uint8)
    whole = confusion(prediction, label, 4)
    parts = sum(
        confusion(p, t, 4) for p, t in zip(np.split(prediction, 4), np.split(label, 4), strict=True)
    )
    assert (whole == parts).all()


def test_absent_class_is_left_out_and_json_has_no_nan() -> None:
    content = score(np.array([[8, 0, 2], [0, 0, 0], [0, 0, 0]]), ("a", "b", "c"), 1).as_dict()
    assert content["absent"] == ["b", "c"]
    assert content["mean_iou"] == 0.8
    assert content["classes"][1]["iou"] is None
