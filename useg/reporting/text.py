"""Numbers -> how a report spells them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from useg.classes import ClassTable, Label
from useg.data.dataset import pair_name
from useg.data.splits import find_sequences, is_film
from useg.scoring.metrics import Confusion
from useg.scoring.regions import Sizes, error_rates
from useg.scoring.uncertainty import Interval

if TYPE_CHECKING:
    from useg.data.dataset import Dataset
    from useg.reporting.evaluate import Cause, Comparison, Evaluation

    pass


def percent(share: float, brief: bool = False) -> str:
    """Spell a share 0..1: ``74.3 %``, or briefly ``74 %``; what is absent (``nan``) is a dash, what is tiny is not called 0.

    >>> percent(0.7432), percent(0.7432, brief=True), percent(0.0002), percent(float("nan"))
    ('74.3 %', '74 %', 'less than 0.1 %', '–')
    """
    if math.isnan(share):
        return "–"  # noqa: RUF001
    if 0 < share < 0.0005:
        return "less than 0.1 %"
    return f"{100 * share:.{0 if brief and share >= 0.0995 else 1}f} %"


def number(share: float) -> str:
    """Spell a share 0..1 as a number of percent, ``74.3``; a dash for ``nan``."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}"  # noqa: RUF001


def span(interval: Interval | None) -> str:
    """Spell an interval of shares in percent; nothing where there is none.

    >>> span(Interval(0.4781, 0.5532))
    '47.8 to 55.3'
    """
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}" if interval else ""


def counted(count: int, one: str, many: str = "") -> str:
    """Spell a number of things.

    >>> counted(1, "image"), counted(1200, "image"), counted(2, "class", "classes")
    ('1 image', '1,200 images', '2 classes')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Join names as a sentence does.

    >>> listed(["a"]), listed(["a", "b", "c"]), listed("abcdefgh")
    ('a', 'a, b and c', 'a, b, c, d, e, f and 2 more')
    """
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def sentence(text: str) -> str:
    """Return a clause as a sentence of its own.

    >>> sentence("few pixels"), sentence("Done.")
    ('Few pixels.', 'Done.')
    """
    return (
        text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else "." * bool(text))
    )


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """Say in a table and some lines what was measured: every score by its full name, what was left out, and what limits it."""
    scores, spans, edges = evaluation.scores, evaluation.intervals, evaluation.boundaries
    assert spans is not None
    assert edges is not None
    rows: list[tuple[str, ...]] = [
        (
            "class",
            "IoU",
            "Dice",
            "precision",
            "recall",
            "boundary IoU",
            "boundary F",
            "recall of thin parts",
        )
    ]
    for entry, span, edge in zip(scores.classes, spans.classes, edges.classes, strict=True):
        if entry.pixels:
            values = (
                entry.dice,
                entry.precision,
                entry.recall,
                edge.boundary_iou,
                edge.boundary_f,
                edge.thin_recall,
            )
            rows.append(
                (entry.name, spelled(entry.iou, span), *(spelled(value) for value in values))
            )
    count = len(scores.classes) - len(scores.absent)
    lines = _table(rows)
    lines += [
        f"mean IoU {spelled(scores.mean_iou, spans.mean_iou)}, mean Dice {spelled(scores.mean_dice)}, over {counted(count, 'class', 'classes')}",
        f"pixel accuracy {spelled(scores.pixel_accuracy, spans.pixel_accuracy)}, {counted(scores.num_images, 'image')}",
        f"IoU weighted by class frequency {spelled(scores.frequency_weighted_iou)}, micro IoU (all pixels pooled) {spelled(scores.micro_iou)}",
        f"mean boundary IoU {spelled(edges.mean_boundary_iou)}, mean boundary F {spelled(edges.mean_boundary_f)}",
    ]
    if evaluation.calibration:
        found = evaluation.calibration
        lines.append(
            f"calibration error {spelled(found.error)}: mean confidence {spelled(found.confidence)} at temperature {found.temperature:.2f}"
        )
    if evaluation.objects:
        things = evaluation.objects
        lines.append(
            f"objects: F1 {spelled(things.f1)} at IoU 0.5 ({things.matched} matched of {things.num_true} true and {things.num_predicted} predicted; "
            f"{things.merged} merged, {things.split} split)"
        )
    if evaluation.membranes:
        errors = evaluation.membranes
        lines.append(
            f"warping error {errors.warping_error:.6f}, Rand error {errors.rand_error:.4f}, pixel error {errors.pixel_error:.4f}"
        )
    if scores.absent:
        lines.append(f"absent from the truth and left out of the means: {', '.join(scores.absent)}")
    lines.append(
        spans.note
        or f"in brackets: 95 % intervals, from {_drawn(spans.num_blocks, scores.num_images)}"
    )
    lines += [
        f"why: {cause.message} ({cause.evidence}); {cause.remedy}" for cause in evaluation.causes
    ]
    return lines


def comparison_lines(comparison: Comparison) -> list[str]:
    """Say how two models did on the same images, class by class, and how sure it is which is better."""
    first, second, gain = comparison.first.scores, comparison.second.scores, comparison.difference
    rows = [("class", "IoU", "against", "difference")]
    for one, other, (value, span) in zip(first.classes, second.classes, gain.classes, strict=True):
        if one.pixels:
            rows.append((one.name, spelled(one.iou), spelled(other.iou), points(value, span)))
    rows.append(
        (
            "mean IoU",
            spelled(first.mean_iou),
            spelled(second.mean_iou),
            points(gain.mean_iou, gain.interval),
        )
    )
    rows.append(
        ("pixel accuracy", spelled(first.pixel_accuracy), spelled(second.pixel_accuracy), "")
    )
    lines = [*_table(rows), f"{comparison.first.model} against {comparison.second.model}"]
    if gain.probability_better is not None:
        better = gain.probability_better
        sure = (
            "more than 99.9"
            if better > 0.9995
            else "less than 0.1"
            if better < 0.0005
            else f"{100 * better:.1f}"
        )
        lines.append(
            f"the first has the higher mean IoU with a probability of {sure} % on other such images"
        )
    lines.append(
        gain.note
        or f"in brackets: 95 % intervals, from {_drawn(gain.num_blocks, first.num_images)}"
    )
    return lines


def spelled(value: float, interval: Interval | None = None) -> str:
    """Format a score (0 to 1) and its interval in percent.

    >>> spelled(0.5204, Interval(0.478, 0.553)), spelled(float("nan"))
    ('52.0 % [47.8, 55.3]', '-')
    """
    if math.isnan(value):
        return "-"
    brackets = f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]" if interval else ""
    return f"{100 * value:.1f} %{brackets}"


def points(difference: float, interval: Interval | None) -> str:
    """Format the difference between two scores, and its interval, in percentage points.

    >>> points(0.01, Interval(-0.0204, 0.04)), points(float("nan"), None)
    ('+1.0 points [-2.0, +4.0]', '-')
    """
    if math.isnan(difference):
        return "-"
    brackets = f" [{100 * interval.low:+z.1f}, {100 * interval.high:+z.1f}]" if interval else ""
    return f"{100 * difference:+z.1f} points{brackets}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out rows, the first of which is the head: names to the left, numbers under their heads."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _drawn(num_blocks: int, num_images: int) -> str:
    return (
        counted(num_blocks, "image")
        if num_blocks == num_images
        else f"{counted(num_blocks, 'block')} of neighbouring images drawn together"
    )


def image_names(evaluation: Evaluation) -> list[str]:
    """Return what the images are called in a report: their paths below the folder that they have in common."""
    names = [pair_name(image.pair) for image in evaluation.images]
    common = (
        len(commonpath([Path(name).parent for name in names]).rstrip("/") + "/") if names else 0
    )
    return [name[common:] if common > 1 else name for name in names]


_FEW_IMAGES, _FEW_PIXELS = 3, 2000  # a class with fewer is too small to be judged


@dataclass(frozen=True)
class GalleryImage:
    """One image of the gallery.

    Args:
        reason: why it is shown, such as ``"worst"`` or ``"worst in Poles"``; may be empty.
        name: what it is called.
        mean_iou: over its own classes.
        ious: of each class, ``nan`` where it is not in the truth.
        image: ``(H, W, C)``.
        label: ``(H, W)``, as it was scored.
        prediction: ``(H, W)``.
    """

    reason: str
    name: str
    mean_iou: float
    ious: tuple[float, ...]
    image: NDArray[Any]
    label: Label
    prediction: Label


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
    cases: Sequence[GalleryImage] = ()
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
    drawn = (
        counted(found.num_blocks, "image")
        if alone
        else f"{counted(found.num_blocks, 'block')} of neighbouring images"
    )
    return f"On other images like these, the mean IoU would lie between {span(found.mean_iou).replace(' to ', ' and ')} % (95 % interval from {drawn})."


def caveats(
    evaluation: Evaluation,
    dataset: Dataset,
    provenance: Mapping[str, Any],
    twins: int | None = None,
) -> list[str]:
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


def _leaks(
    evaluation: Evaluation, dataset: Dataset, provenance: Mapping[str, Any], twins: int | None
) -> list[str]:
    found, split, here = [], evaluation.split, trained_here(dataset, provenance)
    if split in ("train", "all") and dataset.of("train") and (here or not provenance):
        found.append(
            "If the model was trained on this data set, these are pictures that it has seen: the scores measure memory."
        )
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
    found = [
        "The model kept is the one that scored best on these very pictures, and its temperature was fitted on them, which flatters it a little."
    ]
    if not dataset.splits_by.startswith("random") and _same_recordings(dataset, evaluation.split):
        found.append(
            "Training saw other parts of the same recordings, so expect lower scores on other places and other days."
        )
    return found


def _same_recordings(dataset: Dataset, split: str) -> bool:
    """Tell whether frames of a film or slices of a stack are on both sides, by their names."""
    if not is_film(dataset.pairs):
        return False
    return any(
        {"train", split} <= {pair.split for pair in sequence}
        for sequence in find_sequences(dataset.pairs)
    )


def _thin_evidence(evaluation: Evaluation) -> list[str]:
    found = []
    if evaluation.intervals and evaluation.intervals.note and evaluation.intervals.mean_iou:
        found.append(f"The intervals come {evaluation.intervals.note}.")
    held = (evaluation.tallies[:, 1] > 0).sum(0) if evaluation.images else np.zeros(0, np.int64)
    tiny = [
        f"{entry.name} ({counted(entry.pixels, 'pixel')} in {counted(int(held[entry.id]), 'image')})"
        for entry in evaluation.scores.classes
        if held.size
        and entry.pixels
        and (held[entry.id] < _FEW_IMAGES or entry.pixels < _FEW_PIXELS)
    ]
    if tiny:
        found.append(
            f"Too little of them to judge them by, yet each counts in the mean like any other class: {listed(tiny)}."
        )
    if evaluation.scores.absent:
        found.append(
            f"Not in the truth, so without a score and outside every mean: {listed(evaluation.scores.absent, 40)}."
        )
    return found


def worst_confusions(counts: Confusion, names: Sequence[str], most: int = 3) -> list[str]:
    """Put the worst confusions into words: those that take the largest share of their true class, as the mean IoU weighs them.

    >>> worst_confusions(np.array([[82, 18], [0, 9]]), ("Poles", "Buildings"))
    ['18 % of Poles pixels are called Buildings']
    """
    wrong = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    np.fill_diagonal(wrong, 0)
    # Of equal shares, the one with more pixels first.
    order = sorted(
        zip(*np.nonzero(wrong), strict=True), key=lambda pair: (-wrong[pair], -counts[pair])
    )
    return [
        f"{percent(float(wrong[k, j]), brief=True)} of {names[k]} pixels are called {names[j]}"
        for k, j in order[:most]
    ]


def size_words(sizes: Sizes) -> str:
    """Say how much is found of the things of each size.

    >>> from useg.scoring.regions import score_regions
    >>> size_words(score_regions(np.array([[[0, 10, 0, 4]], [[0, 2, 0, 3]], [[0, 50, 0, 900]], [[0, 9, 0, 700]]])))
    'Found are 20 % of 10 small regions and 75 % of 4 large regions.'
    """
    found = [
        f"{percent(size.found, brief=True)} of {counted(size.num_regions, size.size + ' region')}"
        for size in sizes.overall
        if size.num_regions
    ]
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
    vertical, horizontal = (
        ("top", "middle", "bottom")[3 * int(row) // rows],
        ("left", "centre", "right")[3 * int(column) // columns],
    )
    place = {"middle centre": "the centre"}.get(
        f"{vertical} {horizontal}", f"the {vertical} {horizontal}"
    )
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
    verdict = (
        "about as sure as it should be"
        if abs(gap) < 0.01
        else "surer than it is right"
        if gap > 0
        else "less sure than it is right"
    )
    said = [
        f"The model is {verdict}: on average it is {percent(found.confidence)} sure, and {percent(accuracy)} of the pixels are right. "
        f"Confidence and accuracy lie {percent(found.error)} apart (expected calibration error)."
    ]
    if found.temperature != 1:
        how = "made less sure of itself" if found.temperature > 1 else "made surer of itself"
        said.append(
            f"It was {how} after training: its logits are divided by {found.temperature:.2f} (the temperature), which changes no label."
        )
    if report.fitted_here:
        said.append(
            "The temperature was fitted on pixels of these same pictures, so this calibration error is a little too good, here and in JSON."
        )
    return said


def spread_words(evaluation: Evaluation) -> str:
    """Say how the single images did."""
    low, middle, high = spread(evaluation)
    return f"Half of the images lie between {percent(low)} and {percent(high)}; the median is {percent(middle)}."


def spread(evaluation: Evaluation) -> tuple[float, float, float]:
    """Return the quartiles of the images' mean IoU, ``nan`` where none has one."""
    values = [image.mean_iou for image in evaluation.images if not math.isnan(image.mean_iou)] or [
        math.nan
    ]
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return low, middle, high


def weakest(evaluation: Evaluation, most: int = 5) -> list[tuple[str, float]]:
    """Return names and mean IoU of the weakest images."""
    named = zip(
        image_names(evaluation), (image.mean_iou for image in evaluation.images), strict=True
    )
    return sorted(
        ((name, value) for name, value in named if not math.isnan(value)),
        key=lambda entry: entry[1],
    )[:most]


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
