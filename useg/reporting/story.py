"""An evaluation -> sentences: what was measured, what could make it wrong, and where it goes wrong. Page and Markdown tell the same story."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from useg.classes import ClassTable
from useg.data.splits import looks_filmed, sequences
from useg.reporting.gallery import Case, image_names
from useg.reporting.spelling import counted, listed, percent, span
from useg.scoring.metrics import Confusion
from useg.scoring.places import error_rates
from useg.scoring.regions import Sizes

if TYPE_CHECKING:  # torch comes with them, and a page needs none
    from useg.data.dataset import Dataset
    from useg.reporting.cause import Cause
    from useg.reporting.evaluate import Evaluation

_FEW_IMAGES, _FEW_PIXELS = 3, 2000  # a class with fewer is too small to be judged


@dataclass(frozen=True)
class Command:
    """A command line to copy, and what it does in one sentence."""

    text: str
    does: str


@dataclass(frozen=True)
class Report:
    """All that a report of an evaluation tells.

    Args:
        title: its heading.
        evaluation: what was measured, on what.
        table: names and colours of the classes.
        cases: images to look at, best first.
        thumbnails: a small JPEG of each image of the evaluation, or none at all.
        log: rows of ``log.jsonl`` for the training curves, or none.
        facts: settings, seed, machine, versions: whatever a reader needs to repeat the numbers.
        caveats: sentences that a reader must see before the numbers.
        causes: why classes are bad, and what helps.
        commands: the exact command lines.
        fitted_here: the model's temperature was fitted on pictures of this evaluation.
    """

    title: str
    evaluation: Evaluation
    table: ClassTable
    cases: Sequence[Case] = ()
    thumbnails: Sequence[bytes] = ()
    log: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    caveats: Sequence[str] = ()
    causes: Sequence[Cause] = ()
    commands: Sequence[Command] = ()
    fitted_here: bool = False


def measured(evaluation: Evaluation) -> str:
    """Say what was measured on."""
    part = "" if evaluation.split == "all" else f" in the split “{evaluation.split}”"
    return f"Measured on {counted(evaluation.scores.num_images, 'image')}{part} of {evaluation.dataset}, at native resolution."


def interval_words(evaluation: Evaluation) -> str:
    """Say between what the mean IoU of other such images would lie, or why that is not known."""
    found = evaluation.intervals
    if found is None or not (found.mean_iou or found.note):
        return ""
    if found.mean_iou is None:
        return f"{found.note[0].upper()}{found.note[1:]}."
    alone = found.num_blocks == evaluation.scores.num_images
    drawn = counted(found.num_blocks, "image") if alone else f"{counted(found.num_blocks, 'block')} of neighbouring images"
    return (
        f"On other images like these, the mean IoU would lie between {span(found.mean_iou).replace(' to ', ' and ')} % (95 % interval from {drawn})."
    )


def caveats(evaluation: Evaluation, dataset: Dataset, provenance: Mapping[str, Any], twins: int | None = None) -> list[str]:
    """Say what could make the scores wrong, the gravest first.

    Args:
        evaluation: the scores.
        dataset: what they were measured on.
        provenance: what the model file says of its training; empty where it says nothing.
        twins: how many of the images are nearly the same as one that was trained on; None where that was not looked into.
    """
    return [
        *_leaks(evaluation, dataset, provenance, twins),
        *_flattery(evaluation, dataset, provenance),
        *_thin_evidence(evaluation),
    ]


def trained_here(dataset: Dataset, provenance: Mapping[str, Any]) -> bool:
    """Tell whether a model was trained on this data set, as far as its file tells."""
    return provenance.get("dataset") == dataset.root.name


def _leaks(evaluation: Evaluation, dataset: Dataset, provenance: Mapping[str, Any], twins: int | None) -> list[str]:
    found, split, here = [], evaluation.split, trained_here(dataset, provenance)
    if split in ("train", "all") and dataset.of("train") and (here or not provenance):
        found.append("If the model was trained on this data set, these are pictures that it has seen: the scores measure memory.")
    elif here and provenance.get("num_train", len(dataset.of("train"))) != len(dataset.of("train")):
        found.append(
            f"The model was trained on {provenance['num_train']} pictures of this data set, but this split leaves {len(dataset.of('train'))} to "
            "train on: it is another split, and the model may have seen some of these pictures."
        )
    if twins:
        are = "is" if twins == 1 else "are"
        found.append(
            f"{counted(twins, 'of these images', 'of these images')} {are} nearly the same as one of the training split: that much is memory."
        )
    return found


def _flattery(evaluation: Evaluation, dataset: Dataset, provenance: Mapping[str, Any]) -> list[str]:
    if evaluation.split != "val" or not (trained_here(dataset, provenance) or not provenance):
        return []
    found = ["The model kept is the one that scored best on these very pictures, and its temperature was fitted on them, which flatters it a little."]
    if not dataset.splits_by.startswith("random") and _same_recordings(dataset, evaluation.split):
        found.append("Training saw other parts of the same recordings, so expect lower scores on other places and other days.")
    return found


def _same_recordings(dataset: Dataset, split: str) -> bool:
    """Tell whether frames of a film or slices of a stack are on both sides, by their names."""
    if not looks_filmed(dataset.pairs):
        return False
    return any({"train", split} <= {pair.split for pair in sequence} for sequence in sequences(dataset.pairs))


def _thin_evidence(evaluation: Evaluation) -> list[str]:
    found = []
    if evaluation.intervals and evaluation.intervals.note and evaluation.intervals.mean_iou:
        found.append(f"The intervals come {evaluation.intervals.note}.")
    held = (evaluation.tallies[:, 1] > 0).sum(0) if evaluation.images else np.zeros(0, np.int64)
    tiny = [
        f"{entry.name} ({counted(entry.pixels, 'pixel')} in {counted(int(held[entry.id]), 'image')})"
        for entry in evaluation.scores.classes
        if held.size and entry.pixels and (held[entry.id] < _FEW_IMAGES or entry.pixels < _FEW_PIXELS)
    ]
    if tiny:
        found.append(f"Too little of them to judge them by, yet each counts in the mean like any other class: {listed(tiny)}.")
    if evaluation.scores.absent:
        found.append(f"Not in the truth, so without a score and outside every mean: {listed(evaluation.scores.absent, 40)}.")
    return found


def worst_confusions(counts: Confusion, names: Sequence[str], most: int = 3) -> list[str]:
    """Put the worst confusions into words: those that take the largest share of their true class, as the mean IoU weighs them.

    >>> worst_confusions(np.array([[82, 18], [0, 9]]), ("Poles", "Buildings"))
    ['18 % of Poles pixels are called Buildings']
    """
    wrong = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    np.fill_diagonal(wrong, 0)
    # Of equal shares, the one with more pixels first.
    order = sorted(zip(*np.nonzero(wrong), strict=True), key=lambda pair: (-wrong[pair], -counts[pair]))
    return [f"{percent(float(wrong[k, j]), brief=True)} of {names[k]} pixels are called {names[j]}" for k, j in order[:most]]


def size_words(sizes: Sizes) -> str:
    """Say how much is found of the things of each size.

    >>> from useg.scoring.regions import score_regions
    >>> size_words(score_regions(np.array([[[0, 10, 0, 4]], [[0, 2, 0, 3]], [[0, 50, 0, 900]], [[0, 9, 0, 700]]])))
    'Found are 20 % of 10 small regions and 75 % of 4 large regions.'
    """
    found = [f"{percent(size.found, brief=True)} of {counted(size.num_regions, size.size + ' region')}" for size in sizes.overall if size.num_regions]
    return f"Found are {listed(found)}."


def size_bound(up_to: float) -> str:
    """Say how large a region of a size may be.

    >>> size_bound(0.0001), size_bound(1.0)
    ('up to 0.01 % of the image', 'larger')
    """
    return "larger" if up_to >= 1 else f"up to {100 * up_to:g} % of the image"


def place_words(evaluation: Evaluation) -> str:
    """Say where in the picture most is wrong, and how much the places differ."""
    assert evaluation.places is not None
    rates = error_rates(evaluation.places)
    if np.isnan(rates).all():
        return "No pixel is judged."
    row, column = np.unravel_index(np.nanargmax(rates), rates.shape)
    rows, columns = rates.shape
    vertical, horizontal = ("top", "middle", "bottom")[3 * int(row) // rows], ("left", "centre", "right")[3 * int(column) // columns]
    place = {"middle centre": "the centre"}.get(f"{vertical} {horizontal}", f"the {vertical} {horizontal}")
    return (
        f"Most is wrong at {place}, where a field has {percent(float(np.nanmax(rates)), brief=True)} of its pixels wrong; "
        f"the best field has {percent(float(np.nanmin(rates)), brief=True)}."
    )


def calibration_words(report: Report) -> list[str]:
    """Say whether the model's probabilities mean what they say."""
    found = report.evaluation.calibration
    if found is None or math.isnan(found.error):
        return []
    accuracy = report.evaluation.scores.pixel_accuracy
    gap = found.confidence - accuracy
    verdict = "about as sure as it should be" if abs(gap) < 0.01 else "surer than it is right" if gap > 0 else "less sure than it is right"
    said = [
        f"The model is {verdict}: on average it is {percent(found.confidence)} sure, and {percent(accuracy)} of the pixels are right. "
        f"Confidence and accuracy lie {percent(found.error)} apart (expected calibration error)."
    ]
    if found.temperature != 1:
        how = "made less sure of itself" if found.temperature > 1 else "made surer of itself"
        said.append(f"It was {how} after training: its logits are divided by {found.temperature:.2f} (the temperature), which changes no label.")
    if report.fitted_here:
        said.append("The temperature was fitted on pixels of these same pictures, so this calibration error is a little too good, here and in JSON.")
    return said


def spread_words(evaluation: Evaluation) -> str:
    """Say how the single images did."""
    low, middle, high = spread(evaluation)
    return f"Half of the images lie between {percent(low)} and {percent(high)}; the median is {percent(middle)}."


def spread(evaluation: Evaluation) -> tuple[float, float, float]:
    """Return the quartiles of the images' mean IoU, ``nan`` where none has one."""
    values = [image.mean_iou for image in evaluation.images if not math.isnan(image.mean_iou)] or [math.nan]
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return low, middle, high


def weakest(evaluation: Evaluation, most: int = 5) -> list[tuple[str, float]]:
    """Return names and mean IoU of the weakest images."""
    named = zip(image_names(evaluation), (image.mean_iou for image in evaluation.images), strict=True)
    return sorted(((name, value) for name, value in named if not math.isnan(value)), key=lambda entry: entry[1])[:most]


def objects_words(evaluation: Evaluation) -> list[str]:
    """Say what was found of the objects that were asked for, and how the membranes are."""
    said = []
    if things := evaluation.objects:
        said.append(
            f"F1 {percent(things.f1)} at IoU 0.5: {things.matched:,} of {counted(things.num_true, 'true object')} matched, "
            f"{counted(things.num_predicted, 'object')} predicted. "
            f"{counted(things.merged, 'prediction')} cover several true objects, {counted(things.split, 'true object')} fell apart."
        )
    if errors := evaluation.membranes:
        said.append(
            f"Membranes, as the ISBI 2012 challenge counts: warping error {errors.warping_error:.6f}, Rand error {errors.rand_error:.4f}, "
            f"pixel error {errors.pixel_error:.4f}; smaller is better."
        )
    return said
