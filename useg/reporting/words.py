"""An evaluation or a comparison -> lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from useg.reporting.evaluate import Comparison, Evaluation
from useg.reporting.spelling import counted
from useg.scoring.intervals import Interval


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """Say in a table and some lines what was measured: every score by its full name, what was left out, and what limits it."""
    scores, spans, edges = evaluation.scores, evaluation.intervals, evaluation.boundaries
    assert spans is not None
    assert edges is not None
    rows: list[tuple[str, ...]] = [("class", "IoU", "Dice", "precision", "recall", "boundary IoU", "boundary F", "recall of thin parts")]
    for entry, span, edge in zip(scores.classes, spans.classes, edges.classes, strict=True):
        if entry.pixels:
            values = (entry.dice, entry.precision, entry.recall, edge.boundary_iou, edge.boundary_f, edge.thin_recall)
            rows.append((entry.name, spelled(entry.iou, span), *(spelled(value) for value in values)))
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
        lines.append(f"calibration error {spelled(found.error)}: mean confidence {spelled(found.confidence)} at temperature {found.temperature:.2f}")
    if evaluation.objects:
        things = evaluation.objects
        lines.append(
            f"objects: F1 {spelled(things.f1)} at IoU 0.5 ({things.matched} matched of {things.num_true} true and {things.num_predicted} predicted; "
            f"{things.merged} merged, {things.split} split)"
        )
    if evaluation.membranes:
        errors = evaluation.membranes
        lines.append(f"warping error {errors.warping_error:.6f}, Rand error {errors.rand_error:.4f}, pixel error {errors.pixel_error:.4f}")
    if scores.absent:
        lines.append(f"absent from the truth and left out of the means: {', '.join(scores.absent)}")
    lines.append(spans.note or f"in brackets: 95 % intervals, from {_drawn(spans.num_blocks, scores.num_images)}")
    lines += [f"why: {cause.message} ({cause.evidence}); {cause.remedy}" for cause in evaluation.causes]
    return lines


def comparison_lines(comparison: Comparison) -> list[str]:
    """Say how two models did on the same images, class by class, and how sure it is which is better."""
    first, second, gain = comparison.first.scores, comparison.second.scores, comparison.difference
    rows = [("class", "IoU", "against", "difference")]
    for one, other, (value, span) in zip(first.classes, second.classes, gain.classes, strict=True):
        if one.pixels:
            rows.append((one.name, spelled(one.iou), spelled(other.iou), points(value, span)))
    rows.append(("mean IoU", spelled(first.mean_iou), spelled(second.mean_iou), points(gain.mean_iou, gain.interval)))
    rows.append(("pixel accuracy", spelled(first.pixel_accuracy), spelled(second.pixel_accuracy), ""))
    lines = [*_table(rows), f"{comparison.first.model} against {comparison.second.model}"]
    if gain.probability_better is not None:
        better = gain.probability_better
        sure = "more than 99.9" if better > 0.9995 else "less than 0.1" if better < 0.0005 else f"{100 * better:.1f}"
        lines.append(f"the first has the higher mean IoU with a probability of {sure} % on other such images")
    lines.append(gain.note or f"in brackets: 95 % intervals, from {_drawn(gain.num_blocks, first.num_images)}")
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
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _drawn(num_blocks: int, num_images: int) -> str:
    return counted(num_blocks, "image") if num_blocks == num_images else f"{counted(num_blocks, 'block')} of neighbouring images drawn together"
