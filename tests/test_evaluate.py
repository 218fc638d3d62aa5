"""Scores of a data set are those of its pixels, at their native size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_predictor import make_model, make_predictor

from useg import ClassTable, UsageError
from useg.data.cache import WorkingSize
from useg.data.dataset import Dataset, Pair, read_sample
from useg.reporting.evaluate import evaluate


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    rng = np.random.default_rng(0)
    pairs = []
    for k in range(5):
        pairs.append(Pair(tmp_path / f"{k}.png", tmp_path / f"{k}_mask.png", "val" if k < 3 else "train"))
        Image.fromarray(rng.integers(0, 256, (20 + k, 30, 3), np.uint8)).save(pairs[-1].image)
        Image.fromarray(rng.integers(0, 3, (20 + k, 30), np.uint8)).save(pairs[-1].mask)
    return Dataset(tmp_path, "folders", tuple(pairs), ClassTable(("a", "b", "c", "d")))


def test_equals_counting_pixels_by_hand(dataset: Dataset) -> None:
    predictor = make_predictor(make_model(working=WorkingSize(scale=0.5)))
    seen = []
    evaluation = evaluate(predictor, dataset, "val", progress=lambda done, total: seen.append((done, total)))
    samples = [read_sample(pair, dataset) for pair in dataset.of("val")]
    truth = np.concatenate([sample.label.ravel() for sample in samples])
    predicted = np.concatenate([predictor(sample.image).ravel() for sample in samples])
    ious = [((truth == k) & (predicted == k)).sum() / ((truth == k) | (predicted == k)).sum() for k in range(3)]
    assert evaluation.scores.mean_iou == pytest.approx(np.mean(ious))
    assert evaluation.scores.pixel_accuracy == pytest.approx((truth == predicted).mean())
    assert evaluation.scores.absent == ("d",)
    assert evaluation.counts.sum() == truth.size  # native pixels, although the model works at half the size
    assert (evaluation.scores.num_images, len(evaluation.images), seen[-1]) == (3, 3, (3, 3))


def test_all_takes_every_pair(dataset: Dataset) -> None:
    assert evaluate(make_predictor(make_model()), dataset, "all").scores.num_images == 5


def test_an_empty_split_and_other_classes_are_refused(dataset: Dataset) -> None:
    predictor = make_predictor(make_model())
    with pytest.raises(UsageError, match=r"no pair in the split 'test'; it has train: 2, val: 3; choose with --split"):
        evaluate(predictor, dataset, "test")
    other = Dataset(dataset.root, dataset.layout, dataset.pairs, ClassTable(("x", "y", "z")))
    with pytest.raises(UsageError, match=r"the model knows 4 classes \(a, b, c, d\), but .* has 3 \(x, y, z\)"):
        evaluate(predictor, other)
