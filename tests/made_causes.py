"""Data sets and models with one planted cause of low scores, and some with none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from made_inference import make_model, make_predictor
from PIL import Image

from useg.classes import CARLA
from useg.data.dataset import Dataset, Pair
from useg.images.image_files import Sample, resize_image
from useg.inference.predictor import Predictor
from useg.inference.runtimes import Runtime
from useg.models.geometry import WorkingSize
from useg.reporting.causes import find_causes
from useg.reporting.error_analysis import dilate_mask
from useg.reporting.evaluate import evaluate_dataset
from useg.reporting.evaluation_result import Cause
from useg.scenes.generate import make_scene
from useg.scoring.metrics import components

NUM_TRAIN, NUM_VAL = 24, 12
WIDTH, HEIGHT = 128, 96
NATIVE_SIZE = WorkingSize((WIDTH, HEIGHT))
BUILDING, POLE, LINE, ROAD, PAVEMENT, TREE, VEHICLE = 1, 5, 6, 7, 8, 9, 10

# A true sample comes in, the prediction of a model and its confidence go out.
Answer = Callable[[Sample, np.random.Generator], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class SceneFiles:
    """A made scene and its two files."""

    sample: Sample
    pair: Pair


@dataclass(frozen=True)
class PlantedCause:
    """The cause that must be found, and the arguments of :func:`plant`; no class means all."""

    kind: str
    class_id: int | None
    plan: dict[str, Any]

    @property
    def class_name(self) -> str:
        return "" if self.class_id is None else CARLA.names[self.class_id]


def write_scene_files(folder: Path) -> list[SceneFiles]:
    """Write some more scenes than a data set takes."""
    made = []
    for k in range(NUM_TRAIN + NUM_VAL + 10):
        sample = make_scene(k, (WIDTH, HEIGHT))
        pair = Pair(folder / f"{k}.png", folder / f"{k}_mask.png")
        Image.fromarray(sample.image).save(pair.image)
        Image.fromarray(sample.label).save(pair.mask)
        made.append(SceneFiles(sample, pair))
    return made


class AnswerPredictor(Predictor):
    """A predictor without a network: ``answer`` predicts from the true sample of each image."""

    def __init__(self, answer: Answer, working: WorkingSize) -> None:
        runtime = make_predictor(make_model()).runtime
        description = replace(runtime.description, classes=CARLA, working=working)
        super().__init__(Runtime(runtime.run, description, "stand-in", Path("memory")))
        self.answer = answer
        self.samples: dict[bytes, tuple[Sample, int]] = {}

    def logits(self, image: Any, tile: int | None = None) -> np.ndarray:
        sample, seed = self.samples[image.tobytes()]
        prediction, confidence = self.answer(sample, np.random.default_rng(seed))
        logits = np.zeros((len(CARLA), *prediction.shape), np.float32)
        values = np.log(confidence * (len(CARLA) - 1) / (1 - confidence))
        np.put_along_axis(logits, prediction[None].astype(np.intp), values[None], 0)
        return logits


def answer_well(sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Predict as a good network: a few blobs and border pixels are wrong and less confident."""
    prediction = sample.label.copy()
    wrong = border_pixels(prediction) & (rng.random(prediction.shape) < 0.12)
    prediction[wrong] = np.roll(sample.label, 1, axis=1)[wrong]
    paint_blobs(prediction, rng, 3, (3, 7))
    return prediction, usual_confidence(prediction, sample.label, rng)


def usual_confidence(
    prediction: np.ndarray, true: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return a high confidence where the prediction is correct, and a lower one elsewhere."""
    noise = rng.uniform(-0.05, 0.05, prediction.shape)
    return (np.where(prediction == true, 0.93, 0.6) + noise).astype(np.float32)


def border_pixels(label: np.ndarray) -> np.ndarray:
    border = np.zeros(label.shape, bool)
    border[:-1] |= label[1:] != label[:-1]
    border[:, :-1] |= label[:, 1:] != label[:, :-1]
    return border


def paint_blobs(
    label: np.ndarray,
    rng: np.random.Generator,
    number: int,
    sides: tuple[int, int],
    class_id: int | None = None,
) -> None:
    """Paint rectangles of one class, or of random classes, into a label map."""
    for _ in range(number):
        high, wide = rng.integers(*sides, 2)
        top, left = rng.integers(0, HEIGHT - high), rng.integers(0, WIDTH - wide)
        value = rng.integers(len(CARLA)) if class_id is None else class_id
        label[top : top + high, left : left + wide] = value


def mistake_regions(class_id: int, predicted_id: int, probability: float) -> Answer:
    """Predict another class for whole regions of a class."""

    def answer(sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        prediction, _ = answer_well(sample, rng)
        numbers = components(sample.label == class_id)
        lost = rng.random(numbers.max() + 1) < probability
        prediction[lost[numbers] & (numbers > 0)] = predicted_id
        return prediction, usual_confidence(prediction, sample.label, rng)

    return answer


def widen_class(class_id: int, over_id: int) -> Answer:
    """Predict a class two pixels too wide, over another class."""

    def answer(sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        prediction, _ = answer_well(sample, rng)
        wide = dilate_mask(sample.label == class_id, 2) & (sample.label == over_id)
        prediction[wide] = class_id
        return prediction, usual_confidence(prediction, sample.label, rng)

    return answer


def answer_at_size(size: tuple[int, int]) -> Answer:
    """Predict as well as possible at a small size: the class that covers most of each pixel."""

    def answer(sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        masks = [(sample.label == k).astype(np.float32) for k in range(len(CARLA))]
        enlarged = resize_image(resize_image(np.stack(masks, axis=-1), size), (WIDTH, HEIGHT))
        prediction = enlarged.argmax(2).astype(np.uint8)
        return prediction, usual_confidence(prediction, sample.label, rng)

    return answer


def fail_in_the_dark(sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    prediction, _ = answer_well(sample, rng)
    if sample.image.mean() < 60:
        paint_blobs(prediction, rng, 50, (10, 25))
    return prediction, usual_confidence(prediction, sample.label, rng)


def plant(
    folder: Path,
    scenes: list[SceneFiles],
    seed: int,
    answer: Answer,
    *,
    change_train: Callable[[Sample, int], Sample] = lambda sample, k: sample,
    change_val: Callable[[Sample], Sample] = lambda sample: sample,
    change_label: Callable[[np.ndarray, np.random.Generator], np.ndarray] = lambda label, rng: (
        label
    ),
    working: WorkingSize = NATIVE_SIZE,
) -> tuple[Dataset, AnswerPredictor]:
    """Make a data set of scenes and its model.

    Args:
        folder: for the changed files.
        scenes: the scenes to choose from.
        seed: chooses the scenes and their splits.
        answer: how the model predicts.
        change_train: changes training samples, given their number.
        change_val: changes validation samples.
        change_label: changes validation masks, but not what the model knows.
        working: working size of the model.
    """
    rng = np.random.default_rng(seed)
    predictor, pairs = AnswerPredictor(answer, working), []
    folder.mkdir()
    for position, k in enumerate(rng.permutation(len(scenes))[: NUM_TRAIN + NUM_VAL]):
        scene, is_train = scenes[k], position < NUM_TRAIN
        sample = change_train(scene.sample, position) if is_train else change_val(scene.sample)
        predictor.samples[sample.image.tobytes()] = sample, 1000 * seed + position
        label = sample.label if is_train else change_label(sample.label, rng)
        image, mask = scene.pair.image, scene.pair.mask
        if sample.image is not scene.sample.image:
            image = folder / f"{position}.png"
            Image.fromarray(sample.image).save(image, compress_level=0)
        if label is not scene.sample.label:
            mask = folder / f"{position}_mask.png"
            Image.fromarray(label).save(mask, compress_level=0)
        pairs.append(Pair(image, mask, "train" if is_train else "val"))
    return Dataset(folder, "folders", tuple(pairs), CARLA, "random"), predictor


def relabel(
    class_id: int, instead: int, num_kept: int = 0, columns: int = 0
) -> Callable[[Sample, int], Sample]:
    """Label a class as another, except in the first samples, or in the first columns of all."""

    def change_train(sample: Sample, k: int) -> Sample:
        if k < num_kept:
            return sample
        gone = (sample.label == class_id) & (np.arange(WIDTH) >= columns)
        return replace(sample, label=np.where(gone, np.uint8(instead), sample.label))

    return change_train


def darken(sample: Sample) -> Sample:
    return replace(sample, image=(sample.image * 0.35).astype(np.uint8))


def scatter_trees(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    label = label.copy()
    paint_blobs(label, rng, 30, (7, 13), TREE)
    return label


def forget_vehicles(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    numbers = components(label == VEHICLE)
    gone = rng.random(numbers.max() + 1) < 0.75
    return np.where(gone[numbers] & (numbers > 0), np.uint8(ROAD), label)


def shift_mask(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.roll(label, (4, 5), axis=(0, 1))


CAUSES = {
    "few examples": PlantedCause(
        "few examples",
        VEHICLE,
        {
            "answer": mistake_regions(VEHICLE, ROAD, 0.7),
            "change_train": relabel(VEHICLE, ROAD, num_kept=2),
        },
    ),
    "border": PlantedCause("confused at borders", LINE, {"answer": widen_class(LINE, ROAD)}),
    "regions": PlantedCause(
        "confused in regions", TREE, {"answer": mistake_regions(TREE, BUILDING, 0.6)}
    ),
    "narrow": PlantedCause(
        "small things",
        POLE,
        {"answer": answer_at_size((32, 24)), "working": WorkingSize((32, 24))},
    ),
    "scattered labels": PlantedCause(
        "label noise", TREE, {"answer": answer_well, "change_label": scatter_trees}
    ),
    "missing labels": PlantedCause(
        "label noise", VEHICLE, {"answer": answer_well, "change_label": forget_vehicles}
    ),
    "shifted masks": PlantedCause(
        "label noise", None, {"answer": answer_well, "change_label": shift_mask}
    ),
    "dark": PlantedCause("split shift", None, {"answer": fail_in_the_dark, "change_val": darken}),
    "class share": PlantedCause(
        "split shift",
        PAVEMENT,
        {
            "answer": mistake_regions(PAVEMENT, ROAD, 0.8),
            "change_train": relabel(PAVEMENT, ROAD, columns=14),
        },
    ),
}


def causes_of(dataset: Dataset, predictor: Predictor, split: str = "val") -> tuple[Cause, ...]:
    """Evaluate a model, and find the causes of its weak classes."""
    return find_causes(evaluate_dataset(predictor, dataset, split), dataset, predictor)


def cause_of_kind(causes: tuple[Cause, ...], kind: str) -> Cause:
    return next(cause for cause in causes if cause.kind == kind)
