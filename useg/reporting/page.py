"""A report -> one self-contained HTML page: scores with what could make them wrong, pictures to wipe, where it goes wrong, every image."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from useg.classes import IGNORE, ClassTable, palette
from useg.pictures import IGNORED_COLOR, RIGHT_COLOR, WRONG_COLOR, curves_svg, shares, to_picture
from useg.reporting import text
from useg.reporting.html import (
    Shot,
    data_url,
    flat,
    image_ious,
    photo,
    places_svg,
    reliability_svg,
    write_page,
)
from useg.reporting.text import GalleryImage, Report, image_names
from useg.scoring.metrics import Confusion
from useg.scoring.regions import error_rates

if TYPE_CHECKING:
    from useg.reporting.evaluate import Evaluation

_LARGEST_MATRIX = 24  # classes; a larger confusion matrix is no longer read by eye


_MOST_TICKS = 300


_VERDICTS = ((RIGHT_COLOR, "correct"), (WRONG_COLOR, "wrong"), (IGNORED_COLOR, "ignored"))


def write_report(path: Path, report: Report) -> None:
    """Write the page of an evaluation.

    Args:
        path: the ``.html`` file; it appears whole or not at all.
        report: what to tell.

    Raises:
        UsageError: ``path`` cannot be written.
    """
    from markupsafe import (
        Markup,  # only numbers enter the drawings, so they are safe to embed as they are
    )

    evaluation, table = report.evaluation, report.table
    scores = evaluation.scores
    calibration, counts = evaluation.calibration, evaluation.places
    rates = error_rates(counts) if counts is not None and counts.any() else None
    write_page(
        path,
        "report.html",
        title=report.title,
        kind="evaluation",
        report=report,
        story=text,
        evaluation=evaluation,
        scores=scores,
        rows=_class_rows(evaluation, table),
        matrix=_matrix(evaluation.counts, table),
        confusions=text.worst_confusions(evaluation.counts, table.names),
        cases=[(case, _present(case.ious), _shots(case, table)) for case in report.cases],
        palette=json.dumps(
            [[name, *color] for name, color in zip(table.names, table.colors, strict=True)]
        ),
        seen=_seen(report),
        findable=sorted(
            {
                k
                for case in report.cases
                for k, value in enumerate(case.ious)
                if not math.isnan(value)
            }
        ),
        verdicts=_VERDICTS,
        sizes=_sizes(evaluation, table),
        places=None if rates is None else Markup(places_svg(rates)),
        highest=0 if rates is None else float(np.nanmax(rates)),
        reliability=Markup(reliability_svg(calibration))
        if calibration and calibration.curve
        else None,
        spread=_spread(evaluation),
        images=_images(report),
        curves=[Markup(sheet) for sheet in curves_svg(report.log)] if report.log else [],
    )


def _class_rows(evaluation: Evaluation, table: ClassTable) -> list[dict[str, Any]]:
    """What the table of classes shows, a row for each that is in the truth."""
    total = sum(entry.pixels for entry in evaluation.scores.classes)
    spans = evaluation.intervals.classes if evaluation.intervals else repeat(None)
    edges = evaluation.boundaries.classes if evaluation.boundaries else repeat(None)
    return [
        {
            "score": entry, "color": table.colors[entry.id], "span": span, "share": entry.pixels / total,
            "values": [entry.dice, entry.precision, entry.recall, *((edge.boundary_iou, edge.boundary_f, edge.thin_recall) if edge else ())],
        }
        for entry, span, edge in zip(evaluation.scores.classes, spans, edges, strict=False)
        if entry.pixels
    ]  # fmt: skip


def _matrix(counts: Confusion, table: ClassTable) -> dict[str, Any] | None:
    """The confusion matrix as shares of each true class, without classes that neither occur nor are predicted."""
    used = np.flatnonzero(counts.sum(0) + counts.sum(1))
    if not 1 < len(used) <= _LARGEST_MATRIX:
        return None
    part = counts[np.ix_(used, used)]
    shown = part / np.maximum(part.sum(1, keepdims=True), 1)
    kept = [k for k, row in enumerate(part) if row.sum()]
    names = [table.names[k] for k in used]
    return {"names": names, "rows": [(names[k], k, shown[k].tolist()) for k in kept]}


def _shots(case: GalleryImage, table: ClassTable) -> list[Shot]:
    """Image, truth, prediction and errors of a case."""
    colors = palette(table)
    colors[len(table) :] = IGNORED_COLOR
    verdicts = np.array(
        [color for color, _ in _VERDICTS] + [IGNORED_COLOR] * (256 - len(_VERDICTS)), np.uint8
    )
    errors = np.where(case.label == IGNORE, 2, case.prediction != case.label).astype(np.uint8)
    maps = (
        ("truth", case.label, colors),
        ("prediction", case.prediction, colors),
        ("errors", errors, verdicts),
    )
    return [photo("image", to_picture(case.image)), *(flat(*entry) for entry in maps)]


def _present(ious: Sequence[float]) -> str:
    """Write the IoUs of the classes that an image has as JSON: ``{"3": 0.5213}``."""
    return json.dumps(
        {k: round(value, 4) for k, value in enumerate(ious) if not math.isnan(value)},
        separators=(",", ":"),
    )


def _seen(report: Report) -> list[int]:
    """The classes in the pictures of the gallery."""
    return sorted(
        set[int]().union(
            *(
                shares(part, report.table)
                for case in report.cases
                for part in (case.label, case.prediction)
            )
        )
    )


def _sizes(evaluation: Evaluation, table: ClassTable) -> list[dict[str, Any]]:
    """The table of regions by size: all together, then each class."""
    if evaluation.sizes is None:
        return []
    rows: list[dict[str, Any]] = [
        {"name": "All classes", "color": None, "sizes": evaluation.sizes.overall}
    ]
    rows += [
        {"name": table.names[k], "color": table.colors[k], "sizes": sizes}
        for k, sizes in enumerate(evaluation.sizes.classes)
    ]
    return [row for row in rows if any(size.num_regions for size in row["sizes"])]


def _spread(evaluation: Evaluation) -> dict[str, Any] | None:
    """How the single images did: the quartiles, and tick positions 0..1."""
    values = np.array(
        [image.mean_iou for image in evaluation.images if not math.isnan(image.mean_iou)]
    )
    if len(values) < 2:
        return None
    low, middle, high = text.spread(evaluation)
    ticks = (
        values
        if len(values) <= _MOST_TICKS
        else np.quantile(values, np.linspace(0, 1, _MOST_TICKS))
    )
    return {"low": low, "middle": middle, "high": high, "ticks": ticks.tolist()}


def _images(report: Report) -> list[dict[str, Any]]:
    """Every image, weakest first: name, mean IoU, the IoU of each of its classes, and its small picture."""
    evaluation = report.evaluation
    sources = [data_url(content, "jpeg") for content in report.thumbnails] or [""] * len(
        evaluation.images
    )
    rows = [
        {
            "name": name, "mean_iou": image.mean_iou, "source": source,
            "ious": _present(image_ious(image)),
        }
        for name, image, source in zip(image_names(evaluation), evaluation.images, sources, strict=True)
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (math.isnan(row["mean_iou"]), row["mean_iou"]))
