"""Compare objects that a model keeps apart with connected regions of a plain model.

    python benchmarks/objects.py [NAME=FOLDER ...] [--steps 300] [--seeds 0 1 2] [--set KEY=VALUE]

Each data set numbers its objects; every fifth image is left out to judge on. Both models see the
same crops for the same number of steps, so a busy machine gives the same results, only later.
``made`` needs no folder: touching discs, ellipses and grains of known number. Each run becomes a
row of ``results/objects.json`` as soon as it ends; a stored row is not computed again. Scores are
AP at an IoU of 0.5, the mean absolute error of the count per image, predictions that join several
true objects, and the IoU of the foreground. ``--picture FILE`` draws the first made image of the
last model instead of scoring.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from record import RESULTS, record
from scipy import ndimage

from useg.config import Settings, parse_assignments
from useg.data.dataset import Dataset
from useg.data.layouts import find_dataset
from useg.inference.predictor import Predictor, load
from useg.machine import describe_machine
from useg.pictures import side_by_side
from useg.reporting.evaluate import Extras, evaluate_dataset
from useg.training.loop import fit

MADE = "made"
LEFT_OUT = 5
NUM_MADE, MADE_SIDE = 40, 128


def make_objects(seed: int, side: int = MADE_SIDE) -> NDArray[np.uint16]:
    """Number discs, ellipses and grains that touch, and never cover each other: ``(H, W)``."""
    rng = np.random.default_rng(seed)
    y, x = np.indices((side, side))
    kind, radius = seed % 3, rng.uniform(6, 11)
    # How far outside of each shape a pixel is: where two overlap, the nearer one has it.
    outside = np.full((side, side), np.inf)
    objects = np.zeros((side, side), np.uint16)
    for number in range(1, int(rng.integers(12, 30))):
        turn, stretch = rng.uniform(0, np.pi), 1.0 if kind == 0 else rng.uniform(1.2, 1.9)
        across, down = x - rng.uniform(0, side), y - rng.uniform(0, side)
        along = across * np.cos(turn) + down * np.sin(turn)
        beside = down * np.cos(turn) - across * np.sin(turn)
        distance = np.hypot(along / stretch, beside * stretch) / radius
        if kind == 2:
            # Grains are pointed.
            distance += 0.25 * np.abs(along) / (radius * stretch)
        nearer = (distance < 1) & (distance < outside)
        outside[nearer], objects[nearer] = distance[nearer], number
    return _keep_largest_parts(objects)


def _keep_largest_parts(objects: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Remove what others have cut off, and objects of which hardly anything is left."""
    kept, number = np.zeros_like(objects), 0
    for value in np.unique(objects)[1:]:
        parts, _ = ndimage.label(objects == value)
        sizes = np.bincount(parts.ravel())[1:]
        if sizes.max() >= 40:
            number += 1
            kept[parts == sizes.argmax() + 1] = number
    return kept


def write_made(folder: Path) -> Path:
    """Write images and masks of made objects, with uneven light and noise."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for k in range(NUM_MADE):
        rng, objects = np.random.default_rng(k + 1000), make_objects(k)
        bright = np.append(0, rng.uniform(0.5, 1.0, int(objects.max())))[objects]
        light = ndimage.gaussian_filter(rng.random(objects.shape), 25)
        image = ndimage.gaussian_filter(bright, 1.2) * (0.6 + 8 * np.abs(light - light.mean()))
        image = 30 + 170 * image + rng.normal(0, 8, objects.shape)
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(
            folder / "images" / f"{k:02}.png"
        )
        Image.fromarray(objects).save(folder / "masks" / f"{k:02}.png")
    return folder


def leave_out(dataset: Dataset) -> Dataset:
    """Leave every fifth image out of training, to judge on."""
    pairs = tuple(
        replace(pair, split="val" if k % LEFT_OUT == 2 else "train")
        for k, pair in enumerate(dataset.pairs)
    )
    return replace(dataset, pairs=pairs, splits_by="random")


def train(dataset: Dataset, settings: Settings, objects: bool) -> Predictor:
    """Train with or without objects; return the model of the last validation."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        fit(dataset, run, settings.with_({"model.objects": objects}))
        predictor = load(run)
    return predictor


def score(predictor: Predictor, dataset: Dataset) -> dict[str, float]:
    """Score the left-out images."""
    extras = Extras(objects=dataset.classes.names[1])
    evaluation = evaluate_dataset(predictor, dataset, "val", extras=extras)
    scores = evaluation.object_scores[""]
    return {
        "ap50": scores.ap50,
        "mean_ap": scores.mean_ap,
        "panoptic_quality": scores.panoptic_quality,
        "count_error": scores.count_error,
        "count_bias": scores.count_bias,
        "merged": scores.merged,
        "split": scores.split,
        "num_true": scores.num_true,
        "foreground_iou": float(evaluation.scores.classes[1].iou),
    }


def paint(numbers: NDArray[Any]) -> NDArray[np.uint8]:
    """Give each object a colour of its own."""
    colors = np.random.default_rng(3).integers(70, 255, (int(numbers.max()) + 1, 3))
    colors[0] = 0
    return colors[numbers].astype(np.uint8)


def draw(path: Path, predictor: Predictor, plain: Predictor, dataset: Dataset) -> None:
    """Draw a left-out image, its true objects, the connected regions, and the objects."""
    pair = dataset.of("val")[1]
    image = np.asarray(Image.open(pair.image))
    true = np.asarray(Image.open(pair.mask)).astype(np.int64)
    parts = [np.repeat(image[..., None], 3, 2), paint(true)]
    parts += [paint(model.objects(image).numbers) for model in (plain, predictor)]
    large = [part.repeat(2, 0).repeat(2, 1) for part in parts]
    counts = [int(true.max()), *(len(model.objects(image)) for model in (plain, predictor))]
    names = ("true objects", "connected regions", "objects of the model")
    titles = ["image", *(f"{name}: {count}" for name, count in zip(names, counts, strict=True))]
    Image.fromarray(side_by_side(large, tuple(titles))).save(path)


def data_sets(named: list[str], folder: Path) -> Iterator[tuple[str, Dataset]]:
    for text in named:
        name, _, place = text.partition("=")
        root = Path(place) if place else write_made(folder / name)
        yield name, leave_out(find_dataset(root))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="*", default=[MADE])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    path = RESULTS / "objects.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    changes = {"train.steps": given.steps, "train.validate_every": 10**6}
    changes |= parse_assignments(given.changes)
    with tempfile.TemporaryDirectory() as folder:
        for name, dataset in data_sets(given.data, Path(folder)):
            for seed in given.seeds:
                settings = Settings().with_({**changes, "train.seed": seed})
                models = {}
                for objects in (False, True):
                    key = {"data": name, "seed": seed, "objects": objects, "settings": changes}
                    if not given.picture and any(key.items() <= row.items() for row in rows):
                        continue
                    models[objects] = train(dataset, settings, objects)
                    if not given.picture:
                        rows.append({**key, **score(models[objects], dataset)})
                        record("objects", {"machine": describe_machine(), "rows": rows})
                        print(rows[-1], flush=True)
                if given.picture:
                    draw(given.picture, models[True], models[False], dataset)


if __name__ == "__main__":
    main()
