"""A data set through a predictor -> scores at native resolution with intervals, of the whole and of each image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label, most_probable, softmax
from useg.data.dataset import Dataset, Pair, pair_name, pick_evenly, read_sample
from useg.data.splits import find_sequences, is_film
from useg.errors import UsageError, choose
from useg.images.files import Sample, read_mask, resize_label
from useg.inference import runtimes
from useg.inference.predictor import Predictor
from useg.machine import ahead
from useg.models import segmenter
from useg.scoring import boundaries, regions, uncertainty
from useg.scoring.boundaries import (
    BoundaryCounts,
    MembraneCounts,
    Membranes,
    boundary_counts,
    membrane_counts,
)
from useg.scoring.metrics import (
    Confusion,
    Scores,
    Tally,
    confusion,
    mean_iou,
    pixel_accuracy,
    plain,
    score,
    tally,
)
from useg.scoring.regions import (
    ObjectCounts,
    PlaceCounts,
    RegionCounts,
    object_counts,
    place_counts,
    region_counts,
)
from useg.scoring.uncertainty import (
    FIT_PIXELS,
    Reliability,
    fit_temperature,
    reliability,
    some_pixels,
)

MAX_TEMPERATURE_IMAGES = (
    40  # evenly spread over those held out: enough for one number, and soon done
)


def find_temperature(predictor: Predictor, dataset: Dataset, pairs: Sequence[Pair]) -> float:
    """Fit the temperature on some pixels of pictures that training has not seen.

    Args:
        predictor: the model; the temperature that it has does not matter.
        dataset: where the pairs come from.
        pairs: held-out pictures; at most ``MOST_PICTURES`` of them are looked at.

    Raises:
        UsageError: an unreadable file, or a picture that does not fit the model.
    """
    chosen = pick_evenly(pairs, MAX_TEMPERATURE_IMAGES)
    parts = []
    for k, pair in enumerate(chosen):
        sample = read_sample(pair, dataset)
        parts.append(
            some_pixels(
                predictor.logits(sample.image), sample.label, FIT_PIXELS // len(chosen), seed=k
            )
        )
    return (
        fit_temperature(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        if parts
        else 1.0
    )


def calibrate(run: Path, dataset: Dataset) -> None:
    """Fit the temperature of the model in a run folder on its validation pictures, and write it into the model file.

    Raises:
        UsageError: as for :func:`find_temperature`; also no model, or a file that cannot be written.
    """
    model = segmenter.load_model(run)
    model.temperature = find_temperature(
        Predictor(runtimes.runtime_of_model(model, run)), dataset, dataset.of("val")
    )
    segmenter.save_model(model, run / segmenter.MODEL_NAME)


def with_temperature(predictor: Predictor, temperature: float) -> Predictor:
    """Return the same predictor with another temperature; its label maps are the same."""
    return Predictor(
        replace(
            predictor.runtime,
            description=replace(predictor.runtime.description, temperature=temperature),
        )
    )


CauseKind = Literal[
    "label noise",
    "few examples",
    "small things",
    "split shift",
    "not carried over",
    "learnt too little",
    "confused at borders",
    "confused in regions",
]


@dataclass(frozen=True)
class Cause:
    """Why a class is weak, as far as can be told.

    Args:
        class_name: which; empty for a cause of the whole.
        kind: a fixed term.
        message: a sentence.
        evidence: the numbers behind it.
        remedy: the setting, command or data that would help.
    """

    class_name: str
    kind: CauseKind
    message: str
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Extras:
    """What an evaluation is asked for beyond its scores.

    Args:
        ignore_mask: a picture whose pixels other than 0 are left out of every image, such as the car's own hood; of the images' size, or
            of their proportions.
        tolerance: pixels by which a drawn boundary may miss the true one in ``boundary_f``; by default a share of the diagonal.
        objects: name of a class whose connected regions are counted as objects.
        membranes: name of the membrane class, for the errors of the ISBI 2012 challenge.
        tile: as for a call of the predictor; scores do not depend on it.
    """

    ignore_mask: str | Path | None = None
    tolerance: int | None = None
    objects: str | None = None
    membranes: str | None = None
    tile: int | None = None


@dataclass(frozen=True)
class CountSettings:
    """Extras, looked up: ``ignored`` is 1 where pixels are left out, ``objects`` and ``membranes`` are class ids."""

    ignored: NDArray[np.uint8] | None
    tolerance: int | None
    objects: int | None
    membranes: int | None
    tile: int | None

    @classmethod
    def of(cls, extras: Extras, classes: ClassTable) -> CountSettings:
        """Look the extras up among the model's classes.

        Raises:
            UsageError: no such class, an ignore mask that cannot be read or leaves nothing, or a negative tolerance.
        """
        ids = {name: k for k, name in enumerate(classes.names)}
        if extras.tolerance is not None and extras.tolerance < 0:
            raise UsageError(
                f"the tolerance of boundaries is {extras.tolerance} pixels, but it cannot be negative; 0 asks for the exact pixel"
            )
        objects_, membranes = (
            None if name is None else choose("the class", name, ids)
            for name in (extras.objects, extras.membranes)
        )
        ignored = (
            None if extras.ignore_mask is None else _read_ignore_mask(Path(extras.ignore_mask))
        )
        return cls(ignored, extras.tolerance, objects_, membranes, extras.tile)


@dataclass(frozen=True)
class ImageCounts:
    """All that is counted in an image; images add up. What was not asked for is empty."""

    confusion: Confusion
    boundaries: BoundaryCounts
    reliability: Reliability
    regions: RegionCounts
    places: PlaceCounts
    objects: ObjectCounts
    membranes: MembraneCounts

    def __add__(self, other: ImageCounts) -> ImageCounts:
        return ImageCounts(
            *(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        )


def count_image(
    predictor: Predictor, sample: Sample, asked: CountSettings
) -> tuple[ImageCounts, Label]:
    """Predict one image, and count.

    Args:
        predictor: the model.
        sample: image and label, as :func:`judged` returns it.
        asked: what to count.

    Returns:
        The counts, and the prediction ``(H, W)``.

    Raises:
        UsageError: an image that does not fit the model.
    """
    label = sample.label
    logits = predictor.logits(sample.image, asked.tile)
    prediction = most_probable(logits)
    num_classes, temperature = len(predictor.classes), predictor.temperature
    things, membranes = np.zeros(0, np.int64), np.zeros(0)
    known = label != IGNORE
    if asked.objects is not None:
        things = object_counts((prediction == asked.objects) & known, label == asked.objects)
    if asked.membranes is not None:
        cell = 1 - softmax(logits, temperature)[asked.membranes]
        membranes = membrane_counts(cell, (label != asked.membranes) & known, known)
    counts = ImageCounts(
        confusion(prediction, label, num_classes),
        boundary_counts(prediction, label, num_classes, asked.tolerance),
        reliability(logits, prediction, label, temperature),
        region_counts(prediction, label, num_classes),
        place_counts(prediction, label),
        things,
        membranes,
    )
    return counts, prediction


def apply_ignore_mask(sample: Sample, asked: CountSettings, name: str) -> Sample:
    """Return a sample as it is scored: its label is ``IGNORE`` also where the ignore mask says so.

    Args:
        sample: as it was read.
        asked: with the ignore mask, if any.
        name: of the label, for an error.

    Raises:
        UsageError: the ignore mask does not fit the label.
    """
    return (
        sample
        if asked.ignored is None
        else replace(sample, label=_without(sample.label, asked.ignored, name))
    )


def _read_ignore_mask(path: Path) -> NDArray[np.uint8]:
    mask = read_mask(path)
    ignored = np.any(mask.reshape(*mask.shape[:2], -1) != 0, axis=2)
    if np.all(ignored):
        raise UsageError(
            f"the ignore mask '{path}' leaves no pixel: all are other than 0; paint 0 where pixels count"
        )
    return np.asarray(ignored, np.uint8)


def _without(label: Label, ignored: NDArray[np.uint8], name: str) -> Label:
    """Return a label that is ``IGNORE`` also where ``ignored``, which has its size or its proportions to the pixel."""
    (height, width), (rows, columns) = label.shape, ignored.shape
    if 2 * abs(rows * width - columns * height) > max(
        rows, columns, height, width
    ):  # more than rounding
        raise UsageError(
            f"the ignore mask is {columns}x{rows} pixels, but '{name}' is {width}x{height}; give one of this size or of these proportions"
        )
    kept = label.copy()
    kept[resize_label(ignored, (width, height)) != 0] = IGNORE
    return kept


PredictionCallback = Callable[[Sample, Label], None]


BLOCK_IMAGES = 10  # neighbouring images of a film or stack that are drawn together: the longest gap that a split leaves between its parts


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
    wrong pixels of a grid laid over every image. ``causes`` say why weak classes are weak (:func:`useg.reporting.causes.add_causes`).
    """

    scores: Scores
    images: tuple[ImageScore, ...]
    counts: Confusion
    model: str
    dataset: str
    split: str
    blocks: tuple[int, ...] = ()
    intervals: uncertainty.Intervals | None = None
    boundaries: boundaries.Boundaries | None = None
    calibration: uncertainty.Calibration | None = None
    sizes: regions.Sizes | None = None
    places: regions.PlaceCounts | None = None
    objects: regions.Objects | None = None
    membranes: Membranes | None = None
    causes: tuple[Cause, ...] = ()

    @property
    def tallies(self) -> uncertainty.Tallies:
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
            content |= {
                "mean_boundary_iou": self.boundaries.mean_boundary_iou,
                "mean_boundary_f": self.boundaries.mean_boundary_f,
            }
            for entry, edges in zip(content["classes"], self.boundaries.classes, strict=True):
                entry |= asdict(edges)
        content["calibration"] = self.calibration and self.calibration.as_dict()
        if self.sizes:
            content["sizes"] = [asdict(size) for size in self.sizes.overall]
            for entry, sizes in zip(content["classes"], self.sizes.classes, strict=True):
                entry["sizes"] = [asdict(size) for size in sizes]
        content |= {
            name: asdict(part)
            for name, part in (("objects", self.objects), ("membranes", self.membranes))
            if part
        }
        content["causes"] = [asdict(cause) for cause in self.causes]
        plain_content: dict[str, Any] = plain(content)
        return plain_content


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images, and how much better the first is."""

    first: Evaluation
    second: Evaluation
    difference: uncertainty.PairedDifference

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


def evaluate_dataset(
    predictor: Predictor,
    dataset: Dataset,
    split: str = "val",
    *,
    extras: Extras = Extras(),
    progress: Callable[[int, int], None] = lambda done, total: None,
    seen: PredictionCallback = lambda sample, prediction: None,
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
    asked = CountSettings.of(extras, predictor.classes)
    sums: ImageCounts | None = None
    images = []
    for pair, read in zip(pairs, ahead(read_sample(pair, dataset) for pair in pairs), strict=True):
        sample = apply_ignore_mask(read, asked, str(pair.mask))
        counts, prediction = count_image(predictor, sample, asked)
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
        intervals=uncertainty.score_intervals(np.stack([image.tally for image in images]), blocks),
        boundaries=boundaries.score_boundaries(sums.boundaries),
        calibration=uncertainty.calibration(sums.reliability, predictor.temperature),
        sizes=regions.score_regions(sums.regions),
        places=sums.places,
        objects=regions.score_objects(sums.objects) if sums.objects.size else None,
        membranes=boundaries.score_membranes(sums.membranes) if sums.membranes.size else None,
    )


def compare_evaluations(first: Evaluation, second: Evaluation) -> Comparison:
    """Compare two evaluations of the same images.

    Raises:
        UsageError: they are of other images.
    """
    if [image.pair for image in first.images] != [image.pair for image in second.images]:
        raise UsageError(
            f"{first.model} and {second.model} were scored on different images; evaluate both on the same data set and split"
        )
    return Comparison(
        first, second, uncertainty.compare_tallies(first.tallies, second.tallies, first.blocks)
    )


def find_blocks(pairs: Sequence[Pair], dataset: Dataset) -> list[int]:
    """Number the images that are independent of each other, as far as their names tell: a number for each pair.

    Images with running numbers are taken for frames of a film or slices of a stack, up to ``BLOCK`` neighbours in one block, unless the
    data set was split at random, which says that they are none.
    """
    if dataset.splits_by.startswith("random") or not is_film(pairs):
        return list(range(len(pairs)))
    places: dict[Pair, int] = {}
    blocks = (
        part
        for sequence in find_sequences(pairs)
        for part in np.array_split(np.arange(len(sequence)), -(-len(sequence) // BLOCK_IMAGES))
    )
    ordered = iter([pair for sequence in find_sequences(pairs) for pair in sequence])
    for number, block in enumerate(blocks):
        places |= {next(ordered): number for _ in block}
    return [places[pair] for pair in pairs]


def _pairs(predictor: Predictor, dataset: Dataset, split: str) -> list[Pair]:
    """Return the pairs to score, or say why the model cannot be scored on them."""
    pairs = [pair for pair in dataset.pairs if split in ("all", pair.split)]
    if not pairs:
        there = ", ".join(
            f"{name}: {count}"
            for name, count in sorted(Counter(pair.split for pair in dataset.pairs).items())
        )
        raise UsageError(
            f"{dataset.root} has no pair in the split {split!r}; it has {there}; choose with --split"
        )
    if dataset.classes.names != predictor.classes.names:
        raise UsageError(
            f"the model knows {len(predictor.classes)} classes ({', '.join(predictor.classes.names)}), but {dataset.root} has "
            f"{len(dataset.classes)} ({', '.join(dataset.classes.names)}); give a classes.toml with the model's classes"
        )
    return pairs


def _span(interval: uncertainty.Interval | None) -> list[float] | None:
    return [interval.low, interval.high] if interval else None


def _spans(found: uncertainty.Intervals) -> dict[str, Any]:
    return {
        "level": 0.95, "mean_iou": _span(found.mean_iou), "pixel_accuracy": _span(found.pixel_accuracy),
        "num_blocks": found.num_blocks, "note": found.note,
    }  # fmt: skip
