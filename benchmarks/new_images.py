"""What helps a model on images of a new place, and how well cross-validation predicts its score.

    python benchmarks/new_images.py FOLDER [--folds carla ...] [--seeds 0 1 2] [--only remedies]

``remedies``: a model of the old place is scored on the new one (at most 16 images) and on held-out
images of the old one (at most 16): as it is, trained with the new images but without their masks,
adapted to them, and started from with ten labelled images (eight for training, two held out).
Beside it, a model is trained from scratch on these ten.

``cross-validation``: three folds by group and a final model are trained without the new place. What
the folds expect of a new group is compared with the score of the final model on the new place, and
with that of a model of plain training.

The folds are those of ``generalise.py``. A seed chooses the weights, the order of the images, and
the ten labelled ones. All runs have fixed steps, so a busy machine gives the same results, only
later. Each measurement becomes a row of ``results/new_images.json`` as soon as it ends; a stored
row is not measured again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from generalise import (
    FOLDS,
    Fold,
    count_steps,
    is_left_out,
    read_rows,
    reference_speed,
    split,
    store,
)
from record import RESULTS, commit
from unlabelled import link_images

from useg import api
from useg.config import Settings
from useg.cross_validation import train_folds
from useg.data.dataset import Dataset, pick_evenly, read_pair_image, read_sample
from useg.data.layouts import find_dataset
from useg.inference.adapt import choose_share, to_input
from useg.inference.predictor import Predictor
from useg.inference.runtimes import runtime_of_model
from useg.models.geometry import fit_bands
from useg.models.segmenter import Segmenter, load_model
from useg.scoring.metrics import confusion, score
from useg.training import plan as planning
from useg.training.loop import fit
from useg.training.warm_start import adopt_settings

NUM_SCORED = 16
LABELLED, HELD_OUT = 8, 2
# The steps of a model of the old place are those of so many minutes.
MINUTES = 0.5
NEW_STEPS = 50
FOLD_STEPS = 100
REMEDIES = ("carla", "camvid 0001TP", "cells d2")
CROSS_VALIDATED = ("camvid 0001TP", "vessels", "tiles")
NEVER = {"train.validate_every": 10**9}


def mean_iou(model: Segmenter, dataset: Dataset, part: str) -> float:
    """Return the mean IoU on at most ``NUM_SCORED`` images of a split."""
    predictor = Predictor(runtime_of_model(model, Path("model"), "torch"))
    size = len(model.classes)
    counts = np.zeros((size, size), np.int64)
    pairs = pick_evenly(dataset.of(part), NUM_SCORED)
    for pair in pairs:
        sample = read_sample(pair, dataset)
        counts += confusion(predictor(sample.image), sample.label, size)
    return score(counts, model.classes.names, len(pairs)).mean_iou


def adapt_to(model: Segmenter, dataset: Dataset) -> tuple[Segmenter, float]:
    """Return the model adapted to the test images, without their labels, and the share chosen."""
    images = []
    for pair in pick_evenly(dataset.of("test"), NUM_SCORED):
        image = fit_bands(read_pair_image(pair), model.channels, model.pixels, str(pair.image))
        images.append(to_input(model, model.working.prepare(image)))
    adapted, adaptation = choose_share(model, images)
    return adapted, adaptation.share


def places(folder: Path, fold: Fold, seed: int) -> tuple[Dataset, Dataset]:
    """Return the old place, and the new one with ten labelled images; all others are ``test``."""
    both, scored = split(folder, fold)
    new = [pair for pair in both.pairs if scored.get(pair.image, "home") != "home"]
    old = [pair for pair in both.pairs if pair not in new]
    order = np.random.default_rng(seed).permutation(len(new))
    parts = ["train"] * LABELLED + ["val"] * HELD_OUT + ["test"] * len(new)
    labelled = [replace(new[k], split=part) for k, part in zip(order, parts, strict=False)]
    return replace(both, pairs=tuple(old)), replace(both, pairs=tuple(labelled))


def train(
    dataset: Dataset, out: Path, changes: dict[str, Any], start: Path | None = None
) -> Segmenter:
    """Train for the fixed steps in ``changes`` and return the last model."""
    given = {**changes, **NEVER}
    settings = Settings().with_(given)
    if start:
        settings, _ = adopt_settings(start, settings, given)
    with reference_speed():
        fit(dataset, out, settings)
    return load_model(out)


def steps_of(dataset: Dataset, seed: int) -> int:
    """Return the steps of a run of ``MINUTES``."""
    settings = Settings().with_({"train.minutes": MINUTES, "train.seed": seed})
    with reference_speed():
        return count_steps(planning.make_plan(settings, dataset).settings, MINUTES)


def measure_remedies(folder: Path, fold: Fold, seed: int) -> Iterator[dict[str, Any]]:
    """Score the model of the old place, and what is made of it."""
    old, new = places(folder, fold, seed)
    steps = steps_of(old, seed)
    fixed = {"train.seed": seed, "train.steps": NEW_STEPS}

    def row(what: str, model: Segmenter, **more: Any) -> dict[str, Any]:
        scores = {"new": mean_iou(model, new, "test"), "old": mean_iou(model, old, "val")}
        return {"what": what, **scores, **more}

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        source = place / "old"
        base = {"train.seed": seed, "train.steps": steps}
        yield row("original model", train(old, source, base), steps=steps)
        images = link_images(place / "images", (pair.image for pair in new.pairs))
        recoloured = {**base, "data.unlabelled": str(images)}
        yield row("trained with the images", train(old, place / "with", recoloured), steps=steps)
        adapted, share = adapt_to(load_model(source), new)
        yield row("adapted to the images", adapted, share=share)
        yield row("started from it", train(new, place / "warm", fixed, source))
        frozen = {**fixed, "train.freeze": "encoder"}
        yield row("started, encoder frozen", train(new, place / "frozen", frozen, source))
        yield row("trained from scratch", train(new, place / "anew", fixed))


def link_old(folder: Path, fold: Fold, out: Path) -> Path:
    """Return a folder of links to the data set without the groups that are left out."""
    source = folder / fold.folder
    left_out = {
        path.absolute()
        for pair in find_dataset(source).pairs
        if is_left_out(pair, fold)
        for path in (pair.image, pair.mask)
    }
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.absolute() not in left_out:
            link = out / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
    return out


def measure_cross_validation(folder: Path, fold: Fold, seed: int) -> Iterator[dict[str, Any]]:
    """Compare the score that folds expect of a new group with that on the new place."""
    _, new = places(folder, fold, seed)
    new = replace(new, pairs=tuple(replace(pair, split="test") for pair in new.pairs))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        old = link_old(folder, fold, place / "data")
        settings = {"train.seed": seed, "train.steps": FOLD_STEPS}
        with reference_speed():
            expected = train_folds(
                old, place / "folds", 3, final=True, settings=settings, force=True
            )
            assert expected.near
            api.train(old, place / "plain", settings={**settings, **NEVER}, force=True)
        interval = expected.intervals and expected.intervals.mean_iou
        yield {
            "near": expected.near.mean_iou,
            "expected": expected.scores.mean_iou,
            "interval": [interval.low, interval.high] if interval else None,
            "groups": dict(expected.groups or {}),
            "final": mean_iou(load_model(place / "folds"), new, "test"),
            "plain": mean_iou(load_model(place / "plain"), new, "test"),
            "steps": FOLD_STEPS,
        }


MEASUREMENTS = {
    "remedies": (REMEDIES, measure_remedies),
    "cross-validation": (CROSS_VALIDATED, measure_cross_validation),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--folds", nargs="+", choices=FOLDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--out", type=Path, default=RESULTS / "new_images.json")
    given = parser.parse_args()
    for seed in given.seeds:
        for kind in given.only:
            names, measure = MEASUREMENTS[kind]
            for name in given.folds or names:
                wanted = {"measured": kind, "fold": name, "seed": seed}
                if any(wanted.items() <= row.items() for row in read_rows(given.out)):
                    continue
                rows = [
                    {**wanted, "commit": commit(), **row}
                    for row in measure(given.folder, FOLDS[name], seed)
                ]
                for row in rows:
                    store(given.out, row)
                    print(row, flush=True)


if __name__ == "__main__":
    main()
