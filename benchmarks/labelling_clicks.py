"""Compare clicks on objects with strokes of a brush: how many, and how long, to 90 % IoU.

    python benchmarks/labelling_clicks.py FOLDER [--objects 20] [--pictures OUT]

FOLDER holds the data sets that ``SETS`` names. An object is a connected region of a true mask. The
first click is at its deepest point, further ones at the deepest point of the largest error, as is
usual for interactive segmentation. A stroke is a straight drag with a brush as wide as the object
allows, chosen among random ones so that it covers most of what is left. Both work in a view that
shows four times the object, so small ones are zoomed. No model helps: this is the first picture.

The seconds of a person are a model, not a measurement: ``ACTION_SECONDS`` to aim and press, the
drag at ``DRAG_SPEED``, and the processor time of the answer. ``--pictures`` draws the objects that
clicks did not reach.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from record import record
from scipy import ndimage

from useg.classes import IGNORE
from useg.data.dataset import read_label, read_pair_image
from useg.data.layouts import find_dataset
from useg.labelling.regions import find_superpixels, propose_region
from useg.machine import describe_machine
from useg.scoring.metrics import regions
from useg.visualization import to_picture

# Data set -> the classes that are no objects.
SETS = {
    "carla": ("None", "Other"),
    "bloodcells": ("background",),
    "magnetic_tiles": ("sound",),
    "nuclei_objects": ("background",),
}
TARGET = 0.9
MAX_ACTIONS = 20
# Objects are at least so large, and have at most this share of the picture.
MIN_PIXELS, MAX_SHARE = 400, 0.4
VIEW_FACTOR = 4.0
ACTION_SECONDS = 1.2
# Choosing another size of the brush.
SIZE_SECONDS = 0.5
# Share of the view's width per second.
DRAG_SPEED = 0.5
NUM_CANDIDATES = 150


@dataclass
class Object:
    """An object in its view: pixels ``(H, W, C)`` and ``(H, W)``; name for people."""

    name: str
    image: np.ndarray
    inside: np.ndarray


def find_objects(folder: Path, count: int) -> Iterator[Object]:
    """Yield objects of pictures that are spread over a data set, one of each picture."""
    rng = np.random.default_rng(0)
    dataset = find_dataset(folder, strict=False)
    background = [k for k, name in enumerate(dataset.classes.names) if name in SETS[folder.name]]
    found = 0
    for k in np.arange(len(dataset.pairs)) * 7919 % len(dataset.pairs):
        pair = dataset.pairs[k]
        if folder.name == "nuclei_objects":
            numbers = np.array(Image.open(pair.mask), np.int64)
            is_object = numbers > 0
        else:
            label = read_label(pair, dataset)
            numbers = regions(label) + 1
            is_object = ~np.isin(label, [*background, IGNORE])
        sizes = np.bincount(numbers[is_object], minlength=int(numbers.max()) + 1)
        fitting = np.flatnonzero((sizes >= MIN_PIXELS) & (sizes <= MAX_SHARE * numbers.size))
        if not len(fitting):
            continue
        inside = numbers == rng.choice(fitting)
        window = view_of(inside)
        image = to_picture(read_pair_image(pair))
        yield Object(f"{folder.name}/{pair.image.stem}", image[window], inside[window])
        found += 1
        if found == count:
            return


def view_of(inside: np.ndarray) -> tuple[slice, slice]:
    """Return the part of the picture that shows four times the object."""
    window = []
    for axis, length in enumerate(inside.shape):
        at = np.flatnonzero(inside.any(1 - axis))
        size = min(length, max(64, round((at[-1] - at[0] + 1) * VIEW_FACTOR**0.5)))
        start = min(max(0, (at[0] + at[-1] + 1 - size) // 2), length - size)
        window.append(slice(int(start), int(start + size)))
    return window[0], window[1]


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def deepest(inside: np.ndarray) -> tuple[int, int]:
    """Return column and row of the point farthest from the border."""
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return int(x), int(y)


def largest_part(wrong: np.ndarray) -> np.ndarray:
    numbers, count = ndimage.label(wrong)
    sizes = np.bincount(numbers.ravel(), minlength=count + 1)
    sizes[0] = 0
    return numbers == sizes.argmax()


def click(thing: Object) -> tuple[dict[str, Any], np.ndarray]:
    """Click until the proposal is good enough."""
    began = time.process_time()
    superpixels = find_superpixels(thing.image)
    prepared = time.process_time() - began
    inside, outside = [deepest(thing.inside)], []
    scores, answers = [], []
    best = np.zeros_like(thing.inside)
    while True:
        began = time.process_time()
        found = propose_region(superpixels, inside, outside)
        answers.append(time.process_time() - began)
        scores.append(iou(found, thing.inside))
        if scores[-1] == max(scores):
            best = found
        if scores[-1] >= TARGET or len(scores) == MAX_ACTIONS:
            break
        missing = largest_part(thing.inside & ~found)
        excess = largest_part(found & ~thing.inside)
        if missing.sum() >= excess.sum():
            inside.append(deepest(missing))
        else:
            outside.append(deepest(excess))
    count = len(scores)
    return {
        "reached": scores[-1] >= TARGET,
        "actions": count,
        "first_iou": round(scores[0], 3),
        "best_iou": round(max(scores), 3),
        "seconds": round(count * ACTION_SECONDS + prepared + sum(answers), 2),
        "prepare_ms": round(1000 * prepared),
        "answer_ms": round(1000 * max(answers)),
    }, best


def paint(thing: Object) -> tuple[dict[str, Any], np.ndarray]:
    """Paint strokes until they cover enough of the object."""
    rng = np.random.default_rng(0)
    depth = ndimage.distance_transform_edt(np.pad(thing.inside, 1))[1:-1, 1:-1]
    rows, columns = np.mgrid[: thing.inside.shape[0], : thing.inside.shape[1]]
    painted = np.zeros_like(thing.inside)
    seconds, radius, count = 0.0, 0.0, 0
    while iou(painted, thing.inside) < TARGET and count < MAX_ACTIONS:
        left = np.argwhere(thing.inside & ~painted)
        starts = left[rng.integers(len(left), size=NUM_CANDIDATES)]
        starts[0] = deepest(largest_part(thing.inside & ~painted))[::-1]
        ends = left[rng.integers(len(left), size=NUM_CANDIDATES)]
        best: tuple[float, Any] = (0.0, None)
        for start, end in zip(starts, ends, strict=True):
            path = np.linspace(start, end, 24).round().astype(int)
            fitting = depth[tuple(path.T)].min()
            if fitting < 1:
                path, fitting = path[:1], depth[tuple(start)]
            span = path[-1] - path[0]
            along = ((rows - path[0][0]) * span[0] + (columns - path[0][1]) * span[1]) / max(
                1, span @ span
            )
            near = np.clip(along, 0, 1)
            distance = np.hypot(
                rows - path[0][0] - near * span[0], columns - path[0][1] - near * span[1]
            )
            # A pixel more is what a person does not see, except on something thin.
            for width in (fitting + 1, fitting):
                disc = distance < width
                gain = float((disc & thing.inside & ~painted).sum() - (disc & ~thing.inside).sum())
                if gain > best[0]:
                    best = gain, (disc, width, float(np.hypot(*span)))
        disc, width, length = best[1]
        painted |= disc
        count += 1
        changed = abs(width - radius) > 0.2 * radius
        radius = width if changed else radius
        seconds += ACTION_SECONDS + changed * SIZE_SECONDS
        seconds += length / (DRAG_SPEED * thing.inside.shape[1])
    score = iou(painted, thing.inside)
    return {
        "reached": score >= TARGET,
        "actions": count,
        "best_iou": round(score, 3),
        "seconds": round(seconds, 2),
    }, painted


def measure_time() -> dict[str, float]:
    """Return the processor milliseconds of an answer at one megapixel."""
    coarse = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    image = np.array(Image.fromarray(coarse).resize((1250, 800)))
    times = []
    for _ in range(3):
        began = time.process_time()
        superpixels = find_superpixels(image)
        prepared = time.process_time()
        propose_region(superpixels, [(600, 400)])
        times.append((1000 * (prepared - began), 1000 * (time.process_time() - prepared)))
    prepare, answer = np.median(times, axis=0)
    return {"prepare_ms": round(float(prepare)), "answer_ms": round(float(answer))}


def summarize(rows: list[dict[str, Any]], kind: str) -> dict[str, float]:
    return {
        "reached": sum(row[kind]["reached"] for row in rows) / len(rows),
        "median_actions": float(np.median([row[kind]["actions"] for row in rows])),
        "mean_actions": float(np.mean([row[kind]["actions"] for row in rows])),
        "median_seconds": float(np.median([row[kind]["seconds"] for row in rows])),
        "mean_seconds": float(np.mean([row[kind]["seconds"] for row in rows])),
    }


def draw(thing: Object, parts: list[np.ndarray]) -> Image.Image:
    """Draw the picture, and it with the truth and the results."""
    shown = [thing.image]
    for part in parts:
        edge = part ^ ndimage.binary_erosion(part)
        picture = thing.image.copy()
        picture[edge] = [255, 0, 200]
        shown.append(picture)
    joined = Image.fromarray(np.hstack(shown))
    joined = joined.resize((1200, max(1, round(1200 * joined.height / joined.width))))
    ImageDraw.Draw(joined).text((4, 4), thing.name, fill=(255, 255, 0))
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--objects", type=int, default=20, help="of each data set")
    parser.add_argument("--only", nargs="*", default=list(SETS))
    parser.add_argument("--pictures", type=Path, help="folder for pictures of failures")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    ways: dict[str, Callable[[Object], tuple[dict[str, Any], np.ndarray]]]
    ways = {"clicks": click, "strokes": paint}
    for name in arguments.only:
        rows = []
        for k, thing in enumerate(find_objects(arguments.folder / name, arguments.objects)):
            done = {kind: way(thing) for kind, way in ways.items()}
            rows.append({"object": thing.name, **{kind: each[0] for kind, each in done.items()}})
            if arguments.pictures and done["clicks"][0]["actions"] > 3:
                parts = [thing.inside, done["clicks"][1], done["strokes"][1]]
                draw(thing, parts).save(arguments.pictures / f"{name}-{k}.png")
        results[name] = {kind: summarize(rows, kind) for kind in ways}
        print(name, results[name], flush=True)
        results[name]["objects"] = rows
    path = record(
        "labelling_clicks",
        {"machine": describe_machine(), "one_megapixel": measure_time(), "sets": results},
    )
    print(path)


if __name__ == "__main__":
    main()
