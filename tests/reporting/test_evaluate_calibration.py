"""A calibrated run: its file knows the temperature and the looks of its training images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_inference import make_model, make_predictor, random_image
from PIL import Image

from useg.classes import ClassTable
from useg.data.dataset import Dataset, Pair
from useg.images.image_files import Sample
from useg.inference.predictor import Predictor
from useg.models import segmenter
from useg.models.geometry import WorkingSize
from useg.reporting.evaluate import (
    MAX_TEMPERATURE_IMAGES,
    calibrate,
    find_temperature,
)
from useg.scoring.uncertainty import FIT_PIXELS


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    pairs = tuple(
        Pair(tmp_path / f"{name}.png", tmp_path / f"{name}_mask.png", "val")
        for name in ("x", "y", "z")
    )
    for k, pair in enumerate(pairs):
        Image.fromarray(random_image(20 + k, 30)).save(pair.image)
        Image.fromarray(random_image(40 + k, 30, 1)[: 20 + k, :, 0] % 4).save(pair.mask)
    return Dataset(tmp_path, "folders", pairs, ClassTable(("a", "b", "c", "d")))


def test_temperature_changes_probabilities_and_no_label_map() -> None:
    model, image = make_model(), random_image(40, 30)
    cold = make_predictor(model)
    model.temperature = 3.0
    warm = make_predictor(model)
    assert (warm(image) == cold(image)).all()
    expected = torch.from_numpy(cold.logits(image) / 3).softmax(0).numpy()
    np.testing.assert_allclose(warm.probabilities(image), expected, atol=1e-6)
    assert warm.probabilities(image).max() < cold.probabilities(image).max()


def test_model_file_stores_the_temperature(tmp_path: Path) -> None:
    model = make_model(working=WorkingSize(scale=0.5))
    model.temperature = 1.625
    path = tmp_path / "model.safetensors"
    segmenter.save_model(model, path)
    assert segmenter.load_model(path).temperature == 1.625
    assert Predictor.load(path).runtime.description.temperature == 1.625


def test_a_run_is_calibrated_on_its_validation_images(tmp_path: Path, dataset: Dataset) -> None:
    segmenter.save_model(make_model(), tmp_path / "model.safetensors")
    before = Predictor.load(tmp_path)
    calibrate(tmp_path, dataset)
    after = Predictor.load(tmp_path)
    assert after.runtime.description.temperature == find_temperature(
        before, dataset, dataset.of("val")
    )
    assert after.runtime.description.temperature == find_temperature(
        after, dataset, dataset.of("val")
    ), "it does not build on an earlier one"
    assert after.runtime.description.temperature != 1
    image = random_image(30, 30)
    assert (after(image) == before(image)).all()


def test_a_run_knows_its_training_images_and_how_far_held_out_ones_are(
    tmp_path: Path, dataset: Dataset
) -> None:
    segmenter.save_model(make_model(), tmp_path / "model.safetensors")
    assert Predictor.load(tmp_path).training_distance(random_image(30, 30)) is None
    train = tuple(replace(pair, split="train") for pair in dataset.pairs[::2])
    dataset = replace(dataset, pairs=(*train, *dataset.pairs[1::2]))
    calibrate(tmp_path, dataset)
    distances = [
        Predictor.load(tmp_path).training_distance(pair.image) or 0 for pair in dataset.pairs
    ]
    assert max(distances) <= 1
    assert Predictor.load(tmp_path).training_distance(random_image(30, 30) // 8) > 1


def test_temperature_is_fitted_on_a_limited_even_selection_of_images(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Pair] = []
    blank = Sample(random_image(8, 8), np.zeros((8, 8), np.uint8))
    predictor = make_predictor(make_model())
    monkeypatch.setattr(
        "useg.reporting.evaluate.read_sample", lambda pair, data: seen.append(pair) or blank
    )
    pairs = [replace(dataset.pairs[0], page=k) for k in range(100)]
    assert find_temperature(predictor, dataset, pairs) > 0
    assert len(seen) == MAX_TEMPERATURE_IMAGES
    assert [pair.page for pair in seen[:3]] == [1, 3, 6]
    assert FIT_PIXELS % MAX_TEMPERATURE_IMAGES == 0
    assert find_temperature(predictor, dataset, ()) == 1
