"""The result of an evaluation: scores, intervals and likely causes of errors; also as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from useg.data.dataset import Pair, pair_name
from useg.errors import SettingsError
from useg.objects.scores import ComponentScores, ObjectScores
from useg.scoring import boundaries, uncertainty
from useg.scoring.boundaries import Membranes
from useg.scoring.metrics import Confusion, PlaceCounts, Scores, Sizes, Tally, plain

CauseKind = Literal[
    "label noise",
    "few examples",
    "small things",
    "split shift",
    "not carried over",
    "learnt too little",
    "confused at borders",
    "confused in regions",
    "touching objects",
]


@dataclass(frozen=True)
class Cause:
    """A likely cause of low scores (:mod:`useg.reporting.causes` finds them).

    Args:
        class_name: the weak class; empty for a cause that concerns all classes.
        kind: one of a fixed set of terms.
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
class ImageScore:
    """The scores of one image.

    Args:
        pair: its files.
        mean_iou: mean IoU over the classes in it, 0 to 1.
        pixel_accuracy: 0 to 1.
        tally: its counts ``(3, K)``.
    """

    pair: Pair
    mean_iou: float
    pixel_accuracy: float
    tally: Tally = field(default_factory=lambda: np.zeros((3, 0), np.int64))

    @property
    def name(self) -> str:
        """The name of the image in a report."""
        return pair_name(self.pair)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a model on one split of a data set.

    Args:
        scores: scores of all images together.
        images: scores of each image.
        counts: the summed confusion matrix ``(K, K)``; rows are true classes.
        model: name of the model.
        dataset: root folder of the data set.
        split: ``"train"``, ``"val"``, ``"test"`` or ``"all"``.
        blocks: the block that each image was resampled with, as a number.
        intervals: 95 % intervals of the scores.
        boundaries: boundary IoU, boundary F and the recall of thin parts.
        calibration: expected calibration error and reliability curve.
        sizes: scores of regions by size.
        places: scored and wrong pixels in the cells of a grid over the image.
        objects: scores of objects, if requested.
        membranes: errors of membranes, if requested.
        object_scores: scores of the objects that the truth distinguishes: of all, under ``""``, and
            of each class.
        causes: likely causes of weak classes (:func:`useg.reporting.causes.add_causes`).
        notes: what useg decided about the images and classes, in words.
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
    sizes: Sizes | None = None
    places: PlaceCounts | None = None
    objects: ComponentScores | None = None
    membranes: Membranes | None = None
    object_scores: Mapping[str, ObjectScores] = field(default_factory=dict)
    causes: tuple[Cause, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def tallies(self) -> uncertainty.Tallies:
        """Counts of each image, ``(N, 3, K)``."""
        return np.stack([image.tally for image in self.images])

    def as_dict(self) -> dict[str, Any]:
        """Return everything that was measured as plain values for JSON."""
        content = self.scores.as_dict()
        if self.intervals:
            content["intervals"] = _intervals_as_dict(self.intervals)
            for entry, interval in zip(content["classes"], self.intervals.classes, strict=True):
                entry["iou_interval"] = _interval_as_list(interval)
        if self.boundaries:
            content |= {
                "mean_boundary_iou": self.boundaries.mean_boundary_iou,
                "mean_boundary_f": self.boundaries.mean_boundary_f,
            }
            for entry, boundary in zip(content["classes"], self.boundaries.classes, strict=True):
                entry |= asdict(boundary)
        content["calibration"] = self.calibration and self.calibration.as_dict()
        if self.sizes:
            content["sizes"] = [asdict(size) for size in self.sizes.overall]
            for entry, sizes in zip(content["classes"], self.sizes.classes, strict=True):
                entry["sizes"] = [asdict(size) for size in sizes]
        if self.objects:
            content["objects"] = asdict(self.objects)
        if self.object_scores:
            by_class = {name: each.as_dict() for name, each in self.object_scores.items()}
            content["object_scores"] = {**by_class.pop(""), "classes": by_class}
        if self.membranes:
            content["membranes"] = asdict(self.membranes)
        content["causes"] = [asdict(cause) for cause in self.causes]
        if self.notes:
            content["notes"] = list(self.notes)
        plain_content: dict[str, Any] = plain(content)
        return plain_content


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images.

    Args:
        first: the evaluation of the first model.
        second: that of the second.
        difference: of their scores; positive where the first is better.
    """

    first: Evaluation
    second: Evaluation
    difference: uncertainty.PairedDifference

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON.

        The evaluation of the first model is at the top level; the evaluation of the second and the
        difference are under ``comparison``.
        """
        gain = self.difference
        classes = [
            {
                "id": entry.id,
                "name": entry.name,
                "iou": value,
                "interval": _interval_as_list(interval),
            }
            for entry, (value, interval) in zip(
                self.first.scores.classes, gain.classes, strict=True
            )
        ]
        comparison = {
            "model": self.first.model,
            "against": self.second.model,
            "mean_iou": gain.mean_iou,
            "interval": _interval_as_list(gain.interval),
            "probability_better": gain.probability_better,
            "num_blocks": gain.num_blocks,
            "note": gain.note,
            "classes": classes,
            "scores_against": self.second.as_dict(),
        }
        return {**self.first.as_dict(), "comparison": plain(comparison)}


def _interval_as_list(interval: uncertainty.Interval | None) -> list[float] | None:
    return [interval.low, interval.high] if interval else None


def _intervals_as_dict(intervals: uncertainty.Intervals) -> dict[str, Any]:
    return {
        "level": 0.95,
        "mean_iou": _interval_as_list(intervals.mean_iou),
        "pixel_accuracy": _interval_as_list(intervals.pixel_accuracy),
        "num_blocks": intervals.num_blocks,
        "note": intervals.note,
    }


def compare_evaluations(first: Evaluation, second: Evaluation) -> Comparison:
    """Compare two evaluations of the same images.

    Raises:
        SettingsError: the evaluations are of different images.
    """
    if [image.pair for image in first.images] != [image.pair for image in second.images]:
        raise SettingsError(
            f"{first.model} and {second.model} were scored on different images; evaluate both on "
            "the same data set and split"
        )
    difference = uncertainty.compare_tallies(first.tallies, second.tallies, first.blocks)
    return Comparison(first, second, difference)
