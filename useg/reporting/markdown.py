"""A report -> the same in Markdown: tables and sentences, no pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from useg.files import replacing
from useg.reporting import story
from useg.reporting.spelling import number, percent, sentence, span
from useg.reporting.story import Report

if TYPE_CHECKING:  # torch comes with it
    from useg.reporting.cause import Cause


def write_markdown(path: Path, report: Report) -> None:
    """Write the report of an evaluation as Markdown; arguments and errors as for :func:`useg.reporting.report.write_report`."""
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join(_parts(report)) + "\n", "utf-8")


def _parts(report: Report) -> Iterator[str]:
    evaluation = report.evaluation
    scores, intervals = evaluation.scores, evaluation.intervals
    yield f"# {_plain(report.title)}"
    yield _plain(story.measured(evaluation))
    rows = [
        ("mean IoU", scores.mean_iou, intervals and intervals.mean_iou),
        ("pixel accuracy", scores.pixel_accuracy, intervals and intervals.pixel_accuracy),
    ]
    rows += [("mean Dice", scores.mean_dice, None)]
    if evaluation.boundaries:
        rows += [
            ("mean boundary IoU", evaluation.boundaries.mean_boundary_iou, None),
            ("mean boundary F", evaluation.boundaries.mean_boundary_f, None),
        ]
    yield _table(("score", "%", "95 % interval"), [(name, number(value), span(interval or None)) for name, value, interval in rows])
    yield from filter(None, (story.interval_words(evaluation),))
    yield from _list("Before you trust these numbers", report.caveats)
    yield from _list("Likely causes of low scores", [_cause(cause) for cause in report.causes])
    yield "## Classes"
    yield _classes(report)
    yield from _list("Worst confusions", story.worst_confusions(evaluation.counts, report.table.names))
    if evaluation.sizes:
        yield "## Errors by size"
        yield story.size_words(evaluation.sizes)
        sizes = [
            (size.size, story.size_bound(size.up_to), f"{size.num_regions:,}", number(size.found), number(size.recall))
            for size in evaluation.sizes.overall
        ]
        yield _table(("size", "area", "regions", "found, %", "pixels found, %"), sizes)
    yield from _list("Errors by position", [story.place_words(evaluation)] if evaluation.places is not None else [])
    yield from _list("Calibration", story.calibration_words(report))
    yield from _list("Objects", story.objects_words(evaluation))
    if len(evaluation.images) > 1:
        yield from _list(
            "Images with the lowest IoU",
            [story.spread_words(evaluation), *(f"{percent(value)}: {name}" for name, value in story.weakest(evaluation))],
        )
    yield from _list("How to reproduce this", [f"{key}: {value}" for key, value in {"Model": evaluation.model, **report.facts}.items()])
    if report.commands:
        yield "```sh\n" + "\n".join(f"{command.text}   # {command.does}" for command in report.commands) + "\n```"


def _classes(report: Report) -> str:
    evaluation = report.evaluation
    count = len(evaluation.scores.classes)
    spans = evaluation.intervals.classes if evaluation.intervals else (None,) * count
    edges = evaluation.boundaries.classes if evaluation.boundaries else (None,) * count
    head = [
        "class",
        "IoU",
        "95 % interval",
        "Dice",
        "precision",
        "recall",
        *(("boundary IoU", "boundary F", "thin recall") if evaluation.boundaries else ()),
        "pixels",
    ]
    rows = []
    for entry, interval, edge in zip(evaluation.scores.classes, spans, edges, strict=True):
        if entry.pixels:
            values = [entry.dice, entry.precision, entry.recall, *((edge.boundary_iou, edge.boundary_f, edge.thin_recall) if edge else ())]
            rows.append((entry.name, number(entry.iou), span(interval), *(number(value) for value in values), f"{entry.pixels:,}"))
    return "Scores are in percent.\n\n" + _table(head, rows)


def _cause(cause: Cause) -> str:
    return f"{sentence(cause.message)} {sentence(cause.evidence)} What to do: {sentence(cause.remedy)}"


def _list(heading: str, entries: Sequence[str]) -> Iterator[str]:
    if entries:
        yield f"## {heading}"
        yield "\n".join(f"- {_plain(entry)}" for entry in entries)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, [":--", *("--:" for _ in head[1:])], *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))
