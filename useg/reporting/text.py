"""Describe an evaluation in words: number formats, lines for a terminal, sentences for a report.

The terminal, the page and the Markdown (:mod:`useg.reporting.page`) share the sentences: what was
measured, and where the errors are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from useg.classes import ClassTable, Label
from useg.console import format_table
from useg.data.dataset import pair_name
from useg.errors import MAX_NAMES, format_count, join_names
from useg.scoring.metrics import ClassScore, Confusion, Sizes, error_rates
from useg.scoring.uncertainty import Interval

if TYPE_CHECKING:
    from useg.reporting.evaluation_result import Cause, Comparison, Evaluation

# Difference between mean confidence and accuracy up to which a model counts as calibrated.
_MAX_CONFIDENCE_GAP = 0.01


@dataclass(frozen=True)
class GalleryImage:
    """One image of the gallery.

    Args:
        reason: why it is shown, such as ``"worst"`` or ``"worst in Poles"``; may be empty.
        name: its name in the report.
        mean_iou: over the classes in it.
        ious: the IoU of each class; ``nan`` where the class has no true pixel.
        image: ``(H, W, C)``.
        label: ``(H, W)``, with ignored pixels as they were scored.
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
    """A command line to copy, and what it does."""

    text: str
    does: str


@dataclass(frozen=True)
class Report:
    """The content of an evaluation's report.

    Args:
        title: its heading.
        evaluation: the scores.
        classes: names and colours of the classes.
        gallery: images to show, highest mean IoU first.
        thumbnails: a small JPEG of each image of the evaluation, or none.
        log: rows of ``log.jsonl`` for the training curves, or none.
        facts: settings, seed, machine and versions that a reader needs to reproduce the scores.
        caveats: sentences that a reader must see before the scores.
        causes: why classes are weak, and remedies.
        commands: the exact command lines.
        temperature_fitted_here: the temperature was fitted on images of this evaluation.
    """

    title: str
    evaluation: Evaluation
    classes: ClassTable
    gallery: Sequence[GalleryImage] = ()
    thumbnails: Sequence[bytes] = ()
    log: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    caveats: Sequence[str] = ()
    causes: Sequence[Cause] = ()
    commands: Sequence[Command] = ()
    temperature_fitted_here: bool = False


def format_percent(share: float, brief: bool = False) -> str:
    """Format a share 0..1 as ``74.3 %``, or briefly as ``74 %``.

    ``nan`` becomes a dash, and a tiny share is not rounded to 0.

    >>> format_percent(0.7432), format_percent(0.7432, brief=True), format_percent(0.0002)
    ('74.3 %', '74 %', 'less than 0.1 %')
    """
    if math.isnan(share):
        return "–"  # noqa: RUF001
    if 0 < share < 0.0005:
        return "less than 0.1 %"
    return f"{100 * share:.{0 if brief and share >= 0.0995 else 1}f} %"


def format_percent_number(share: float) -> str:
    """Format a share 0..1 as percent without the sign, ``74.3``; ``nan`` becomes a dash."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}"  # noqa: RUF001


def format_interval(interval: Interval | None) -> str:
    """Format an interval of shares in percent; None becomes an empty string.

    >>> format_interval(Interval(0.4781, 0.5532))
    '47.8 to 55.3'
    """
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}" if interval else ""


def format_score(value: float, interval: Interval | None = None) -> str:
    """Format a score 0..1 and its interval in percent, for a terminal.

    >>> format_score(0.5204, Interval(0.478, 0.553)), format_score(float("nan"))
    ('52.0 % [47.8, 55.3]', '-')
    """
    if math.isnan(value):
        return "-"
    brackets = f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]" if interval else ""
    return f"{100 * value:.1f} %{brackets}"


def format_score_difference(difference: float, interval: Interval | None) -> str:
    """Format the difference between two scores, and its interval, in percentage points.

    >>> format_score_difference(0.01, Interval(-0.0204, 0.04))
    '+1.0 points [-2.0, +4.0]'
    """
    if math.isnan(difference):
        return "-"
    brackets = f" [{100 * interval.low:+z.1f}, {100 * interval.high:+z.1f}]" if interval else ""
    return f"{100 * difference:+z.1f} points{brackets}"


def to_sentence(text: str) -> str:
    """Return a clause as a sentence: capitalised, with a full stop.

    >>> to_sentence("few pixels"), to_sentence("Done.")
    ('Few pixels.', 'Done.')
    """
    stop = "" if not text or text.endswith((".", "!", "?")) else "."
    return text[:1].upper() + text[1:] + stop


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """Return the scores of an evaluation as lines for a terminal, with the likely causes."""
    scores, intervals, boundaries = (
        evaluation.scores,
        evaluation.intervals,
        evaluation.boundaries,
    )
    assert intervals is not None
    assert boundaries is not None
    count = format_count(len(scores.classes) - len(scores.absent), "class", "classes")
    lines = [
        *_class_table(evaluation),
        f"mean IoU {format_score(scores.mean_iou, intervals.mean_iou)}, "
        f"mean Dice {format_score(scores.mean_dice)}, over {count}",
        f"pixel accuracy {format_score(scores.pixel_accuracy, intervals.pixel_accuracy)}, "
        f"over {format_count(scores.num_images, 'image')}",
        f"frequency-weighted IoU {format_score(scores.frequency_weighted_iou)}, "
        f"micro IoU (all pixels pooled) {format_score(scores.micro_iou)}",
        f"mean boundary IoU {format_score(boundaries.mean_boundary_iou)}, "
        f"mean boundary F {format_score(boundaries.mean_boundary_f)}",
    ]
    if calibration := evaluation.calibration:
        lines.append(
            f"expected calibration error {format_score(calibration.error)}, mean confidence "
            f"{format_score(calibration.confidence)}, temperature {calibration.temperature:.2f}"
        )
    if objects := evaluation.objects:
        lines.append(
            f"objects: F1 {format_score(objects.f1)} at IoU 0.5 ({objects.matched} of "
            f"{objects.num_true} true objects matched, {objects.num_predicted} predicted, "
            f"{objects.merged} merged, {objects.split} split)"
        )
    lines += [sentence for each in _object_scores(evaluation) for sentence in each]
    if errors := evaluation.membranes:
        lines.append(
            f"membranes: warping error {errors.warping_error:.6f}, "
            f"Rand error {errors.rand_error:.4f}, pixel error {errors.pixel_error:.4f}"
        )
    if scores.absent:
        lines.append(
            "not in the ground truth, so not scored and not part of any mean: "
            + ", ".join(scores.absent)
        )
    lines.append(
        intervals.note or _interval_legend(intervals.num_blocks, evaluation.scores.num_images)
    )
    lines += [f"note: {note}" for note in evaluation.notes]
    return lines + [
        f"likely cause: {cause.message} ({cause.evidence}); what to do: {cause.remedy}"
        for cause in evaluation.causes
    ]


class ClassRow(NamedTuple):
    """The scores of one class, as every table of classes shows them.

    Args:
        score: name, pixels and IoU of the class.
        interval: 95 % interval of the IoU, if there is one.
        values: the scores that :func:`class_headings` names, in ``[0, 1]``.
    """

    score: ClassScore
    interval: Interval | None
    values: tuple[float, ...]


def class_headings(evaluation: Evaluation) -> tuple[str, ...]:
    """Return the names of the scores after the IoU in a table of classes."""
    of_boundaries = ("boundary IoU", "boundary F", "thin recall") if evaluation.boundaries else ()
    return ("Dice", "precision", "recall", *of_boundaries)


def class_rows(evaluation: Evaluation) -> Iterator[ClassRow]:
    """Yield a row for each class in the ground truth."""
    classes = evaluation.scores.classes
    intervals = evaluation.intervals.classes if evaluation.intervals else (None,) * len(classes)
    boundaries = evaluation.boundaries.classes if evaluation.boundaries else (None,) * len(classes)
    for score, interval, boundary in zip(classes, intervals, boundaries, strict=True):
        if not score.pixels:
            continue
        values: tuple[float, ...] = (score.dice, score.precision, score.recall)
        if boundary:
            values += (boundary.boundary_iou, boundary.boundary_f, boundary.thin_recall)
        yield ClassRow(score, interval, values)


def _class_table(evaluation: Evaluation) -> list[str]:
    """Return a table with the scores of each class in the ground truth."""
    return format_table(
        ("class", "IoU", *class_headings(evaluation)),
        [
            (
                row.score.name,
                format_score(row.score.iou, row.interval),
                *(format_score(value) for value in row.values),
            )
            for row in class_rows(evaluation)
        ],
    )


def comparison_lines(comparison: Comparison) -> list[str]:
    """Return the comparison of two models as lines for a terminal."""
    first, second, gain = comparison.first.scores, comparison.second.scores, comparison.difference
    rows: list[tuple[str, ...]] = []
    for one, other, (value, interval) in zip(
        first.classes, second.classes, gain.classes, strict=True
    ):
        if one.pixels:
            difference = format_score_difference(value, interval)
            rows.append((one.name, format_score(one.iou), format_score(other.iou), difference))
    ious = (format_score(scores.mean_iou) for scores in (first, second))
    rows.append(("mean IoU", *ious, format_score_difference(gain.mean_iou, gain.interval)))
    accuracies = (format_score(scores.pixel_accuracy) for scores in (first, second))
    rows.append(("pixel accuracy", *accuracies, ""))
    lines = [
        *format_table(("class", "IoU of first", "IoU of second", "difference"), rows),
        f"first model: {comparison.first.model}",
        f"second model: {comparison.second.model}",
    ]
    if gain.probability_better is not None:
        lines.append(
            "on other images like these, the first model has the higher mean IoU "
            f"with a probability of {_format_probability(gain.probability_better)}"
        )
    lines.append(gain.note or _interval_legend(gain.num_blocks, first.num_images))
    return lines + [f"note: {note}" for note in comparison.first.notes]


def _format_probability(probability: float) -> str:
    if probability > 0.9995:
        return "more than 99.9 %"
    return format_percent(probability) if probability else "less than 0.1 %"


def _interval_legend(num_blocks: int, num_images: int) -> str:
    return f"in brackets: 95 % intervals from {_format_blocks(num_blocks, num_images)}"


def _format_blocks(num_blocks: int, num_images: int) -> str:
    if num_blocks == num_images:
        return format_count(num_blocks, "image")
    return f"{format_count(num_blocks, 'block')} of neighbouring images"


def image_names(evaluation: Evaluation) -> list[str]:
    """Return the names of the images in a report: their paths below their common folder."""
    names = [pair_name(image.pair) for image in evaluation.images]
    if not names:
        return []
    common = len(commonpath([Path(name).parent for name in names]).rstrip("/") + "/")
    return [name[common:] if common > 1 else name for name in names]


def dataset_sentence(evaluation: Evaluation) -> str:
    """Say which images were measured."""
    split = "" if evaluation.split == "all" else f" in the split “{evaluation.split}”"
    count = format_count(evaluation.scores.num_images, "image")
    return f"Measured on {count}{split} of {evaluation.dataset}, at native resolution."


def interval_sentence(evaluation: Evaluation) -> str:
    """Give the 95 % interval of the mean IoU, or say why there is none."""
    intervals = evaluation.intervals
    if intervals is None:
        return ""
    if intervals.mean_iou is None:
        return to_sentence(intervals.note)
    limits = format_interval(intervals.mean_iou).replace(" to ", " and ")
    blocks = _format_blocks(intervals.num_blocks, evaluation.scores.num_images)
    return (
        f"On other images like these, the mean IoU would lie between {limits} % "
        f"(95 % interval from {blocks})."
    )


def confusion_sentences(counts: Confusion, names: Sequence[str], most: int = 3) -> list[str]:
    """Describe the confusions that affect the largest share of their true class.

    >>> confusion_sentences(np.array([[82, 18], [0, 9]]), ("Poles", "Buildings"))
    ['18 % of Poles pixels are predicted as Buildings']
    """
    wrong = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    np.fill_diagonal(wrong, 0)
    # Of equal shares, the one with more pixels comes first.
    order = sorted(
        zip(*np.nonzero(wrong), strict=True), key=lambda pair: (-wrong[pair], -counts[pair])
    )
    return [
        f"{format_percent(float(wrong[k, j]), brief=True)} of {names[k]} pixels are predicted as "
        f"{names[j]}"
        for k, j in order[:most]
    ]


def size_sentence(sizes: Sizes) -> str:
    """Say which share of the regions of each size the model found.

    >>> from useg.scoring.metrics import score_regions
    >>> size_sentence(score_regions(np.array([[[0, 10, 0, 4]], [[0, 2, 0, 3]]] * 2)))
    'The model found 20 % of 10 small regions and 75 % of 4 large regions.'
    """
    found = [
        f"{format_percent(size.found, brief=True)} of "
        f"{format_count(size.num_regions, size.size + ' region')}"
        for size in sizes.overall
        if size.num_regions
    ]
    return f"The model found {join_names(found, MAX_NAMES)}."


def format_size_bound(up_to: float) -> str:
    """Format the largest area of a region of some size.

    >>> format_size_bound(0.0001), format_size_bound(1.0)
    ('up to 0.01 % of the image', 'larger')
    """
    return "larger" if up_to >= 1 else f"up to {100 * up_to:g} % of the image"


def position_sentence(evaluation: Evaluation) -> str:
    """Say where in the image errors are most frequent."""
    assert evaluation.places is not None
    rates = error_rates(evaluation.places)
    if np.isnan(rates).all():
        return "No pixel was scored."
    row, column = np.unravel_index(np.nanargmax(rates), rates.shape)
    vertical = ("top", "middle", "bottom")[3 * int(row) // rates.shape[0]]
    horizontal = ("left", "centre", "right")[3 * int(column) // rates.shape[1]]
    place = f"{vertical} {horizontal}".replace("middle centre", "centre")
    highest, lowest = (
        format_percent(float(rate), brief=True) for rate in (np.nanmax(rates), np.nanmin(rates))
    )
    return (
        f"Errors are most frequent at the {place}: {highest} of the pixels in that cell are "
        f"wrong, compared with {lowest} in the best cell."
    )


def calibration_sentences(report: Report) -> list[str]:
    """Say whether the confidence of the model matches its accuracy."""
    calibration = report.evaluation.calibration
    if calibration is None or math.isnan(calibration.error):
        return []
    accuracy = report.evaluation.scores.pixel_accuracy
    gap = calibration.confidence - accuracy
    state = "overconfident" if gap > 0 else "underconfident"
    if abs(gap) < _MAX_CONFIDENCE_GAP:
        state = "neither overconfident nor underconfident on average"
    sentences = [
        f"The model is {state}: its mean confidence is {format_percent(calibration.confidence)}, "
        f"and {format_percent(accuracy)} of the pixels are correct. "
        f"The expected calibration error is {format_percent(calibration.error)}."
    ]
    if calibration.temperature != 1:
        change = "lowered" if calibration.temperature > 1 else "raised"
        sentences.append(
            f"Temperature scaling after training {change} its confidence: the logits are divided "
            f"by {calibration.temperature:.2f}, which changes no predicted class."
        )
    if report.temperature_fitted_here:
        sentences.append(
            "The temperature was fitted on these images, so this calibration error is slightly "
            "too low, here and in the JSON file."
        )
    return sentences


def quartile_sentence(evaluation: Evaluation) -> str:
    """Give the quartiles of the images' mean IoU."""
    low, median, high = (format_percent(value) for value in iou_quartiles(evaluation))
    return f"Half of the images score between {low} and {high}; the median is {median}."


def iou_quartiles(evaluation: Evaluation) -> tuple[float, float, float]:
    """Return the quartiles of the images' mean IoU; ``nan`` if no image has one."""
    values = [image.mean_iou for image in evaluation.images if not math.isnan(image.mean_iou)]
    low, median, high = (
        float(value) for value in np.quantile(values or [math.nan], (0.25, 0.5, 0.75))
    )
    return low, median, high


def lowest_iou_images(evaluation: Evaluation) -> list[tuple[str, float]]:
    """Return name and mean IoU of the five images with the lowest mean IoU."""
    ious = (image.mean_iou for image in evaluation.images)
    named = zip(image_names(evaluation), ious, strict=True)
    scored = [entry for entry in named if not math.isnan(entry[1])]
    return sorted(scored, key=lambda entry: entry[1])[:5]


def object_sentences(evaluation: Evaluation) -> list[str]:
    """Give the scores of objects and of membranes, if they were measured."""
    sentences = [" ".join(each) for each in _object_scores(evaluation)]
    if objects := evaluation.objects:
        sentences.append(
            f"F1 {format_percent(objects.f1)} at IoU 0.5: {objects.matched:,} of "
            f"{format_count(objects.num_true, 'true object')} matched, "
            f"{format_count(objects.num_predicted, 'object')} predicted. "
            f"{format_count(objects.merged, 'prediction covers', 'predictions cover')} several "
            f"true objects, and {format_count(objects.split, 'true object is', 'true objects are')}"
            " split into several predictions."
        )
    if errors := evaluation.membranes:
        sentences.append(
            f"Membrane errors as in the ISBI 2012 challenge: warping error "
            f"{errors.warping_error:.6f}, Rand error {errors.rand_error:.4f}, pixel error "
            f"{errors.pixel_error:.4f}. Lower is better."
        )
    return sentences


def _object_scores(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Give the scores of the objects that the truth distinguishes, in two sentences each."""
    several = len(evaluation.object_scores) > 2
    found = []
    for name, scores in evaluation.object_scores.items():
        if name and not several:
            continue
        within = scores.intervals
        what = f"Objects of {name}" if name else "Objects"
        found.append(
            (
                f"{what}: AP {format_score(scores.ap50, within['ap50'])} at IoU 0.5, "
                f"{format_score(scores.mean_ap, within['mean_ap'])} from 0.5 to 0.95; "
                f"F1 {format_score(scores.f1, within['f1'])}; panoptic quality "
                f"{format_score(scores.panoptic_quality, within['panoptic_quality'])}.",
                f"{format_count(scores.num_predicted, 'object')} predicted, "
                f"{scores.num_true:,} true; the number per image differs by "
                f"{scores.count_bias:+.2f} on average, by {scores.count_error:.2f} in absolute "
                "value. "
                f"{format_count(scores.merged, 'prediction joins', 'predictions join')} several "
                f"true objects, {format_count(scores.split, 'true object is', 'true objects are')} "
                "split.",
            )
        )
    return found
