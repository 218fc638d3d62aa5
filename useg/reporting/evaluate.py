"""A data set through a predictor -> scores at native resolution, of the whole and of each image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from useg.data.dataset import Dataset, read_sample
from useg.errors import UsageError
from useg.scoring.metrics import Confusion, Scores, confusion, score

if TYPE_CHECKING:  # a page of a survey needs no torch
    from useg.inference.predictor import Predictor


@dataclass(frozen=True)
class ImageScore:
    """How one image did: ``mean_iou`` and ``pixel_accuracy`` are fractions over its own classes."""

    image: Path
    mask: Path
    mean_iou: float
    pixel_accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on one split of a data set; ``counts`` is the summed confusion matrix ``(K, K)``, rows = truth."""

    scores: Scores
    images: tuple[ImageScore, ...]
    counts: Confusion
    model: str
    dataset: str
    split: str


def evaluate(
    predictor: Predictor, dataset: Dataset, split: str = "val", *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Evaluation:
    """Score a model on one split of a data set, each image at its label's native size.

    Args:
        predictor: the model.
        dataset: pairs with their splits assigned.
        split: ``"train"``, ``"val"``, ``"test"``, or ``"all"`` for every pair.
        progress: called with (images done, images in all).

    Raises:
        UsageError: no pair in that split, an unreadable file, or classes that are not the model's.
    """
    pairs = [pair for pair in dataset.pairs if split in ("all", pair.split)]
    if not pairs:
        there = ", ".join(f"{name}: {count}" for name, count in sorted(Counter(pair.split for pair in dataset.pairs).items()))
        raise UsageError(f"{dataset.root} has no pair in the split {split!r}; it has {there}; choose with --split")
    if dataset.classes.names != predictor.classes.names:
        raise UsageError(
            f"the model knows {len(predictor.classes)} classes ({', '.join(predictor.classes.names)}), but {dataset.root} has "
            f"{len(dataset.classes)} ({', '.join(dataset.classes.names)}); give a classes.toml with the model's classes"
        )
    total = np.zeros((len(predictor.classes),) * 2, np.int64)
    images = []
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read_sample, pairs[0], dataset)
        for k, pair in enumerate(pairs):
            sample = ahead.result()
            if k + 1 < len(pairs):
                ahead = reader.submit(read_sample, pairs[k + 1], dataset)
            counts = confusion(predictor(sample.image), sample.label, len(predictor.classes))
            own = score(counts, predictor.classes.names, 1)
            images.append(ImageScore(pair.image, pair.mask, own.mean_iou, own.pixel_accuracy))
            total += counts
            progress(k + 1, len(pairs))
    scores = score(total, predictor.classes.names, len(pairs))
    return Evaluation(scores, tuple(images), total, str(predictor.runtime.source), str(dataset.root), split)
