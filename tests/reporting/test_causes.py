"""Planted causes are found in nearly every seed, and where nothing is wrong nothing is reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_causes import (
    CAUSES,
    HEIGHT,
    WIDTH,
    AnswerPredictor,
    SceneFiles,
    answer_at_size,
    answer_well,
    cause_of_kind,
    causes_of,
    paint_blobs,
    plant,
    usual_confidence,
)
from PIL import Image

from useg.classes import CARLA, IGNORE
from useg.images.image_files import Sample
from useg.models.geometry import WorkingSize
from useg.reporting.causes import MAX_CAUSES_PER_CLASS, find_causes, find_weak_classes
from useg.reporting.error_analysis import ClassErrors, PredictedImage, measure_class_errors
from useg.reporting.evaluate import Extras, evaluate_dataset

SEEDS = list(range(10))
# These are second forms of a kind of cause, so fewer seeds are enough.
FEW_SEEDS = SEEDS[:5]


@pytest.mark.parametrize("name", CAUSES)
def test_planted_cause_is_found(name: str, scenes: list[SceneFiles], tmp_path: Path) -> None:
    planted = CAUSES[name]
    second_form = name in ("scattered labels", "shifted masks", "class share")
    seeds = FEW_SEEDS if second_form else SEEDS
    num_found = 0
    for seed in seeds:
        causes = causes_of(*plant(tmp_path / str(seed), scenes, seed, **planted.plan))
        num_found += (planted.kind, planted.class_name) in {
            (cause.kind, cause.class_name) for cause in causes
        }
        class_names = [cause.class_name for cause in causes]
        assert all(class_names.count(name) <= MAX_CAUSES_PER_CLASS for name in class_names)
    assert num_found >= 0.9 * len(seeds)


def test_good_model_has_no_causes(scenes: list[SceneFiles], tmp_path: Path) -> None:
    for seed in SEEDS:
        assert causes_of(*plant(tmp_path / str(seed), scenes, seed, answer_well)) == ()


def test_without_weak_classes_nothing_is_predicted_or_read(
    scenes: list[SceneFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, predictor = plant(tmp_path / "a", scenes, 0, answer_well)
    evaluation = evaluate_dataset(predictor, dataset)
    monkeypatch.setattr(AnswerPredictor, "logits", None)
    monkeypatch.setattr("useg.reporting.error_analysis.read_sample", None)
    assert find_causes(evaluation, dataset, predictor) == ()


def test_only_weak_classes_have_causes_and_the_lowest_iou_comes_first(
    scenes: list[SceneFiles], tmp_path: Path
) -> None:
    dataset, predictor = plant(
        tmp_path / "a", scenes, 0, answer_at_size((32, 24)), working=WorkingSize((32, 24))
    )
    evaluation = evaluate_dataset(predictor, dataset)
    weak = find_weak_classes(evaluation)
    ious = [evaluation.scores.classes[k].iou for k in weak]
    other_ious = [
        entry.iou for entry in evaluation.scores.classes if entry.id not in weak and entry.pixels
    ]
    assert ious == sorted(ious)
    assert max(ious) < 0.6 <= min(other_ious)
    causes = find_causes(evaluation, dataset, predictor)
    named = [cause.class_name for cause in causes]
    assert list(dict.fromkeys(named)) == [CARLA.names[k] for k in weak if CARLA.names[k] in named]
    assert find_causes(evaluation, dataset, predictor) == causes


@pytest.mark.parametrize("split", ["train", "all"])
def test_training_images_are_not_compared_with_themselves(
    split: str, scenes: list[SceneFiles], tmp_path: Path
) -> None:
    dataset, predictor = plant(tmp_path / "a", scenes, 0, **CAUSES["few examples"].plan)
    kinds = {cause.kind for cause in causes_of(dataset, predictor, split)}
    assert not {"few examples", "split shift", "not carried over"} & kinds


def test_confusion_is_found_without_training_images(
    scenes: list[SceneFiles], tmp_path: Path
) -> None:
    planted = CAUSES["regions"]
    dataset, predictor = plant(tmp_path / "a", scenes, 0, **planted.plan)
    dataset = replace(dataset, pairs=dataset.of("val"))
    cause = cause_of_kind(causes_of(dataset, predictor), planted.kind)
    assert cause.class_name == "Vegetation"


def test_one_image_is_enough(scenes: list[SceneFiles], tmp_path: Path) -> None:
    dataset, predictor = plant(tmp_path / "b", scenes, 0, answer_well)
    dataset = replace(dataset, pairs=(replace(dataset.pairs[0], split="val"),))
    assert len(causes_of(dataset, predictor)) < 5


@pytest.mark.parametrize("kind", ["not carried over", "learnt too little"])
def test_overfitting_and_underfitting_come_first(
    kind: str, scenes: list[SceneFiles], tmp_path: Path
) -> None:
    def answer(sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        prediction, _ = answer_well(sample, rng)
        if kind == "learnt too little" or sample.image.tobytes() not in trained:
            paint_blobs(prediction, rng, 40, (10, 25))
        return prediction, usual_confidence(prediction, sample.label, rng)

    dataset, predictor = plant(tmp_path / "a", scenes, 0, answer)
    trained = {np.asarray(Image.open(pair.image)).tobytes() for pair in dataset.of("train")}
    assert causes_of(dataset, predictor)[0].kind == kind


def test_a_model_that_has_learned_nothing_has_no_causes_of_single_classes(
    scenes: list[SceneFiles], tmp_path: Path
) -> None:
    def answer(sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        prediction = rng.integers(0, len(CARLA), sample.label.shape, np.uint8)
        return prediction, usual_confidence(prediction, sample.label, rng)

    causes = causes_of(*plant(tmp_path / "a", scenes, 0, answer))
    assert [cause.kind for cause in causes] == ["learnt too little"]


def test_pixels_under_the_ignore_mask_are_not_measured(
    scenes: list[SceneFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, predictor = plant(tmp_path / "a", scenes, 0, **CAUSES["regions"].plan)
    ignored = np.zeros((HEIGHT, WIDTH), np.uint8)
    ignored[:, : WIDTH // 2] = 1
    Image.fromarray(ignored).save(tmp_path / "ignored.png")
    extras = Extras(ignore_mask=tmp_path / "ignored.png")
    labels = []

    def record(image: PredictedImage, class_id: int, other_id: int) -> ClassErrors:
        labels.append(image.label)
        return measure_class_errors(image, class_id, other_id)

    monkeypatch.setattr("useg.reporting.causes.measure_class_errors", record)
    find_causes(evaluate_dataset(predictor, dataset, extras=extras), dataset, predictor, extras)
    assert labels
    for label in labels:
        assert (label[:, : WIDTH // 2] == IGNORE).all()
        assert (label[:, WIDTH // 2 :] != IGNORE).all()
