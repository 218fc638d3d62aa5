"""Compare objects that a model keeps apart with connected regions of a plain model.

    python benchmarks/objects.py [NAME=FOLDER ...] [--steps 300] [--seeds 0 1 2] [--set KEY=VALUE]
        [--border-weights]

Each data set numbers its objects; every fifth image is left out to judge on. Both models see the
same crops for the same number of steps, so a busy machine gives the same results, only later.
``made`` needs no folder: touching discs, ellipses and grains of known number. Each run becomes a
row of ``results/objects.json`` as soon as it ends; a stored row is not computed again. Scores are
AP at an IoU of 0.5, the mean absolute error of the count per image, predictions that join several
true objects, and the IoU of the foreground.

``--border-weights`` trains a third kind of model, as the U-Net paper does: a line of background two
pixels wide keeps objects apart that touch, and background between near objects has up to ten times
the weight. ``--picture FILE`` draws the first made image of the last model instead of scoring.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from record import RESULTS, record
from scipy import ndimage

from useg.config import Settings, parse_assignments
from useg.data import cache
from useg.data.cache import pack_target
from useg.data.dataset import Dataset
from useg.data.layouts import find_dataset
from useg.inference.predictor import Predictor, load
from useg.machine import describe_machine
from useg.objects import separation, table
from useg.objects.separation import ObjectIds
from useg.reporting.evaluate import Extras, evaluate_dataset
from useg.scoring.losses import Loss
from useg.training import trainer
from useg.training.loop import fit
from useg.visualization import side_by_side

MADE, BORDERS = "made", "border weights"
LEFT_OUT = 5
NUM_MADE, MADE_SIDE = 40, 128

# The weight between two objects that touch, and how many pixels apart it falls (the paper's w0 and
# sigma). A byte holds so many steps of a weight; LINE marks the background between touching ones.
BORDER_WEIGHT, BORDER_SIGMA = 10.0, 5.0
STEPS, LINE = 25, 255


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


def weigh_borders(objects: ObjectIds) -> NDArray[np.uint8]:
    """Return the weight of each pixel between objects, in steps, or ``LINE``: ``(H, W)``."""
    nearest = np.full((2, *objects.shape), np.inf)
    for number in np.unique(objects[objects > 0]):
        distance = ndimage.distance_transform_edt(objects != number)
        nearest = np.sort(np.stack([*nearest, distance]), 0)[:2]
    sums = nearest.sum(0)
    weight = BORDER_WEIGHT * np.exp(-(sums**2) / (2 * BORDER_SIGMA**2)) * (objects == 0)
    steps = np.rint(STEPS * weight).astype(np.uint8)
    # In an object, the nearest is itself: the second is at 1 where it touches another one.
    steps[(objects > 0) & (nearest[1] <= 1)] = LINE
    return steps


def draw_lines(label: NDArray[Any], steps: NDArray[np.uint8]) -> NDArray[np.uint16]:
    return pack_target(np.where(steps == LINE, 0, label).astype(np.uint8), steps)


def with_border_weights(loss: Loss, num_classes: int) -> Loss:
    """Add the weighted cross-entropy of the pixels between objects to the loss of the classes."""

    def total(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        of_classes, label = logits[:, :num_classes].float(), target & 0xFF
        weight = (target >> 8).clamp(max=STEPS * BORDER_WEIGHT).float() / STEPS
        each = torch.nn.functional.cross_entropy(of_classes, label, reduction="none")
        unused = 0 * logits[:, num_classes:].float().sum()
        return loss(logits[:, :num_classes], label) + (weight * each).mean() + unused

    return total


def find_connected(
    label: NDArray[np.uint8], depth: NDArray[np.float32], classes: Any
) -> separation.Levels:
    """Find levels without valleys: objects are connected regions."""
    return separation.find_levels(label, np.full_like(depth, 100), classes)


@contextmanager
def border_weights() -> Iterator[None]:
    """Let models learn border weights in the place of the depth."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, USEG_CACHE=folder))
        for module, name, own in (
            (cache, "measure_depth", weigh_borders),
            (cache, "pack_target", draw_lines),
            (trainer, "with_objects", with_border_weights),
            (table, "find_levels", find_connected),
        ):
            stack.enter_context(mock.patch.object(module, name, own))
        yield


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
    parser.add_argument("--border-weights", action="store_true")
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
                if given.picture:
                    plain, model = (train(dataset, settings, each) for each in (False, True))
                    draw(given.picture, model, plain, dataset)
                    continue
                for objects in [BORDERS] if given.border_weights else [False, True]:
                    key = {"data": name, "seed": seed, "objects": objects, "settings": changes}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    with border_weights() if objects == BORDERS else nullcontext():
                        found = score(train(dataset, settings, bool(objects)), dataset)
                    rows.append({**key, **found})
                    record("objects", {"machine": describe_machine(), "rows": rows})
                    print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
