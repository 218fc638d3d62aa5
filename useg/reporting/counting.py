"""A sample through a predictor -> everything that is counted in it; images add up, so that their order and grouping cannot matter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from useg.classes import IGNORE, ClassTable, Label
from useg.data.images import Sample, read_mask, resize_label
from useg.errors import UsageError, choose
from useg.scoring.answers import most_probable, softmax
from useg.scoring.boundaries import BoundaryCounts, boundary_counts
from useg.scoring.calibration import Reliability, reliability
from useg.scoring.isbi import MembraneCounts, membrane_counts
from useg.scoring.metrics import Confusion, confusion
from useg.scoring.objects import ObjectCounts, object_counts
from useg.scoring.places import PlaceCounts, place_counts
from useg.scoring.regions import RegionCounts, region_counts

if TYPE_CHECKING:  # a page of a survey needs no torch
    from useg.inference.predictor import Predictor


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
class Asked:
    """Extras, looked up: ``ignored`` is 1 where pixels are left out, ``objects`` and ``membranes`` are class ids."""

    ignored: NDArray[np.uint8] | None
    tolerance: int | None
    objects: int | None
    membranes: int | None
    tile: int | None

    @classmethod
    def of(cls, extras: Extras, classes: ClassTable) -> Asked:
        """Look the extras up among the model's classes.

        Raises:
            UsageError: no such class, an ignore mask that cannot be read or leaves nothing, or a negative tolerance.
        """
        ids = {name: k for k, name in enumerate(classes.names)}
        if extras.tolerance is not None and extras.tolerance < 0:
            raise UsageError(f"the tolerance of boundaries is {extras.tolerance} pixels, but it cannot be negative; 0 asks for the exact pixel")
        objects_, membranes = (None if name is None else choose("the class", name, ids) for name in (extras.objects, extras.membranes))
        ignored = None if extras.ignore_mask is None else _read_ignore_mask(Path(extras.ignore_mask))
        return cls(ignored, extras.tolerance, objects_, membranes, extras.tile)


@dataclass(frozen=True)
class Counts:
    """All that is counted in an image; images add up. What was not asked for is empty."""

    confusion: Confusion
    boundaries: BoundaryCounts
    reliability: Reliability
    regions: RegionCounts
    places: PlaceCounts
    objects: ObjectCounts
    membranes: MembraneCounts

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def count(predictor: Predictor, sample: Sample, asked: Asked) -> tuple[Counts, Label]:
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
    counts = Counts(
        confusion(prediction, label, num_classes),
        boundary_counts(prediction, label, num_classes, asked.tolerance),
        reliability(logits, prediction, label, temperature),
        region_counts(prediction, label, num_classes),
        place_counts(prediction, label),
        things,
        membranes,
    )
    return counts, prediction


def judged(sample: Sample, asked: Asked, name: str) -> Sample:
    """Return a sample as it is scored: its label is ``IGNORE`` also where the ignore mask says so.

    Args:
        sample: as it was read.
        asked: with the ignore mask, if any.
        name: of the label, for an error.

    Raises:
        UsageError: the ignore mask does not fit the label.
    """
    return sample if asked.ignored is None else replace(sample, label=_without(sample.label, asked.ignored, name))


def _read_ignore_mask(path: Path) -> NDArray[np.uint8]:
    mask = read_mask(path)
    ignored = np.any(mask.reshape(*mask.shape[:2], -1) != 0, axis=2)
    if np.all(ignored):
        raise UsageError(f"the ignore mask '{path}' leaves no pixel: all are other than 0; paint 0 where pixels count")
    return np.asarray(ignored, np.uint8)


def _without(label: Label, ignored: NDArray[np.uint8], name: str) -> Label:
    """Return a label that is ``IGNORE`` also where ``ignored``, which has its size or its proportions to the pixel."""
    (height, width), (rows, columns) = label.shape, ignored.shape
    if 2 * abs(rows * width - columns * height) > max(rows, columns, height, width):  # more than rounding
        raise UsageError(
            f"the ignore mask is {columns}x{rows} pixels, but '{name}' is {width}x{height}; give one of this size or of these proportions"
        )
    kept = label.copy()
    kept[resize_label(ignored, (width, height)) != 0] = IGNORE
    return kept
