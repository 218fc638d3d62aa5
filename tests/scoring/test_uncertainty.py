"""Calibration against other implementations and known temperatures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from oracles import oracle
from torch.nn import functional as F

from useg.classes import IGNORE, confidence, most_probable, softmax
from useg.scoring.uncertainty import (
    MAX_TEMPERATURE,
    NUM_BINS,
    calibration,
    fit_temperature,
    reliability,
    sample_pixels,
)


def drawn(
    temperature: float, count: int = 20_000, num_classes: int = 5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits (N, K), and true classes that are drawn from them at a known temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, num_classes)).astype(np.float32) * 4
    noise = rng.gumbel(size=logits.shape)
    return logits, (logits / temperature + noise).argmax(1).astype(np.uint8)


def as_image(logits: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    image = logits.T.reshape(logits.shape[1], 100, -1).copy()
    return image, most_probable(image), truth.reshape(100, -1)


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 4)),
        elements=st.integers(-3, 3),
    )
)
def test_most_probable_class_is_argmax_and_the_first_of_equals(logits: np.ndarray) -> None:
    assert (most_probable(logits) == logits.argmax(0)).all()
    assert (
        confidence(logits, 2.0) == pytest.approx(softmax(logits, 2.0).max(0), rel=1e-5)
    ) or logits.size == 0


def test_softmax_equals_torch_also_for_extreme_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 30, 20)).astype(np.float32) * 300
    for temperature in (0.1, 1.0, 3.0):
        expected = (torch.from_numpy(logits) / temperature).softmax(0).numpy()
        np.testing.assert_allclose(softmax(logits, temperature), expected, atol=2e-5)


def test_counts_equal_a_counting_loop() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 70, 9)).astype(np.float32) * 2
    label = rng.choice(np.uint8([0, 1, 2, IGNORE]), (70, 9))
    prediction = most_probable(logits)
    counts = np.zeros((3, NUM_BINS))
    for y, x in np.ndindex(label.shape):
        if label[y, x] != IGNORE:
            weights = np.exp(logits[:, y, x].astype(np.float64) / 1.5)
            sure = weights.max() / weights.sum()
            place = min(int(sure * NUM_BINS), NUM_BINS - 1)
            counts[:, place] += 1, sure, prediction[y, x] == label[y, x]
    np.testing.assert_allclose(reliability(logits, prediction, label, 1.5), counts, rtol=1e-5)


def test_error_equals_torchmetrics() -> None:
    multiclass_calibration_error = oracle(
        "torchmetrics.functional.classification"
    ).multiclass_calibration_error
    logits, truth = drawn(3.0)
    image, prediction, label = as_image(logits, truth)
    label[:5] = IGNORE
    found = calibration(reliability(image, prediction, label), 1.0)
    given = torch.from_numpy(image)[None].softmax(1), torch.from_numpy(label).long()[None]
    assert found.error == pytest.approx(
        float(multiclass_calibration_error(*given, 5, NUM_BINS, "l1", ignore_index=IGNORE)),
        abs=1e-5,
    )
    assert found.confidence == pytest.approx(float(given[0].max(1).values[:, 5:].mean()), abs=1e-5)
    assert sum(bin_.share for bin_ in found.curve) == pytest.approx(1)
    assert [bin_.confidence for bin_ in found.curve] == sorted(
        bin_.confidence for bin_ in found.curve
    )


def test_images_add_up_and_ignored_ones_add_nothing() -> None:
    image, prediction, label = as_image(*drawn(1.0))
    whole = reliability(image, prediction, label)
    parts = [
        reliability(image[:, rows], prediction[rows], label[rows])
        for rows in (np.s_[:37], np.s_[37:])
    ]
    np.testing.assert_allclose(parts[0] + parts[1], whole, rtol=1e-6)
    nothing = reliability(image, prediction, np.full_like(label, IGNORE))
    assert nothing.sum() == 0
    assert math.isnan(calibration(nothing, 1.0).error)
    assert calibration(nothing, 1.0).as_dict()["error"] is None


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_known_temperature_is_found_and_reduces_the_calibration_error(temperature: float) -> None:
    found = fit_temperature(*drawn(temperature))
    assert found == pytest.approx(temperature, rel=0.03)
    # Other pixels than those of the fit.
    others = as_image(*drawn(temperature, seed=1))
    before, after = (calibration(reliability(*others, t), t).error for t in (1.0, found))
    assert after < 0.015
    assert before > 5 * after or temperature == 1


def test_fitted_temperature_minimises_cross_entropy() -> None:
    logits, truth = drawn(1.7, 500, 3)
    found = fit_temperature(logits, truth)
    losses = {
        t: float(
            F.cross_entropy(torch.from_numpy(logits / t).double(), torch.from_numpy(truth).long())
        )
        for t in found * np.geomspace(0.5, 2, 201)
    }
    assert min(losses, key=losses.__getitem__) == pytest.approx(found, rel=0.01)


def test_temperatures_that_cannot_be_fitted_stay_in_bounds() -> None:
    logits, truth = drawn(1.0, 100)
    assert fit_temperature(logits[:0], truth[:0]) == 1
    assert fit_temperature(logits[:, :1], np.zeros_like(truth)) == 1
    always_right, always_wrong = (
        fit_temperature(logits, ids.astype(np.uint8))
        for ids in (logits.argmax(1), logits.argmin(1))
    )
    assert always_right == pytest.approx(1 / MAX_TEMPERATURE, rel=1e-3)
    assert always_wrong == pytest.approx(MAX_TEMPERATURE, rel=1e-3)
    assert fit_temperature(np.full((10, 3), 1e30, np.float32), np.zeros(10, np.uint8)) > 0


def test_sampled_pixels_are_never_ignored() -> None:
    rng = np.random.default_rng(0)
    label = rng.choice(np.uint8([0, 1, IGNORE]), (20, 30))
    logits = np.stack([np.arange(600).reshape(20, 30), label.astype(int)]).astype(np.float32)
    picked, truth = sample_pixels(logits, label, 50, seed=3)
    assert picked.shape == (50, 2)
    assert IGNORE not in truth
    assert (picked[:, 1] == truth).all()
    assert (label.ravel()[picked[:, 0].astype(int)] == truth).all()
    assert sample_pixels(logits, np.full_like(label, IGNORE), 50, 3)[1].size == 0
