"""Images that look unlike the training images are recognized, whatever size or type they have."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from useg.models.description import (
    MAX_EXAMPLE_NUMBERS,
    Statistics,
    TrainingImages,
    count_statistics,
    fit_training_images,
    measure_image,
)
from useg.models.geometry import WorkingSize
from useg.scenes.generate import make_scene

MEAN, STD = (110.0, 110.0, 110.0), (60.0, 60.0, 60.0)
SIZE = 128, 96


def scene(seed: int) -> NDArray[np.uint8]:
    return make_scene(seed, SIZE).image


def measure(image: NDArray[np.generic]) -> Statistics:
    return measure_image(image, MEAN, STD, WorkingSize(frame=SIZE))


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    held_out = [measure(scene(seed)) for seed in range(100, 140)]
    return fit_training_images([measure(scene(seed)) for seed in range(40)], held_out)


def share_beyond(images: TrainingImages, others: list[NDArray[np.uint8]]) -> float:
    return float(np.mean([images.distance(measure(image)) > 1 for image in others]))


def test_few_images_of_the_same_kind_are_unlike_the_training_images(
    images: TrainingImages,
) -> None:
    assert share_beyond(images, [scene(seed) for seed in range(100, 140)]) == 1 / 40
    assert share_beyond(images, [scene(seed) for seed in range(200, 240)]) <= 0.1
    assert share_beyond(images, [scene(seed) for seed in range(40)]) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image // 4,
        lambda image: 128 + image // 4,
        lambda image: image * np.array([1, 0.6, 0.3]),
        lambda image: np.repeat(image.mean(2, keepdims=True), 3, axis=2),
        lambda image: image + np.random.default_rng(0).normal(0, 40, image.shape),
        lambda image: 255 - image,
    ],
    ids=["dark", "foggy", "red", "grey", "noisy", "negative"],
)
def test_images_in_another_light_are_unlike_them(images: TrainingImages, change: object) -> None:
    assert callable(change)
    changed = [
        np.clip(change(scene(seed).astype(float)), 0, 255).astype(np.uint8)
        for seed in range(200, 220)
    ]
    assert share_beyond(images, changed) >= 0.9


def test_size_does_not_matter_where_images_are_resized(images: TrainingImages) -> None:
    for seed in range(200, 210):
        image = scene(seed)
        enlarged = image.repeat(3, axis=0).repeat(3, axis=1)
        assert images.distance(measure(enlarged)) < 1.5 * max(0.5, images.distance(measure(image)))


def test_stored_numbers_give_the_same_distances(images: TrainingImages) -> None:
    again = TrainingImages.from_dict(json.loads(json.dumps(images.as_dict())))
    for seed in range(200, 205):
        measured = measure(scene(seed))
        assert again.distance(measured) == pytest.approx(images.distance(measured), rel=1e-3)
    assert len(json.dumps(images.as_dict())) < 10_000


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 300, 3), (5, 2, 4), (700, 3, 2)])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_every_image_has_finite_numbers(shape: tuple[int, int, int], kind: str) -> None:
    bands = shape[2]
    image = np.full(shape, np.finfo("f4").max if kind == "float32" else 255).astype(kind)
    measured = measure_image(image, [0.0] * bands, [1e-3] * bands, WorkingSize())
    assert measured.shape == (count_statistics(bands),)
    assert np.isfinite(measured).all()


def test_images_that_are_all_alike_do_not_make_every_other_one_unlike() -> None:
    constant = measure(np.full((96, 128, 3), 100, np.uint8))
    images = fit_training_images([constant] * 5, [constant])
    assert images.distance(measure(np.full((96, 128, 3), 101, np.uint8))) < 1
    assert images.distance(measure(np.full((96, 128, 3), 200, np.uint8))) > 1


def test_many_bands_make_fewer_examples() -> None:
    numbers = list(np.random.default_rng(0).normal(size=(64, count_statistics(100))))
    images = fit_training_images(numbers, numbers)
    assert images.examples.size <= MAX_EXAMPLE_NUMBERS
    assert len(images.examples) == 19
