"""Write the report of an evaluation: an HTML page that needs no other file, and Markdown.

A :class:`useg.reporting.text.Report` comes in; the page shows its scores and caveats, a gallery,
the classes, the errors by size and position, the calibration and every image. The Markdown has the
tables and sentences of the page, without pictures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from useg.classes import IGNORE, ClassTable, palette
from useg.files import replacing
from useg.ownership import is_own_markdown, stamp
from useg.parsing import printable
from useg.reporting import text
from useg.reporting.html import (
    EmbeddedPicture,
    data_url,
    embed_class_map,
    embed_photo,
    error_map_svg,
    escape_markdown,
    format_markdown_table,
    image_ious,
    reliability_curve_svg,
    write_page,
)
from useg.reporting.text import (
    GalleryImage,
    Report,
    format_interval,
    format_percent,
    format_percent_number,
    image_names,
    to_sentence,
)
from useg.scoring.metrics import Confusion, Sizes, error_rates
from useg.visualization import (
    CORRECT_COLOR,
    IGNORED_COLOR,
    WRONG_COLOR,
    curves_svg,
    label_shares,
    to_picture,
)

if TYPE_CHECKING:
    from useg.reporting.evaluation_result import Cause, Evaluation

# A larger confusion matrix is unreadable.
_MAX_MATRIX_CLASSES = 24

# One tick per image; beyond this number, quantiles represent the images.
_MAX_TICKS = 300

# The error map of an image holds indices into this table.
_ERROR_COLORS = ((CORRECT_COLOR, "correct"), (WRONG_COLOR, "wrong"), (IGNORED_COLOR, "ignored"))


def write_report(path: Path, report: Report) -> None:
    """Write the page of an evaluation.

    Args:
        path: the ``.html`` file. It is replaced as a whole, or not at all.
        report: the content.

    Raises:
        UsageError: ``path`` cannot be written.
    """
    # The drawings contain only numbers and fixed words, so they need no escaping.
    from markupsafe import Markup

    evaluation, classes = report.evaluation, report.classes
    calibration, grid = evaluation.calibration, evaluation.places
    rates = error_rates(grid) if grid is not None and grid.any() else None
    curve = reliability_curve_svg(calibration) if calibration and calibration.curve else None
    write_page(
        path,
        "report.html",
        title=report.title,
        kind="evaluation",
        report=report,
        text=text,
        evaluation=evaluation,
        scores=evaluation.scores,
        rows=list(text.class_rows(evaluation)),
        matrix=_confusion_matrix(evaluation.counts, classes),
        confusions=text.confusion_sentences(evaluation.counts, classes.names),
        gallery=[
            (image, _ious_as_json(image.ious), _embed_pictures(image, classes))
            for image in report.gallery
        ],
        palette=json.dumps(
            [[name, *color] for name, color in zip(classes.names, classes.colors, strict=True)]
        ),
        legend_ids=_legend_ids(report),
        filter_ids=_filter_ids(report),
        error_colors=_ERROR_COLORS,
        sizes=_size_rows(evaluation, classes),
        error_map=None if rates is None else Markup(error_map_svg(rates)),
        highest_error_rate=0 if rates is None else float(np.nanmax(rates)),
        reliability=curve and Markup(curve),
        distribution=_iou_distribution(evaluation),
        images=_image_rows(report),
        curves=[Markup(sheet) for sheet in curves_svg(report.log)] if report.log else [],
    )


def _confusion_matrix(counts: Confusion, classes: ClassTable) -> dict[str, Any] | None:
    """Return the confusion matrix as shares of each true class, without unused classes."""
    used = np.flatnonzero(counts.sum(0) + counts.sum(1))
    if not 1 < len(used) <= _MAX_MATRIX_CLASSES:
        return None
    part = counts[np.ix_(used, used)]
    shown = part / np.maximum(part.sum(1, keepdims=True), 1)
    names = [classes.names[k] for k in used]
    rows = [(names[k], k, shown[k].tolist()) for k, row in enumerate(part) if row.sum()]
    return {"names": names, "rows": rows}


def _embed_pictures(image: GalleryImage, classes: ClassTable) -> list[EmbeddedPicture]:
    """Return the image, its ground truth, its prediction and its errors."""
    class_colors = palette(classes)
    class_colors[len(classes) :] = IGNORED_COLOR
    error_colors = np.full((256, 3), IGNORED_COLOR, np.uint8)
    error_colors[: len(_ERROR_COLORS)] = [color for color, _ in _ERROR_COLORS]
    errors = np.where(image.label == IGNORE, 2, image.prediction != image.label).astype(np.uint8)
    return [
        embed_photo("image", to_picture(image.image)),
        embed_class_map("truth", image.label, class_colors),
        embed_class_map("prediction", image.prediction, class_colors),
        embed_class_map("errors", errors, error_colors),
    ]


def _ious_as_json(ious: Sequence[float]) -> str:
    """Return the IoU of each class in an image, ``{"3": 0.5213}``; absent classes are omitted."""
    return json.dumps(
        {k: round(value, 4) for k, value in enumerate(ious) if not math.isnan(value)},
        separators=(",", ":"),
    )


def _legend_ids(report: Report) -> list[int]:
    """Return the classes that the gallery shows, in the ground truth or in a prediction."""
    ids: set[int] = set()
    for image in report.gallery:
        for label in (image.label, image.prediction):
            ids.update(label_shares(label, report.classes))
    return sorted(ids)


def _filter_ids(report: Report) -> list[int]:
    """Return the classes in the ground truth of the gallery."""
    ids: set[int] = set()
    for image in report.gallery:
        ids.update(k for k, value in enumerate(image.ious) if not math.isnan(value))
    return sorted(ids)


def _size_rows(evaluation: Evaluation, classes: ClassTable) -> list[dict[str, Any]]:
    """Return the rows of the table of region sizes: all classes together, then each class."""
    if evaluation.sizes is None:
        return []
    rows: list[dict[str, Any]] = [
        {"name": "All classes", "color": None, "sizes": evaluation.sizes.overall}
    ]
    rows += [
        {"name": classes.names[k], "color": classes.colors[k], "sizes": sizes}
        for k, sizes in enumerate(evaluation.sizes.classes)
    ]
    return [row for row in rows if any(size.num_regions for size in row["sizes"])]


def _iou_distribution(evaluation: Evaluation) -> dict[str, Any] | None:
    """Return the quartiles of the images' mean IoU, and ticks that show the images, 0..1."""
    values = np.array(
        [image.mean_iou for image in evaluation.images if not math.isnan(image.mean_iou)]
    )
    if len(values) < 2:
        return None
    low, median, high = text.iou_quartiles(evaluation)
    if len(values) > _MAX_TICKS:
        values = np.quantile(values, np.linspace(0, 1, _MAX_TICKS))
    return {"low": low, "median": median, "high": high, "ticks": values.tolist()}


def _image_rows(report: Report) -> list[dict[str, Any]]:
    """Return every image, lowest mean IoU first: name, mean IoU, IoU of each class, thumbnail."""
    images = report.evaluation.images
    sources = [data_url(content, "jpeg") for content in report.thumbnails] or [""] * len(images)
    rows = [
        {
            "name": name,
            "mean_iou": image.mean_iou,
            "source": source,
            "ious": _ious_as_json(image_ious(image)),
        }
        for name, image, source in zip(image_names(report.evaluation), images, sources, strict=True)
    ]
    return sorted(rows, key=lambda row: (math.isnan(row["mean_iou"]), row["mean_iou"]))


def write_markdown(path: Path, report: Report) -> None:
    """Write the report of an evaluation as Markdown.

    Args:
        path: the file. It is replaced as a whole, or not at all.
        report: the content.

    Raises:
        UsageError: ``path`` cannot be written.
    """
    content = printable("\n\n".join(_markdown_blocks(report)))
    with replacing(path, is_own_markdown) as draft:
        draft.write_text(stamp(f"{content}\n\n"), "utf-8")


def _markdown_blocks(report: Report) -> Iterator[str]:
    """Yield headings, tables and lists, in the order of the page."""
    evaluation = report.evaluation
    yield f"# {escape_markdown(report.title)}"
    yield escape_markdown(text.dataset_sentence(evaluation))
    yield _scores_table(evaluation)
    if interval := text.interval_sentence(evaluation):
        yield interval
    yield from _list_section("Before you trust these numbers", report.caveats)
    causes = [_cause_sentences(cause) for cause in report.causes]
    yield from _list_section("Likely causes of low scores", causes)
    yield "## Classes"
    yield "Scores are in percent."
    yield _class_table(evaluation)
    confusions = text.confusion_sentences(evaluation.counts, report.classes.names)
    yield from _list_section("Worst confusions", confusions)
    if evaluation.sizes:
        yield "## Errors by size"
        yield text.size_sentence(evaluation.sizes)
        yield _size_table(evaluation.sizes)
    if evaluation.places is not None:
        yield from _list_section("Errors by position", [text.position_sentence(evaluation)])
    yield from _list_section("Calibration", text.calibration_sentences(report))
    yield from _list_section("Objects", text.object_sentences(evaluation))
    if len(evaluation.images) > 1:
        lowest = [
            f"{format_percent(value)}: {name}" for name, value in text.lowest_iou_images(evaluation)
        ]
        sentences = [text.quartile_sentence(evaluation), *lowest]
        yield from _list_section("Images with the lowest IoU", sentences)
    facts = {"Model": evaluation.model, **report.facts}
    yield from _list_section(
        "How to reproduce this", [f"{key}: {value}" for key, value in facts.items()]
    )
    if report.commands:
        lines = [f"{command.text}   # {command.does}" for command in report.commands]
        yield "\n".join(["```sh", *lines, "```"])


def _scores_table(evaluation: Evaluation) -> str:
    scores, intervals = evaluation.scores, evaluation.intervals
    mean_iou = intervals.mean_iou if intervals else None
    pixel_accuracy = intervals.pixel_accuracy if intervals else None
    rows = [
        ("mean IoU", scores.mean_iou, mean_iou),
        ("pixel accuracy", scores.pixel_accuracy, pixel_accuracy),
        ("mean Dice", scores.mean_dice, None),
    ]
    if boundaries := evaluation.boundaries:
        rows += [
            ("mean boundary IoU", boundaries.mean_boundary_iou, None),
            ("mean boundary F", boundaries.mean_boundary_f, None),
        ]
    return format_markdown_table(
        ("score", "%", "95 % interval"),
        [
            (name, format_percent_number(value), format_interval(interval))
            for name, value, interval in rows
        ],
    )


def _class_table(evaluation: Evaluation) -> str:
    return format_markdown_table(
        ("class", "IoU", "95 % interval", *text.class_headings(evaluation), "pixels"),
        [
            (
                row.score.name,
                format_percent_number(row.score.iou),
                format_interval(row.interval),
                *(format_percent_number(value) for value in row.values),
                f"{row.score.pixels:,}",
            )
            for row in text.class_rows(evaluation)
        ],
    )


def _size_table(sizes: Sizes) -> str:
    return format_markdown_table(
        ("size", "area", "regions", "found, %", "pixels found, %"),
        [
            (
                size.size,
                text.format_size_bound(size.up_to),
                f"{size.num_regions:,}",
                format_percent_number(size.found),
                format_percent_number(size.recall),
            )
            for size in sizes.overall
        ],
    )


def _cause_sentences(cause: Cause) -> str:
    return (
        f"{to_sentence(cause.message)} {to_sentence(cause.evidence)} "
        f"What to do: {to_sentence(cause.remedy)}"
    )


def _list_section(heading: str, entries: Sequence[str]) -> Iterator[str]:
    """Yield a heading and a list, or nothing if there are no entries."""
    if entries:
        yield f"## {heading}"
        yield "\n".join(f"- {escape_markdown(entry)}" for entry in entries)
