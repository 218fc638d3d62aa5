"""A data set through a predictor -> scores at native resolution with intervals, of the whole and of each image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from useg.classes import Label
from useg.data.dataset import Dataset, Pair, pair_name, read_sample
from useg.data.images import Sample
from useg.data.parallel import ahead
from useg.data.splits import looks_filmed, sequences
from useg.errors import UsageError
from useg.reporting.cause import Cause
from useg.reporting.counting import Asked, Counts, Extras, count, judged
from useg.scoring import boundaries, calibration, isbi, objects, places, regions
from useg.scoring import intervals as bootstrap
from useg.scoring.metrics import Confusion, Scores, Tally, mean_iou, pixel_accuracy, plain, score, tally

if TYPE_CHECKING:  # a page of a survey needs no torch
    from useg.inference.predictor import Predictor

Seen = Callable[[Sample, Label], None]

BLOCK = 10  # neighbouring images of a film or stack that are drawn together: the longest gap that a split leaves between its parts


@dataclass(frozen=True)
class ImageScore:
    """How one image did: ``mean_iou`` and ``pixel_accuracy`` are fractions over its own classes; ``tally`` has its counts ``(3, K)``."""

    pair: Pair
    mean_iou: float
    pixel_accuracy: float
    tally: Tally = field(default_factory=lambda: np.zeros((3, 0), np.int64))

    @property
    def name(self) -> str:
        """What to call it in a report."""
        return pair_name(self.pair)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on one split of a data set; ``counts`` is the summed confusion matrix ``(K, K)``, rows = truth.

    ``blocks`` says which images were taken as one when the intervals were drawn: a number for each. ``places`` counts the judged and the
    wrong pixels of a grid laid over every image. ``causes`` say why weak classes are weak (:func:`useg.reporting.causes.explained`).
    """

    scores: Scores
    images: tuple[ImageScore, ...]
    counts: Confusion
    model: str
    dataset: str
    split: str
    blocks: tuple[int, ...] = ()
    intervals: bootstrap.Intervals | None = None
    boundaries: boundaries.Boundaries | None = None
    calibration: calibration.Calibration | None = None
    sizes: regions.Sizes | None = None
    places: places.PlaceCounts | None = None
    objects: objects.Objects | None = None
    membranes: isbi.Membranes | None = None
    causes: tuple[Cause, ...] = ()

    @property
    def tallies(self) -> bootstrap.Tallies:
        """Counts of each image, ``(N, 3, K)``."""
        return np.stack([image.tally for image in self.images])

    def as_dict(self) -> dict[str, Any]:
        """Return all that was measured, as plain values for JSON; what was not is left out."""
        content = self.scores.as_dict()
        if self.intervals:
            content["intervals"] = _spans(self.intervals)
            for entry, span in zip(content["classes"], self.intervals.classes, strict=True):
                entry["iou_interval"] = _span(span)
        if self.boundaries:
            content |= {"mean_boundary_iou": self.boundaries.mean_boundary_iou, "mean_boundary_f": self.boundaries.mean_boundary_f}
            for entry, edges in zip(content["classes"], self.boundaries.classes, strict=True):
                entry |= asdict(edges)
        content["calibration"] = self.calibration and self.calibration.as_dict()
        if self.sizes:
            content["sizes"] = [asdict(size) for size in self.sizes.overall]
            for entry, sizes in zip(content["classes"], self.sizes.classes, strict=True):
                entry["sizes"] = [asdict(size) for size in sizes]
        content |= {name: asdict(part) for name, part in (("objects", self.objects), ("membranes", self.membranes)) if part}
        content["causes"] = [asdict(cause) for cause in self.causes]
        plain_content: dict[str, Any] = plain(content)
        return plain_content


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images, and how much better the first is."""

    first: Evaluation
    second: Evaluation
    difference: bootstrap.Difference

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: the first model's evaluation, with the second's and the difference under ``comparison``."""
        gain = self.difference
        classes = [
            {"id": entry.id, "name": entry.name, "iou": value, "interval": _span(span)}
            for entry, (value, span) in zip(self.first.scores.classes, gain.classes, strict=True)
        ]
        comparison = {
            "model": self.first.model, "against": self.second.model, "mean_iou": gain.mean_iou, "interval": _span(gain.interval),
            "probability_better": gain.probability_better, "num_blocks": gain.num_blocks, "note": gain.note, "classes": classes,
            "scores_against": self.second.as_dict(),
        }  # fmt: skip
        return {**self.first.as_dict(), "comparison": plain(comparison)}


def evaluate(
    predictor: Predictor,
    dataset: Dataset,
    split: str = "val",
    *,
    extras: Extras = Extras(),  # noqa: B008 - frozen
    progress: Callable[[int, int], None] = lambda done, total: None,
    seen: Seen = lambda sample, prediction: None,
) -> Evaluation:
    """Score a model on one split of a data set, each image at its label's native size.

    Args:
        predictor: the model.
        dataset: pairs with their splits assigned.
        split: ``"train"``, ``"val"``, ``"test"``, or ``"all"`` for every pair.
        extras: what else to measure, and what to leave out.
        progress: called with (images done, images in all).
        seen: called with each sample, as it is scored, and its prediction, in order.

    Raises:
        UsageError: no pair in that split, an unreadable file, classes that are not the model's, or extras that do not fit.
    """
    pairs = _pairs(predictor, dataset, split)
    asked = Asked.of(extras, predictor.classes)
    sums: Counts | None = None
    images = []
    for pair, read in zip(pairs, ahead(read_sample(pair, dataset) for pair in pairs), strict=True):
        sample = judged(read, asked, str(pair.mask))
        counts, prediction = count(predictor, sample, asked)
        seen(sample, prediction)
        own = tally(counts.confusion)
        images.append(ImageScore(pair, float(mean_iou(own)), float(pixel_accuracy(own)), own))
        sums = counts if sums is None else sums + counts
        progress(len(images), len(pairs))
    assert sums is not None
    blocks = find_blocks(pairs, dataset)
    return Evaluation(
        scores=score(sums.confusion, predictor.classes.names, len(pairs)),
        images=tuple(images),
        counts=sums.confusion,
        model=predictor.name,
        dataset=str(dataset.root),
        split=split,
        blocks=tuple(blocks),
        intervals=bootstrap.score_intervals(np.stack([image.tally for image in images]), blocks),
        boundaries=boundaries.score_boundaries(sums.boundaries),
        calibration=calibration.calibration(sums.reliability, predictor.temperature),
        sizes=regions.score_regions(sums.regions),
        places=sums.places,
        objects=objects.score_objects(sums.objects) if sums.objects.size else None,
        membranes=isbi.score_membranes(sums.membranes) if sums.membranes.size else None,
    )


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """Compare two evaluations of the same images.

    Raises:
        UsageError: they are of other images.
    """
    if [image.pair for image in first.images] != [image.pair for image in second.images]:
        raise UsageError(f"{first.model} and {second.model} were scored on different images; evaluate both on the same data set and split")
    return Comparison(first, second, bootstrap.compare(first.tallies, second.tallies, first.blocks))


def find_blocks(pairs: Sequence[Pair], dataset: Dataset) -> list[int]:
    """Number the images that are independent of each other, as far as their names tell: a number for each pair.

    Images with running numbers are taken for frames of a film or slices of a stack, up to ``BLOCK`` neighbours in one block, unless the
    data set was split at random, which says that they are none.
    """
    if dataset.splits_by.startswith("random") or not looks_filmed(pairs):
        return list(range(len(pairs)))
    places: dict[Pair, int] = {}
    blocks = (part for sequence in sequences(pairs) for part in np.array_split(np.arange(len(sequence)), -(-len(sequence) // BLOCK)))
    ordered = iter([pair for sequence in sequences(pairs) for pair in sequence])
    for number, block in enumerate(blocks):
        places |= {next(ordered): number for _ in block}
    return [places[pair] for pair in pairs]


def _pairs(predictor: Predictor, dataset: Dataset, split: str) -> list[Pair]:
    """Return the pairs to score, or say why the model cannot be scored on them."""
    pairs = [pair for pair in dataset.pairs if split in ("all", pair.split)]
    if not pairs:
        there = ", ".join(f"{name}: {count}" for name, count in sorted(Counter(pair.split for pair in dataset.pairs).items()))
        raise UsageError(f"{dataset.root} has no pair in the split {split!r}; it has {there}; choose with --split")
    if dataset.classes.names != predictor.classes.names:
        raise UsageError(
            f"the model knows {len(predictor.classes)} classes ({', '.join(predictor.classes.names)}), but {dataset.root} has "
            f"{len(dataset.classes)} ({', '.join(dataset.classes.names)}); give a classes.toml with the model's classes"
        )
    return pairs


def _span(interval: bootstrap.Interval | None) -> list[float] | None:
    return [interval.low, interval.high] if interval else None


def _spans(found: bootstrap.Intervals) -> dict[str, Any]:
    return {
        "level": 0.95, "mean_iou": _span(found.mean_iou), "pixel_accuracy": _span(found.pixel_accuracy),
        "num_blocks": found.num_blocks, "note": found.note,
    }  # fmt: skip
